"""SimpleTuner's arguments that are more, less or otherwise than one option here.

Of its config.json (or TOML, or command line) and of the `data_backend_config` that it names. Read
in its field registry; a key that is not given has its default there (rank 16, rate 4e-7,
dropout 0.1).
"""

import math
from typing import Any

from sd_lora.config.rows import SCHEDULES
from sd_lora.config.translate.kohya_network import ALGORITHMS, oft_size
from sd_lora.config.translate.rates import argument_text, optimizer, own_rate
from sd_lora.config.translate.rows import (
    Given,
    Row,
    Taken,
    absent,
    among,
    is_off,
    needless,
    number,
    of_push,
    other_model,
    otherwise,
    read_with,
    stored_in,
    switch,
    taking,
    truth,
    whole,
)

NOT_THERE = "is not there"
FAMILIES = {"sd1x": "sd1", "sd2x": "sd2", "sdxl": "sdxl"}
"""Model family → family."""

FLAVOURS = {
    ("sd1x", "1.5"): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ("sd1x", "1.4"): "CompVis/stable-diffusion-v1-4",
    ("sd1x", "dreamshaper"): "Lykon/dreamshaper-8",
    ("sd2x", "2.1"): "stabilityai/stable-diffusion-2-1",
    ("sd2x", "2.0"): "stabilityai/stable-diffusion-2-0",
    ("sdxl", "base-1.0"): "stabilityai/stable-diffusion-xl-base-1.0",
    ("sdxl", "base-0.9"): "stabilityai/stable-diffusion-xl-base-0.9",
}
"""Family and flavour → model of the hub."""


def _type(value: Any, given: Given) -> Taken:
    if str(value).lower() != "lora":
        raise other_model("model_type", value)
    return Taken("needless", reason="is always so here")


def _family(value: Any, given: Given) -> Taken:
    family = FAMILIES.get(str(value).lower())
    if family is None:
        raise other_model("model_family", value)
    return Taken("otherwise", {"family": family}, "is read from the model, and compared")


def _flavour(value: Any, given: Given) -> Taken:
    name = FLAVOURS.get((str(given.get("model_family")).lower(), str(value).lower()))
    if not is_off(given.get("pretrained_model_name_or_path")):
        return Taken("needless", reason="counts for nothing: the model's path is given")
    if name is None:
        return Taken("absent", reason="is not known; give --pretrained_model_name_or_path")
    found = {"pretrained_model_name_or_path": name}
    return Taken("otherwise", found, "is the name of a model on the hub")


def _lora_type(value: Any, given: Given) -> Taken:
    if str(value).lower() == "standard":
        return Taken("needless", reason="is method lora, as here without it")
    if str(value).lower() != "lycoris":
        return Taken("absent", reason=f"{NOT_THERE}: LoRA is written instead")
    return Taken("needless", reason="is read with lycoris_config")


def _is_lycoris(given: Given) -> bool:
    return str(given.get("lora_type")).lower() == "lycoris"


def _of_lora(option: str) -> Row:
    """An option of standard LoRA alone."""

    def take(value: Any, given: Given) -> Taken:
        if value is None or _is_lycoris(given):
            return Taken("needless", reason="is not given, or lycoris_config says it")
        return Taken("same", {option: value})

    return Row(f"--{option}", "", take)


def _lycoris(value: Any, given: Given) -> Taken:
    if not _is_lycoris(given):
        return Taken("needless", reason="belongs to lora_type lycoris")
    table = given.load(str(value))
    if not isinstance(table, dict):
        return Taken("absent", reason="is a file that cannot be read here; give --method, --rank")
    algorithm = str(table.get("algo", "lokr")).lower()
    found: dict[str, Any] = {"method": ALGORITHMS.get(algorithm, "lora")}
    dims = {"linear_dim": "rank", "linear_alpha": "lora_alpha", "conv_dim": "conv_rank"}
    dims |= {"conv_alpha": "conv_alpha"}
    found |= {ours: table[theirs] for theirs, ours in dims.items() if theirs in table}
    whole_matrix = algorithm == "lokr" and number(table.get("linear_dim", 0)) >= 10000
    if whole_matrix:  # a rank above every layer's: the second factor is whole
        found = {"method": "lokr", "lokr_full_matrix": True}
    size, rate = oft_size(table.get("linear_dim")) if algorithm == "diag-oft" else ({}, "")
    found |= size
    if algorithm == "lokr" and number(table.get("factor", -1)) >= 1:
        found["lokr_factor"] = table["factor"]
    preset = table.get("apply_preset") or {}
    modules = preset.get("target_module") or ["Attention"]
    conv = [name for name in modules if "Resnet" in name or "Conv" in name]
    attention = modules == ["Attention"]
    found["targets"] = "attention" if attention else "transformer+conv" if conv else "transformer"
    losses = [key for key in preset if key not in ("target_module", "module_algo_map")]
    losses += ["module_algo_map"] * (preset.get("module_algo_map") not in (None, {}))
    reason = f"is method {found['method']}{rate}" + (
        f"; not there: {', '.join(losses)}" if losses else ""
    )
    if algorithm not in ALGORITHMS:
        return Taken("absent", found, f"has algo {algorithm}, which is not there; LoRA is written")
    return Taken("otherwise", found, reason)


def _resolution(value: Any, given: Given) -> Taken:
    side, how = side_of(value, str(given.get("resolution_type") or "pixel_area"))
    return Taken("otherwise" if how else "same", {"resolution": side}, how)


def side_of(value: Any, kind: str) -> tuple[int, str]:
    """The side in pixels of a resolution, and its difference in words."""
    if kind == "area":
        side = round(math.sqrt(number(value) * 1_000_000) / 64) * 64
        return side, "is a side in pixels, of that many megapixels"
    how = "is the side of an area; the shorter side there" if kind == "pixel" else ""
    return whole(value), how


def _warmup(value: Any, given: Given) -> Taken:
    if str(given.get("lr_scheduler")) == "constant":
        return Taken("needless", reason="has no effect with constant")
    return Taken("same", {"lr_warmup_steps": value})


def _epochs(value: Any, given: Given) -> Taken:
    if is_off(value):
        return Taken("needless", reason="is off")
    if not is_off(given.get("max_train_steps")):
        return Taken("needless", reason="counts for nothing: max_train_steps is given")
    return Taken("same", {"num_train_epochs": value})


def _resume(value: Any, given: Given) -> Taken:
    if str(value) == "latest":
        reason = "is for a run that was stopped; a new one has nothing to resume"
        return Taken("needless", reason=reason)
    return Taken("same" if not is_off(value) else "needless",
                 {"resume_from_checkpoint": value} if not is_off(value) else {}, "")  # fmt: skip


def _rate(option: str) -> Row:
    def take(value: Any, given: Given) -> Taken:
        if is_off(value):
            return Taken("needless", reason="is not given")
        return own_rate(value, given.get("optimizer"), option)

    return Row(f"--{option}", "", take)


def _offset(value: Any, given: Given) -> Taken:
    if is_off(given.get("offset_noise")):
        return Taken("needless", reason="is off without offset_noise")
    reason = "is of every step; there of a quarter of them (noise_offset_probability)"
    return Taken("otherwise", {"noise_offset": value}, reason)


def _clip(value: Any, given: Given) -> Taken:
    if str(given.get("grad_clip_method", "value")) == "value":
        return Taken("absent", reason="is a bound on each value there; --max_grad_norm is a norm")
    return Taken("same", {"max_grad_norm": value})


def _backends(value: Any, given: Given) -> Taken:
    rows = value if isinstance(value, list) else given.load(str(value))
    if not isinstance(rows, list):
        return Taken("absent", reason="is a file that cannot be read here; give --train_data_dir")
    off = ("disabled", "disable")
    rows = [r for r in rows if isinstance(r, dict) and all(is_off(r.get(key)) for key in off)]
    images = [row for row in rows if row.get("dataset_type", "image") == "image"]
    local = [row for row in images if row.get("type", "local") == "local"]
    losses = [f"{row.get('id')} ({row.get('type')})" for row in images if row not in local]
    if not local:
        return Taken("absent", reason="has no folder of this machine; give --train_data_dir")
    tables = [_table(row, given) for row in local]
    losses += sorted({key for row in local for key in row if key in UNREAD and _asks(key, row)})
    found: dict[str, Any] = {"sources": tables}
    first = local[0]
    sides = [_side(row, given) for row in local]
    if any("resolution" in row for row in local):
        found["resolution"] = max(sides)
    if len(set(sides)) > 1:
        tables[:] = [t | {"resolutions": [s]} for t, s in zip(tables, sides, strict=True)]
    if truth(first.get("crop", False)) and str(first.get("crop_aspect", "square")) == "square":
        center = str(first.get("crop_style", "random")) != "random"
        found |= {"aspect_ratio_buckets": False, "center_crop": center}
    reason = f"not there: {', '.join(losses)}" if losses else ""
    return Taken("otherwise", found, reason)


def _side(row: dict[str, Any], given: Given) -> int:
    kind = str(row.get("resolution_type") or given.get("resolution_type") or "pixel_area")
    return side_of(row.get("resolution", given.get("resolution", 1024)), kind)[0]


UNREAD = ("minimum_image_size", "maximum_image_size", "target_downsample_size", "probability",
          "minimum_aspect_ratio", "maximum_aspect_ratio", "prepend_instance_prompt",
          "conditioning", "conditioning_data", "train_batch_size")  # fmt: skip


def _asks(key: str, row: dict[str, Any]) -> bool:
    return not is_off(row[key]) and not (key == "probability" and row[key] == 1)


def _table(row: dict[str, Any], given: Given) -> dict[str, Any]:
    """A `[[sources]]` table of a data backend."""
    table: dict[str, Any] = {"path": str(row.get("instance_data_dir", ""))}
    strategy = str(row.get("caption_strategy") or given.get("caption_strategy") or "filename")
    captions = {"textfile": "sidecar", "filename": "filename", "instanceprompt": "prompt"}
    if strategy in captions:
        table["captions"] = captions[strategy]
    if strategy == "textfile" and is_off(row.get("disable_multiline_split")):
        table["wildcards"] = True
    prompt = row.get("instance_prompt") or given.get("instance_prompt")
    if strategy == "instanceprompt" and not is_off(prompt):
        table["prompt"] = str(prompt)
    if not is_off(row.get("repeats")):
        table["repeats"] = whole(row["repeats"]) + 1  # theirs: beside the first time
    shuffle = row.get("caption_shuffle") or {}
    if not is_off(shuffle.get("enable")):
        table |= {"shuffle_caption": True, "keep_tokens": whole(shuffle.get("position_start", 0))}
    if not is_off(row.get("is_regularisation_data")):
        table["kind"] = "class"
    return table


_UPLOAD = "is about the upload, --push_to_hub"
_SAMPLES = "is not there: samples are --sample_prompts or --num_validation_images of one prompt"
_TRACKER = "is not there: runs are named by their folder"
_EMA = "is not needed: the average is taken after each step, on the device"
_SAVES = "is not there: --gradient_checkpointing saves memory"

SIMPLETUNER: dict[str, Row] = {
    "model_type": taking("", "", _type),
    "model_family": taking("--family", "", _family),
    "model_flavour": taking("--pretrained_model_name_or_path", "", _flavour),
    "lora_type": taking("--method", "", _lora_type),
    "lora_rank": _of_lora("rank"),
    "lora_alpha": _of_lora("lora_alpha"),
    "lora_dropout": _of_lora("lora_dropout"),
    "lora_init_type": among(
        "init_lora_weights", {"gaussian": "gaussian", "pissa": "pissa", "default": "kaiming",
        "orthogonal": "orthogonal"}, "is kaiming", NOT_THERE),
    "lycoris_config": taking("--method, --rank and --targets", "", _lycoris),
    "init_lokr_norm": absent(NOT_THERE),
    "lora_format": needless("is diffusers' and kohya's file here, both"),
    "peft_lora_target_modules": absent("is --targets here: patterns over whole names"),
    "peft_lora_mode": absent(NOT_THERE, idle=("standard",)),
    "controlnet": absent(NOT_THERE),
    "data_backend_config": taking("--train_data_dir, or [[sources]]", "", _backends),
    "resolution": taking("--resolution", "", _resolution),
    "resolution_type": read_with("resolution"),
    "caption_strategy": read_with("data_backend_config", "--captions_from"),
    "instance_prompt": read_with("data_backend_config"),
    **dict.fromkeys(("minimum_image_size", "maximum_image_size", "target_downsample_size",
        "max_upscale_threshold"), absent("is not there; bucket_no_upscale is")),
    "tokenizer_max_length": absent("is --max_token_length here, a multiple of 75", idle=(77, "77")),
    "train_batch_size": Row("--train_batch_size", "", lambda value, given: Taken(
        "same", {"train_batch_size": value})),
    "num_train_epochs": taking("--num_train_epochs", "", _epochs),
    "learning_rate": _rate("learning_rate"),
    "text_encoder_lr": _rate("text_encoder_lr"),
    "lr_scheduler": among(
        "lr_scheduler", {n: n for n in SCHEDULES}, "", f"{NOT_THERE}: constant is used"),
    "lr_warmup_steps": taking("--lr_warmup_steps", "", _warmup),
    "lr_end": absent("is not there: polynomial ends near 0", idle=(4e-7, "4e-7")),
    "lr_scale": absent("is --scale_lr here, by batch × accumulation × processes"),
    "lr_scale_sqrt": absent(NOT_THERE),
    "optimizer": optimizer("simpletuner"),
    "optimizer_config": taking("--optimizer_args", "", argument_text),
    "optimizer_beta1": otherwise("adam_beta1", "is that of AdamW and its variants", number),
    "optimizer_beta2": otherwise("adam_beta2", "is that of AdamW and its variants", number),
    "max_grad_norm": taking("--max_grad_norm", "", _clip),
    "grad_clip_method": read_with("max_grad_norm"),
    "mixed_precision": among(
        "mixed_precision", {"bf16": "bf16", "fp16": "fp16", "no": "no", "fp32": "no"},
        "", "is no, fp16 or bf16 here"),
    "vae_dtype": among(
        "vae_precision", {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}, "",
        "is fp32 here"),
    "base_model_precision": stored_in(
        {"int8-quanto": "int8", "int8-torchao": "int8", "fp8-quanto": "fp8", "fp8-torchao": "fp8",
         "nf4-bnb": "nf4"}, plain=("no_change",)),
    "text_encoder_1_precision": absent("is not there", idle=("no_change",)),
    "text_encoder_2_precision": absent("is not there", idle=("no_change",)),
    "base_model_default_dtype": needless("is not needed: mixed_precision says it"),
    "quantize_via": needless("belongs to base_model_precision"),
    "disable_tf32": absent("is the default here"),
    "attention_mechanism": absent("is PyTorch's own", idle=("diffusers", "sdpa", "xformers")),
    "noise_offset": taking("--noise_offset", "", _offset),
    "offset_noise": read_with("noise_offset", "--noise_offset"),
    "noise_offset_probability": read_with("noise_offset"),
    "use_soft_min_snr": absent("is --soft_min_snr_gamma here, a formula with a gamma"),
    "snr_weight": absent(NOT_THERE, idle=(1, 1.0)),
    "masked_loss_probability": needless("belongs to masks, which are --alpha_mask here"),
    "timestep_bias_strategy": absent(
        "is not there; --timestep_sampling, --min_timestep and --max_timestep are",
        idle=("none",)),
    "ema_validation": absent("is of the average always", idle=("none",)),
    **dict.fromkeys(("ema_device", "ema_cpu_only", "ema_update_interval", "ema_foreach_disable",
        "ema_warmup_steps"), needless(_EMA)),
    **dict.fromkeys(("enable_group_offload", "ramtorch", "musubi_blocks_to_swap"), switch(
        "--offload_weights", "is all blocks of the UNet but two", offload_weights=True)),
    **dict.fromkeys(
        ("offload_during_startup", "quantize_activations", "fuse_optimizer"), absent(_SAVES)),
    "gradient_checkpointing_interval": absent("is every layer"),
    "use_gradient_checkpointing": otherwise("gradient_checkpointing", "is called so", truth),
    "resume_from_checkpoint": taking("--resume_from_checkpoint", "", _resume),
    "checkpointing_steps": otherwise("checkpointing_steps", "is called so", whole),
    "checkpoint_epoch_interval": absent("is not there: checkpoints come by steps"),
    **dict.fromkeys(("checkpointing_rolling_steps", "checkpoints_rolling_total_limit"), absent(
        "is not there: --checkpointing_steps is", idle=(1,))),
    "num_validation_images": Row("--num_validation_images", "", lambda value, given: Taken(
        "same", {"num_validation_images": value})),
    "validation_steps": otherwise("sample_every", "is called so", whole),
    "validation_disable": Row("--num_validation_images 0", "", lambda value, given: Taken(
        "needless", reason="is off") if is_off(value) else Taken(
        "otherwise", {"num_validation_images": 0}, "is a number of samples")),
    **dict.fromkeys(("validation_negative_prompt", "validation_prompt_library",
        "user_prompt_library", "validation_noise_scheduler",
        "eval_dataset_id"), absent(_SAMPLES)),
    **dict.fromkeys(("validation_resolution", "validation_seed", "validation_randomize",
        "validation_on_startup", "validation_torch_compile", "disable_benchmark",
        "validation_using_datasets", "validation_multigpu", "validation_preview",
        "validation_preview_steps", "validation_seed_source"), needless(
        "is the training resolution, seeds 0, 1, 2, …, and a first sheet of the base")),
    "evaluation_type": absent("is not there: each run has a score", idle=("none",)),
    "push_checkpoints_to_hub": absent("is at the end alone: --push_to_hub"),
    "model_card_private": of_push("hub_private_repo", "push_to_hub"),
    "hub_model_id": of_push("hub_model_id", "push_to_hub"),
    **dict.fromkeys(("push_to_hub_background", "model_card_safe_for_work", "model_card_note",
        "modelspec_comment"), needless(_UPLOAD)),
    **dict.fromkeys(("tracker_run_name", "tracker_project_name"), absent(_TRACKER)),
    **dict.fromkeys(("aspect_bucket_rounding", "vae_batch_size", "write_batch_size",
        "read_batch_size", "cache_dir_vae", "cache_dir_text", "compress_disk_cache",
        "disable_bucket_pruning", "preserve_data_backend_cache", "override_dataset_config",
        "skip_file_discovery", "metadata_update_interval", "vae_cache_ondemand",
        "vae_cache_scan_behaviour", "vae_cache_disable", "text_encoder_batch_size",
        "image_processing_batch_size", "allow_dataset_oversubscription",
        "torch_num_threads", "webhook_config", "webhook_reporting_interval",
        "training_scheduler_timestep_spacing", "inference_scheduler_timestep_spacing",
        "set_grads_to_none", "gradient_precision", "num_processes", "num_machines",
        "i_know_what_i_am_doing", "dataloader_prefetch", "ignore_missing_files",
        "keep_vae_loaded", "fully_unload_text_encoder", "save_text_encoder", "configs_dir",
        "gradient_checkpointing_backend", "accelerator_cache_clear_interval",
        "delete_problematic_images", "validation_disable_unconditional", "vae_enable_tiling",
        "vae_enable_slicing", "vae_enable_patch_conv", "strict_epoch_limit", "num_eval_images",
        "eval_steps_interval", "dynamo_use_regional_compilation", "find_unused_parameters",
        "text_cache_ondemand", "text_cache_disable", "fuse_qkv_projections",
        "validation_lycoris_strength", "delete_unwanted_images", "trust_remote_code"), needless(
        "is about the program itself")),
    "aspect_bucket_alignment": otherwise("bucket_step", "is called so", whole),
    "dynamo_backend": absent(NOT_THERE, idle=("no",)),
    "refiner_training": absent("is not there: the refiner is trained by its own model"),
}  # fmt: skip
"""Argument → row."""


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the dashes that config.json may write before them."""
    return {name.lstrip("-"): value for name, value in settings.items()}


def defaults(given: Given) -> dict[str, Any]:
    """SimpleTuner's values where nothing is given, and those here are others."""
    found: dict[str, Any] = {
        "lora_rank": 16,
        "lora_dropout": 0.1,
        "train_batch_size": 4,
        "learning_rate": 4e-7,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 0,
        "gradient_checkpointing": True,
        "mixed_precision": "bf16",
        "caption_dropout_probability": 0.1,
        "max_grad_norm": 2.0,
        "num_train_epochs": 1,
        "checkpoints_total_limit": 5,
        "num_validation_images": 1,
        "resolution": 1024,
    }
    if str(given.get("lr_scheduler")) == "polynomial":
        found["lr_power"] = 0.8
    return {name: value for name, value in found.items() if name not in given}
