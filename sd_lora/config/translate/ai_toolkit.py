"""ai-toolkit's keys that are more, less or otherwise than one option here.

Keys of a job's process, with dots for inner tables: `train.lr`, `network.linear`. Read in its
config_modules; a key that is not given has its default there (alpha 1, rate 1e-6).
"""

from dataclasses import replace
from typing import Any

from sd_lora.config.rows import SCHEDULES
from sd_lora.config.translate.prompts import of_list, of_row
from sd_lora.config.translate.rates import argument, arguments, betas, optimizer, own_rate
from sd_lora.config.translate.rows import (
    COMPILE,
    Given,
    Row,
    Taken,
    absent,
    among,
    is_off,
    needless,
    number,
    of_push,
    of_steps,
    other_model,
    otherwise,
    read_with,
    stored_in,
    switch,
    taking,
    truth,
    whole,
)
from sd_lora.errors import UsageError

NOT_THERE = "is not there"
FAMILIES = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl"}
"""Architecture → family."""

OTHER_MODELS = ("is_flux", "is_v3", "is_pixart", "is_pixart_sigma", "is_auraflow", "is_lumina2",
                "is_ssd", "is_vega")  # fmt: skip

LINEAR_ENDS = r"(.*\.)?resnets\.\d\.(conv_shortcut|time_emb_proj)|(time|add)_embedding\.linear_[12]"
"""Linear layers and 1×1 convolutions of a UNet beside its transformers."""

PRECISIONS = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}
PRECISIONS |= {"fp32": "no", "float32": "no", "float": "no"}
FILE_PRECISIONS = PRECISIONS | {"fp32": "fp32", "float32": "fp32", "float": "fp32"}


def family(given: Given) -> str | None:
    """The family that a configuration names; None for a model that is not trained here."""
    arch = given.get("model.arch")
    if any(not is_off(given.get(f"model.{name}")) for name in OTHER_MODELS):
        return None
    if not is_off(arch):
        return FAMILIES.get(str(arch).lower())
    if not is_off(given.get("model.is_xl")):
        return "sdxl"
    return "sd1" if is_off(given.get("model.is_v2")) else "sd2"


def _model(value: Any, given: Given) -> Taken:
    if family(given) is None:
        raise other_model("model.name_or_path", value)
    return Taken("same", {"pretrained_model_name_or_path": value})


def _type(value: Any, given: Given) -> Taken:
    if "trainer" not in str(value):
        raise other_model("type", value)
    return Taken("needless", reason="is always so here")


def _family(value: Any, given: Given) -> Taken:
    found = family(given)
    if is_off(value):
        return Taken("needless", reason="is off")
    if found is None:
        raise other_model("model.arch", value)
    return Taken("otherwise", {"family": found}, "is read from the model, and compared")


def _network(value: Any, given: Given) -> Taken:
    """Method and target modules: all linear layers, and convolutions with network.conv."""
    word = str(value).lower()
    methods = {"lora": "lora", "locon": "lora", "lierla": "lora", "lokr": "lokr"}
    conv = not is_off(given.get("network.conv"))
    targets = "all" if conv else f"transformer+{LINEAR_ENDS}"
    values: dict[str, Any] = {"method": methods.get(word, "lora"), "targets": targets}
    if word == "lokr" and truth(given.get("network.lokr_full_rank", True)):
        values["lokr_full_matrix"] = True
    if word not in methods:
        return Taken("absent", values, f"{NOT_THERE}: LoRA is written instead")
    return Taken("otherwise", values, "is a method and its targets")


def _rank(value: Any, given: Given) -> Taken:
    lokr = str(given.get("network.type")).lower() == "lokr"
    if lokr and truth(given.get("network.lokr_full_rank", True)):
        return Taken("needless", reason="counts for nothing with lokr_full_rank")
    return Taken("same", {"rank": value})


def _factor(value: Any, given: Given) -> Taken:
    if str(given.get("network.type")).lower() != "lokr" or is_off(value) or number(value) < 1:
        return Taken("needless", reason="is LoKr's, or near the square root as here without it")
    return Taken("same", {"lokr_factor": value})


def _alpha(value: Any, given: Given) -> Taken:
    if "network.linear_alpha" in given:
        return Taken("needless", reason="counts for nothing: linear_alpha is given")
    return Taken("same", {"lora_alpha": value})


def _rate(option: str) -> Row:
    def take(value: Any, given: Given) -> Taken:
        if option == "learning_rate" and "train.unet_lr" in given:
            value = given["train.unet_lr"]
        if option == "text_encoder_lr" and is_off(given.get("train.train_text_encoder")):
            return Taken("needless", reason="has no effect: the text encoders are not trained")
        return own_rate(value, given.get("train.optimizer"), option)

    return Row(f"--{option}", "", take)


def _scheduler(value: Any, given: Given) -> Taken:
    word = str(value).lower()
    if word in ("constant", "constant_with_warmup", "cosine"):
        return Taken("same", {"lr_scheduler": word})
    if word not in SCHEDULES:
        return Taken("absent", reason=f"{NOT_THERE}: constant is used")
    reason = "is diffusers' schedule of that name; theirs is PyTorch's, and ends otherwise"
    return Taken("otherwise", {"lr_scheduler": word}, reason)


def _sources(value: Any, given: Given) -> Taken:
    rows = [row for row in value or [] if isinstance(row, dict)]
    if not rows:
        return Taken("absent", reason="has no folder; give --train_data_dir")
    most = max(side for row in rows for side in _sides(row))
    tables = [_table(row) | _resolutions(row, most) for row in rows]
    unread = sorted({k for r in rows for k, v in r.items() if not _known(k, v)})
    found: dict[str, Any] = {"sources": tables, "resolution": most}
    if not all(truth(row.get("buckets", True)) for row in rows):
        found |= {"aspect_ratio_buckets": False, "center_crop": True}
    if all(truth(row.get("alpha_mask", False)) for row in rows):
        found["alpha_mask"] = True
    reason = f"not there: {', '.join(unread)}" if unread else ""
    return Taken("otherwise", found, reason)


def _resolutions(row: dict[str, Any], most: int) -> dict[str, Any]:
    """The key of a table with other resolutions than the run's, the largest of all."""
    sides = sorted(set(_sides(row)))
    return {"resolutions": sides} if sides != [most] else {}


def _sides(row: dict[str, Any]) -> list[int]:
    sides = row.get("resolution", 512)
    return [whole(side) for side in (sides if isinstance(sides, list) else [sides])] or [512]


KEYS = {
    "folder_path": "path",
    "dataset_path": "path",
    "caption_ext": "caption_extension",
    "caption_type": "caption_extension",
    "default_caption": "prompt",
    "trigger_word": "trigger_word",
    "num_repeats": "repeats",
    "loss_multiplier": "weight",
    "mask_path": "mask_folder",
    "caption_dropout_rate": "caption_dropout",
    "token_dropout_rate": "caption_tag_dropout",
    "shuffle_tokens": "shuffle_caption",
    "keep_tokens": "keep_tokens",
    "flip_x": "random_flip",
    "random_crop": "random_crop",
}
"""Key of a dataset → key of a `[[sources]]` table."""

OFF = {"default_caption": "", "num_repeats": 1, "loss_multiplier": 1, "network_weight": 1}
TOLD = ("resolution", "buckets", "alpha_mask", "is_reg", "cache_latents", "type",
        "cache_latents_to_disk", "bucket_tolerance", "num_workers", "prefetch_factor", "controls",
        "num_frames", "shrink_video_to_frames", "cache_text_embeddings",
        "mask_min_value")  # fmt: skip
"""Keys of a dataset that are read elsewhere, or are about the program itself."""

CONVERT: dict[str, Any] = {
    "repeats": whole, "weight": number, "caption_dropout": number, "caption_tag_dropout": number,
    "shuffle_caption": truth, "keep_tokens": whole, "random_flip": truth, "random_crop": truth,
    "caption_extension": lambda value: "." + str(value).lstrip("."),
}  # fmt: skip


def _known(key: str, value: Any) -> bool:
    return key in KEYS or key in TOLD or is_off(value) or value == OFF.get(key)


def _table(row: dict[str, Any]) -> dict[str, Any]:
    """A `[[sources]]` table of a dataset."""
    table = {
        KEYS[key]: CONVERT.get(KEYS[key], str)(value)
        for key, value in row.items()
        if key in KEYS and not is_off(value) and value != OFF.get(key)
    }
    if not table.get("shuffle_caption") and not table.get("caption_tag_dropout"):
        table.pop("keep_tokens", None)  # kept anyway
    return table | ({"kind": "class"} if not is_off(row.get("is_reg")) else {})


def _folder(value: Any, given: Given) -> Taken:
    name = given.get("name")
    if is_off(name):
        return Taken("same", {"output_dir": value})
    return Taken("otherwise", {"output_dir": f"{str(value).rstrip('/')}/{name}"}, "ends in name")


def _disabled(value: Any, given: Given) -> Taken:
    if is_off(value):
        return Taken("needless", reason="is off")
    return Taken("otherwise", {"num_validation_images": 0}, "is a number of samples")


SHARED = ("neg", "width", "height", "seed", "network_multiplier")
"""Settings of all samples, which stand in each prompt's line here."""


def _prompts(value: Any, given: Given) -> Taken:
    shared = {n: given.get(f"sample.{n}") for n in SHARED}
    rows = [of_row(row, {}) for row in value or []]
    if shared["seed"] is not None and not is_off(given.get("sample.walk_seed")):
        first = whole(shared["seed"])
        rows = [replace(r, seed=first + i) if r.seed is None else r for i, r in enumerate(rows)]
    return of_list([row.line for row in rows if row.prompt], shared)


def _denoising(option: str, default: int, shift: int) -> Row:
    def take(value: Any, given: Given) -> Taken:
        if whole(value) >= default - 1 if shift else whole(value) == default:
            return Taken("needless", reason="is the default")
        return Taken("same", {option: whole(value) + shift})

    return Row(f"--{option}", "", take)


_ONE = "is not there: the loss is to the noise"

AI_TOOLKIT: dict[str, Row] = {
    "name": read_with("training_folder"),
    "type": taking("", "is about the program itself", _type),
    "training_folder": taking("--output_dir", "", _folder),
    "trigger_word": otherwise(
        "trigger_word", "is the first tag of captions without it; [trigger] is no mark here"),
    "model.name_or_path": taking("--pretrained_model_name_or_path", "", _model),
    **dict.fromkeys(("model.arch", "model.is_xl", "model.is_v2"), taking("--family", "", _family)),
    "model.is_v_pred": switch(
        "--prediction_type", "is a type of prediction", prediction_type="v_prediction"),
    "model.quantize": stored_in(
        {"qfloat8": "fp8", "qint8": "int8"}, named=("model.qtype", "qfloat8")),
    "model.compile": COMPILE,
    **dict.fromkeys(("model.quantize_te", "model.low_vram", "model.refiner_name_or_path"),
        absent(NOT_THERE)),
    "model.layer_offloading": switch(
        "--offload_weights", "is all blocks of the UNet but two", offload_weights=True),
    "model.dtype": needless("is not needed: mixed_precision says it"),
    "model.lora_path": absent("is sd-lora bake before the run", here="sd-lora bake"),
    "model.unet_path": absent("is a part of the model here"),
    **dict.fromkeys(("model.qtype", "model.qtype_te", "model.model_kwargs",
        "model.quantize_kwargs"), needless("belongs to quantize")),
    "network.type": taking("--targets and --method", "", _network),
    "network.linear": taking("--rank", "", _rank),
    "network.rank": taking("--rank", "", _rank),
    "network.alpha": taking("--lora_alpha", "", _alpha),
    "network.lokr_factor": taking("--lokr_factor", "", _factor),
    "network.lokr_full_rank": read_with("network.type", "--lokr_full_matrix"),
    "network.transformer_only": needless("has no effect on UNets there"),
    "network.old_lokr_format": needless("is not needed: lokr files are LyCORIS's"),
    "network.network_kwargs": absent(
        "is --targets here: patterns over whole names", idle=({"ignore_if_contains": []},)),
    "network.split_multistage_loras": needless("belongs to other models"),
    "datasets": taking("--train_data_dir, or [[sources]] of a file", "", _sources),
    "train.lr": _rate("learning_rate"),
    "train.unet_lr": read_with("train.lr", "--learning_rate"),
    "train.text_encoder_lr": _rate("text_encoder_lr"),
    "train.optimizer": optimizer("ai_toolkit"),
    "train.optimizer_params.betas": betas("train.optimizer"),
    "train.optimizer_params.eps": argument("eps", "train.optimizer", "adam_epsilon"),
    **arguments("train.optimizer", "train.optimizer_params."),
    "train.lr_scheduler": taking("--lr_scheduler", "", _scheduler),
    "train.gradient_accumulation": otherwise(
        "gradient_accumulation_steps", "is called so", whole),
    "train.gradient_accumulation_steps": absent(
        "counts micro-batches as steps there; gradient_accumulation is ours", idle=(1,)),
    "train.train_unet": Row("", "", lambda value, given: Taken(
        "needless", reason="is always so here") if truth(value) else Taken(
        "absent", reason="is not there: the UNet is always trained")),
    "train.noise_scheduler": absent(
        "is the base's own: DDPM's noise", idle=("ddpm", "ddim", "euler", "euler_a")),
    "train.dtype": among(
        "mixed_precision", PRECISIONS, "is the frozen base's; the LoRA is float32",
        "is fp16, bf16 or float32 here"),
    "train.min_denoising_steps": _denoising("min_timestep", 0, 0),
    "train.max_denoising_steps": _denoising("max_timestep", 1000, 1),
    "train.snr_gamma": absent("is not there: min_snr_gamma is, --snr_gamma"),
    "train.content_or_style": among(
        "timestep_sampling", {"balanced": "uniform", "content": "cubic", "style": "cubic_reversed"},
        "is --timestep_sampling, a shape", "is not there"),
    "train.timestep_type": needless("belongs to flow models"),
    "train.linear_timesteps": needless("belongs to flow models"),
    "train.bypass_guidance_embedding": needless("belongs to flow models"),
    "train.loss_type": among(
        "loss_type", {"mse": "l2", "mae": "l1"}, "", "is not there"),
    "train.loss_target": absent(_ONE, idle=("noise",)),
    "train.ema_config": Row("--use_ema and --ema_decay", "", lambda value, given: Taken(
        "needless", reason="is off") if is_off((value or {}).get("use_ema")) else Taken(
        "same", {"use_ema": True, "ema_decay": (value or {}).get("ema_decay", 0.999)})),
    "train.disable_sampling": taking("--num_validation_images 0", "", _disabled),
    "train.skip_first_sample": absent("is not there: the first samples show the base"),
    "train.force_first_sample": needless("is always so here"),
    "train.cache_text_embeddings": needless(
        "is always so here for text encoders that do not learn"),
    "train.unload_text_encoder": needless("is not needed: their embeddings are cached"),
    "train.diff_output_preservation": switch(
        "--output_preservation class", "is a kind of preservation", output_preservation="class",
        preservation_sampler_steps=0),
    "train.blank_prompt_preservation": switch(
        "--output_preservation blank", "is a kind of preservation", output_preservation="blank",
        preservation_sampler_steps=0),
    **{f"train.{kind}_preservation_multiplier": otherwise(
        "preservation_weight", "is one for both kinds", number)
       for kind in ("diff_output", "blank_prompt")},
    "train.xformers": needless("is not needed: PyTorch's own attention is always used"),
    "train.sdp": needless("is not needed: PyTorch's own attention is always used"),
    "train.attention_backend": absent("is PyTorch's own", idle=("native",)),
    "train.reg_weight": otherwise("prior_loss_weight", "is called so", number),
    "train.prompt_dropout_prob": otherwise("caption_dropout", "is one for both encoders", number),
    "train.switch_boundary_every": needless("belongs to other models"),
    "train.start_step": needless("is not needed: a resumed run goes on at the same image"),
    "train.lr_scheduler_params": needless("belongs to a setting that is off or not there"),
    "save.dtype": among("save_precision", FILE_PRECISIONS, "", "is fp32, fp16 or bf16 here"),
    "save.save_every": of_steps(
        "is whole states to resume from as well", "save_lora_every", "checkpointing_steps"),
    "save.save_format": needless("is diffusers' and kohya's file here, both"),
    "save.hf_repo_id": of_push("hub_model_id", "save.push_to_hub"),
    "save.hf_private": of_push("hub_private_repo", "save.push_to_hub"),
    "sample.prompts": taking("--sample_prompts", "", _prompts),
    "sample.samples": taking("--sample_prompts", "", _prompts),
    "sample.sampler": needless("is DPM-Solver++ always"),
    **{f"sample.{name}": read_with("sample.prompts", "--sample_prompts") for name in SHARED},
    "sample.walk_seed": read_with("sample.prompts", "--sample_prompts"),
    **dict.fromkeys(("sample.sample_start_step", "sample.num_frames", "sample.fps",
        "sample.format", "sample.ext"), needless("is about the program itself")),
    **dict.fromkeys(("device", "sqlite_db_path", "performance_log_every", "log_dir",
        "version"), needless("is about the program itself")),
    "logging.use_wandb": switch("--report_to wandb", "is a tracker", report_to="wandb"),
    **dict.fromkeys(("logging.log_every", "logging.verbose", "logging.use_ui_logger",
        "logging.project_name", "logging.run_name"), needless("is about the program itself")),
    "embedding.trigger": otherwise("token_abstraction", "is a new word: add it to captions", str),
    "embedding.save_format": needless("is safetensors"),
}  # fmt: skip
"""Key → row."""

WHOLE = ("network.network_kwargs", "train.ema_config", "train.lr_scheduler_params",
         "model.model_kwargs", "model.quantize_kwargs")  # fmt: skip
"""Tables that a row reads as one."""


PREFIXES = {
    "adapter.": absent("is not there"),
    "slider.": absent("is not there: LoRAs are trained"),
}
"""Beginning of a key → row."""


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a job's first process, with dots for inner tables.

    Raises:
        UsageError: no table of settings, or no list of processes.
    """
    config = settings.get("config", settings)
    processes = config.get("process") or [{}] if isinstance(config, dict) else None
    if not isinstance(processes, list) or not isinstance(processes[0], dict):
        raise UsageError("config is no table with a list of tables as its process")
    found = {k: v for k, v in config.items() if k != "process"}
    found |= _flat(processes[0], "")
    if len(processes) > 1:
        found["process"] = f"{len(processes)} of them"
    return found


def _flat(table: dict[str, Any], before: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and name not in WHOLE:
            found |= _flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def defaults(given: Given) -> dict[str, Any]:
    """ai-toolkit's values where nothing is given, and those here are others."""
    found: dict[str, Any] = {
        "network.type": "lora",
        "network.alpha": 1.0,
        "train.lr": 1e-6,
        "train.steps": 1000,
        "train.batch_size": 1,
        "train.gradient_checkpointing": True,
        "train.dtype": "fp32",
        "save.dtype": "float16",
        "save.save_every": 1000,
        "save.max_step_saves_to_keep": 5,
    }
    return {name: value for name, value in found.items() if name not in given}
