"""OneTrainer's keys that are more, less or otherwise than one option here.

Keys of its configuration, with dots for inner tables: `unet.gradient_checkpointing`. Read in its
TrainConfig and ConceptConfig, version 11. A key that is not given has its default there.
"""

import re
from typing import Any

from sd_lora.config.optimizers import called_elsewhere, optimizer_facts
from sd_lora.config.translate.onetrainer_data import concept_file, concepts, embeddings, sample_file
from sd_lora.config.translate.onetrainer_network import FAMILIES, NETWORK
from sd_lora.config.translate.onetrainer_objective import NOT_THERE, OBJECTIVE
from sd_lora.config.translate.prompts import of_list
from sd_lora.config.translate.rates import argument, arguments, optimizer, own_rate
from sd_lora.config.translate.rows import (
    COMPILE,
    Given,
    Kind,
    Row,
    Taken,
    absent,
    among,
    is_off,
    needless,
    number,
    other_model,
    otherwise,
    read_with,
    stored_in,
    switch,
    taking,
    truth,
    whole,
)

SCHEDULERS = {
    "constant": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
    "cosine_with_hard_restarts": "cosine_with_restarts",
    "rex": "rex",
}
PRECISIONS = {"float_16": "fp16", "bfloat_16": "bf16", "float_32": "no", "tfloat_32": "no"}
FILE_PRECISIONS = {"float_16": "fp16", "bfloat_16": "bf16", "float_32": "fp32"}


def unit_steps(name: str, option: str, reason: str) -> Row:
    """A count with a unit of its own, taken if the unit is steps."""

    def take(value: Any, given: Given) -> Taken:
        unit = str(given.get(f"{name}_unit") or "").upper()
        if is_off(value) or unit == "NEVER":
            return Taken("needless", reason="is off")
        if unit != "STEP":
            return Taken("absent", reason=f"counts {unit.lower() or 'time'}s; {reason}")
        return Taken("same", {option: value})

    return Row(f"--{option}, in steps", f"counts epochs or minutes; {reason}", take)


def _save_every(value: Any, given: Given) -> Taken:
    unit = str(given.get("save_every_unit") or "").upper()
    names = {"STEP": "save_lora_every", "EPOCH": "save_lora_every_epochs"}
    if is_off(value) or unit == "NEVER":
        return Taken("needless", reason="is off")
    if unit not in names:
        return Taken("absent", reason=f"counts {unit.lower() or 'time'}s; steps or epochs here")
    return Taken("same", {names[unit]: value})


def _family(value: Any, given: Given) -> Taken:
    family = FAMILIES.get(str(value).lower())
    if family is None:
        raise other_model("model_type", value)
    reason = "is read from the model, and compared"
    if "inpainting" in str(value).lower():
        reason += "; masks of the part to fill are drawn, and not read from files"
    return Taken("otherwise", {"family": family}, reason)


def _method(value: Any, given: Given) -> Taken:
    if str(value).upper() != "LORA":
        raise other_model("training_method", value)
    return Taken("needless", reason="is always so here")


def _encoder_part(name: str, row: Row) -> Row:
    """A setting of a text encoder that counts only if that encoder is trained."""
    part = name.partition(".")[0]

    def take(value: Any, given: Given) -> Taken:
        trained = given.get(f"{part}.train", True)
        if is_off(value) or is_off(trained):
            return Taken("needless", reason="belongs to a text encoder that is not trained")
        return row.take(value, given)

    return Row(row.here, row.reason, take)


def _rate(option: str) -> Row:
    return Row(f"--{option}", "", lambda value, given: own_rate(
        value, given.get("optimizer.optimizer"), option))  # fmt: skip


def _learning_rate(value: Any, given: Given) -> Taken:
    if not is_off(given.get("unet.learning_rate")):
        return Taken("needless", reason="counts for nothing: unet.learning_rate is given")
    return own_rate(value, given.get("optimizer.optimizer"))


def _unet_rate(value: Any, given: Given) -> Taken:
    if is_off(value):
        return Taken("needless", reason="is not given")
    return own_rate(value, given.get("optimizer.optimizer"))


def _scheduler(value: Any, given: Given) -> Taken:
    word = str(value).lower()
    if word not in SCHEDULERS:
        return Taken("absent", reason=f"{NOT_THERE}: constant is used")
    if word == "constant" and not is_off(given.get("learning_rate_warmup_steps")):
        found = {"lr_scheduler": "constant_with_warmup"}
        return Taken("otherwise", found, "has a warm-up there")
    return Taken("same", {"lr_scheduler": SCHEDULERS[word]})


def _warmup(value: Any, given: Given) -> Taken:
    steps = number(value)
    if steps == 1:
        return Taken("absent", reason="is the whole run; give --lr_warmup_steps")
    if 0 < steps < 1:
        return Taken("same", {"lr_warmup_steps": steps})
    count = max(0, round(steps / whole(given.get("gradient_accumulation_steps") or 1)))
    kind: Kind = "same" if count == steps else "otherwise"
    return Taken(kind, {"lr_warmup_steps": count}, "counts optimiser steps, not micro-batches")


def _ema(value: Any, given: Given) -> Taken:
    if is_off(value) or str(value).upper() == "OFF":
        return Taken("needless", reason="is off")
    decay, every = number(given.get("ema_decay") or 0.999), given.get("ema_update_step_interval")
    each = round(decay ** (1 / whole(every or 5)), 8)  # taken in every so many steps there
    return Taken("otherwise", {"use_ema": True, "ema_decay": each}, "is updated in each step")


def _resolution(value: Any, given: Given) -> Taken:
    sides = [part.strip() for part in re.split(r"[,x]", str(value)) if part.strip()]
    numbers = sorted({whole(side) for side in sides})
    if not numbers:
        return Taken("needless", reason="is not given")
    if len(numbers) == 1:
        return Taken("same", {"resolution": numbers[0]})
    reason = "are all used in each epoch; there one is drawn for each image"
    return Taken("otherwise", {"resolutions": numbers}, reason)


def _precision(value: Any, given: Given) -> Taken:
    word = str(value).lower()
    if word not in PRECISIONS:
        return Taken("absent", reason="is fp16, bf16 or float32 here")
    found: dict[str, Any] = {"mixed_precision": PRECISIONS[word]}
    found |= {"allow_tf32": True} if word == "tfloat_32" else {}
    return Taken("otherwise", found, "is the frozen base's; the LoRA is float32")


def _destination(value: Any, given: Given) -> Taken:
    path = str(value)
    folder = re.sub(r"\.(safetensors|ckpt|pt)$", "", path)
    kind: Kind = "same" if folder == path else "otherwise"
    return Taken(kind, {"output_dir": folder}, "is a folder: two files and the log are in it")


def _beta(index: int) -> Row:
    """A beta: one of two options with AdamW and its variants, of one argument with others."""
    option = ("adam_beta1", "adam_beta2")[index]

    def take(value: Any, given: Given) -> Taken:
        ours = called_elsewhere(str(given.get("optimizer.optimizer") or "ADAMW")) or ""
        if is_off(value) and value != 0:
            return Taken("needless", reason="is not given")
        if "betas" not in optimizer_facts(ours, None).args:
            return Taken("otherwise", {option: number(value)}, "is that of AdamW and its variants")
        pair = [given.get(f"optimizer.beta{n}") for n in (1, 2, 3)]
        numbers = [number(beta) for beta in pair if beta is not None]
        return Taken("otherwise", {"optimizer_args": {"betas": numbers}}, "is an argument: betas")

    return taking(f"--{option}", "", take)


_SCALE = "is not there: --scale_lr multiplies by the batch, theirs by its root; write the rate"
_PARTS = ("prior", "transformer", "unconditional_transformer", "text_encoder_3", "text_encoder_4",
          "effnet_encoder", "decoder", "decoder_text_encoder", "decoder_vqgan", "cloud", "secrets",
          "quantization", "optimizer_defaults", "embedding")  # fmt: skip
PREFIXES = {"optimizer.": needless("belongs to other optimisers, or is a way of computing")}
"""Beginning of a key → row."""


def _sample_after(value: Any, given: Given) -> Taken:
    option = {"EPOCH": "validation_epochs", "STEP": "sample_every"}
    unit = str(given.get("sample_after_unit")).upper()
    if is_off(value) or unit == "NEVER":
        return Taken("needless", reason="is off")
    if unit not in option:
        return Taken("absent", reason="is in steps or epochs here: --sample_every")
    return Taken("same", {option[unit]: value})


_UNET_OFFLOADS = {("unet", "offload_fraction"), ("unet", "activation_offloading")}

ONETRAINER: dict[str, Row] = NETWORK | OBJECTIVE | {
    **dict.fromkeys(_PARTS, needless("belongs to other models or to the program")),
    "training_method": taking("", "", _method),
    "model_type": taking("--family", "", _family),
    "output_model_format": needless("is diffusers' and kohya's file here, both"),
    "output_model_destination": taking("--output_dir", "", _destination),
    "output_dtype": among("save_precision", FILE_PRECISIONS, "", "is fp32, fp16 or bf16 here"),
    "concepts": taking("--train_data_dir, or [[sources]] of a file", "", concepts),
    "concept_file_name": taking("--train_data_dir, or [[sources]] of a file", "", concept_file),
    "latent_caching": Row("--cache_latents", "", lambda value, given: Taken(
        "needless", reason="is always so here") if truth(value) else Taken(
        "otherwise", {"cache_latents": "no"}, "is a place of the cache")),
    "clear_cache_before_training": needless("is not needed: the cache goes by content"),
    "learning_rate": taking("--learning_rate", "", _learning_rate),
    "unet.learning_rate": taking("--learning_rate", "", _unet_rate),
    "text_encoder.learning_rate": _encoder_part("text_encoder.x", _rate("text_encoder_lr")),
    "text_encoder_2.learning_rate": _encoder_part("text_encoder_2.x", _rate("text_encoder_2_lr")),
    "learning_rate_scheduler": taking("--lr_scheduler", "", _scheduler),
    "learning_rate_warmup_steps": taking("--lr_warmup_steps", "", _warmup),
    "learning_rate_cycles": otherwise(
        "lr_num_cycles", "is restarts of cosine_with_restarts", lambda v: max(1, round(number(v)))),
    "learning_rate_scaler": absent(_SCALE, idle=("NONE",)),
    "custom_learning_rate_scheduler": absent(NOT_THERE),
    "scheduler_params": absent(NOT_THERE),
    "optimizer.optimizer": optimizer("onetrainer"),
    "optimizer.beta1": _beta(0),
    "optimizer.beta2": _beta(1),
    "optimizer.eps": argument("eps", "optimizer.optimizer", "adam_epsilon"),
    **arguments("optimizer.optimizer", "optimizer."),
    "clip_grad_norm": Row("--max_grad_norm", "", lambda value, given: Taken(
        "same", {"max_grad_norm": value or 0})),
    "resolution": taking("--resolution or --resolutions", "", _resolution),
    "train_dtype": taking("--mixed_precision", "", _precision),
    "dataloader_threads": needless("is not needed: latents are cached"),
    "unet.train": Row("", "", lambda value, given: Taken(
        "needless", reason="is always so here") if truth(value) else Taken(
        "absent", reason="is not there: the UNet is always trained")),
    **dict.fromkeys(("unet.stop_training_after", "unet.stop_training_after_unit"), needless(
        "is not needed: the UNet learns to the end")),
    "text_encoder.stop_training_after": _encoder_part("text_encoder.x", unit_steps(
        "text_encoder.stop_training_after", "text_encoder_stop_step",
        "--text_encoder_stop_step is in steps")),
    "text_encoder_2.stop_training_after": _encoder_part("text_encoder_2.x", unit_steps(
        "text_encoder_2.stop_training_after", "text_encoder_2_stop_step",
        "--text_encoder_2_stop_step is in steps")),
    "text_encoder.dropout_probability": otherwise(
        "caption_dropout", "is one for both encoders; zeros for SDXL, the empty prompt for SD 1"),
    "text_encoder_2.dropout_probability": read_with("text_encoder.dropout_probability"),
    "text_encoder_2_layer_skip": read_with("text_encoder_layer_skip"),
    **{f"{part}.train_embedding": needless("is always so here")
       for part in ("text_encoder", "text_encoder_2")},
    **{f"{part}.stop_training_after_unit": read_with("stop_training_after")
       for part in ("text_encoder", "text_encoder_2")},
    **{f"{part}.{key}": needless("is not needed: mixed_precision says it")
       for part in ("text_encoder", "text_encoder_2") for key in ("weight_dtype",)},
    "unet.weight_dtype": stored_in(
        {"int_8": "int8", "float_8": "fp8", "nfloat_4": "nf4"},
        plain=("float_32", "float_16", "bfloat_16", "tfloat_32")),
    **{f"{part}.gradient_checkpointing": read_with("unet.gradient_checkpointing")
       for part in ("text_encoder", "text_encoder_2", "vae")},
    "unet.offload_fraction": switch(
        "--offload_weights", "is of no UNet there; here it is all blocks but two",
        offload_weights=True),
    "unet.activation_offloading": needless(
        "moves nothing of a UNet there; here --offload_activations does"),
    **{f"{part}.{key}": absent(NOT_THERE, idle=(1, 1.0))
       for part in ("unet", "text_encoder", "text_encoder_2", "vae")
       for key in ("offload_fraction", "activation_offloading", "attention_mask", "guidance_scale",
                   "include", "model_name")
       if (part, key) not in _UNET_OFFLOADS | {("vae", "model_name")}},
    "weight_dtype": needless("is not needed: mixed_precision says it"),
    "vae.weight_dtype": among(
        "vae_precision", FILE_PRECISIONS, "", "is fp32, fp16 or bf16 here"),
    "masked_training": switch(
        "--mask_files", "is the mean over the masked part, as with normalize_masked_area_loss",
        mask_files=True),
    **dict.fromkeys(("unmasked_probability", "normalize_masked_area_loss",
        "masked_prior_preservation_weight"), needless("belongs to masked_training")),
    "additional_embeddings": taking("--token_abstraction", "", embeddings),
    "preserve_embedding_norm": absent(NOT_THERE),
    "embedding_weight_dtype": absent("is float32 always", idle=("FLOAT_32",)),
    "offset_noise_weight": otherwise("noise_offset", "is called so", number),
    "generalized_offset_noise": absent(NOT_THERE),
    "perturbation_noise_weight": absent(
        "is to be predicted too there; --input_perturbation is in the input alone"),
    "force_v_prediction": switch(
        "--prediction_type", "is a type of prediction", prediction_type="v_prediction"),
    "force_epsilon_prediction": switch(
        "--prediction_type", "is a type of prediction", prediction_type="epsilon"),
    "dynamic_timestep_shifting": absent(NOT_THERE),
    "timestep_shift": otherwise("timestep_shift", "is called so", number),
    "loss_weight_strength": read_with("loss_weight_fn", "--snr_gamma"),
    "mse_strength": read_with("mae_strength", "--loss_type"),
    **dict.fromkeys(("log_cosh_strength", "huber_strength"), absent(
        "is not there as there: --loss_type huber and smooth_l1 are near it")),
    **dict.fromkeys(("huber_delta", "vb_loss_strength", "frames", "non_ema_sampling",
        "text_encoder_2_sequence_length", "text_encoder_sequence_length",
        "text_encoder_3_layer_skip", "text_encoder_4_layer_skip"),
        needless("belongs to a setting that is off or not there")),
    "loss_scaler": absent("is not there: each image's weight is its source's", idle=("NONE",)),
    "ema": taking("--use_ema", "", _ema),
    **dict.fromkeys(("ema_decay", "ema_update_step_interval"), read_with("ema", "--ema_decay")),
    "validation": absent(NOT_THERE),
    **dict.fromkeys(("validate_after", "validate_after_unit"), needless("belongs to validation")),
    "custom_conditioning_image": absent(NOT_THERE),
    "force_circular_padding": absent(NOT_THERE),
    "compile": COMPILE,
    "samples": taking("--sample_prompts", "", lambda value, given: of_list(
        [row for row in value or [] if not isinstance(row, dict) or row.get("enabled", True)])),
    "sample_definition_file_name": taking("--sample_prompts", "", sample_file),
    "sample_after": taking("--validation_epochs or --sample_every", "", _sample_after),
    "sample_after_unit": read_with("sample_after"),
    "backup_after": unit_steps(
        "backup_after", "checkpointing_steps", "--checkpointing_steps is in steps"),
    "backup_after_unit": read_with("backup_after"),
    "rolling_backup": read_with("rolling_backup_count"),
    "rolling_backup_count": Row("--checkpoints_total_limit", "", lambda value, given: Taken(
        "same", {"checkpoints_total_limit": value}) if not is_off(given.get("rolling_backup"))
        else Taken("needless", reason="belongs to rolling_backup, which is off")),
    "backup_before_save": needless("is not needed: a checkpoint is whole or not there"),
    "continue_last_backup": switch(
        "--resume_from_checkpoint latest-if-any", "is a checkpoint's name",
        resume_from_checkpoint="latest-if-any"),
    "save_every": taking(
        "--save_lora_every, in steps, and --save_lora_every_epochs", "", _save_every),
    "save_every_unit": read_with("save_every"),
    **dict.fromkeys(("save_skip_first", "save_filename_prefix"), needless(
        "belongs to save_every")),
    **dict.fromkeys(("debug_mode", "debug_dir", "workspace_dir", "huggingface_cache_dir",
        "offline_mode", "tensorboard", "tensorboard_expose", "tensorboard_always_on",
        "tensorboard_port", "prevent_overwrites", "include_train_config", "multi_gpu",
        "device_indexes", "gradient_reduce_precision", "fused_gradient_reduce",
        "async_gradient_reduce", "async_gradient_reduce_buffer", "async_offloading",
        "train_device", "temp_device", "fallback_train_dtype", "enable_autocast_cache",
        "only_cache", "attention_mechanism", "sample_skip_first", "sample_image_format",
        "sample_video_format", "sample_audio_format", "samples_to_tensorboard",
        "save_skip_first", "__version"), needless("is about the program itself")),
}  # fmt: skip
"""Key → row."""


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with dots for inner tables; lists and tables of other models stay."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and key not in _PARTS:
            found |= {f"{key}.{inner}": deep for inner, deep in value.items()}
        else:
            found[key] = value
    return found


def defaults(given: Given) -> dict[str, Any]:
    """OneTrainer's values where nothing is given, and those here are others."""
    found: dict[str, Any] = {
        "base_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "lora_rank": 16,
        "lora_alpha": 1.0,
        "layer_filter_preset": "full",
        "batch_size": 1,
        "epochs": 100,
        "learning_rate": 3e-6,
        "learning_rate_scheduler": "CONSTANT",
        "learning_rate_warmup_steps": 200,
        "resolution": "512",
        "train_dtype": "FLOAT_16",
        "unet.gradient_checkpointing": True,
        "text_encoder.train": True,
        "text_encoder.stop_training_after": 30,
        "text_encoder.stop_training_after_unit": "EPOCH",
    }
    if str(given.get("peft_type")).upper() == "OFT_2":
        found |= {"oft_block_size": 32, "oft_scaled": False}
    if FAMILIES.get(str(given.get("model_type")).lower()) == "sdxl":
        found["text_encoder_2.train"] = True
    return {name: value for name, value in found.items() if name not in given}
