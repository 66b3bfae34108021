"""Names by which other programs know a base's modules, as far as files can have them.

A name here is a key without its ending: `lora_unet_input_blocks_1_1_proj_in`, `unet.conv_in`.
"""

import re
from collections.abc import Set

from sd_lora.formats import diffusers
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.original_names import Layout, unet_to_original

Place = tuple[str, str]
"""Component and canonical name of a delta."""

_ATTENTION = re.compile(r"\.attn\d\.to_(q|k|v|out\.0)$")
_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(mlp\.fc[12]|self_attn\.(q|k|v|out)_proj)")


def is_attention(name: str) -> bool:
    """Whether a UNet's module is a projection of an attention."""
    return bool(_ATTENTION.search(name))


_FLAT = re.compile(r"(?:lora_(?:unet|te\d?)|lycoris)_")


def stem_of(key: str) -> str:
    """A key without its ending."""
    if _FLAT.match(key):
        return key.partition(".")[0]
    return diffusers.stem_of(key)


def is_original(stems: Set[str]) -> bool:
    """Whether kohya's names are of the original code's blocks."""
    return any(re.match(r"lora_unet_(input_blocks|middle_block|output_blocks)", s) for s in stems)


def is_of_diffusers(stems: Set[str]) -> bool:
    """Whether kohya's names are of diffusers' blocks."""
    return any(re.match(r"lora_unet_(down_blocks|mid_block|up_blocks)", stem) for stem in stems)


def is_open_clip(base: MetaPipeline, component: str) -> bool:
    """Whether A1111 has a text encoder in OpenCLIP's modules: SD2's, and SDXL's second."""
    return component == "text_encoder_2" or base.family.name == "sd2"


def _clip(base: MetaPipeline, component: str) -> str:
    """ComfyUI's name of a text encoder."""
    if component == "text_encoder_2":
        return "clip_g"
    return "clip_h" if base.family.name == "sd2" else "clip_l"


def _unet(base: MetaPipeline, name: str) -> set[str]:
    """ComfyUI's names of a UNet's module: the original one, and diffusers' with the word
    `processor` in attention.
    """
    original = unet_to_original(name, base.layout)
    if original is None:
        return set()
    flat, processor = name.replace(".", "_"), name.replace(".to_", ".processor.to_")
    if processor.endswith(".to_out.0"):
        processor = processor[:-2]
    names = {f"lora_unet_{original.replace('.', '_')}", f"diffusion_model.{original}"}
    return names | {f"lora_unet_{flat}", f"lycoris_{flat}", processor, f"unet.{processor}"}


def forge(base: MetaPipeline, component: str, name: str) -> set[str]:
    """Forge's names of a module, by the delta's name."""
    name = name.removesuffix(".bias")
    if component == "unet":
        return _unet(base, name)
    alone = "text_encoder" not in base.configs  # the refiner's
    clip = _clip(base, component)
    if name == "text_projection":
        projections = {"text_encoder.text_projection", "lora_te2_text_projection"}
        return projections if clip == "clip_g" else {"lora_te1_text_projection"}
    if not _LAYER.fullmatch(name):
        return set()
    flat = name.replace(".", "_")
    if clip == "clip_g" and not alone:
        return {f"lora_te2_{flat}", f"text_encoder_2.{name}"}
    first = f"lora_prior_te_{flat}" if alone else f"lora_te1_{flat}"
    return {f"lora_te_{flat}", first, f"text_encoder.{name}"}


def comfyui(base: MetaPipeline, component: str, name: str) -> set[str]:
    """ComfyUI's names of a module, by the delta's name."""
    names = forge(base, component, name)
    if component == "unet":
        original = unet_to_original(name.removesuffix(".bias"), base.layout)
        return names | ({f"diffusion_model.{original}.bias"} if name.endswith(".bias") else set())
    names -= {"text_encoder.text_projection"}
    weight = name.removesuffix(".bias")
    return names | {f"text_encoders.{_clip(base, component)}.transformer.{weight}"}


_NO_RULE = ("add_embedding.", "conv_norm_out")
"""Beginnings of diffusers' names that A1111 does not translate."""


def a1111(base: MetaPipeline, component: str, name: str) -> set[str]:
    """A1111's names of a module, by the delta's name.

    It translates diffusers' names by the positions of SD1's blocks.
    """
    name = name.removesuffix(".bias")
    flat = name.replace(".", "_")
    if component == "unet":
        original = unet_to_original(name, base.layout)
        if original is None:
            return set()
        names = {f"lora_unet_{original.replace('.', '_')}"}
        if unet_to_original(name, Layout()) == original and not name.startswith(_NO_RULE):
            names.add(f"lora_unet_{flat}")
        return names
    if not name.startswith("text_model.encoder.layers."):
        return set()
    if is_open_clip(base, component):
        if not _LAYER.fullmatch(name):
            return set()
        if component == "text_encoder_2":
            return set() if "text_encoder" not in base.configs else {f"lora_te2_{flat}"}
        return {f"lora_te_{flat}"}
    return {f"lora_te1_{flat}"} | ({f"lora_te_{flat}"} if base.family.name == "sd1" else set())
