"""OneTrainer's keys of the adapter: method, layers, ranks, text encoders."""

import math
import re
from typing import Any

from sd_lora.config.translate.rows import (
    Given,
    Row,
    Taken,
    absent,
    is_off,
    needless,
    number,
    otherwise,
    read_with,
    taking,
    truth,
    whole,
)

NOT_THERE = "is not there"
FAMILIES = {
    "stable_diffusion_15": "sd1",
    "stable_diffusion_20": "sd2",
    "stable_diffusion_20_base": "sd2",
    "stable_diffusion_21": "sd2",
    "stable_diffusion_21_base": "sd2",
    "stable_diffusion_xl_10_base": "sdxl",
    "stable_diffusion_15_inpainting": "sd1",
    "stable_diffusion_20_inpainting": "sd2",
    "stable_diffusion_xl_10_base_inpainting": "sdxl",
}
"""Model type → family."""


def _targets(value: Any, given: Given) -> Taken:
    names = {"attn-mlp": "transformer", "attn-only": "attention", "full": "all"}
    preset, own = str(value).lower(), str(given.get("layer_filter") or "")
    if preset in names:
        return Taken("same", {"targets": names[preset]})
    if is_off(own):
        return Taken("otherwise", {"targets": "all"}, "has no filter")
    if not is_off(given.get("layer_filter_regex")):
        return Taken("otherwise", {"targets": own}, "is a pattern over whole names here")
    words = "|".join(re.escape(word.strip()) for word in own.split(",") if word.strip())
    return Taken("otherwise", {"targets": f".*({words}).*"}, "is a pattern over whole names here")


def _rank(value: Any, given: Given) -> Taken:
    if str(given.get("peft_type")).upper() == "LOKR" and not is_off(given.get("lokr_dim")):
        return Taken("needless", reason="counts for nothing: lokr_dim is LoKr's")
    return Taken("same", {"rank": value})


def _of_lokr(option: str) -> Row:
    def take(value: Any, given: Given) -> Taken:
        if str(given.get("peft_type")).upper() != "LOKR" or is_off(value) or value == -1:
            return Taken("needless", reason="is off, or LoKr's")
        return Taken("same", {option: value})

    return Row(f"--{option}", "", take)


def _method(value: Any, given: Given) -> Taken:
    word = str(value).lower()
    if word in ("lora", "loha", "lokr"):
        return Taken("same", {"method": word})
    if word in ("oft_2", "oft"):
        reason = "turns the outputs of a layer here, its inputs there"
        return Taken("otherwise", {"method": "oft"}, reason)
    return Taken("absent", reason=f"{NOT_THERE}: LoRA is written instead")


def _is_oft(given: Given) -> bool:
    return str(given.get("peft_type")).upper().startswith("OFT")


def _oft_block_size(value: Any, given: Given) -> Taken:
    if not _is_oft(given) or is_off(value):
        return Taken("needless", reason="belongs to OFT")
    return Taken("same", {"oft_block_size": value})


def _oft_scaled(value: Any, given: Given) -> Taken:
    if not _is_oft(given) or truth(value):
        return Taken("needless", reason="is always so here, or belongs to OFT")
    size = max(2, number(given.get("oft_block_size") or 32))
    further = 2 * math.sqrt(size - 1)
    reason = f"is always so here: without it, a rate turns {further:.3g} times as far"
    return Taken("absent", reason=reason)


def _oft_block_share(value: Any, given: Given) -> Taken:
    if not _is_oft(given) or is_off(value):
        return Taken("needless", reason="is off, or belongs to OFT")
    return Taken("absent", reason="is not there: each block has a rotation of its own")


def _dropout(value: Any, given: Given) -> Taken:
    if is_off(value):
        return Taken("needless", reason="is off")
    dora = not is_off(given.get("lora_decompose"))
    name = "lora_dropout" if dora else "neuron_dropout"
    return Taken("otherwise" if dora else "same", {name: value}, "is of the input with DoRA" * dora)


def encoder_rank(second: bool) -> Row:
    """The switch of one text encoder; together they are train_text_encoder and a rank of 0."""

    def take(value: Any, given: Given) -> Taken:
        sdxl = FAMILIES.get(str(given.get("model_type")).lower()) == "sdxl"
        trained = truth(value)
        if second and not sdxl:
            return Taken("needless", reason="belongs to SDXL")
        other = given.get("text_encoder.train" if second else "text_encoder_2.train", True)
        other = sdxl and truth(other)
        if trained:
            return Taken("otherwise", {"train_text_encoder": True}, "is one switch for both")
        name = "text_encoder_2_rank" if second else "text_encoder_rank"
        if not other:
            return Taken("needless", reason="is the default here: the UNet alone")
        found: dict[str, Any] = {name: 0}
        if not second:  # the second one's rank is the first one's if it is not given
            rank = given.get("lora_rank", 16)
            found["text_encoder_2_rank"] = whole(rank)
        return Taken("otherwise", found, "is a rank of 0: the other encoder learns alone")

    return Row("--train_text_encoder", "", take)


NETWORK: dict[str, Row] = {
    "peft_type": taking("--method", "", _method),
    "layer_filter_preset": taking("--targets", "", _targets),
    "layer_filter": read_with("layer_filter_preset", "--targets"),
    "layer_filter_regex": read_with("layer_filter_preset", "--targets"),
    "lora_rank": taking("--rank", "", _rank),
    "lora_decompose": otherwise(
        "use_dora", "has a magnitude per output; per input there unless "
        "lora_decompose_output_axis", truth),
    "lora_decompose_output_axis": needless("is always so here"),
    "lora_decompose_norm_epsilon": needless("is always so here"),
    "lora_weight_dtype": absent("is float32 always", idle=("FLOAT_32",)),
    "bundle_additional_embeddings": needless("is not there: words have files of their own"),
    "dropout_probability": taking("--neuron_dropout", "", _dropout),
    "lokr_dim": _of_lokr("rank"),
    "lokr_decompose_factor": _of_lokr("lokr_factor"),
    "lokr_decompose_both": _of_lokr("lokr_decompose_both"),
    "lokr_full_matrix": _of_lokr("lokr_full_matrix"),
    "lokr_use_tucker": _of_lokr("use_tucker"),
    "lokr_weight_decompose": _of_lokr("use_dora"),
    "lokr_dora_on_output": needless("is always so here"),
    "lokr_vec_trick": needless("is a way of computing there"),
    "oft_block_size": taking("--oft_block_size", "", _oft_block_size),
    "oft_scaled": taking("", "is always so here", _oft_scaled),
    "oft_block_share": taking("", "is not there", _oft_block_share),
    "text_encoder.train": encoder_rank(False),
    "text_encoder_2.train": encoder_rank(True),
}  # fmt: skip
"""Key → row."""
