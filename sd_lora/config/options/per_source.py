"""Options that each source of images may have of its own."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sd_lora.config.rows import DATA_SET, DATASET_FILE, SAME, SUBJECT_FOLDER, Section, section
from sd_lora.errors import Problem

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

option = section("data")


class PerSourceOptions(Section):
    """Caption rules, columns, repeats and flips."""

    # fmt: off
    shuffle_caption: bool = option(False,
        "shuffle the tags of captions each time",
        header="ss_shuffle_caption", dataset_key=True, kohya=SAME,
        onetrainer="text.enable_tag_shuffling", ignored_by=DATASET_FILE,
        ai_toolkit="datasets.shuffle_tokens")
    keep_tokens: int = option(0,
        "tags at the start of captions to keep in place, neither shuffled nor dropped",
        ge=0, header="ss_keep_tokens", header_form="if given", dataset_key=True, kohya=SAME,
        onetrainer="text.keep_tags_count",
        ignored_by=DATASET_FILE, ai_toolkit="datasets.keep_tokens")
    keep_tokens_separator: str | None = option(None,
        "mark in captions, for example |||: tags before it are neither shuffled nor dropped",
        dataset_key=True, kohya=SAME,
        ignored_by=DATASET_FILE)
    caption_separator: str = option(",",
        "separator between tags",
        dataset_key=True, kohya=SAME, onetrainer="text.tag_delimiter",
        ignored_by=DATASET_FILE)
    caption_tag_dropout: float = option(0.0,
        "share of the tags dropped each time",
        ge=0, lt=1, header="ss_caption_tag_dropout_rate", header_form="if given", dataset_key=True,
        kohya="caption_tag_dropout_rate",
        onetrainer="text.tag_dropout_probability",
        ignored_by=DATASET_FILE, ai_toolkit="datasets.token_dropout_rate")
    caption_prefix: str | None = option(None,
        "text before each caption, with a space",
        dataset_key=True, kohya=SAME,
        ignored_by=DATASET_FILE)
    caption_suffix: str | None = option(None,
        "text after each caption, with a space",
        dataset_key=True, kohya=SAME,
        ignored_by=DATASET_FILE)
    wildcards: bool = option(False,
        "captions may have {a|b}: one of them each time; of captions with several lines one "
        "is used",
        dataset_key=True, kohya="enable_wildcard",
        ignored_by=DATASET_FILE)
    trigger_word: str | None = option(None,
        "first tag of each caption, unless the caption has it already",
        ignored_by=DATASET_FILE, ai_toolkit="trigger_word")
    caption_dropout: float = option(0.0,
        "share of the instances trained without their caption, so that guidance learns too; "
        "0.1 is usual. Without a caption means zeros for SDXL, as its guidance has it, and "
        "the empty prompt for SD 1 and 2; class images keep theirs",
        ge=0, lt=1, header="ss_caption_dropout_rate", summary=("captions", "{:.0%} dropped"),
        dataset_key=True, kohya="caption_dropout_rate",
        onetrainer="text_encoder.dropout_probability",
        simpletuner="caption_dropout_probability",
        ignored_by=DATASET_FILE, ai_toolkit="train.prompt_dropout_prob")
    caption_extension: str | None = option(None,
        "extension of caption files; .txt and .caption if not given",
        dataset_key=True, kohya=SAME,
        ignored_by=(*DATA_SET, *DATASET_FILE), ai_toolkit="datasets.caption_ext")
    mask_files: bool = option(False,
        "train the masked part of images: white in their masks counts in the loss, black does "
        "not. Masks lie beside their images (NAME-masklabel.png, NAME_mask.png, masks/NAME.png); "
        "otherwise they are left out",
        ignored_by=(*DATA_SET, *DATASET_FILE))
    mask_folder: str | None = option(None,
        "folder of masks, each with the name of its image; as mask_files",
        dataset_key="conditioning_data_dir",
        ignored_by=(*DATA_SET, *DATASET_FILE), in_record="name")
    image_column: str = option("image",
        "column of the images",
        scripts="ABD",
        ignored_by=SUBJECT_FOLDER)
    resolutions: list[int] | None = option(None,
        "train each image at each of these resolutions, in buckets of its own for each; the "
        "largest is the default of resolution, the side of sample and class images",
        ignored_by=DATASET_FILE)
    repeats: int = option(1,
        "uses of each image per epoch; sources and kohya's folders have their own",
        ge=1, scripts="D", dataset_key="num_repeats", kohya="dataset_repeats",
        ignored_by=DATASET_FILE, ai_toolkit="datasets.num_repeats")
    random_flip: bool = option(False,
        "mirror images half of the time",
        header="ss_flip_aug", dataset_key=True, scripts="ABD", kohya="flip_aug",
        onetrainer="image.enable_random_flip",
        ignored_by=DATASET_FILE, ai_toolkit="datasets.flip_x")
    # fmt: on

    @property
    def reads_masks(self) -> bool:
        """Whether masks are read from files."""
        return self.mask_files or self.mask_folder is not None


NEVER_BLANK = ("trigger_word", "caption_extension")
NEVER_EMPTY = ("caption_separator", "keep_tokens_separator")
"""Texts that need a character; the first two need one that is no space."""


def empty_text(name: str, value: object) -> Problem | None:
    """The problem of a text that must not be empty."""
    blank = isinstance(value, str) and not (value.strip() if name in NEVER_BLANK else value)
    if blank and name in (*NEVER_BLANK, *NEVER_EMPTY):
        return Problem(name, f"{name} must not be empty")
    return None


def wrong_value(name: str, value: object) -> Problem | None:
    """The problem of an option's value that its type and range do not show."""
    if name == "resolutions" and isinstance(value, list):
        if not value or min(value) < 1 or len(set(value)) < len(value):
            text = f"resolutions must be whole numbers of at least 1, each once, not {value}"
            return Problem(name, text)
    return empty_text(name, value)


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield wrong values, and kept tags where no tag moves."""
    for name in PerSourceOptions.model_fields:
        problem = wrong_value(name, getattr(config, name))
        if problem:
            yield problem
    tagged = config.shuffle_caption or config.caption_tag_dropout or config.sources is not None
    for name in ("keep_tokens", "keep_tokens_separator"):
        if getattr(config, name) and not tagged:
            text = f"{name} has no effect without shuffle_caption or caption_tag_dropout"
            yield Problem(name, text, "Leave it out")
