"""Kinds of checkpoint files, told from the names and shapes of their tensors."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from diffusers.loaders.single_file_utils import infer_diffusers_model_type

from sd_lora.errors import UsageError
from sd_lora.files import PARSER_ERRORS, PICKLES, Shape
from sd_lora.models.checkpoint_file import CheckpointFile

UNET, VAE = "model.diffusion_model.", "first_stage_model."
SD2_TEXT, SDXL_TEXT_2 = "cond_stage_model.model.", "conditioner.embedders.1.model."
REFINER_TEXT = "conditioner.embedders.0.model."
OPEN_CLIP = (SD2_TEXT, SDXL_TEXT_2, REFINER_TEXT)
"""Beginnings of keys in OpenCLIP's names."""

PREFIXES = {
    "unet": (UNET,),
    "vae": (VAE,),
    "text_encoder": (
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        SD2_TEXT,
    ),
    "text_encoder_2": (SDXL_TEXT_2, REFINER_TEXT),
}
"""Part → possible beginnings of its keys."""

CONV_IN_KEY = f"{UNET}input_blocks.0.0.weight"
PROJ_IN_KEY = f"{UNET}middle_block.1.proj_in.weight"
TEXT_WIDTH_KEY = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
LABEL_KEY = f"{UNET}label_emb.0.0.weight"

# Labels of other models: by diffusers' names for them; by ends of keys, in sizes unknown to
# diffusers; by starts of keys; by modules inside a UNet of our families; by its input channels.
_DIFFUSERS_TYPES = {
    "sd35": "Stable Diffusion 3.5",
    "sd3": "Stable Diffusion 3",
    "flux-": "Flux",
    "stable_cascade": "Stable Cascade",
    "animatediff": "an AnimateDiff motion module",
    "controlnet": "a ControlNet",
}
_PIXART_KEYS = {"blocks.0.mlp.fc1.weight", "blocks.0.cross_attn.kv_linear.weight"}
_KEY_ENDS = {
    "adaln_single.linear.weight": "PixArt",
    "clip_txt_mapper.weight": "Stable Cascade",
    "channelwise.0.weight": "Stable Cascade",
    "joint_blocks.0.x_block.mlp.fc1.weight": "Stable Diffusion 3",
    "img_attn.norm.key_norm.scale": "Flux",
    "temporal_transformer.norm.weight": "an AnimateDiff motion module",
    "input_hint_block.0.weight": "a ControlNet",
}
_KEY_STARTS = {
    (UNET,): f"incomplete: its UNet has no {CONV_IN_KEY}",
    (VAE, "encoder.conv_in.", "decoder.conv_in."): "a VAE alone",
    ("cond_stage_model.", "conditioner.", "text_model.", "transformer.res"): "a text encoder alone",
    ("input_blocks.", "diffusion_model.", "conv_in."): "a UNet alone, without a checkpoint's names",
}
_UNET_MODULES = {
    "control_model.": "a ControlNet",
    "time_stack.": "Stable Video Diffusion",
    "motion_modules.": "an AnimateDiff model",
    f"{UNET}label_emb.weight": "an upscaler",
}
_INPUT_CHANNELS = {5: "a depth", 7: "an upscaling", 8: "an InstructPix2Pix"}


def open_checkpoint(path: Path) -> CheckpointFile:
    """Open a checkpoint; raise UsageError for another file name, and as `CheckpointFile` does."""
    if os.path.isfile(path) and path.suffix not in (".safetensors", *PICKLES):
        ends = ", ".join((".safetensors", *PICKLES))
        raise UsageError(f"{path} is no checkpoint by its name, which must end in one of {ends}")
    return CheckpointFile(path)


def name_other_model(shapes: Mapping[str, Shape]) -> str | None:
    """Return the name of a model other than SD1, SD2 and SDXL; None for one of these.

    shapes: key → shape of every tensor of the file.
    """
    if len(shapes.get(CONV_IN_KEY, ())) == 4:
        channels, width = shapes[CONV_IN_KEY][1], shapes.get(TEXT_WIDTH_KEY, (0,))[-1]
        inside = next(
            (v for k, v in _UNET_MODULES.items() if any(k in key for key in shapes)), None
        )
        if inside or channels not in (4, 9):
            return (
                inside
                or f"{_INPUT_CHANNELS.get(channels, 'a')} model with {channels} input channels"
            )
        return "Stable Diffusion 2.1 unCLIP" if LABEL_KEY in shapes and width == 1024 else None
    if any(re.match(r"(.*\.)?(lora_|lycoris_|hada_w|lokr_w)", key) for key in shapes):
        return "a LoRA file, not a model: give the model that it was trained on"
    both = {key.removeprefix(UNET): shape for key, shape in shapes.items()} | dict(shapes)
    if both.keys() >= _PIXART_KEYS:  # diffusers takes it for Sana
        return "PixArt"
    try:
        objects = {key: SimpleNamespace(shape=shape) for key, shape in both.items()}
        kind = infer_diffusers_model_type(objects)
    except PARSER_ERRORS:
        kind = "v1"  # diffusers' answer for anything unknown
    if kind != "v1":
        known = (label for start, label in _DIFFUSERS_TYPES.items() if kind.startswith(start))
        return next(known, f"a model of another kind ({kind})")
    ends = (label for end, label in _KEY_ENDS.items() if any(key.endswith(end) for key in both))
    starts = (
        label for start, label in _KEY_STARTS.items() if any(k.startswith(start) for k in shapes)
    )
    first = next(iter(shapes), None)
    return next(ends, None) or next(starts, f"no model known here (its first tensor: {first!r})")
