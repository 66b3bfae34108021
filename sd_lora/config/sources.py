"""A source of images as a user describes it; free of torch: flags are checked at once."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import ValidationError

from sd_lora.config.options.per_source import PerSourceOptions, wrong_value
from sd_lora.config.rows import CAPTIONS, LAYOUTS, Option, section
from sd_lora.config.values import problems_of
from sd_lora.errors import Problem, UsageError

Kind = Literal["instance", "class"]


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """Rules for captions, applied at each use of an image; see `caption_rules`.

    caption_dropout: share of the images used without a caption. shuffle_caption: shuffle the tags
    between separators, but the first keep_tokens of them, or those before keep_tokens_separator.
    caption_tag_dropout: share of these tags dropped. wildcards: {a|b} is one of them, and one of
    several lines is used. caption_prefix, caption_suffix: added with a space. trigger_word: the
    first tag, unless the caption has it already.
    """

    caption_dropout: float = 0.0
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str | None = None
    caption_separator: str = ","
    caption_tag_dropout: float = 0.0
    caption_prefix: str = ""
    caption_suffix: str = ""
    wildcards: bool = False
    trigger_word: str | None = None

    @property
    def varies(self) -> bool:
        """Whether a caption changes from use to use, apart from its dropout."""
        return self.shuffle_caption or self.caption_tag_dropout > 0 or self.wildcards


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One source of images; the rows of `SourceTable` describe its fields.

    label: its name in messages.
    """

    path: str | None = None
    dataset: str | None = None
    config_name: str | None = None
    split: str = "train"
    revision: str | None = None
    cache_dir: str | None = None
    streaming: bool = False
    image_column: str = "image"
    caption_column: str | None = "text"
    layout: str = "auto"
    captions: str = "auto"
    metadata_file: str | None = None
    caption_extension: str | None = None
    prompt: str | None = None
    recursive: bool = True
    resolutions: list[int] | None = None
    bucket_min_side: int | None = None
    bucket_max_side: int | None = None
    mask_files: bool = False
    mask_folder: str | None = None
    repeats: int = 1
    weight: float = 1.0
    kind: Kind = "instance"
    random_flip: bool = False
    random_crop: bool | None = None
    rules: CaptionRules = field(default_factory=CaptionRules)
    label: str = ""

    @property
    def trained_at(self) -> list[int | None]:
        """Its resolutions; [None], the run's, without any of its own."""
        return [*self.resolutions] if self.resolutions else [None]

    @property
    def where(self) -> str:
        """The name of the source in messages."""
        return self.label or self.path or self.dataset or "source"


option = section("source")


class SourceTable(PerSourceOptions):
    """The keys of a `[[sources]]` table."""

    # fmt: off
    path: str | None = option(None,
        "folder of images",
        in_record="name")
    dataset: str | None = option(None,
        "a `datasets` set instead: a hub name, a local folder, a parquet, json or csv file",
        in_record="name")
    config_name: str | None = option(None,
        "configuration of the set")
    split: str = option("train",
        "split of the set")
    revision: str | None = option(None,
        "hub revision of the set")
    cache_dir: str | None = option(None,
        "folder for downloaded sets",
        in_record="no")
    streaming: bool = option(False,
        "read the set row by row")
    caption_column: str | None = option("text",
        "column of the captions")
    layout: str = option("auto",
        "meaning of subfolders: kohya takes `N_token class` subfolders as sources of their own",
        choices=LAYOUTS)
    captions: str = option("auto",
        "origin of captions; auto: metadata, else sidecars, else prompt",
        choices=CAPTIONS)
    metadata_file: str | None = option(None,
        "file instead of each metadata.jsonl or .csv in the folder; its names are relative to "
        "path",
        in_record="name")
    prompt: str | None = option(None,
        "caption of images without one")
    recursive: bool = option(True,
        "read subfolders too")
    weight: float = option(1.0,
        "weight of each image's loss",
        gt=0)
    kind: str = option("instance",
        "instances to learn, or class images",
        choices=get_args(Kind))
    random_crop: bool | None = option(None,
        "crop at a random place; if not given, as the run does")
    bucket_min_side: int | None = option(None,
        "shortest side of a bucket in pixels; if not given, as in the run",
        ge=1)
    bucket_max_side: int | None = option(None,
        "longest side of a bucket in pixels; if not given, as in the run",
        ge=1)
    # fmt: on


RULES: dict[str, dataclasses.Field] = {f.name: f for f in dataclasses.fields(CaptionRules)}
SOURCE: dict[str, dataclasses.Field] = {
    f.name: f for f in dataclasses.fields(SourceSpec) if f.name not in ("rules", "label")
}
KEYS: dict[str, Option] = {n: Option.of(n, f) for n, f in SourceTable.model_fields.items()}
"""Key of a `[[sources]]` table → its row."""

OF_FOLDERS = (
    "layout", "metadata_file", "caption_extension", "recursive", "mask_files", "mask_folder",
)  # fmt: skip
OF_SETS = ("config_name", "split", "revision", "cache_dir", "streaming")
"""Keys without effect for the other of the two."""


def problems(spec: SourceSpec) -> list[str]:
    """Wrong values of a specification: ranges, choices, contradictions."""
    values = {name: getattr(spec, name) for name in SOURCE}
    found = _wrong_values(values | {name: getattr(spec.rules, name) for name in RULES})
    return [problem.line() for problem in found] + _contradictions(spec)


def _wrong_values(values: dict[str, Any]) -> list[Problem]:
    """Wrong types, ranges, choices and texts of a table's values."""
    try:
        SourceTable(**values)
    except ValidationError as error:
        return problems_of(error, KEYS, "an option of a source")
    return [problem for name, value in values.items() if (problem := wrong_value(name, value))]


def _contradictions(spec: SourceSpec) -> list[str]:
    found = []
    if (spec.path is None) == (spec.dataset is None):
        found.append("needs either a path (of a folder) or a dataset")
    if spec.caption_extension is not None and not spec.caption_extension.strip(" ."):
        found.append(f"caption_extension must be like .txt, not {spec.caption_extension!r}")
    shortest, longest = spec.bucket_min_side, spec.bucket_max_side
    if shortest is not None and longest is not None and shortest > longest:
        found.append("bucket_min_side must not be above bucket_max_side")
    if spec.captions == "prompt" and spec.prompt is None:
        found.append("captions = prompt needs a prompt")
    if spec.captions == "metadata" and spec.caption_column is None:
        found.append("captions = metadata needs a caption_column")
    if spec.dataset is not None and spec.captions in ("metadata", "sidecar", "filename"):
        found.append(
            f"captions = {spec.captions} is for folders; of a dataset, name caption_column"
        )
    if spec.metadata_file is not None and spec.captions not in ("auto", "metadata"):
        found.append(f"metadata_file contradicts captions = {spec.captions}")
    return found


def _read_spec(table: dict[str, Any], defaults: SourceSpec) -> tuple[SourceSpec, list[str]]:
    """A specification, and the faults of its table."""
    wrong = {problem.field: problem for problem in _wrong_values(table)}
    found = [problem.line() for problem in wrong.values()]
    values: dict[str, Any] = {
        # TOML writes 1 for 1.0
        name: float(value) if KEYS[name].kind == "float" else value
        for name, value in table.items()
        if name not in wrong
    }
    rules = {name: values.pop(name) for name in list(values) if name in RULES}
    if values.get("kind") == "class":  # options of the subject are not for its class
        defaults = dataclasses.replace(defaults, prompt=None, repeats=1, rules=CaptionRules())
    spec = dataclasses.replace(
        defaults,
        **({"path": None, "dataset": None} | values),
        rules=dataclasses.replace(defaults.rules, **rules),
        label="",
    )
    if not {"path", "dataset"} & wrong.keys():
        found += _contradictions(spec)
    if spec.dataset is not None:
        found += [f"{name} is for folders" for name in OF_FOLDERS if name in values]
    elif spec.path is not None:
        found += [f"{name} is for a dataset" for name in OF_SETS if name in values]
    return spec, found


def read_specs(tables: list[dict[str, Any]], defaults: SourceSpec, where: str) -> list[SourceSpec]:
    """The sources of `[[sources]]` tables.

    Args:
        tables: key → value, as TOML has them; each names its own path or dataset.
        defaults: values of all keys that a table leaves out.
        where: the file, for messages.

    Raises:
        UsageError: all faults of all tables at once.
    """
    specs, found = [], []
    for number, table in enumerate(tables, 1):
        if not isinstance(table, dict):
            found.append(f"source {number}: must be a table, not {table!r:.40}")
            continue
        spec, faults = _read_spec(table, defaults)
        name = table.get("path") or table.get("dataset")
        label = f"source {number} ({name})" if name else f"source {number}"
        found += [f"{label}: {text}" for text in faults]
        specs.append(spec)
    if found:
        raise UsageError(f"{where}: [[sources]] cannot be read\n  " + "\n  ".join(found))
    return specs
