"""OneTrainer's keys that are more, less or otherwise than one option here.

Keys of its configuration, with dots for inner tables: `unet.gradient_checkpointing`. Read in its
TrainConfig and ConceptConfig, version 11. What is not said is its default there.
"""

import re
from typing import Any

from sd_lora.config.translate.kohya import own_rate
from sd_lora.config.translate.prompts import of_list
from sd_lora.config.translate.rows import (
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
    switch,
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
}
"""Model type → family."""

SCHEDULERS = {
    "constant": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
    "cosine_with_hard_restarts": "cosine_with_restarts",
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


def _family(value: Any, given: Given) -> Taken:
    family = FAMILIES.get(str(value).lower())
    if family is None:
        raise other_model("model_type", value)
    return Taken("otherwise", {"family": family}, "is read from the model, and compared")


def _method(value: Any, given: Given) -> Taken:
    if str(value).upper() != "LORA":
        raise other_model("training_method", value)
    return Taken("needless", reason="is always so here")


def _targets(value: Any, given: Given) -> Taken:
    names = {"attn-mlp": "transformer", "attn-only": "attention", "full": "all"}
    preset, own = str(value).lower(), str(given.get("layer_filter") or "")
    if preset in names:
        return Taken("otherwise", {"targets": names[preset]}, "is called so here")
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
    if 0 < steps <= 1:
        return Taken("absent", reason="is a part of the run; give a number of steps")
    count = max(0, round(steps / whole(given.get("gradient_accumulation_steps") or 1)))
    kind: Kind = "same" if count == steps else "otherwise"
    return Taken(kind, {"lr_warmup_steps": count}, "counts optimiser steps, not micro-batches")


def _optimizer(value: Any, given: Given) -> Taken:
    word = str(value).upper()
    if word == "ADAMW":
        return Taken("needless", reason="is the optimiser here")
    if word == "ADAMW_8BIT":
        return Taken("otherwise", {"use_8bit_adam": True}, "is AdamW's 8-bit form")
    reason = f"{NOT_THERE}: AdamW is used; mind the learning rate, theirs is for another optimiser"
    return Taken("absent", reason=reason)


def _resolution(value: Any, given: Given) -> Taken:
    sides = [part.strip() for part in re.split(r"[,x]", str(value)) if part.strip()]
    numbers = sorted({whole(side) for side in sides})
    if not numbers:
        return Taken("needless", reason="is not given")
    kind: Kind = "same" if len(numbers) == 1 else "otherwise"
    return Taken(kind, {"resolution": numbers[-1]}, "is the largest of them: a run has one here")


def _strength(option: str) -> Row:
    def take(value: Any, given: Given) -> Taken:
        timestep = round(1000 * number(value))
        if timestep in (0, 1000):
            return Taken("needless", reason="is the default")
        return Taken("otherwise", {option: timestep}, "is a timestep, 1000 times as large")

    return Row(f"--{option}, times 1000", "is a timestep here", take)


def _snr(value: Any, given: Given) -> Taken:
    word = str(value).upper()
    if word == "CONSTANT":
        return Taken("needless", reason="is the default")
    if word != "MIN_SNR_GAMMA":
        return Taken("absent", reason=f"{NOT_THERE}: min-SNR is, --snr_gamma")
    gamma = given.get("loss_weight_strength", 5)
    return Taken("otherwise", {"snr_gamma": gamma}, "is on if a gamma is given")


def _zero_snr(value: Any, given: Given) -> Taken:
    if is_off(value):
        return Taken("needless", reason="is off")
    found = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    return Taken("otherwise", found, "is two options")


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


def concept_table(concept: dict[str, Any]) -> dict[str, Any]:
    """A `[[sources]]` table of a concept."""
    text, image = concept.get("text") or {}, concept.get("image") or {}
    table: dict[str, Any] = {"path": str(concept.get("path", ""))}
    if is_off(concept.get("include_subdirectories")):
        table["recursive"] = False
    repeats = number(concept.get("balancing", concept.get("repeats", 1)) or 1)
    if repeats >= 2 and str(concept.get("balancing_strategy", "REPEATS")).upper() == "REPEATS":
        table["repeats"] = round(repeats)
    if number(concept.get("loss_weight", 1)) != 1:
        table["weight"] = number(concept["loss_weight"])
    if str(concept.get("type", "STANDARD")).upper() == "PRIOR_PREDICTION":
        table["kind"] = "class"
    captions = {"sample": "sidecar", "filename": "filename"}
    source = str(text.get("prompt_source", "sample")).lower()
    if source in captions:
        table["captions"] = captions[source]
        table |= {"wildcards": True} if source == "sample" else {}  # one of several lines
    if truth(text.get("enable_tag_shuffling", False)):
        table |= {"shuffle_caption": True, "keep_tokens": whole(text.get("keep_tags_count", 1))}
        table |= {"caption_separator": text["tag_delimiter"]} if text.get("tag_delimiter") else {}
    if truth(text.get("tag_dropout_enable", False)):
        table["caption_tag_dropout"] = number(text.get("tag_dropout_probability", 0))
    if truth(image.get("enable_random_flip", False)):
        table["random_flip"] = True
    return table


CHANGES = {
    *(f"enable_{how}_{name}" for how in ("random", "fixed")
      for name in ("rotate", "brightness", "contrast", "saturation", "hue")),
    "enable_fixed_flip", "enable_resolution_override", "enable_random_circular_mask_shrink",
    "enable_random_mask_rotate_crop",
}  # fmt: skip
"""Keys of a concept's image that change it, and are not there."""


def concept_losses(concept: dict[str, Any]) -> list[str]:
    """Settings of a concept that are not there."""
    text, image = concept.get("text") or {}, concept.get("image") or {}
    found = [f"image.{key}" for key, value in image.items() if key in CHANGES and not is_off(value)]
    if image.get("enable_crop_jitter", True):
        found.append("image.enable_crop_jitter (random_crop = true cuts anywhere, without a cache)")
    if str(text.get("prompt_source", "sample")).lower() == "concept":
        found.append("text.prompt_source concept (prompt says one caption)")
    mode = str(text.get("tag_dropout_mode", "FULL")).upper()
    if truth(text.get("tag_dropout_enable", False)) and mode != "RANDOM":
        found.append(f"text.tag_dropout_mode {mode} (each tag is dropped by itself)")
    found += [f"text.{key}" for key in ("caps_randomize_enable",) if not is_off(text.get(key))]
    if str(concept.get("balancing_strategy", "REPEATS")).upper() == "SAMPLES":
        found.append("balancing_strategy SAMPLES (repeats count uses of each image)")
    return found


def _concepts(value: Any, given: Given) -> Taken:
    rows = [row for row in value or [] if isinstance(row, dict) and row.get("enabled", True)]
    left_out = [r for r in rows if str(r.get("type", "")).upper() == "VALIDATION"]
    rows = [row for row in rows if row not in left_out]
    if not rows:
        return Taken("absent", reason="has no concept to train; give --train_data_dir")
    losses = sorted({loss for row in rows for loss in concept_losses(row)})
    losses += [f"validation concept {row.get('path')}" for row in left_out]
    reason = "is [[sources]]" + (f"; not there: {', '.join(losses)}" if losses else "")
    return Taken("otherwise", {"sources": [concept_table(row) for row in rows]}, reason)


def _concept_file(value: Any, given: Given) -> Taken:
    if given.get("concepts"):
        return Taken("needless", reason="counts for nothing: concepts are given")
    rows = _rows_of(str(value), given)
    if rows is None:
        return Taken("absent", reason="is a file that cannot be read here; give --train_data_dir")
    return _concepts(rows, given)


def _sample_file(value: Any, given: Given) -> Taken:
    if given.get("samples"):
        return Taken("needless", reason="counts for nothing: samples are given")
    rows = _rows_of(str(value), given)
    if rows is None:
        reason = "is a file that cannot be read here; give --validation_prompt"
        return Taken("absent", reason=reason)
    return of_list([row for row in rows if row.get("enabled", True)])


def _rows_of(path: str, given: Given) -> list[dict[str, Any]] | None:
    """The tables in a JSON list; None if there is no such file."""
    rows = given.load(path)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else None


def _embeddings(value: Any, given: Given) -> Taken:
    rows = [row for row in value or [] if isinstance(row, dict) and row.get("train", True)]
    if not rows:
        return Taken("needless", reason="is empty")
    counts = {whole(row.get("token_count") or 1) for row in rows}
    found: dict[str, Any] = {
        "token_abstraction": ",".join(str(row.get("placeholder", "<embedding>")) for row in rows),
        "num_new_tokens_per_abstraction": max(counts),
        "initializer_token": ",".join(str(r.get("initial_embedding_text", "*")) for r in rows),
    }
    return Taken("otherwise", found, "is files of their own, with one count of vectors for all")


_SCALE = "is not there: --scale_lr multiplies by the batch, theirs by its root; write the rate"
_PARTS = ("prior", "transformer", "unconditional_transformer", "text_encoder_3", "text_encoder_4",
          "effnet_encoder", "decoder", "decoder_text_encoder", "decoder_vqgan", "cloud", "secrets",
          "quantization", "optimizer_defaults", "embedding")  # fmt: skip
OTHER_PARTS = needless("belongs to other models or to the program")
"""The row of tables that are not read."""

ONETRAINER: dict[str, Row] = {
    "training_method": taking("", "", _method),
    "model_type": taking("--family", "", _family),
    "output_model_format": needless("is diffusers' and kohya's file here, both"),
    "output_model_destination": taking("--output_dir", "", _destination),
    "output_dtype": among("save_precision", FILE_PRECISIONS, "is called so", "is fp32, fp16, bf16"),
    "concepts": taking("--train_data_dir, or [[sources]] of a file", "", _concepts),
    "concept_file_name": taking("--train_data_dir, or [[sources]] of a file", "", _concept_file),
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
    "learning_rate_min_factor": absent(NOT_THERE),
    "learning_rate_scaler": absent(_SCALE, idle=("NONE",)),
    "custom_learning_rate_scheduler": absent(NOT_THERE),
    "scheduler_params": absent(NOT_THERE),
    "optimizer.optimizer": taking("AdamW, or --use_8bit_adam", "", _optimizer),
    "optimizer.beta1": otherwise("adam_beta1", "is AdamW's", number),
    "optimizer.beta2": otherwise("adam_beta2", "is AdamW's", number),
    "optimizer.eps": otherwise("adam_epsilon", "is AdamW's", number),
    "clip_grad_norm": Row("--max_grad_norm", "", lambda value, given: Taken(
        "same", {"max_grad_norm": value or 0})),
    "resolution": taking("--resolution", "is one number here", _resolution),
    "train_dtype": taking("--mixed_precision", "", _precision),
    "dataloader_threads": needless("is not needed: latents are cached"),
    "peft_type": among(
        "method", {"lora": "lora", "loha": "loha", "lokr": "lokr"}, "is called so here",
        f"{NOT_THERE}: LoRA is written instead"),
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
    "lora_model_name": absent("is not there: every run starts from the base"),
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
    **dict.fromkeys(("oft_block_size", "oft_block_share", "oft_scaled"), needless(
        "belongs to OFT")),
    "unet.train": Row("", "", lambda value, given: Taken(
        "needless", reason="is always so here") if truth(value) else Taken(
        "absent", reason="is not there: the UNet is always trained")),
    **dict.fromkeys(("unet.stop_training_after", "unet.stop_training_after_unit"), needless(
        "is not needed: the UNet learns to the end")),
    "text_encoder.train": encoder_rank(False),
    "text_encoder_2.train": encoder_rank(True),
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
       for part in ("unet", "text_encoder", "text_encoder_2") for key in ("weight_dtype",)},
    **{f"{part}.gradient_checkpointing": read_with("unet.gradient_checkpointing")
       for part in ("text_encoder", "text_encoder_2", "vae")},
    **{f"{part}.{key}": absent(NOT_THERE, idle=(1, 1.0))
       for part in ("unet", "text_encoder", "text_encoder_2", "vae")
       for key in ("offload_fraction", "activation_offloading", "attention_mask", "guidance_scale",
                   "include", "model_name") if (part, key) != ("vae", "model_name")},
    "weight_dtype": needless("is not needed: mixed_precision says it"),
    "vae.weight_dtype": among(
        "vae_precision", FILE_PRECISIONS, "is called so", "is fp32, fp16 or bf16"),
    "masked_training": absent("is not there for mask files; --alpha_mask has the images' own"),
    **dict.fromkeys(("unmasked_probability", "unmasked_weight", "normalize_masked_area_loss",
        "masked_prior_preservation_weight"), needless("belongs to masked_training")),
    "additional_embeddings": taking("--token_abstraction", "", _embeddings),
    "preserve_embedding_norm": absent(NOT_THERE),
    "embedding_weight_dtype": absent("is float32 always", idle=("FLOAT_32",)),
    "offset_noise_weight": otherwise("noise_offset", "is called so", number),
    "generalized_offset_noise": absent(NOT_THERE),
    "perturbation_noise_weight": absent(NOT_THERE),
    "rescale_noise_scheduler_to_zero_terminal_snr": taking(
        "--prediction_type v_prediction --rescale_betas_zero_snr", "", _zero_snr),
    "force_v_prediction": switch(
        "--prediction_type", "is a type of prediction", prediction_type="v_prediction"),
    "force_epsilon_prediction": switch(
        "--prediction_type", "is a type of prediction", prediction_type="epsilon"),
    "min_noising_strength": _strength("min_timestep"),
    "max_noising_strength": _strength("max_timestep"),
    "timestep_distribution": absent("is uniform always", idle=("UNIFORM",)),
    **dict.fromkeys(("noising_weight", "noising_bias", "dynamic_timestep_shifting"), absent(
        NOT_THERE)),
    "timestep_shift": absent(NOT_THERE, idle=(1, 1.0)),
    "loss_weight_fn": taking("--snr_gamma", "", _snr),
    "loss_weight_strength": read_with("loss_weight_fn", "--snr_gamma"),
    "mse_strength": absent("is 1 always", idle=(1, 1.0)),
    **dict.fromkeys(("mae_strength", "log_cosh_strength", "huber_strength"), absent(
        "is not there: the loss is the squared error")),
    **dict.fromkeys(("huber_delta", "vb_loss_strength", "frames", "ema_decay",
        "ema_update_step_interval", "non_ema_sampling", "text_encoder_2_sequence_length",
        "text_encoder_sequence_length", "text_encoder_3_layer_skip",
        "text_encoder_4_layer_skip"), needless("belongs to a setting that is off or not there")),
    "loss_scaler": absent("is not there: each image's weight is its source's", idle=("NONE",)),
    "ema": absent(NOT_THERE, idle=("OFF",)),
    "validation": absent(NOT_THERE),
    **dict.fromkeys(("validate_after", "validate_after_unit"), needless("belongs to validation")),
    "custom_conditioning_image": absent(NOT_THERE),
    "force_circular_padding": absent(NOT_THERE),
    "compile": absent(NOT_THERE),
    "samples": taking("--validation_prompt", "", lambda value, given: of_list(
        [row for row in value or [] if not isinstance(row, dict) or row.get("enabled", True)])),
    "sample_definition_file_name": taking("--validation_prompt", "", _sample_file),
    "sample_after": Row("--validation_epochs, in epochs", "", lambda value, given: Taken(
        "same", {"validation_epochs": value})
        if str(given.get("sample_after_unit")).upper() == "EPOCH" and not is_off(value)
        else Taken("absent", reason="is in epochs here: --validation_epochs")),
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
        "--resume_from_checkpoint latest", "is a checkpoint's name",
        resume_from_checkpoint="latest"),
    "save_every": absent("is not there: the LoRA is written at the end"),
    **dict.fromkeys(("save_every_unit", "save_skip_first", "save_filename_prefix"), needless(
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
    """Settings with dots for inner tables; lists stay, tables of other models are left out."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key in _PARTS:
            continue
        if isinstance(value, dict):
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
    if FAMILIES.get(str(given.get("model_type")).lower()) == "sdxl":
        found["text_encoder_2.train"] = True
    return {name: value for name, value in found.items() if name not in given}
