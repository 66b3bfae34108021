"""Loading a model's parts from a diffusers folder or a hub id, each part once."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from sd_lora.errors import UsageError
from sd_lora.models.families import Family, refuse_other_pipelines, trainable_family
from sd_lora.models.skeleton import Skeleton, without_bars

_PART_FILES = {
    "scheduler": ("scheduler_config.json",),
    "text_encoder": ("config.json",),
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "unet": ("config.json",),
    "vae": ("config.json",),
}


@dataclass
class Parts:
    """The parts of a Stable Diffusion 1.x or 2.x model, on the CPU, in evaluation mode, frozen."""

    family: Family
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels a latent spans on a side: 8 for the published models."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def skeleton(self) -> Skeleton:
        """The modules that a LoRA of this model is made for."""
        models = {"unet": self.unet, "text_encoder": self.text_encoder}
        return Skeleton.of_models(models, self.family)


def _check_folder(path: Path) -> None:
    """Raises UsageError naming what a local diffusers folder lacks."""
    index = path / "model_index.json"
    if not index.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        single = [p.name for p in path.glob("*.safetensors")]
        hint = f"; for a single checkpoint such as {single[0]}" if single else "; for a checkpoint"
        raise UsageError(
            f"{path} is no diffusers folder: it has no model_index.json (found {found}){hint}, "
            "convert it first with diffusers' from_single_file(…).save_pretrained(…)"
        )
    try:
        class_name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{index} is not a pipeline's index: {error}") from None
    refuse_other_pipelines(str(class_name))
    for part, names in _PART_FILES.items():
        if not any((path / part / name).is_file() for name in names):
            raise UsageError(f"{path} lacks {part}/{names[0]}: the model folder is incomplete")


def _check_path(name: str) -> None:
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
    elif path.is_file():
        raise UsageError(
            f"{name} is a file; today a model is a diffusers folder or a hub id. Convert it with "
            "diffusers' StableDiffusionPipeline.from_single_file(…).save_pretrained(…)"
        )
    elif name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name:
        raise UsageError(f"model {name} does not exist: there is no such folder")


def _load(what: str, name: str, load: Callable[[], Any]) -> Any:
    """Runs one from_pretrained, turning its failure into an error that names the part.

    Loaders report weights that the files lack and go on with random ones; here that is an error.
    """
    try:
        with without_bars():
            loaded = load()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        where = " (no folder here; as a hub id neither cached nor reachable, or without this part)"
        where = "" if Path(name).is_dir() else where
        raise UsageError(f"the {what} of {name}{where} could not be loaded: {reason}") from None
    if not isinstance(loaded, tuple):
        return loaded
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"the {what} of {name} lacks {len(missing)} of its weights ({missing[0]}, …): the "
            "files are incomplete or of another model"
        )
    return model


def _check_tokenizer(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, name: str) -> None:
    """Raises UsageError for a tokenizer that cannot be this text encoder's.

    transformers 5 builds an empty one, without a word, where the vocabulary's file is missing; a
    CLIP vocabulary has at least 256 symbols, as many word ends, and two special tokens.
    """
    size, known = len(tokenizer), text_encoder.config.vocab_size
    if not 514 <= size <= known:
        raise UsageError(
            f"the tokenizer of {name} has {size} tokens and the text encoder knows {known}: its "
            "files are missing, broken, or of another model"
        )


def load_parts(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    tokenizer_name: str | None = None,
) -> Parts:
    """Loads a model's parts in float32.

    Args:
        name: a diffusers folder, or a hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5".
        revision, variant, cache_dir: as in diffusers' `from_pretrained`.
        tokenizer_name: another tokenizer's folder or hub id.

    Raises:
        UsageError: what is missing or broken, or a model of a family that cannot be trained.
    """
    _check_path(name)
    hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    weights = hub | {
        "variant": variant,
        "torch_dtype": torch.float32,
        "output_loading_info": True,
    }

    def part(cls: Any, folder: str, **options: Any) -> Any:
        return _load(folder, name, partial(cls.from_pretrained, name, subfolder=folder, **options))

    # the configuration first: a wrong family is told before gigabytes are read
    read_config = partial(UNet2DConditionModel.load_config, name, subfolder="unet", **hub)
    config = _load("unet", name, read_config)
    if not isinstance(config, dict):
        raise UsageError(f"the configuration of the unet of {name} is not a table of settings")
    family = trainable_family(config)
    scheduler = part(DDPMScheduler, "scheduler", **hub)
    if tokenizer_name:
        load = partial(CLIPTokenizer.from_pretrained, tokenizer_name, **hub)
        tokenizer = _load("tokenizer", tokenizer_name, load)
    else:
        tokenizer = part(CLIPTokenizer, "tokenizer", **hub)
    parts = Parts(
        family=family,
        tokenizer=tokenizer,
        text_encoder=part(CLIPTextModel, "text_encoder", **weights),
        vae=part(AutoencoderKL, "vae", **weights),
        unet=part(UNet2DConditionModel, "unet", **weights),
        scheduler=scheduler,
    )
    _check_tokenizer(tokenizer, parts.text_encoder, tokenizer_name or name)
    limit = parts.text_encoder.config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    for model in (parts.text_encoder, parts.vae, parts.unet):
        model.requires_grad_(False).eval()
    return parts
