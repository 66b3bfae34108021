"""Contradictions of a configuration: options that exclude each other, or have no effect together.

The simple ones ("X has no effect without Y") are in the rows (`requires`, `only`); here are the
functions for the others. Each yields problems.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sd_lora.config.rows import Option
from sd_lora.config.sources import RULES, empty_text
from sd_lora.errors import Problem

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

LEAVE_OUT = "Leave it out"


def contradictions(
    config: "TrainConfig", options: Mapping[str, Option], wrong: Collection[str]
) -> list[Problem]:
    """All contradictions of a configuration.

    options: its rows. wrong: options with wrong values, which have their defaults in `config`.
    """
    found = [*_by_rows(config, options), *_model(config), *_sources(config, options)]
    for check in (_data, _dreambooth, _text, _adapter, _objective, _samples):
        found += check(config)
    return [problem for problem in found if problem.field not in wrong]


def _by_rows(config: "TrainConfig", options: Mapping[str, Option]) -> Iterator[Problem]:
    """Options of another mode, and options without effect for want of another one."""
    for name, option in options.items():
        value = getattr(config, name)
        if not option.is_given(value):
            continue
        if option.only and option.only != config.mode:
            yield Problem(name, f"{name} has an effect in {option.only} runs only", LEAVE_OUT)
            continue
        for other, values in option.requires.items():
            theirs = getattr(config, other)
            if theirs in values if values else theirs:
                continue
            why = _missing(options[other], values, theirs)
            yield Problem(name, f"{name} has no effect {why}", LEAVE_OUT)


def _missing(other: Option, values: tuple[Any, ...] | None, theirs: Any) -> str:
    """The reason in words: "without train_text_encoder", "with method full"."""
    if not values:
        return f"without {other.name}"
    if other.kind == "bool":
        return f"with{'' if theirs else 'out'} {other.name}"
    if len(values) == len(other.choices) - 1:  # all but one
        return f"with {other.name} {theirs}"
    return f"without {other.name} {' or '.join(map(str, values))}"


def _model(config: "TrainConfig") -> Iterator[Problem]:
    name = "pretrained_model_name_or_path"
    if not config.pretrained_model_name_or_path:
        yield Problem(name, f"{name} is required: a folder, a file or a hub id")


OF_FOLDERS = ("captions_from", "caption_extension", "data_layout")
WITHOUT_EFFECT = {
    "instance_data_dir": (*OF_FOLDERS, "caption_column", "image_column"),
    "dataset_name": OF_FOLDERS[1:],
    "dataset_config": (
        *OF_FOLDERS, *RULES, "caption_default", "center_crop", "random_flip", "repeats",
    ),
}  # fmt: skip
"""Option with the place of the images → options that it ignores."""


def _sources(config: "TrainConfig", options: Mapping[str, Option]) -> Iterator[Problem]:
    """Places of images: exactly one, and no options that it ignores."""
    folder = "train_data_dir" if config.mode == "text_to_image" else "instance_data_dir"
    places = (folder, "dataset_name", "sources", "dataset_config")
    given = [name for name in places if getattr(config, name)]
    if len(given) != 1:
        found = f"both {given[0]} and {given[1]}" if given else "none"
        text = f"give one of {', '.join(places[:-1])} and {places[-1]}, not {found}"
        yield Problem(given[1] if given else folder, text)
        return
    for name in WITHOUT_EFFECT.get(given[0], ()):
        if options[name].is_given(getattr(config, name)):
            yield Problem(name, f"{name} has no effect with {given[0]}", LEAVE_OUT)


def _data(config: "TrainConfig") -> Iterator[Problem]:
    """Streams, texts of caption rules, sides of buckets, class images."""
    random = config.center_crop is False or (
        config.center_crop is None and not config.aspect_ratio_buckets
    )
    if config.streaming and config.cache_latents == "no":
        text = "streaming can read each image once only, and cache_latents is no"
        yield Problem("streaming", text, "Cache the latents")
    if config.streaming and random:
        text = "streaming can read each image once only, and crops are random"
        yield Problem("streaming", text, "Give center_crop")
    for name in ("caption_separator", "keep_tokens_separator", "trigger_word", "caption_extension"):
        problem = empty_text(name, getattr(config, name))
        if problem:
            yield problem
    shortest, longest = config.bucket_min_side, config.bucket_max_side
    if shortest is not None and longest is not None and shortest > longest:
        yield Problem("bucket_min_side", "bucket_min_side must not be above bucket_max_side")
    may_have_classes = config.with_prior_preservation or config.sources or config.dataset_config
    if config.prior_loss_weight != 1 and not may_have_classes:
        text = "prior_loss_weight has no effect without class images"
        yield Problem("prior_loss_weight", text, LEAVE_OUT)
    tagged = config.shuffle_caption or config.caption_tag_dropout or config.sources is not None
    for name in ("keep_tokens", "keep_tokens_separator"):
        if getattr(config, name) and not tagged:
            text = f"{name} has no effect without shuffle_caption or caption_tag_dropout"
            yield Problem(name, text, LEAVE_OUT)


def _dreambooth(config: "TrainConfig") -> Iterator[Problem]:
    """Prompts and folders of DreamBooth."""
    if config.mode != "dreambooth":
        return
    if not (config.instance_prompt or config.sources or config.dataset_config):
        text = "instance_prompt is required, for example 'a photo of sks dog'"
        yield Problem("instance_prompt", text)
    for name in ("class_data_dir", "class_prompt"):
        if config.with_prior_preservation and not getattr(config, name):
            yield Problem(name, f"with_prior_preservation needs {name}")


def _text(config: "TrainConfig") -> Iterator[Problem]:
    """Text encoders, weighted prompts and new words."""
    left_out = config.text_encoder_rank == 0 and not config.text_encoder_2_rank
    if config.train_text_encoder and left_out:
        text = "train_text_encoder with text_encoder_rank 0 trains no text encoder"
        yield Problem("text_encoder_rank", text)
    learning = config.train_text_encoder or config.token_abstraction
    if config.weighted_prompts and learning:
        text = "weighted_prompts needs text encoders that do not learn: compel encodes once only"
        yield Problem("weighted_prompts", text)
    if config.weighted_prompts and config.clip_skip:
        text = "weighted_prompts excludes clip_skip: compel has none for these models"
        yield Problem("weighted_prompts", text)
    if config.token_abstraction is not None and not config.token_abstraction.strip(" ,"):
        yield Problem("token_abstraction", "token_abstraction names no word")


def _adapter(config: "TrainConfig") -> Iterator[Problem]:
    """Ranks of text encoders without a rank, and PiSSA."""
    for name in ("text_encoder_rank", "text_encoder_2_rank"):
        if config.method == "full" and getattr(config, name):  # 0 leaves an encoder out
            yield Problem(name, f"{name} has no effect with method full", LEAVE_OUT)
    excluded = [n for n in ("use_tucker", "scale_weight_norms") if getattr(config, n)]
    if config.init_lora_weights == "pissa" and excluded:
        text = f"init_lora_weights pissa excludes {' and '.join(excluded)}"
        yield Problem("init_lora_weights", text)


def _objective(config: "TrainConfig") -> Iterator[Problem]:
    """Timesteps, and two weightings at once."""
    if config.max_timestep is not None and config.max_timestep <= config.min_timestep:
        yield Problem("max_timestep", "max_timestep must be above min_timestep")
    if config.do_edm_style_training and config.snr_gamma is not None:
        text = "do_edm_style_training excludes snr_gamma: each weights the losses"
        yield Problem("do_edm_style_training", text)


def _samples(config: "TrainConfig") -> Iterator[Problem]:
    if config.validation_prompt and not config.num_validation_images:
        text = "validation_prompt has no effect with num_validation_images 0"
        yield Problem("validation_prompt", text, LEAVE_OUT)
