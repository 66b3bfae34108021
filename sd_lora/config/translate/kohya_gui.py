"""kohya_ss, the interface to sd-scripts: the keys of its JSON, and of its own config.toml.

A key that it passes on under sd-scripts' name is that name's; here are the others, and the keys
that count for one `LoRA_type` alone. Read in its lora_gui.py.
"""

from typing import Any

from sd_lora.config.translate.kohya import KOHYA, is_unset
from sd_lora.config.translate.kohya import defaults as of_scripts
from sd_lora.config.translate.rows import (
    UNUSED,
    Given,
    Row,
    Taken,
    absent,
    is_off,
    needless,
    number,
    other_model,
    read_with,
    taking,
)

RENAMED = {
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "lora_network_weights": "network_weights",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sdxl_no_half_vae": "no_half_vae",
    "LyCORIS_preset": "preset",
    "state_dir": "resume",
    "models_dir": "pretrained_model_name_or_path",
    "vae_dir": "vae",
    "sdxl_checkbox": "sdxl",
}
"""Key of kohya_ss → name in sd-scripts."""

KINDS: dict[str, tuple[str, str]] = {
    "Standard": ("networks.lora", ""),
    "Kohya LoCon": ("networks.lora", "conv"),
    "LoRA-FA": ("networks.lora_fa", ""),
    "Kohya DyLoRA": ("networks.dylora", "conv"),
    "LoCon": ("lycoris.kohya", "locon"),
    "LyCORIS/LoCon": ("lycoris.kohya", "locon"),
    "LyCORIS/LoHa": ("lycoris.kohya", "loha"),
    "LyCORIS/LoKr": ("lycoris.kohya", "lokr"),
    "LyCORIS/Native Fine-Tuning": ("lycoris.kohya", "full"),
    "LyCORIS/DyLoRA": ("lycoris.kohya", "dylora"),
    "LyCORIS/GLoRA": ("lycoris.kohya", "glora"),
    "LyCORIS/iA3": ("lycoris.kohya", "ia3"),
    "LyCORIS/Diag-OFT": ("lycoris.kohya", "diag-oft"),
    "LyCORIS/BOFT": ("lycoris.kohya", "boft"),
    "Kohya LoHa": ("lycoris.kohya", "loha"),
    "Kohya LoKr": ("lycoris.kohya", "lokr"),
}
"""LoRA_type → network module, and LyCORIS' algorithm, or "conv" for sd-scripts' convolutions."""

OF_LYCORIS = ("preset", "use_tucker", "use_cp", "use_scalar", "rank_dropout_scale", "dora_wd",
              "train_norm", "bypass_mode", "constrain", "rescaled", "train_on_input",
              "factor", "decompose_both", "full_matrix", "unit")  # fmt: skip
OF_BLOCKS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "conv_dims",
             "conv_alphas", "down_lr_weight", "mid_lr_weight", "up_lr_weight",
             "block_lr_zero_threshold")  # fmt: skip


def _kind(value: Any, given: Given) -> Taken:
    if str(value) in KINDS:
        return Taken("needless", reason="is read as network_module")
    if any(word in str(value) for word in ("Flux", "Anima", "Lumina", "Hunyuan")):
        raise other_model("LoRA_type", value)
    return Taken("absent", reason="is not there: plain LoRA is written instead")


def _epoch(value: Any, given: Given) -> Taken:
    if not is_off(given.get("max_train_steps")) or not is_off(given.get("max_train_epochs")):
        return Taken("needless", reason="counts for nothing: the run's length is given")
    return Taken("otherwise", {"num_train_epochs": value}, "is the run's length, as there")


def _warmup(value: Any, given: Given) -> Taken:
    scheduler = str(given.get("lr_scheduler") or "constant")
    if is_off(value) or scheduler == "constant" or not is_off(given.get("lr_warmup_steps")):
        return Taken("needless", reason="is off, or lr_warmup_steps is given")
    share = number(value) / 100
    if share >= 1:
        return Taken("absent", reason="is the whole run; give --lr_warmup_steps")
    return Taken("otherwise", {"lr_warmup_steps": share}, "is a share of the run, 0.1 for 10 %")


def _unset_steps(value: Any, given: Given) -> Taken:
    if is_off(value):
        return Taken("needless", reason="is off, or epochs are given")
    return KOHYA["max_train_steps"].take(value, given)


KOHYA_GUI: dict[str, Row] = KOHYA | {
    "LoRA_type": taking("--method and --targets", "", _kind),
    "epoch": taking("--num_train_epochs", "", _epoch),
    "max_train_steps": taking("--max_train_steps", "", _unset_steps),
    "lr_warmup": taking("--lr_warmup_steps", "", _warmup),
    "stop_text_encoder_training": absent("is --text_encoder_stop_step here, in steps"),
    "stop_text_encoder_training_pct": absent("is --text_encoder_stop_step here, in steps"),
    "noise_offset_type": read_with("noise_offset and multires_noise_iterations"),
    "additional_parameters": absent("is more flags: write them as they are, and translate those"),
    "no_token_padding": absent("is not there: captions are padded, as when sampling"),
    "gradient_accumulation_steps": Row("--gradient_accumulation_steps", "", lambda value, given:
        Taken("same", {"gradient_accumulation_steps": value or 1})),
    **dict.fromkeys(("learning_rate_te", "learning_rate_te1", "learning_rate_te2", "t5xxl_lr",
        "fused_optimizer_groups"), needless("belongs to dreambooth and other models there")),
    **dict.fromkeys(("model_list", "num_cpu_threads_per_process", "use_wandb", "use_shell",
        "gpu_ids", "main_process_port", "multi_gpu", "num_machines", "num_processes",
        "dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph", "config_dir",
        "extra_accelerate_launch_args", "log_tracker_config_dir", "allowed_paths", "flux1_checkbox",
        "sd3_checkbox", "lowvram", "save_as_bool"), needless("is about the program itself")),
    **dict.fromkeys(("metadata_title", "metadata_author", "metadata_description",
        "metadata_license", "metadata_tags"), absent("is not there")),
}  # fmt: skip
"""Key → row."""


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by sd-scripts' names, with the network that LoRA_type stands for."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= value if isinstance(value, dict) else {key: value}
    found = {RENAMED.get(key, key): value for key, value in flat.items()}
    module, kind = KINDS.get(str(flat.get("LoRA_type", "Standard")), ("networks.lora", ""))
    lycoris = module.startswith("lycoris")
    unused: list[str] = list(OF_BLOCKS if lycoris else OF_LYCORIS)
    unused += [] if lycoris or kind == "conv" else ["conv_dim", "conv_alpha"]
    unused += ["multires_noise_iterations"] if found.get("noise_offset_type") == "Original" else []
    for key in unused:
        if key in found:
            found[UNUSED + key] = found.pop(key)
    attention = found.get("xformers")
    if isinstance(attention, str) and not is_off(attention):
        found["xformers"] = True
    found |= {"network_module": module} | ({"algo": kind} if lycoris else {})
    zero_is_unset = ("lr_scheduler_num_cycles", "max_token_length", "lr_scheduler_power", "seed")
    return {k: None if k in zero_is_unset and is_off(v) else v for k, v in found.items()}


OTHER_MODELS = ("flux", "flux1_", "sd3_", "t5xxl", "clip_l", "clip_g", "hunyuan", "anima", "lumina",
                "single_blocks", "double_blocks", "blockwise", "model_prediction_type",
                "timestep_sampling", "discrete_flow_shift", "guidance_scale", "apply_t5", "ae",
                "save_clip", "save_t5xxl", "mem_eff_save", "split_mode", "split_qkv",
                "train_blocks", "train_double", "train_single", "img_", "txt_", "single_",
                "enable_all_linear", "in_dims", "train_t5xxl", "mod_dim", "single_mod")  # fmt: skip

FAMILIES = {UNUSED: needless("has no effect with the other settings there")} | dict.fromkeys(
    OTHER_MODELS, needless("belongs to other models")
)
"""Beginning of a key → row: keys of other models, which the interface writes always."""

SHOWN = {name: key for key, name in RENAMED.items()}


def defaults(given: Given) -> dict[str, Any]:
    """sd-scripts' values where nothing is given, but for the length, which `epoch` says."""
    found = of_scripts(given)
    if not is_off(given.get("epoch")) and is_unset(given.get("max_train_steps")):
        found.pop("max_train_steps", None)
    rate = given.get("text_encoder_lr")
    if is_unset(rate) or is_off(rate):  # the interface trains them only with a rate of their own
        found["text_encoder_lr"] = 0
    return found
