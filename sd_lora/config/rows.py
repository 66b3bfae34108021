"""One row an option: type, range, default, help, and the option's names elsewhere.

`option(...)` declares a field of a pydantic model; `Option` is the row read back from it. Flags,
TOML, help, docs/flags.md, the JSON schema, the header of LoRA files and the comparison on resume
are made from these rows.
"""

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

Mode = Literal["text_to_image", "dreambooth"]
MODES: tuple[Mode, ...] = ("text_to_image", "dreambooth")

SAME = "="
"""A peer's name for an option that is our own name."""

PEERS = ("diffusers", "kohya", "onetrainer", "ai_toolkit", "simpletuner")
"""Other trainers whose names for options are known: diffusers' scripts, sd-scripts (kohya),
OneTrainer and ai-toolkit (keys of their configurations), SimpleTuner."""

PLAIN_LORA = ("lora", "lora_fa")
RANKED = (*PLAIN_LORA, "loha", "lokr")
METHODS = (*RANKED, "oft", "full")
"""Name of the adapter methods, here without torch; a test compares them with the table."""

SUBJECT_FOLDER, DATA_SET, DATASET_FILE = (
    ("instance_data_dir",),
    ("dataset_name",),
    ("dataset_config",),
)
"""Places of images, for rows of options that have no effect there."""

LAYOUTS = ("auto", "plain", "kohya")
CAPTIONS = ("auto", "metadata", "sidecar", "filename", "prompt")
LEFTOVERS = ("smaller", "pad-batch", "repeat")
PRESETS = ("subject", "character", "style")
"""Name of the presets: of the files in `presets/`."""

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "all", "none")

Work = Literal[
    "a step",
    "loading the base model",
    "bringing the models to the device",
    "drawing class images",
    "encoding images",
    "encoding captions",
    "drawing sample images",
    "drawing images to score",
    "updating the weights",
    "checking the model",
    "writing files",
]
"""Work of a run that takes memory, as messages name it."""

LOWER = "lower"
"""Value of `less_memory` for a number that takes less memory the lower it is."""

CACHES = ("auto", "memory", "disk", "no")

_WARMUP = "lr_warmup_steps"
_LEAST = "lr_min_ratio"
SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (_WARMUP, _LEAST),
    "cosine": (_WARMUP, _LEAST),
    "cosine_with_restarts": (_WARMUP, _LEAST, "lr_num_cycles"),
    "polynomial": (_WARMUP, _LEAST, "lr_power"),
    "constant": (),
    "constant_with_warmup": (_WARMUP,),
    "piecewise_constant": ("lr_step_rules",),
    "inverse_sqrt": (_WARMUP,),
    "warmup_stable_decay": (_WARMUP, _LEAST, "lr_decay_steps"),
    "rex": (_WARMUP, _LEAST),
    "points": ("lr_points",),
}
"""Learning-rate schedule → the options that it uses."""


def _steps_or_share(value: int | float) -> int | float:
    if value and value < 1:
        return value
    if not float(value).is_integer():
        raise PydanticCustomError("steps", "neither whole nor a share")
    return int(value)


Steps = Annotated[int | float, AfterValidator(_steps_or_share)]
"""Type of a number of steps: whole, or below 1 a share of the run; 500.0 is 500."""

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner")
"""Name of the model families, here without diffusers; compared in the same way."""


class Section(BaseModel):
    """Options of one section: strict types, finite numbers, no NUL, no unknown names."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_a_choice(cls, value: Any, info: ValidationInfo) -> Any:
        extra: Any = cls.model_fields[str(info.field_name)].json_schema_extra
        choices = extra["choices"] if extra else []
        open_to_paths = extra and extra["or_import_path"] and isinstance(value, str)
        if open_to_paths and "." in value:
            return value
        if choices and value is not None and value not in choices:
            raise PydanticCustomError("choice", "not a choice", {"choices": choices})
        return value

    @field_validator("*")
    @classmethod
    def _has_no_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:  # no path may hold one
            raise PydanticCustomError("nul", "a NUL character")
        return value


def by_mode(text_to_image: Any, dreambooth: Any) -> dict[str, Any]:
    """Defaults that differ by mode."""
    return {"text_to_image": text_to_image, "dreambooth": dreambooth}


def section(name: str) -> Callable[..., Any]:
    """A function `option(default, help, …)` for the rows of one section."""

    def option(
        default: Any,
        help: str,
        *,
        ge: float | None = None, gt: float | None = None, lt: float | None = None,
        le: float | None = None, multiple_of: int | None = None, choices: tuple[str, ...] = (),
        or_import_path: bool = False, modes: Mapping[str, Any] | None = None,
        sdxl: Mapping[str, Any] | None = None, of_scripts: Mapping[str, Any] | None = None,
        only: Mode | None = None, requires: Mapping[str, tuple[Any, ...] | None] | None = None,
        unless: Mapping[str, tuple[Any, ...]] | None = None,
        only_warns: bool = False, without_gpu: str | Mapping[Any, str] = "",
        may_change: bool = False, of_all_jobs: bool = False, dataset_key: str | bool = False,
        less_memory: Mapping[Work, tuple[int, Any]] | None = None, costs: str = "",
        package: tuple[str, str] | Mapping[Any, tuple[str, str]] | None = None,
        header: str | None = None, header_form: str = "always", in_record: str = "whole",
        summary: tuple[str, str] | None = None, ignored_by: tuple[str, ...] = (),
        without_value: str | None = None, short: str | None = None, formerly: str | None = None,
        former_values: Mapping[Any, Any] | None = None, main: str = "", scripts: str = "",
        **names: str,
    ) -> Any:  # fmt: skip
        """Declare an option.

        Args:
            default: its value if it is not given; None if it is known only later.
            help: its meaning, with its unit. ge, gt, lt, le, multiple_of: its range.
            choices: its allowed values. or_import_path: whether a class's path is one, too.
            modes: defaults by mode, in place of `default`.
            sdxl: mode → default for SDXL, known when the base model is.
            of_scripts: mode → default of the launch scripts alone.
            only: the one mode in which it has an effect.
            requires: other option → values with which this one has an effect; None: any value
                that is given.
            unless: other option → values with which this one has no effect.
            only_warns: whether a run starts, with a warning, where it has no effect.
            without_gpu: its effect on a CPU, as a clause, for the warning; or value → a clause.
            may_change: whether a resumed run may change it. of_all_jobs: one value for all jobs.
            less_memory: work → its place by cost, and the value that takes less. costs: its time.
            package: a package that it needs, and the extra that installs it; or value → both.
            header: key of a LoRA file's header that holds its value.
            header_form: row of `HEADER_FORMS`, its value there.
            in_record: its value in a file's record of the run: "whole", a path's "name", "no".
            summary: row of a run's summary, and its text there ("clip skip {}"), if it is given.
            ignored_by: places of images, as options, with which it has no effect.
            without_value: value of its flag without one.
            dataset_key: its name in kohya's dataset configuration; True: its `kohya` name.
            formerly: its former name, still understood. former_values: value under that name →
                value now, None to leave it out.
            short: a second, short name of its flag.
            main: its meaning in a few words, for the first page of the help; else it is not there.
            scripts: diffusers' scripts with this flag, as letters of `command_line.SCRIPTS`.
            names: peer of `PEERS` → its name there, SAME if it is our own.
        """
        if scripts:
            names = {"diffusers": SAME, **names}
        extra: Any = {
            "section": name, "choices": list(choices), "or_import_path": or_import_path,
            "modes": dict(modes or {}), "sdxl": dict(sdxl or {}),
            "of_scripts": dict(of_scripts or {}), "only": only,
            "requires": {k: v and list(v) for k, v in (requires or {}).items()},
            "unless": {k: list(v) for k, v in (unless or {}).items()}, "only_warns": only_warns,
            "without_gpu": without_gpu, "may_change": may_change, "of_all_jobs": of_all_jobs,
            "less_memory": {w: list(rank) for w, rank in (less_memory or {}).items()},
            "package": package, "header": header, "header_form": header_form, "costs": costs,
            "in_record": in_record, "ignored_by": list(ignored_by),
            "summary": summary and list(summary), "without_value": without_value,
            "dataset_key": dataset_key, "short": short, "main": main, "formerly": formerly,
            "former_values": dict(former_values or {}), "scripts": scripts, "names": names,
        }  # fmt: skip
        bounds: Any = {"ge": ge, "gt": gt, "lt": lt, "le": le, "multiple_of": multiple_of}
        return Field(default, description=help, json_schema_extra=extra, **bounds)

    return option


@dataclass(frozen=True)
class Option:
    """A row. kind: "int", "float", "bool", "str", "steps", "ints", "dict" or "list" (of tables);
    item: kind of a dict's values, "value" for any plain ones; see `option` for the others."""

    name: str
    kind: str
    default: Any
    help: str
    section: str
    choices: tuple[str, ...]
    or_import_path: bool
    modes: dict[str, Any]
    sdxl: dict[str, Any]
    of_scripts: dict[str, Any]
    only: Mode | None
    requires: dict[str, tuple[Any, ...] | None]
    unless: dict[str, tuple[Any, ...]]
    only_warns: bool
    without_gpu: str | Mapping[Any, str]
    may_change: bool
    of_all_jobs: bool
    less_memory: dict[Work, tuple[int, Any]]
    costs: str
    package: tuple[str, str] | Mapping[Any, tuple[str, str]] | None
    header: str | None
    header_form: str
    in_record: str
    summary: tuple[str, str] | None
    ignored_by: tuple[str, ...]
    without_value: str | None
    dataset_key: str | None
    short: str | None
    main: str
    formerly: str | None
    former_values: dict[Any, Any]
    scripts: str
    names: dict[str, str]
    range: dict[str, float] = field(default_factory=dict)
    item: str = ""

    @classmethod
    def of(cls, name: str, info: FieldInfo) -> "Option":
        """The row of a field."""
        extra: Any = dict(info.json_schema_extra or {})  # type: ignore[arg-type]
        bounds = {
            key: getattr(rule, key)
            for rule in info.metadata
            for key in ("ge", "gt", "lt", "le", "multiple_of")
            if hasattr(rule, key)
        }
        extra["choices"] = tuple(extra["choices"])
        extra["requires"] = {k: v and tuple(v) for k, v in extra["requires"].items()}
        extra["unless"] = {k: tuple(v) for k, v in extra["unless"].items()}
        extra["names"] = {k: name if v == SAME else v for k, v in extra["names"].items()}
        extra["ignored_by"] = tuple(extra["ignored_by"])
        extra["summary"] = extra["summary"] and tuple(extra["summary"])
        if extra["dataset_key"] is True:
            extra["dataset_key"] = extra["names"]["kohya"]
        kind = kind_of(info.annotation)
        item = item_of(info.annotation) if kind == "dict" else ""
        text = str(info.description)
        return cls(name, kind, info.default, text, **extra, range=bounds, item=item)

    def default_for(self, mode: str, sdxl: bool = False) -> Any:
        """The default in a mode; None while it depends on the base model or other options."""
        if sdxl and mode in self.sdxl:
            return self.sdxl[mode]
        return self.modes.get(mode, self.default)

    def is_given(self, value: Any) -> bool:
        """Whether a value differs from the default, so that somebody meant it."""
        return value is not None and value != self.default and value not in self.modes.values()

    def value_in_header(self, value: Any) -> Any:
        """The value as a LoRA file's header has it."""
        return HEADER_FORMS[self.header_form](self, value)

    def missing(self, config: object) -> list[str]:
        """Options for whose values it has no effect in a configuration."""
        found = []
        for other, values in self.requires.items():
            theirs = getattr(config, other)
            if not (theirs in values if values else theirs):
                found.append(other)
        found += [
            other for other, values in self.unless.items() if getattr(config, other) in values
        ]
        return found

    def package_of(self, value: Any) -> tuple[str, str] | None:
        """The package that a value needs, and the extra that installs it; None if it needs none."""
        if not self.is_given(value) or not self.package:
            return None
        return self.package.get(value) if isinstance(self.package, Mapping) else self.package

    def effect_without_gpu(self, value: Any) -> str:
        """The effect of a value on a CPU, as a clause; empty if it is the same."""
        if not self.is_given(value):
            return ""
        of_value = self.without_gpu
        return of_value.get(value, "") if isinstance(of_value, Mapping) else of_value

    def range_text(self) -> str:
        """The range in words: "at least 0 and below 1"; empty if there is none."""
        words = {"ge": "at least", "gt": "above", "lt": "below", "le": "at most"}
        words["multiple_of"] = "a multiple of"
        return " and ".join(f"{words[key]} {bound:g}" for key, bound in self.range.items())


HEADER_FORMS: dict[str, Callable[[Option, Any], Any]] = {
    "always": lambda option, value: value,
    "if given": lambda option, value: value if option.is_given(value) else None,
    # kohya's clip skip 1 is the last layer
    "counted from 1": lambda option, value: value + 1 if value else None,
}
"""How a value stands in a LoRA file's header, by the peers' meaning of its key."""


def _without_none(annotation: Any) -> Any:
    if _is_union(annotation):
        return next(a for a in get_args(annotation) if a is not type(None))
    return annotation


def item_of(annotation: Any) -> str:
    """Kind of the values of a dict's annotation: "int", "float", "value" for any plain ones."""
    values = get_args(_without_none(annotation))[1]
    return "value" if _is_union(values) else kind_of(get_args(values)[0])


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def kind_of(annotation: Any) -> str:
    """Plain type of an annotation: "int | None" is "int", a Literal or text is "str", a list of
    whole numbers "ints", and `Steps` "steps"."""
    if get_args(annotation) == (int, float):
        return "steps"
    annotation = _without_none(annotation)
    if get_args(annotation) == (int,):
        return "ints"
    origin = get_origin(annotation) or annotation
    kinds = {bool: "bool", int: "int", float: "float", dict: "dict", list: "list"}
    return kinds.get(origin, "str")
