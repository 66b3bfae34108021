"""sd-scripts' flags and keys that are more, less or otherwise than one option here.

Of `train_network.py` and `sdxl_train_network.py` 0.10; `kohya_network.py` has those of the network,
`kohya_gui.py` those of kohya_ss. Read in their argument parsers; docs/flags.md says more.
"""

import math
from typing import Any

from sd_lora.config.rows import SCHEDULES
from sd_lora.config.translate.kohya_network import NETWORK, is_lycoris
from sd_lora.config.translate.prompts import of_file
from sd_lora.config.translate.rates import argument, arguments, betas, optimizer, own_rate
from sd_lora.config.translate.rows import (
    COMPILE,
    STORED,
    Given,
    Row,
    Taken,
    absent,
    among,
    is_off,
    needless,
    number,
    of_steps,
    otherwise,
    read_with,
    switch,
    taking,
    truth,
    whole,
)

MISSING = "is not there"
NOT_THERE = f"{MISSING}: nothing here does it yet"


def first(value: Any) -> Any:
    """The first of a list, or the value itself."""
    return value[0] if isinstance(value, list | tuple) and value else value


def trains_text_encoder(given: Given) -> bool:
    """Whether sd-scripts trains the text encoders with these settings."""
    switches = ("network_train_unet_only", "cache_text_encoder_outputs",
                "cache_text_encoder_outputs_to_disk")  # fmt: skip
    rate = first(given.get("text_encoder_lr"))
    zero = rate is not None and rate != "" and is_off(rate)
    return not zero and all(is_off(given.get(name)) for name in switches)


def _learning_rate(value: Any, given: Given) -> Taken:
    if is_off(given.get("unet_lr")):
        return own_rate(value, given.get("optimizer_type"))
    own = any(not is_off(first(given.get(f"text_encoder_lr{end}"))) for end in ("", "1"))
    if own or not trains_text_encoder(given):
        return Taken("needless", reason="counts for nothing: unet_lr and text_encoder_lr are given")
    taken = own_rate(value, given.get("optimizer_type"), "text_encoder_lr")
    reason = "is that of the text encoders, for unet_lr is the UNet's"
    return taken if taken.kind == "absent" else Taken("otherwise", taken.values, reason)


def _unet_lr(value: Any, given: Given) -> Taken:
    if is_off(value):
        return Taken("needless", reason="is not given")
    return own_rate(value, given.get("optimizer_type"))


def _text_encoder_lr(value: Any, given: Given) -> Taken:
    rates = list(value) if isinstance(value, list | tuple) else str(value).split()
    if not rates or is_off(rates[0]) or not trains_text_encoder(given):
        return Taken("needless", reason="has no effect: the text encoders are not trained")
    taken = own_rate(rates[0], given.get("optimizer_type"), "text_encoder_lr")
    if len({str(rate) for rate in rates}) > 1 and taken.kind == "same":
        reason = "is the first of the rates, as networks.lora takes it for both encoders"
        return Taken("otherwise", taken.values, reason)
    return taken


def _unet_only(value: Any, given: Given) -> Taken:
    if not trains_text_encoder(given):
        return Taken("needless", reason="is the default here: the UNet alone")
    return Taken("otherwise", {"train_text_encoder": True}, "text encoders are trained there")


def _resolution(value: Any, given: Given) -> Taken:
    sides = value if isinstance(value, list | tuple) else str(value).replace("x", ",").split(",")
    numbers = [whole(side) for side in sides if str(side).strip()]
    if not numbers:
        return Taken("needless", reason="is not given")
    if len(set(numbers)) == 1:
        return Taken("same", {"resolution": numbers[0]})
    side = max(8, math.isqrt(numbers[0] * numbers[1]) // 8 * 8)
    reason = "is the side of a square of the same area: of buckets, or of squares without them"
    return Taken("otherwise", {"resolution": side}, reason)


_MASKED = "is the mean over the masked part; there over all"


def _mask_folder(value: Any, given: Given) -> Taken:
    if is_off(value) or is_off(given.get("masked_loss")):
        return Taken("needless", reason="counts for nothing there without masked_loss")
    return Taken("otherwise", {"mask_folder": value}, _MASKED)


def _warmup(value: Any, given: Given) -> Taken:
    steps, scheduler = number(value), str(given.get("lr_scheduler") or "constant")
    if scheduler == "constant":
        return Taken("needless", reason="has no effect with constant")
    return Taken("same", {"lr_warmup_steps": steps})


def _steps(value: Any, given: Given) -> Taken:
    if not is_off(given.get("max_train_epochs")):
        return Taken("needless", reason="counts for nothing: there, epochs go before steps")
    return Taken("needless" if is_off(value) else "same", {} if is_off(value) else {
        "max_train_steps": value
    }, "is not given" if is_off(value) else "")  # fmt: skip


def _sample_steps(value: Any, given: Given) -> Taken:
    if not is_off(given.get("sample_every_n_epochs")):
        return Taken("needless", reason="counts for nothing: there, epochs go before steps")
    if is_off(value):
        return Taken("needless", reason="is not given")
    return Taken("same", {"sample_every": value})


def _clip_skip(value: Any, given: Given) -> Taken:
    if is_off(value) or whole(value) == 1:
        return Taken("needless", reason="is the last layer, as here without it")
    if not is_off(given.get("sdxl")):
        reason = "is ignored there for SDXL, whose usual last layer but one is 0 here"
        return Taken("needless", reason=reason)
    return Taken("otherwise", {"clip_skip": whole(value) - 1}, "counts from 0, theirs from 1")


def _token_length(value: Any, given: Given) -> Taken:
    if is_off(value) or whole(value) == 75:
        return Taken("needless", reason="is the default here too")
    return Taken("otherwise", {"max_token_length": value}, _PIECES)


_PIECES = "keeps start and end of each piece of 75; there they are cut out"


def _output_dir(value: Any, given: Given) -> Taken:
    name = given.get("output_name")
    if is_off(name):
        return Taken("same", {"output_dir": value})
    folder = f"{str(value).rstrip('/' + chr(92))}/{name}"
    return Taken("otherwise", {"output_dir": folder}, "ends in output_name: the file's name")


def _output_name(value: Any, given: Given) -> Taken:
    if is_off(value) or not is_off(given.get("output_dir")):
        return Taken("needless", reason="is read with output_dir")
    return Taken("otherwise", {"output_dir": value}, "is the last part of output_dir")


def _data_dir(value: Any, given: Given) -> Taken:
    if not is_off(given.get("dataset_config")):
        return Taken("needless", reason="counts for nothing: dataset_config is given")
    if is_off(given.get("reg_data_dir")):
        return Taken("same", {"train_data_dir": value})
    folders = [
        {"path": str(value), "layout": "kohya"},
        {"path": str(given["reg_data_dir"]), "layout": "kohya", "kind": "class"},
    ]
    return Taken("otherwise", {"sources": folders}, "is a source, reg_data_dir another")


def _count_kept(value: Any, given: Given) -> Taken:
    every = given.get("save_every_n_steps")
    if is_off(value):
        return Taken("needless", reason="is off")
    if is_off(every):
        return Taken(
            "absent", reason="is a number of steps; --checkpoints_total_limit counts files"
        )
    count = max(1, whole(value) // whole(every))
    return Taken("otherwise", {"checkpoints_total_limit": count}, "counts checkpoints, not steps")


SCHEDULERS = {
    name: name for name, used in SCHEDULES.items() if not {"lr_step_rules", "lr_points"} & {*used}
} | {"cosine_with_min_lr": "cosine"}
"""Schedule there, of those that need no file or rules → here."""

_FLOAT32 = "is not there: the LoRA is float32 always; the base is as mixed_precision says"
_UPLOAD = "is not there: --push_to_hub uploads the LoRA files at the end"
_SDPA = "is not needed: PyTorch's own memory-efficient attention is always used"
_BY_EPOCHS = "is not there: checkpoints come by steps, --checkpointing_steps"
_VALIDATION = (
    "is not there: a number of images is held out, chosen by content (--holdout), and validated "
    "after steps (--validate_every)"
)
_SAMPLES = "is not there: samples are drawn by DPM-Solver++"
_DEVICES = "is not needed: accelerate's configuration says it"

KOHYA: dict[str, Row] = NETWORK | {
    # model
    "v2": needless("is not needed: the family is read from the model"),
    "sdxl": switch("--family", "is the script's family", family="sdxl"),
    "debiased_estimation_loss": switch("--debiased_estimation_loss",
        "weights v-prediction as epsilon, by √SNR / (SNR + 1); there 1 / (SNR + 1), up to SNR 1000",
        debiased_estimation_loss=True),
    "v_parameterization": switch(
        "--prediction_type v_prediction", "is a type of prediction", prediction_type="v_prediction"
    ),
    "tokenizer_cache_dir": needless("is not needed: --cache_dir is for all downloads"),
    "no_half_vae": needless("is always so here: the VAE is float32"),
    "disable_mmap_load_safetensors": needless("is about loading there"),
    # data
    "train_data_dir": taking("--train_data_dir", "", _data_dir),
    "reg_data_dir": Row(
        "--class_data_dir with --with_prior_preservation, or class sources", "",
        read_with("train_data_dir").take,
    ),
    "in_json": absent("is metadata_file of a [[sources]] table here"),
    "dataset_class": absent(NOT_THERE),
    "resolution": taking("--resolution", "is one number here", _resolution),
    "caption_extention": otherwise("caption_extension", "is spelt caption_extension"),
    "random_crop": taking(
        "--no-center_crop", "",
        lambda value, given: Taken("otherwise", {"center_crop": not truth(value)},
            "is center_crop, turned round"),
    ),
    "color_aug": absent("is not there: colours are trained as they are"),
    "face_crop_aug_range": absent("is not there: crop the images yourself"),
    "secondary_separator": absent("is not there: a tag is the text between two separators"),
    "caption_dropout_every_n_epochs": absent(
        "is not there: --caption_dropout drops a share of them"),
    "token_warmup_min": needless("belongs to token_warmup_step"),
    "token_warmup_step": absent("is not there: all tags are shown from the first step on"),
    "resize_interpolation": absent("is --image_interpolation_mode here"),
    "debug_dataset": absent("is sd-lora check here", here="sd-lora check"),
    "cache_info": needless("is not needed: sizes and captions are always kept by content"),
    "conditioning_data_dir": taking("--mask_folder", _MASKED, _mask_folder),
    "masked_loss": read_with("conditioning_data_dir and alpha_mask"),
    "alpha_mask": otherwise("alpha_mask", "is the mean over the opaque part; there over all"),
    "caption_prefix": otherwise("caption_prefix", "stays in front; there its tags are shuffled"),
    "caption_suffix": otherwise("caption_suffix", "stays behind; there its tags are shuffled"),
    "caption_dropout_rate": otherwise(
        "caption_dropout", "is zeros for SDXL, as its guidance has it; there the empty prompt"),
    "weighted_captions": otherwise("weighted_prompts", "reads compel's (red)1.3, not (red:1.3)"),
    "max_token_length": taking("--max_token_length", _PIECES, _token_length),
    "clip_skip": taking("--clip_skip, one less", "counts from 0 here", _clip_skip),
    "cache_latents": needless("is always so here: cache_latents is auto"),
    "cache_latents_to_disk": switch(
        "--cache_latents disk", "is a switch there, a place here", cache_latents="disk"),
    "cache_text_encoder_outputs": needless(
        "is always so here for text encoders that do not learn, and there turns them off"),
    "cache_text_encoder_outputs_to_disk": switch(
        "--cache_text_embeddings disk", "is a switch there, a place here",
        cache_text_embeddings="disk"),
    "skip_cache_check": needless("is not needed: the cache goes by content"),
    "vae_batch_size": needless("is about memory while caching there"),
    "text_encoder_batch_size": needless("is about memory while caching there"),
    "persistent_data_loader_workers": needless("is always so here"),
    "enable_bucket": Row("the default; off: --no-aspect_ratio_buckets", "", lambda value, given:
        Taken("same", {"aspect_ratio_buckets": truth(value)})),
    # length
    "max_train_steps": taking("--max_train_steps", "", _steps),
    # optimiser
    "learning_rate": taking("--learning_rate", "", _learning_rate),
    "unet_lr": taking("--learning_rate", "", _unet_lr),
    "text_encoder_lr": taking("--train_text_encoder --text_encoder_lr", "", _text_encoder_lr),
    # two names that stand in its documents on SDXL, and not in its parser
    "text_encoder_lr1": otherwise("text_encoder_lr", "is the first text encoder's", number),
    "text_encoder_lr2": otherwise("text_encoder_2_lr", "is the second text encoder's", number),
    "network_train_unet_only": taking(
        "the default; with text encoders: --train_text_encoder", "", _unet_only),
    "network_train_text_encoder_only": absent("is not there: the UNet is always trained"),
    "optimizer_type": optimizer("kohya"),
    "use_8bit_adam": switch(
        "--optimizer adamw8bit", "is AdamW's 8-bit form", optimizer="adamw8bit"),
    "use_lion_optimizer": switch("--optimizer lion", "is an optimiser", optimizer="lion"),
    "weight_decay": otherwise("adam_weight_decay", "is that of any optimiser", number),
    "betas": betas("optimizer_type"),
    "eps": argument("eps", "optimizer_type", "adam_epsilon"),
    **arguments("optimizer_type"),
    "optimizer_args": Row("--optimizer_args", "", needless("has no part").take),
    "lr_scheduler": among(
        "lr_scheduler", SCHEDULERS, "has that end here by lr_min_ratio",
        f"{MISSING}: constant is used"),
    "lr_scheduler_type": absent(f"{MISSING}: schedules are those of --lr_scheduler"),
    "lr_scheduler_args": absent(f"{MISSING}: a schedule's shape is in options of its own"),
    "lr_warmup_steps": taking("--lr_warmup_steps", "", _warmup),
    "lr_scheduler_timescale": absent(f"{NOT_THERE}: that of inverse_sqrt is its warm-up"),
    "fused_backward_pass": needless("is about Adafactor's memory there"),
    "scale_weight_norms": otherwise(
        "scale_weight_norms", "is once an optimiser step, not once a micro-batch"),
    "max_data_loader_n_workers": Row("--dataloader_num_workers", "", lambda value, given:
        Taken("same", {"dataloader_num_workers": value})),
    # precision and speed
    "full_fp16": absent(_FLOAT32),
    "full_bf16": absent(_FLOAT32),
    **dict.fromkeys(("fp8_base", "fp8_base_unet"), switch(
        "--base_precision", STORED, base_precision="fp8")),
    "xformers": needless(_SDPA),
    "sdpa": needless(_SDPA),
    "mem_eff_attn": needless(_SDPA),
    "torch_compile": COMPILE,
    "dynamo_backend": absent(NOT_THERE, idle=("inductor", "no")),
    "lowram": needless("is not needed: the base is loaded once"),
    "highvram": needless("is not needed"),
    "cpu_offload_checkpointing": switch(
        "--offload_activations", "moves the same tensors with --gradient_checkpointing, else more",
        offload_activations=True),
    "blocks_to_swap": switch(
        "--offload_weights", "is of no UNet there; here it is all blocks but two",
        offload_weights=True),
    **dict.fromkeys(
        ("ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph"), needless(_DEVICES)),
    **dict.fromkeys(
        ("deepspeed", "zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path",
         "offload_param_device", "offload_param_nvme_path", "zero3_init_flag",
         "zero3_save_16bit_model", "fp16_master_weights_and_gradients"),
        absent(NOT_THERE, idle=(2, "2"))),
    # objective
    "v_pred_like_loss": absent(
        f"{MISSING}: losses are weighted by --debiased_estimation_loss, --snr_gamma and the like"),
    **dict.fromkeys(("weighting_scheme", "logit_mean", "logit_std", "mode_scale"), needless(
        "belongs to flow models")),
    # files
    "output_dir": taking("--output_dir", "", _output_dir),
    "output_name": taking("the last part of --output_dir", "", _output_name),
    "save_model_as": absent("is safetensors always", idle=("safetensors",)),
    "use_safetensors": needless("is always so here"),
    "save_precision": among(
        "save_precision", {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}, "",
        "is fp32, fp16 or bf16 here"),
    "save_every_n_steps": of_steps(
        "is whole states to resume from as well", "save_lora_every", "checkpointing_steps"),
    "save_n_epoch_ratio": absent(_BY_EPOCHS),
    "save_last_n_epochs": absent(_BY_EPOCHS),
    "save_last_n_epochs_state": absent(_BY_EPOCHS),
    "save_last_n_steps": taking("--checkpoints_total_limit", "counts checkpoints", _count_kept),
    "save_last_n_steps_state": taking(
        "--checkpoints_total_limit", "counts checkpoints", _count_kept),
    "save_state": needless("is always so here: a checkpoint is the whole state"),
    "save_state_on_train_end": absent("is not there: checkpoints come by --checkpointing_steps"),
    **dict.fromkeys(("initial_epoch", "initial_step", "skip_until_initial_step"), needless(
        "is not needed: a resumed run goes on at the same image")),
    "no_metadata": absent("is not there: the files say how they were trained"),
    "training_comment": absent(NOT_THERE),
    "huggingface_repo_id": Row("--push_to_hub --hub_model_id", "", lambda value, given:
        Taken("needless", reason="is not given") if is_off(value) else
        Taken("same", {"push_to_hub": True, "hub_model_id": value})),
    "huggingface_token": absent("is not read from a configuration: hf auth login"),
    "huggingface_repo_visibility": absent(
        "is --hub_private_repo here; a new repository is public without it", idle=("public",)),
    **dict.fromkeys(
        ("huggingface_repo_type", "huggingface_path_in_repo", "save_state_to_huggingface",
         "resume_from_huggingface", "async_upload"), absent(_UPLOAD)),
    **dict.fromkeys(
        ("log_prefix", "log_tracker_name", "log_tracker_config", "wandb_run_name"),
        absent(f"{MISSING}: runs are named by their folder")),
    "wandb_api_key": absent("is not read from a configuration: wandb login"),
    "log_config": needless("is always so here: config.json is beside the files"),
    "config_file": Row(
        "--config, of a file that sd-lora translate writes", "", needless("is read").take),
    "output_config": needless("is sd-lora translate here"),
    # samples
    "sample_prompts": taking("--sample_prompts", "is one image a prompt", of_file),
    "sample_every_n_steps": taking("--sample_every", "", _sample_steps),
    "sample_at_first": needless("is always so here"),
    "sample_sampler": absent(_SAMPLES, idle=("dpmsolver++",)),
    **dict.fromkeys(
        ("validation_split", "validation_seed", "validate_every_n_epochs",
         "max_validation_steps"), absent(_VALIDATION)),
}  # fmt: skip
"""Name → row."""


def defaults(given: Given) -> dict[str, Any]:
    """sd-scripts' values where nothing is given, and those here are others."""
    found: dict[str, Any] = {
        "network_module": "networks.lora",
        "network_alpha": 1,
        "network_train_unet_only": False,
        "train_batch_size": 1,
        "mixed_precision": "no",
        "enable_bucket": False,
    }
    buckets = not is_off(given.get("enable_bucket"))
    if buckets:
        found |= {"min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64}
    elif is_off(given.get("dataset_config")):
        found["random_crop"] = False
    if is_off(given.get("max_train_epochs")):
        found["max_train_steps"] = 1600
    if is_off(given.get("unet_lr")):
        found["learning_rate"] = 2e-6
    if str(given.get("lr_scheduler") or "constant") != "constant":
        found["lr_warmup_steps"] = 0
    if not is_off(given.get("conv_dim")) and not is_lycoris(given):
        found["conv_alpha"] = 1
    return {name: value for name, value in found.items() if is_unset(given.get(name))}


def is_unset(value: Any) -> bool:
    """Whether a setting is left to its default."""
    return value is None or value == ""
