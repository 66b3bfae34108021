"""A replacement for the base's own VAE: a folder, a hub id, a whole pipeline, or a single file."""

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from sd_lora.errors import UsageError
from sd_lora.models.checkpoint_kinds import open_checkpoint
from sd_lora.models.diffusers_folder import part_config, read_part, without_warnings
from sd_lora.models.families import Family

_STANDARD: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def standard_config(family: Family) -> dict[str, Any]:
    """Return a family's VAE configuration: the same for all but for the scaling factor."""
    return _STANDARD | {"scaling_factor": family.vae_scaling}


def replacement_config(
    vae: str, base: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the configuration of a replacement VAE.

    vae: its folder, hub id, pipeline or file. A file has no configuration: it gets the base's, with
        the latent channels of its own tensors.
    base: configuration of the base's own VAE.
    options: `cache_dir`, `revision` and `variant` for the base.

    Raises:
        UsageError: not found, or not a VAE of this kind.
    """
    path = Path(vae).expanduser()
    if not path.is_file():
        return dict(part_config(AutoencoderKL, vae, _subfolder(vae), _cache_alone(options)))
    shapes = open_checkpoint(path).shapes
    first = next((shapes[key] for key in shapes if key.endswith("decoder.conv_in.weight")), ())
    if len(first) != 4:
        raise UsageError(f"{vae} is not a VAE: it has no decoder.conv_in of four dimensions")
    return dict(base) | {"latent_channels": first[1]}


def load_replacement(
    vae: str, config: Mapping[str, Any], options: Mapping[str, Any], dtype: torch.dtype
) -> AutoencoderKL:
    """Read a replacement VAE.

    vae, options: as in `replacement_config`.
    config: the result of `replacement_config`.
    dtype: of the weights.

    Raises:
        UsageError: not found, or weights are missing.
    """
    path = Path(vae).expanduser()
    if path.is_file():
        return _load_file(path, config, dtype)
    weights: dict[str, Any] = dict(_cache_alone(options)) | {"torch_dtype": dtype}
    weights |= {"output_loading_info": True, "subfolder": _subfolder(vae)}
    load = partial(AutoencoderKL.from_pretrained, vae, **weights)
    try:  # with the base's variant, if this repository has it too
        return read_part("vae", vae, partial(load, variant=options["variant"]))
    except UsageError:
        if options["variant"] is None:
            raise
        return read_part("vae", vae, load)


def _cache_alone(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base's cache folder alone: its revision is of another repository."""
    return {"cache_dir": options["cache_dir"], "revision": None}


def _subfolder(vae: str) -> str:
    """Return "vae" for the folder of a whole pipeline, "" for the folder of a VAE."""
    return "vae" if (Path(vae).expanduser() / "model_index.json").is_file() else ""


def _load_file(path: Path, config: Mapping[str, Any], dtype: torch.dtype) -> AutoencoderKL:
    with tempfile.TemporaryDirectory() as folder, without_warnings():
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)))
        load = partial(AutoencoderKL.from_single_file, config=folder, torch_dtype=dtype)
        vae = read_part("vae", str(path), partial(load, str(path)))
    missing = [n for n, p in vae.named_parameters() if p.is_meta]
    if missing:
        raise UsageError(f"{path} lacks {len(missing)} weights of a VAE ({missing[0]}, …)")
    return vae
