"""The family of a LoRA file: by its tensors, and only where they leave it open, by its header."""

import re
from collections.abc import Mapping

from sd_lora.errors import UsageError
from sd_lora.formats.lora_file import LoRAFile
from sd_lora.models.families import FAMILIES, SHORT_PREDICTIONS, Family, family_named

_TEXT_WIDTHS = {768: None, 1024: "sd2", 1280: "sdxl"}  # CLIP-L is in SD1 and in SDXL


def family_by_tensors(lora: LoRAFile) -> tuple[Family, str] | None:
    """The family of a file by its tensors, with the tensor that shows it; None if none does."""
    unet = lora.adapter.get("unet", {})
    attending = (n for n in unet if re.search(r"\.attn2\.to_[kv]$", n) and len(unet[n].shape) > 1)
    name = next(attending, None)
    width = unet[name].shape[1] if name else None
    known = next((f for f in FAMILIES.values() if f.cross_attention_dim == width), None)
    if "text_encoder_2" in lora.adapter and (known is None or not known.is_xl):
        # the refiner's too; few train that one without its UNet
        return FAMILIES["sdxl"], "it has a second text encoder"
    if known:
        return known, f"its cross-attention is {width} wide"
    for name in unet:
        if name.startswith("add_embedding") or re.search(r"transformer_blocks\.[1-9]", name):
            return FAMILIES["sdxl"], f"it has {name}"
    text = lora.adapter.get("text_encoder", {})
    for name in text:
        if name.endswith("_proj") and len(text[name].shape) > 1:
            width = text[name].shape[1]
            by_text = _TEXT_WIDTHS.get(width)
            if by_text:
                return FAMILIES[by_text], f"its text encoder is {width} wide"
            four_levels = any(re.match(r"(up|down)_blocks\.3|down_blocks\.0\.att", n) for n in unet)
            if width == 768 and four_levels:
                return FAMILIES["sd1"], "its text encoder is 768 wide, its UNet of four levels"
            break
    return None


def family_by_header(header: Mapping[str, str]) -> Family | None:
    """The family named in a header, by kohya's and Stability's keys."""
    version = header.get("ss_base_model_version", "")
    for family in FAMILIES.values():
        if version in family.base_versions.values():
            return family
    architecture = header.get("modelspec.architecture", "").removesuffix("/lora")
    for family in FAMILIES.values():
        if architecture in family.architectures.values():
            return family
    return None


def prediction_type(header: Mapping[str, str], family: Family) -> str | None:
    """A key of `SHORT_PREDICTIONS` by a header; tensors do not show it. Without one:
    `usual_prediction`.
    """
    version = header.get("ss_base_model_version", "")
    said = header.get("modelspec.prediction_type")
    if said == "v" or version in ("sd_v1_v", "sd_v2_v"):
        return "v_prediction"
    known = {short: kind for kind, short in SHORT_PREDICTIONS.items()}
    return known.get(said or "", usual_prediction(family))


def usual_prediction(family: Family) -> str | None:
    """ "epsilon" for SD1 and SDXL, as nearly all of them; None for SD2, published in both kinds."""
    return None if family.name == "sd2" else "epsilon"


def family_of(lora: LoRAFile, given: str | None = None) -> Family:
    """The family of a file: as given, by its tensors, or else by its header.

    Raises:
        UsageError: an unknown family, or a given one that contradicts the tensors.
    """
    by_tensors = family_by_tensors(lora)
    if given is not None:
        family = family_named(given)
        if by_tensors and by_tensors[0] is not family:
            raise UsageError(
                f"{lora.path} is for {by_tensors[0].label} ({by_tensors[1]}), not {family.label}"
            )
        return family
    family_found = by_tensors[0] if by_tensors else family_by_header(lora.header)
    if family_found is None:
        raise UsageError(
            f"neither the tensors nor the header of {lora.path} say which family it is for: give "
            f"--model, or --family {', '.join(FAMILIES)}"
        )
    return family_found
