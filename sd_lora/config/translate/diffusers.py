"""Flags of diffusers' scripts that are no options here.

Of the four scripts of `command_line.SCRIPTS`, and of the advanced DreamBooth scripts. A flag that
asks for what happens anyway is needless: it is taken, with a note.
"""

from typing import Any

from sd_lora.config.translate.rows import (
    Given,
    Row,
    Taken,
    absent,
    is_off,
    needless,
    switch,
    taking,
)

_NOT_YET = "is not supported yet"
_IF = "belongs to DeepFloyd IF, which is not trained here"
_PRODIGY = "is an argument of Prodigy here: --optimizer_args"
_STEPS = "is a part of the epochs in the advanced scripts; here it is a number of steps: give"


def _new_words(value: Any, given: Given) -> Taken:
    if not is_off(given.get("token_abstraction")):
        return Taken("needless", reason="is what token_abstraction asks for")
    return Taken("absent", reason="needs the new words here: --token_abstraction '<monster>'")


_CACHED = "is not needed: text embeddings are always computed once unless they learn"


def _pre_compute(value: Any, given: Given) -> Taken:
    if not is_off(given.get("train_text_encoder")):
        return Taken("absent", reason="contradicts train_text_encoder")
    return Taken("needless", reason=_CACHED)


DIFFUSERS: dict[str, Row] = {
    "class_labels_conditioning": absent(_IF),
    "debug_loss": absent(f"{_NOT_YET}; training_log.jsonl holds each step's loss"),
    "enable_npu_flash_attention": absent(f"{_NOT_YET}: no such device was at hand to prove it on"),
    "enable_xformers_memory_efficient_attention": needless(
        "is not needed: PyTorch's own memory-efficient attention is always used"
    ),
    "output_kohya_format": needless(
        "is not needed: kohya's file is always written where it can be exact"
    ),
    "pre_compute_text_embeddings": taking("", _CACHED, _pre_compute),
    "prodigy_beta3": absent(f"{_PRODIGY} beta3=…"),
    "prodigy_decouple": absent(f"{_PRODIGY} decouple=false", idle=("True", True)),
    "prodigy_safeguard_warmup": absent(f"{_PRODIGY} safeguard_warmup=false", idle=("True", True)),
    "prodigy_use_bias_correction": absent(
        f"{_PRODIGY} use_bias_correction=false", idle=("True", True)
    ),
    "text_encoder_use_attention_mask": absent(_IF),
    "tokenizer_max_length": absent(
        "has another meaning here: --max_token_length, a multiple of 75", idle=(77, "77")
    ),
    "use_8bit_adam": switch(
        "--optimizer adamw8bit", "is optimizer adamw8bit now", optimizer="adamw8bit"
    ),
    "validation_images": absent("belongs to DeepFloyd IF's upscaler, which is not trained here"),
    # of the advanced scripts
    "lora_unet_blocks": absent("is --targets here: regular expressions over the UNet's modules"),
    "train_text_encoder_frac": absent(f"{_STEPS} --text_encoder_stop_step", idle=("1.0", "1")),
    "train_text_encoder_ti": taking(
        "", "is not needed: give the new words with --token_abstraction", _new_words
    ),
    "train_text_encoder_ti_frac": absent(f"{_STEPS} --embedding_stop_step"),
    "use_blora": switch(
        "--targets blora_content+blora_style",
        "is a preset of targets",
        targets="blora_content+blora_style",
    ),
}
"""Flag → row."""

SWITCHES = frozenset(
    "class_labels_conditioning debug_loss enable_npu_flash_attention "
    "enable_xformers_memory_efficient_attention output_kohya_format pre_compute_text_embeddings "
    "text_encoder_use_attention_mask train_text_encoder_ti use_8bit_adam use_blora".split()
)
"""Flags among them that stand without a value."""

BESIDE_OPTIONS: dict[str, str] = {
    "ABCD": "enable_xformers_memory_efficient_attention use_8bit_adam",
    "B": "debug_loss enable_npu_flash_attention",
    "C": "class_labels_conditioning pre_compute_text_embeddings text_encoder_use_attention_mask "
    "tokenizer_max_length validation_images",
    "D": "output_kohya_format prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup "
    "prodigy_use_bias_correction",
}
"""Scripts, as letters → their flags of this table; the others are in the options' rows."""
