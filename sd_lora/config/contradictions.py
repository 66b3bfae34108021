"""What a configuration may not say: values out of their range, and contradictions."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from sd_lora.config.sources import RULES
from sd_lora.errors import did_you_mean

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

AT_LEAST: dict[str, float] = {
    "adam_weight_decay": 0,
    "adam_weight_decay_text_encoder": 0,
    "bucket_max_side": 1,
    "bucket_min_pictures": 1,
    "bucket_min_side": 1,
    "bucket_step": 1,
    "checkpoints_total_limit": 1,
    "conv_rank": 1,
    "clip_skip": 0,
    "dataloader_num_workers": 0,
    "embedding_stop_step": 0,
    "gradient_accumulation_steps": 1,
    "keep_tokens": 0,
    "lokr_factor": 1,
    "lr_num_cycles": 1,
    "lr_warmup_steps": 0,
    "max_grad_norm": 0,
    "max_timestep": 1,
    "max_token_length": 75,
    "max_train_samples": 1,
    "max_train_steps": 1,
    "min_timestep": 0,
    "noise_offset": 0,
    "num_class_images": 1,
    "num_new_tokens_per_abstraction": 1,
    "num_train_epochs": 1,
    "num_validation_images": 0,
    "prior_loss_weight": 0,
    "rank": 1,
    "repeats": 1,
    "resolution": 1,
    "sample_batch_size": 1,
    "text_encoder_2_rank": 0,
    "text_encoder_2_stop_step": 0,
    "text_encoder_rank": 0,
    "text_encoder_stop_step": 0,
    "train_batch_size": 1,
    "validation_epochs": 1,
    "validation_steps": 1,
    "checkpointing_steps": 1,
}
ABOVE_ZERO = frozenset(
    (
        "adam_epsilon",
        "conv_alpha",
        "data_cache_limit",
        "embedding_lr",
        "learning_rate",
        "lora_alpha",
        "loraplus_lr_ratio",
        "scale_weight_norms",
        "snr_gamma",
        "text_encoder_2_alpha",
        "text_encoder_2_lr",
        "text_encoder_alpha",
        "text_encoder_lr",
    )
)
DROPOUTS = ("lora_dropout", "neuron_dropout", "rank_dropout", "module_dropout")
BELOW_ONE = frozenset(
    ("adam_beta1", "adam_beta2", "caption_dropout", "caption_tag_dropout", *DROPOUTS)
)


def type_name(field: dataclasses.Field) -> str:
    """Returns a field's plain type: "int", "float", "bool", "str", "dict" or "list"."""
    text = str(field.type) if not isinstance(field.type, type) else field.type.__name__
    for name in ("dict", "list", "bool", "float", "int"):
        if text.startswith(name):
            return name
    return "str"


def type_problem(field: dataclasses.Field, value: object) -> str:
    """Returns what a value should have been ("must be a whole number"), or an empty string."""
    kind = type_name(field)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "bool": isinstance(value, bool),
        "int": number and isinstance(value, int),
        "float": number,
        "str": isinstance(value, str),
        "dict": isinstance(value, dict),
        "list": isinstance(value, list) and all(isinstance(entry, dict) for entry in value),
    }
    words = {
        "bool": "must be true or false",
        "int": "must be a whole number",
        "float": "must be a number",
        "str": "must be a text",
        "dict": "must be a table of pattern = number",
        "list": "must be tables, [[sources]] in TOML",
    }
    return "" if fits[kind] else words[kind]


def problems_of(config: "TrainConfig") -> list[str]:
    """Returns all that is wrong with a configuration, a line each."""
    wrong = _wrong_values(config)
    # arithmetic is for numbers
    return [*wrong, *_contradictions(config), *([] if wrong else _impossible_numbers(config))]


def _impossible_numbers(config: "TrainConfig") -> list[str]:
    problems = []
    if config.max_token_length % 75:
        problems.append(f"max_token_length must be a multiple of 75, not {config.max_token_length}")
    if config.max_timestep is not None and config.max_timestep <= config.min_timestep:
        problems.append("max_timestep must be above min_timestep")
    if config.weighted_prompts and config.clip_skip:
        problems.append("weighted_prompts goes without clip_skip: compel has none for these models")
    return problems


def _wrong_values(config: "TrainConfig") -> list[str]:
    """Returns what is out of its range, or of another type than it should be."""
    problems = []
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata["choices"]
        if value is None:
            continue
        wrong = type_problem(field, value)
        if wrong:
            problems.append(f"{field.name} {wrong}, not {value!r}")
        elif choices and value not in choices:
            hint = did_you_mean(str(value), choices)
            problems.append(f"{field.name} is one of {', '.join(choices)}, not {value!r}.{hint}")
        elif field.name in AT_LEAST and value < AT_LEAST[field.name]:
            least = AT_LEAST[field.name]
            problems.append(f"{field.name} must be at least {least}, not {value}")
        elif field.name in ABOVE_ZERO and value <= 0:
            problems.append(f"{field.name} must be above 0, not {value}")
        elif field.name in BELOW_ONE and not 0 <= value < 1:
            problems.append(f"{field.name} must be at least 0 and below 1, not {value}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{field.name} must be a finite number, not {value}")
        elif isinstance(value, dict):
            problems += _wrong_patterns(field.name, value)
    return problems


def _wrong_patterns(name: str, table: dict[str, Any]) -> list[str]:
    whole = name == "rank_pattern"
    kinds, least = (int, "a whole number of at least 1") if whole else (int | float, "above 0")
    return [
        f"{name} {pattern!r} must be {least}, not {value!r}"
        for pattern, value in table.items()
        if isinstance(value, bool)
        or not isinstance(value, kinds)
        or not (value > 0 and math.isfinite(value))
    ]


def _contradictions(config: "TrainConfig") -> list[str]:
    problems = []
    for field in dataclasses.fields(config):
        only = field.metadata["only"]
        if only and only != config.mode and getattr(config, field.name) != field.default:
            problems.append(f"{field.name} means something in {only} runs only")
    if not config.pretrained_model_name_or_path:
        problems.append("pretrained_model_name_or_path is required: a folder or a hub id")
    problems += _data_contradictions(config)
    if config.mode == "dreambooth":
        problems += _dreambooth_contradictions(config)
    if config.validation_prompt and not config.num_validation_images:
        problems.append("validation_prompt has no effect with num_validation_images 0")
    schedules = {"lr_num_cycles": "cosine_with_restarts", "lr_power": "polynomial"}
    for name, schedule in schedules.items():
        if getattr(config, name) != getattr(type(config), name) and config.lr_scheduler != schedule:
            problems.append(f"{name} has no effect without lr_scheduler {schedule}")
    return [*problems, *_text_contradictions(config), *_adapter_contradictions(config)]


_OF_FOLDERS = ("captions_from", "caption_extension", "data_layout")
NO_EFFECT = {
    "instance_data_dir": _OF_FOLDERS,
    "dataset_name": _OF_FOLDERS[1:],
    "dataset_config": (
        *_OF_FOLDERS, *RULES, "caption_default", "center_crop", "random_flip", "repeats",
    ),
}  # fmt: skip
"""Where images come from → settings that say nothing of them."""


def _data_contradictions(config: "TrainConfig") -> list[str]:
    """Returns what is wrong with where images come from, and with their shapes."""
    folder = "train_data_dir" if config.mode == "text_to_image" else "instance_data_dir"
    places = (folder, "dataset_name", "sources", "dataset_config")
    given = [name for name in places if getattr(config, name)]
    problems = []
    if len(given) != 1:
        got = f"both {given[0]} and {given[1]}" if given else "none"
        problems.append(f"give one of {', '.join(places[:-1])} and {places[-1]}, not {got}")
    if len(given) == 1:
        problems += [
            f"{field.name} has no effect with {given[0]}"
            for field in dataclasses.fields(config)
            if field.name in NO_EFFECT.get(given[0], ())
            and getattr(config, field.name) != field.default
        ]
    if not config.dataset_name:
        for name in ("dataset_config_name", "streaming"):
            if getattr(config, name):
                problems.append(f"{name} has no effect without dataset_name")
    if config.streaming and config.cache_latents == "no":
        problems.append("streaming cannot read an image again, and so needs cached latents")
    drawn = (
        not config.aspect_ratio_buckets if config.center_crop is None else not config.center_crop
    )
    if config.streaming and drawn:
        problems.append("streaming cannot read an image again, and so needs center_crop")
    for name in ("caption_separator", "keep_tokens_separator", "trigger_word", "caption_extension"):
        value = getattr(config, name)
        if isinstance(value, str) and (not value or (name == "trigger_word" and not value.strip())):
            problems.append(f"{name} must not be empty")
    sides = (config.bucket_min_side, config.bucket_max_side)
    if None not in sides and sides[0] > sides[1]:  # type: ignore[operator]
        problems.append("bucket_min_side must not be above bucket_max_side")
    may_have_classes = config.with_prior_preservation or config.sources or config.dataset_config
    if config.prior_loss_weight != 1 and not may_have_classes:
        problems.append("prior_loss_weight has no effect without class images")
    if not config.aspect_ratio_buckets:
        for field in dataclasses.fields(config):
            name = field.name
            if name.startswith("bucket_") and name != "bucket_leftovers":
                if getattr(config, name) != field.default:
                    problems.append(f"{name} has no effect without aspect_ratio_buckets")
    tagged = config.shuffle_caption or config.caption_tag_dropout
    if not tagged and config.sources is None:
        for name in ("keep_tokens", "keep_tokens_separator"):
            if getattr(config, name):
                problems.append(f"{name} needs shuffle_caption or caption_tag_dropout")
    return problems


def _text_contradictions(config: "TrainConfig") -> list[str]:
    """Returns settings of text encoders and new words that have no effect or cannot be meant."""
    problems = [
        f"{name} needs train_text_encoder"
        for name in (field.name for field in dataclasses.fields(config))
        if (name.startswith("text_encoder_") or name == "adam_weight_decay_text_encoder")
        and getattr(config, name) is not None
        and not config.train_text_encoder
    ]
    if (
        config.train_text_encoder
        and config.text_encoder_rank == 0
        and not config.text_encoder_2_rank
    ):
        problems.append("train_text_encoder with text_encoder_rank 0 trains no text encoder")
    if config.weighted_prompts and (config.train_text_encoder or config.token_abstraction):
        problems.append(
            "weighted_prompts needs text encoders that are not trained: compel's embeddings are "
            "computed once"
        )
    if config.token_abstraction is not None and not config.token_abstraction.strip(" ,"):
        problems.append("token_abstraction names no word")
    needs_words = ("embedding_lr", "embedding_stop_step", "initializer_token")
    if not config.token_abstraction:
        given = [name for name in needs_words if getattr(config, name) is not None]
        if config.num_new_tokens_per_abstraction != 2:
            given.append("num_new_tokens_per_abstraction")
        problems += [f"{name} needs token_abstraction" for name in given]
    if config.do_edm_style_training and config.snr_gamma is not None:
        problems.append("do_edm_style_training weighs losses itself: it goes without snr_gamma")
    return problems


def _adapter_contradictions(config: "TrainConfig") -> list[str]:
    """Returns the settings that the method has no use for."""
    plain_lora = config.method in ("lora", "lora_fa")
    wants = {
        "init_lora_weights": (plain_lora, "method lora or lora_fa"),
        "use_tucker": (config.method != "full", "another method than full"),
        "use_rslora": (config.method != "full", "another method than full"),
        "rank_dropout": (config.method != "full", "another method than full"),
        "neuron_dropout": (plain_lora and not config.use_dora, "method lora without use_dora"),
        "loraplus_lr_ratio": (config.method == "lora", "method lora"),
        "lokr_factor": (config.method == "lokr", "method lokr"),
        "lokr_full_matrix": (config.method == "lokr", "method lokr"),
        "lokr_decompose_both": (config.method == "lokr", "method lokr"),
    }
    problems = [
        f"{name} needs {what}"
        for name, (met, what) in wants.items()
        if getattr(config, name) and not met
    ]
    if config.method == "full":  # what has no rank has no use for one
        ranks = ("lora_alpha", "conv_rank", "conv_alpha", "rank_pattern", "alpha_pattern")
        given = [name for name in ranks if getattr(config, name) is not None]
        named = ("text_encoder_alpha", "text_encoder_2_alpha")
        given += [name for name in named if getattr(config, name) is not None]
        named = ("text_encoder_rank", "text_encoder_2_rank")  # 0 leaves an encoder out
        given += [name for name in named if getattr(config, name)]
        given += ["rank"] if config.rank != type(config).rank else []
        problems += [f"{name} needs another method than full" for name in given]
    if config.lokr_decompose_both and config.lokr_full_matrix:
        problems.append("lokr_decompose_both has no effect with lokr_full_matrix")
    if config.init_lora_weights == "pissa" and (config.use_tucker or config.scale_weight_norms):
        problems.append(
            "init_lora_weights pissa goes with neither use_tucker nor scale_weight_norms"
        )
    return problems


def _dreambooth_contradictions(config: "TrainConfig") -> list[str]:
    problems = []
    if not (config.instance_prompt or config.sources or config.dataset_config):
        problems.append("instance_prompt is required, such as 'a photo of sks dog'")
    if config.instance_data_dir:
        for name in ("caption_column", "image_column"):
            if getattr(config, name) not in (None, type(config).image_column):
                problems.append(f"{name} has no effect with instance_data_dir")
    if config.with_prior_preservation:
        for name in ("class_data_dir", "class_prompt"):
            if not getattr(config, name):
                problems.append(f"with_prior_preservation needs {name}")
    else:
        named = "class_data_dir class_prompt num_class_images sample_batch_size "
        for name in f"{named}prior_generation_precision".split():
            if getattr(config, name) != getattr(type(config), name):
                problems.append(f"{name} has no effect without with_prior_preservation")
    return problems
