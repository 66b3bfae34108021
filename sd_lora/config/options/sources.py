"""Options of the sources of images; and the sources that they describe."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sd_lora.config.kohya import read_dataset_config
from sd_lora.config.options.per_source import PerSourceOptions
from sd_lora.config.rows import (
    CAPTIONS,
    DATA_SET,
    DATASET_FILE,
    LAYOUTS,
    SAME,
    SUBJECT_FOLDER,
    Section,
    by_mode,
    section,
)
from sd_lora.config.sources import RULES, CaptionRules, SourceSpec, read_specs
from sd_lora.errors import Problem

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

option = section("data")


class SourceOptions(Section):
    """Folders, data sets, and the origin of their captions."""

    # fmt: off
    train_data_dir: str | None = option(None,
        "folder of images with metadata.jsonl, metadata.csv or .txt captions",
        only="text_to_image", may_change=True, scripts="AB", kohya=SAME, onetrainer="concepts",
        ai_toolkit="datasets.folder_path", in_record="name")
    dataset_name: str | None = option(None,
        "a `datasets` set: a hub name or a local folder",
        may_change=True, scripts="ABD", in_record="name")
    dataset_config_name: str | None = option(None,
        "configuration of the set",
        requires={"dataset_name": None}, scripts="ABD")
    split: str = option("train",
        "split of the set; test[:100] is a part of one",
        requires={"dataset_name": None})
    streaming: bool = option(False,
        "read the set row by row instead of downloading it first, for sets larger than the "
        "disk; needs cached latents",
        requires={"dataset_name": None})
    sources: list[dict[str, Any]] | None = option(None,
        "several sources in one run: [[sources]] tables of a TOML file, each with a path or "
        "dataset, repeats, weight, and caption rules",
        may_change=True)
    dataset_config: str | None = option(None,
        "kohya's dataset configuration: a TOML or JSON file with [[datasets]] and "
        "[[datasets.subsets]]",
        may_change=True, kohya=SAME, in_record="name")
    data_layout: str = option("auto",
        "meaning of subfolders: kohya's 'N_token class' folders with their repeats, or a "
        "plain tree; auto: kohya's where nothing else lies beside them",
        choices=LAYOUTS,
        ignored_by=(*SUBJECT_FOLDER, *DATA_SET, *DATASET_FILE))
    captions_from: str | None = option(None,
        "origin of captions: metadata files, sidecar files (.txt, .caption), file names of "
        "the images, or one for all, caption_default or instance_prompt; auto: metadata, else "
        "sidecars. instance_data_dir has one for all if nothing is said of captions",
        modes=by_mode("auto", None), choices=CAPTIONS, onetrainer="text.prompt_source",
        ignored_by=DATASET_FILE)
    caption_default: str | None = option(None,
        "caption of images without one; if not given, they are left out",
        only="text_to_image",
        ignored_by=DATASET_FILE, ai_toolkit="datasets.default_caption")
    strict: bool = option(False,
        "stop if the check of the data leaves out an image or warns",
        may_change=True)
    caption_column: str | None = option(None,
        "column of the captions, each a text or a list of texts; in dreambooth runs "
        "instance_prompt if not given",
        modes=by_mode("text", None), scripts="ABD")
    leave_out: str | None = option(None,
        "images that are neither trained nor held out: their names or patterns, between commas, "
        "such as '07.png, blurred/*'",
        may_change=True)
    max_train_samples: int | None = option(None,
        "train on this number of images, chosen by the seed",
        ge=1, only="text_to_image", scripts="AB")
    # fmt: on

    @property
    def places(self) -> list[str]:
        """Options that say where images are, of those given."""
        folder = FOLDER[self.mode]  # type: ignore[attr-defined]
        return [name for name in (folder, *ELSEWHERE) if getattr(self, name)]

    @property
    def has_own_tables(self) -> bool:
        """Whether a file describes the sources one by one, with their prompts and kinds."""
        return bool(self.sources or self.dataset_config)


FOLDER = {"text_to_image": "train_data_dir", "dreambooth": SUBJECT_FOLDER[0]}
"""Mode → option with its folder of images."""

ELSEWHERE = (*DATA_SET, "sources", *DATASET_FILE)
"""Other options with the place of images."""


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield other than one place of images."""
    given, all_places = config.places, [FOLDER[config.mode], *ELSEWHERE]
    one_of = f"one of {', '.join(all_places[:-1])} and {all_places[-1]}"
    if not given:
        yield Problem(all_places[0], f"no folder or set of images is given: give {one_of}")
    elif len(given) > 1:
        yield Problem(given[1], f"give {one_of}, not both {given[0]} and {given[1]}")


def caption_files(config: "TrainConfig") -> dict[str, Any]:
    """The column and extension of caption files, where they are given."""
    names = [f.name for f in dataclasses.fields(SourceSpec) if f.name.startswith("caption_")]
    return {name: value for name in names if (value := getattr(config, name)) is not None}


def captions_of_folder(config: "TrainConfig") -> str:
    """The origin of captions of a DreamBooth folder: one prompt, unless anything is said of
    captions."""
    return config.captions_from or ("auto" if caption_files(config) else "prompt")


def source_defaults(config: "TrainConfig") -> SourceSpec:
    """The values that a source has unless its table says otherwise."""
    own = {name: getattr(config, name) for name in PerSourceOptions.model_fields}
    rules = {name: own.pop(name) for name in RULES}
    given = {name: value for name, value in rules.items() if value is not None}
    values: dict[str, Any] = own | {
        "cache_dir": config.cache_dir,
        "caption_column": config.caption_column,
        "layout": config.data_layout,
        "captions": config.captions_from or "auto",
        "prompt": config.caption_default or config.instance_prompt,
    }
    return SourceSpec(**values, rules=CaptionRules(**given))


def source_specs(config: "TrainConfig") -> list[SourceSpec]:
    """The sources that a configuration names, without the folder of class images.

    Raises:
        UsageError: a wrong table or file of sources.
    """
    defaults = source_defaults(config)
    if config.sources is not None:
        column = config.caption_column or "text"  # DreamBooth's own default is None
        defaults = dataclasses.replace(defaults, caption_column=column)
        return read_specs(config.sources, defaults, "sources")
    if config.dataset_config:
        return read_dataset_config(config.dataset_config)[0]
    spec = dataclasses.replace(defaults, label=config.places[0])
    if config.dataset_name:
        return [
            dataclasses.replace(
                spec,
                dataset=config.dataset_name,
                config_name=config.dataset_config_name,
                split=config.split,
                streaming=config.streaming,
            )
        ]
    spec = dataclasses.replace(spec, path=getattr(config, config.places[0]))
    if config.is_dreambooth:
        spec = dataclasses.replace(
            spec, layout="plain", captions=captions_of_folder(config), recursive=False,
            **{"caption_column": "text"} | caption_files(config),
        )  # fmt: skip
    return [spec]
