"""Another VAE than the base's own: a folder, a hub id, a pipeline's, or a single file."""

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from sd_lora.errors import UsageError
from sd_lora.models.families import Family
from sd_lora.models.folder import part_config, quiet, read_part
from sd_lora.models.recognise import TensorsOfFile

_STANDARD: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def standard_config(family: Family) -> dict[str, Any]:
    """Returns the configuration that the VAEs of all families share, but for their scaling."""
    return _STANDARD | {"scaling_factor": family.vae_scaling}


def other_config(vae: str, base: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of another VAE; a single file's is that of the base's own, with
    the latent channels that the file has.

    Raises:
        UsageError: none there, or no VAE of this kind.
    """
    path = Path(vae).expanduser()
    if not path.is_file():
        return dict(part_config(AutoencoderKL, vae, _subfolder(vae), _of_another(options)))
    shapes = TensorsOfFile(path).shapes
    first = next((shapes[key] for key in shapes if key.endswith("decoder.conv_in.weight")), ())
    if len(first) != 4:
        raise UsageError(f"{vae} is no VAE: it has no decoder.conv_in of four dimensions")
    return dict(base) | {"latent_channels": first[1]}


def load_other(
    vae: str, config: Mapping[str, Any], options: Mapping[str, Any], dtype: torch.dtype
) -> AutoencoderKL:
    """Reads another VAE; `config` is that of `other_config`. Raises UsageError: what is missing."""
    path = Path(vae).expanduser()
    if path.is_file():
        return _of_file(path, config, dtype)
    weights: dict[str, Any] = dict(_of_another(options)) | {"torch_dtype": dtype}
    weights |= {"output_loading_info": True, "subfolder": _subfolder(vae)}
    load = partial(AutoencoderKL.from_pretrained, vae, **weights)
    try:  # the base's variant, where this one has it too
        return read_part("vae", vae, partial(load, variant=options["variant"]))
    except UsageError:
        if options["variant"] is None:
            raise
        return read_part("vae", vae, load)


def _of_another(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the base's options that are for another repository too: its cache, no revision."""
    return {"cache_dir": options["cache_dir"], "revision": None}


def _subfolder(vae: str) -> str:
    """Returns the subfolder of a VAE: a whole pipeline may be given for it, too."""
    return "vae" if (Path(vae).expanduser() / "model_index.json").is_file() else ""


def _of_file(path: Path, config: Mapping[str, Any], dtype: torch.dtype) -> AutoencoderKL:
    with tempfile.TemporaryDirectory() as folder, quiet():
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)))
        load = partial(AutoencoderKL.from_single_file, config=folder, torch_dtype=dtype)
        vae = read_part("vae", str(path), partial(load, str(path)))
    missing = [n for n, p in vae.named_parameters() if p.is_meta]
    if missing:
        raise UsageError(f"{path} lacks {len(missing)} weights of a VAE ({missing[0]}, …)")
    return vae
