"""The family of a LoRA file: by its tensors, and only where they leave it open, by its header."""

import re
from collections.abc import Mapping

from sd_lora.errors import UsageError
from sd_lora.formats.canonical import Modules
from sd_lora.formats.lora_file import LoRAFile
from sd_lora.models.families import FAMILIES, SHORT_PREDICTIONS, Family, family_named

_TEXT_WIDTHS = {768: None, 1024: "sd2", 1280: "sdxl"}  # CLIP-L is in SD1 and in SDXL


def family_by_tensors(lora: LoRAFile) -> tuple[Family, str] | None:
    """The family of a file by its tensors, with the tensor that shows it; None if none does."""
    unet = lora.adapter.get("unet", {})
    attending = (n for n in unet if re.search(r"\.attn2\.to_[kv]$", n) and len(_shape(unet, n)) > 1)
    name = next(attending, None)
    width = unet[name].shape[1] if name else None  # 0 of OFT, which has outputs alone
    known = next((f for f in FAMILIES.values() if f.cross_attention_dim == width), None)
    if "text_encoder_2" in lora.adapter and (known is None or not known.is_xl):
        # the refiner's too; few train that one without its UNet
        shared = ", as the refiner's" if _is_second_alone(lora) else ""
        return FAMILIES["sdxl"], f"it has a second text encoder{shared}"
    if known:
        return known, f"its cross-attention is {width} wide"
    for name in unet:
        if name.startswith("add_embedding") or re.search(r"transformer_blocks\.[1-9]", name):
            return FAMILIES["sdxl"], f"it has {name}"
    text = lora.adapter.get("text_encoder", {})
    for name in text:
        if name.endswith("_proj") and len(_shape(text, name)) > 1:
            width = text[name].shape[1]
            by_text = _TEXT_WIDTHS.get(width)
            if by_text:
                return FAMILIES[by_text], f"its text encoder is {width} wide"
            four_levels = any(re.match(r"(up|down)_blocks\.3|down_blocks\.0\.att", n) for n in unet)
            if width == 768 and four_levels:
                return FAMILIES["sd1"], "its text encoder is 768 wide, its UNet of four levels"
            break
    return None


def _shape(modules: Modules, name: str) -> tuple[int, ...]:
    """The shape of a delta; () of one that cannot be made, which is reported elsewhere."""
    try:
        return modules[name].shape
    except UsageError:
        return ()


def known_family(lora: LoRAFile) -> tuple[Family, str] | None:
    """The family of a file with the reason: by its tensors, and where these leave a choice, by its
    header; None if neither says it.
    """
    by_tensors, by_header = family_by_tensors(lora), family_by_header(lora.header)
    if by_tensors is None:
        return (by_header, "its header says so") if by_header else None
    if by_header and by_header is not by_tensors[0] and _is_second_alone(lora):
        if "text_encoder_2" in by_header.components:
            return by_header, "its header says so, and the tensors fit SDXL's second encoder too"
    return by_tensors


def _is_second_alone(lora: LoRAFile) -> bool:
    """Whether nothing but a second text encoder is adapted, which SDXL and its refiner share."""
    return set(lora.adapter) == {"text_encoder_2"}


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
    if given is not None:
        family, by_tensors = family_named(given), family_by_tensors(lora)
        shared = _is_second_alone(lora) and "text_encoder_2" in family.components
        if by_tensors and by_tensors[0] is not family and not shared:
            raise UsageError(
                f"{lora.path} is for {by_tensors[0].label} ({by_tensors[1]}), not {family.label}"
            )
        return family
    found = known_family(lora)
    if found is None:
        raise UsageError(
            f"neither the tensors nor the header of {lora.path} say which family it is for: give "
            f"--model, or --family {', '.join(FAMILIES)}"
        )
    return found[0]
