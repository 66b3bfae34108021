"""The configuration of a run: as given (`TrainConfig`), and resolved for a base model
(`RunConfig`).

Its fields are the rows of `options/`. Flags carry the names and per-mode defaults of diffusers'
example scripts, so that their command lines carry over. Defaults < file < flags.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

from pydantic import PrivateAttr, ValidationError

from sd_lora.config.contradictions import contradictions
from sd_lora.config.options.adapter import OF_FILE, AdapterOptions
from sd_lora.config.options.data import DataOptions
from sd_lora.config.options.images import ResolvedImages
from sd_lora.config.options.objective import ObjectiveOptions, ValidationOptions
from sd_lora.config.options.run import ModelOptions, RunOptions
from sd_lora.config.options.sources import source_specs
from sd_lora.config.options.training import ResolvedTraining, TrainingOptions, with_optimizer
from sd_lora.config.presets import preset
from sd_lora.config.rows import MODES, PRESETS, Option, Section
from sd_lora.config.spelling import Spelling
from sd_lora.config.values import problems_of
from sd_lora.errors import Problem, UsageError, refuse

T = TypeVar("T", bound="TrainConfig")


class TrainConfig(
    ValidationOptions,
    ObjectiveOptions,
    TrainingOptions,
    AdapterOptions,
    DataOptions,
    ModelOptions,
    RunOptions,
):
    """The options of a run as given; see the help of each field.

    Numbers that depend on the base model are None until `resolve`.

    Raises:
        UsageError: wrong types, values out of range and contradictions, all at once.
    """

    _notes: tuple[str, ...] = PrivateAttr(default=())
    _token: str | None = PrivateAttr(default=None)
    _spelling: Spelling = PrivateAttr(default_factory=Spelling)

    def __init__(self, **values: Any) -> None:
        values, notes = with_present_names(values)
        token = values.get("hub_token")
        if isinstance(token, str):  # no field: those are written, compared and shown
            del values["hub_token"]
        for note in notes:
            warnings.warn(note, DeprecationWarning, stacklevel=2)
        values = with_optimizer(with_preset(values), values)
        mode = values.get("mode", "text_to_image")
        waiting = _of_family(values)
        for name, option in OPTIONS.items():
            # defaults that depend on the family wait for the base model: `resolve`
            waits = mode in option.sdxl or name in waiting
            if option.modes and values.get(name) is None and not waits:
                values[name] = option.modes.get(mode, option.modes[MODES[0]])
        opened = _open(values)
        for name in OF_FILE:
            if values.get(name) is None:
                values[name] = None if name in opened else OPTIONS[name].default
        problems: list[Problem] = []
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = problems_of(error, OPTIONS)
        wrong = {problem.field for problem in problems}
        sound = {k: v for k, v in values.items() if k in OPTIONS and k not in wrong}
        problems += contradictions(type(self).model_construct(**sound), OPTIONS, wrong)
        refuse(problems)
        self._token = token
        if self.sources is not None:  # before anything is read
            source_specs(self)

    def replace(self: T, **changes: Any) -> T:
        """The same configuration with other values, checked like a new one."""
        values = self.as_dict() | {"hub_token": self._token} | changes
        return type(self)(**values).with_notes(self._notes)

    @property
    def token(self) -> str | None:
        """The token of `hub_token`, which is in no field, so that nothing writes it."""
        return self._token

    @property
    def notes(self) -> tuple[str, ...]:
        """Hints about how the options were given, such as former names."""
        return self._notes

    def with_notes(self: T, notes: Sequence[str]) -> T:
        """This configuration with hints for the summary."""
        self._notes = tuple(notes)
        return self

    @property
    def spelling(self) -> Spelling:
        """The names of the options in messages, as a command line gave them."""
        return self._spelling

    def with_spelling(self: T, spelling: Spelling) -> T:
        """This configuration with other names of its options in messages."""
        self._spelling = spelling
        return self

    def resolve(self, family: str, resolution: int) -> "RunConfig":
        """The configuration for a base model, with the defaults that depend on it.

        Args:
            family: name of its family.
            resolution: side in pixels of its training images.

        Raises:
            UsageError: another family than `family` names, or options without effect for it.
        """
        self.refuse_other_family(family)
        values = self.as_dict()
        of_family = _of_family(values, family)
        for name, option in OPTIONS.items():
            # a default for text encoders does not ask for them
            if values[name] is None and not option.missing(self) and name not in _open(values):
                values[name] = of_family.get(
                    name, option.default_for(self.mode, family.startswith("sdxl"))
                )
        values["resolution"] = self.resolution or max(self.resolutions or [resolution])
        second = [n for n in OPTIONS if n.startswith("text_encoder_2_") and values[n] is not None]
        if second and family != "sdxl":
            raise UsageError(f"{min(second)} needs two text encoders, and {family} has one")
        return RunConfig(**(values | {"hub_token": self._token})).with_notes(self._notes)

    def as_dict(self) -> dict[str, Any]:
        """Option → value."""
        return self.model_dump()

    def to_json(self) -> str:
        """All options as JSON text, which `--config` reads."""
        return json.dumps(self.as_dict(), indent=2, sort_keys=True)


class RunConfig(ResolvedTraining, ResolvedImages, TrainConfig):
    """The options of a run on a known base model: every number that it needs is one."""


SECTIONS: dict[str, type[Section]] = {
    "run": RunOptions,
    "model": ModelOptions,
    "data": DataOptions,
    "adapter": AdapterOptions,
    "training": TrainingOptions,
    "objective": ObjectiveOptions,
    "validation": ValidationOptions,
}
"""Name of a section → its options, in the order of help texts."""

OPTIONS: dict[str, Option] = {
    name: Option.of(name, info)
    for options in SECTIONS.values()
    for name, info in options.model_fields.items()
}
"""Name → row of every option."""

SHORT_NAMES = {o.short: name for name, o in OPTIONS.items() if o.short}
"""Short name of a flag → its option."""

FORMER_NAMES = {o.formerly: name for name, o in OPTIONS.items() if o.formerly}
"""Former name of an option → its name."""


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values, completed by those of their preset: not by options without effect beside them."""
    name = values.get("preset")
    given = {key: value for key, value in values.items() if value is not None}
    if name not in PRESETS:  # none, or a wrong one, for the row's own message
        return dict(values)
    mode = str(given.get("mode", MODES[0]))
    defaults = {key: option.default_for(mode) for key, option in OPTIONS.items()}
    together = preset(name).options | given
    config = SimpleNamespace(**(defaults | together))
    idle = {key for key in together if key in OPTIONS and OPTIONS[key].missing(config)}
    idle |= {*_open(given)}
    return dict(values) | {k: v for k, v in together.items() if k in given or k not in idle}


def _open(values: Mapping[str, Any]) -> Sequence[str]:
    """Options without a default in a run that starts from a LoRA file, which answers them."""
    return OF_FILE if values.get("init_lora") else ()


def _of_family(values: Mapping[str, Any], family: str = "") -> dict[str, Any]:
    """Options of a preset that depend on the family."""
    name = values.get("preset")
    return preset(name).of_family(family) if name in PRESETS else {}


def with_present_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values by the present names of options, and a note for each former name.

    A value under a former name counts where the present one is at its default.
    """
    found = {name: value for name, value in values.items() if name not in FORMER_NAMES}
    notes = []
    for old in values.keys() & FORMER_NAMES.keys():
        option, value = OPTIONS[FORMER_NAMES[old]], values[old]
        if option.former_values and isinstance(value, bool):
            value = option.former_values[value]
            if value is None:
                continue
            notes.append(f"{old} is {option.name} {value} now")
        else:
            notes.append(f"{old} is called {option.name} now")
        if str(found.get(option.name, option.default)).lower() == str(option.default):
            found[option.name] = value
        else:
            notes[-1] += f", and {option.name} is given: {old} is ignored"
    return found, notes


NOT_IN_SCHEMA = (
    "choices", "dataset_key", "former_values", "formerly", "header", "header_form", "ignored_by",
    "in_record", "main", "of_all_jobs", "of_scripts", "only_warns", "or_import_path", "package",
    "scripts", "short", "summary",
    "without_gpu", "without_value",
)  # fmt: skip
"""Parts of rows that editors and forms do not need, or find under another name."""


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration, for editors and forms.

    Each property has its type, range, choices (`enum`), default and help (`description`), and under
    `x-` its section, defaults by mode and for SDXL, requirements, and names elsewhere.
    """
    schema = TrainConfig.model_json_schema()
    for name, option in OPTIONS.items():
        row: dict[str, Any] = schema["properties"][name]
        for key in NOT_IN_SCHEMA:
            row.pop(key, None)
        if option.choices and not option.or_import_path:
            row["enum"] = [*option.choices, *([None] if row.get("default", "") is None else [])]
        elif option.choices:
            row["anyOf"] = [{"enum": [*option.choices]}, {"pattern": r"\."}]
        for key in ("section", "modes", "sdxl", "only", "requires", "unless", "may_change"):
            row[f"x-{key}"] = row.pop(key)
        row.pop("names")
        row["x-names"] = option.names
        row.pop("title", None)
    schema["properties"]["jobs"] = {  # of a file alone, see `config.jobs`
        "description": "runs over one base, each with a name and the options that differ",
        "type": "array",
        "items": {"type": "object", "required": ["name"]},
    }
    return schema | {"x-sections": list(SECTIONS)}
