"""Flags of diffusers' scripts that are no options here."""

_NOT_YET = "is not supported yet"
_IF = "belongs to DeepFloyd IF, which is not trained here"
_PRODIGY = f"belongs to Prodigy, which {_NOT_YET}"
_STEPS = "is a part of the epochs in the advanced scripts; here it is a number of steps: give"

REFUSED: dict[str, str] = {
    "class_labels_conditioning": _IF,
    "debug_loss": f"{_NOT_YET}; training_log.jsonl holds each step's loss",
    "enable_npu_flash_attention": f"{_NOT_YET}: no such device was at hand to prove it on",
    "enable_xformers_memory_efficient_attention": (
        "is not needed: PyTorch's own memory-efficient attention is always used; leave it out"
    ),
    "hub_model_id": f"{_NOT_YET}; upload the files by hand",
    "hub_token": f"{_NOT_YET}; log in with `hf auth login`",
    "optimizer": f"{_NOT_YET}: AdamW is used; leave it out",
    "output_kohya_format": (
        "is not needed: kohya's file is always written where it can be exact; leave it out"
    ),
    "prodigy_beta3": _PRODIGY,
    "prodigy_decouple": _PRODIGY,
    "prodigy_safeguard_warmup": _PRODIGY,
    "prodigy_use_bias_correction": _PRODIGY,
    "push_to_hub": f"{_NOT_YET}; upload the files by hand",
    "text_encoder_use_attention_mask": _IF,
    "tokenizer_max_length": "has another meaning here: --max_token_length, a multiple of 75",
    "validation_images": "belongs to DeepFloyd IF's upscaler, which is not trained here",
    # of the advanced scripts
    "lora_unet_blocks": "is --targets here: regular expressions over the UNet's modules",
    "train_text_encoder_frac": f"{_STEPS} --text_encoder_stop_step",
    "train_text_encoder_ti": "is not needed: give the new words with --token_abstraction",
    "train_text_encoder_ti_frac": f"{_STEPS} --embedding_stop_step",
    "use_blora": "is --targets here: the two blocks of B-LoRA are up_blocks.0.attentions.0 and .1",
}
"""Flags of diffusers' scripts that are refused by name, with the reason."""

WITHOUT_EFFECT = {
    "pre_compute_text_embeddings": "text embeddings are always computed once unless they learn",
}
"""Flags of diffusers' scripts that are accepted and change nothing."""

BESIDE_OPTIONS: dict[str, str] = {
    "ABCD": "enable_xformers_memory_efficient_attention hub_model_id hub_token push_to_hub",
    "B": "debug_loss enable_npu_flash_attention",
    "C": "class_labels_conditioning pre_compute_text_embeddings text_encoder_use_attention_mask "
    "tokenizer_max_length validation_images",
    "D": "optimizer output_kohya_format prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup "
    "prodigy_use_bias_correction",
}
"""Scripts, as letters → their flags that are refused or without effect; the others are in the
rows."""
