"""What a source of images is, as a user says it; free of torch: flags are checked at once."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sd_lora.errors import UsageError, did_you_mean

LAYOUTS = ("auto", "plain", "kohya")
CAPTIONS = ("auto", "metadata", "sidecar", "filename", "prompt")
LEFTOVERS = ("smaller", "pad-batch", "repeat")
CACHES = ("auto", "memory", "disk", "no")

Kind = Literal["instance", "class"]


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """What a caption goes through each time that its image is seen; see `captions.caption_of`.

    caption_dropout: part of the images shown without a caption. shuffle_caption: shuffle the
    tags between separators, but the first keep_tokens of them, or those before
    keep_tokens_separator. caption_tag_dropout: part of these tags left out. wildcards: {a|b} is one
    of them, and of several lines one is read. caption_prefix, caption_suffix: put around, with a
    space. trigger_word: the first tag, unless the caption has it already.
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
        """Whether a caption differs from one time to the next, not counting its absence."""
        return self.shuffle_caption or self.caption_tag_dropout > 0 or self.wildcards


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One source of images.

    path: a folder. dataset: a `datasets` set instead: a hub name, a local folder, a parquet, json
    or csv file; streaming: read row by row. layout: "kohya" takes `N_token class` subfolders as
    sources of their own. captions: where they come from; "auto" is metadata, else sidecars, else
    prompt. metadata_file: instead of each metadata.jsonl or .csv in the folder; its names are
    relative to path. caption_extension: of sidecars; .txt and .caption when None. prompt: the
    caption of an image that has none. repeats: times an epoch. weight: of each image's loss.
    random_flip: mirrored half of the time. random_crop: at a random place; None: as the framing has
    it. label: what messages call it.
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
    repeats: int = 1
    weight: float = 1.0
    kind: Kind = "instance"
    random_flip: bool = False
    random_crop: bool | None = None
    rules: CaptionRules = field(default_factory=CaptionRules)
    label: str = ""

    @property
    def where(self) -> str:
        """Returns what messages call the source."""
        return self.label or self.path or self.dataset or "source"


RULES: dict[str, dataclasses.Field] = {f.name: f for f in dataclasses.fields(CaptionRules)}
SOURCE: dict[str, dataclasses.Field] = {
    f.name: f for f in dataclasses.fields(SourceSpec) if f.name not in ("rules", "label")
}

OF_FOLDERS = ("layout", "metadata_file", "caption_extension", "recursive")
OF_SETS = ("config_name", "split", "revision", "cache_dir", "streaming")
"""What means nothing for the other of the two."""

CHOICES = {"layout": LAYOUTS, "captions": CAPTIONS, "kind": get_args(Kind)}
WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


def fits(value: object, kind: type) -> bool:
    """Returns whether a value of TOML or JSON is one of a kind."""
    # TOML writes 1 for 1.0, and Python takes True for 1
    return type(value) is kind or (kind is float and type(value) is int)


def _kind(field: dataclasses.Field) -> type:
    """Returns the type of a field without its None: a choice is a text."""
    return next((k for k in (field.type, *get_args(field.type)) if k in WORDS), str)


def problems(spec: SourceSpec) -> list[str]:
    """Returns what is wrong with the values of a specification: ranges, choices, contradictions."""
    rules, found = spec.rules, []
    if (spec.path is None) == (spec.dataset is None):
        found.append("needs either a path (of a folder) or a dataset")
    for name, choices in CHOICES.items():
        value = getattr(spec, name)
        if value not in choices:
            hint = did_you_mean(value, choices)
            found.append(f"{name} must be one of {', '.join(choices)}, not {value!r}.{hint}")
    if spec.repeats < 1:
        found.append(f"repeats must be at least 1, not {spec.repeats}")
    if not (spec.weight > 0 and math.isfinite(spec.weight)):
        found.append(f"weight must be a number above 0, not {spec.weight}")
    for name in ("caption_dropout", "caption_tag_dropout"):
        if not 0 <= getattr(rules, name) < 1:
            found.append(f"{name} must be at least 0 and below 1, not {getattr(rules, name)}")
    if rules.keep_tokens < 0:
        found.append(f"keep_tokens must be at least 0, not {rules.keep_tokens}")
    for name in ("caption_separator", "keep_tokens_separator", "trigger_word"):
        value = getattr(rules, name)
        if value is not None and not (value.strip() if name == "trigger_word" else value):
            found.append(f"{name} must not be empty")
    if spec.caption_extension is not None and not spec.caption_extension.strip(" ."):
        found.append(f"caption_extension must be like .txt, not {spec.caption_extension!r}")
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
    """Returns a specification, and what is wrong with its table."""
    known, found = SOURCE | RULES, []
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in known:
            found.append(f"{name!r} is not an option of a source.{did_you_mean(name, known)}")
        elif not fits(value, kind := _kind(known[name])):
            found.append(f"{name} must be {WORDS[kind]}, not {value!r}")
        else:
            values[name] = kind(value)
    rules = {name: values.pop(name) for name in list(values) if name in RULES}
    if values.get("kind") == "class":  # what is said of the subject is not for its class
        defaults = dataclasses.replace(defaults, prompt=None, repeats=1, rules=CaptionRules())
    spec = dataclasses.replace(
        defaults,
        **({"path": None, "dataset": None} | values),
        rules=dataclasses.replace(defaults.rules, **rules),
        label="",
    )
    if not {"path", "dataset"} & (set(table) - set(values)):  # else it is wrong as it is
        found += problems(spec)
    if spec.dataset is not None:
        found += [f"{name} is for folders" for name in OF_FOLDERS if name in values]
    elif spec.path is not None:
        found += [f"{name} is for a dataset" for name in OF_SETS if name in values]
    return spec, found


def read_specs(tables: list[dict[str, Any]], defaults: SourceSpec, where: str) -> list[SourceSpec]:
    """Returns the sources of `[[sources]]` tables: fields of a source and of its caption rules.

    Args:
        tables: field → value, as TOML has them; each says its own path or dataset.
        defaults: what else a table leaves unsaid.
        where: the file, for messages.

    Raises:
        UsageError: everything that is wrong with any of them, at once.
    """
    specs, found = [], []
    for number, table in enumerate(tables, 1):
        if not isinstance(table, dict):
            found.append(f"source {number}: must be a table, not {table!r:.40}")
            continue
        spec, wrong = _read_spec(table, defaults)
        name = table.get("path") or table.get("dataset")
        label = f"source {number} ({name})" if name else f"source {number}"
        found += [f"{label}: {text}" for text in wrong]
        specs.append(spec)
    if found:
        raise UsageError(f"{where}: [[sources]] cannot be read\n  " + "\n  ".join(found))
    return specs
