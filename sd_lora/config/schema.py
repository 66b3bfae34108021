"""The configuration of a run: as given (`TrainConfig`), and resolved for a base model
(`RunConfig`).

Its fields are the rows of `options/`. Flags carry the names and per-mode defaults of diffusers'
example scripts, so that their command lines carry over. Defaults < file < flags.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import PrivateAttr, ValidationError

from sd_lora.config.contradictions import contradictions
from sd_lora.config.options.adapter import AdapterOptions
from sd_lora.config.options.data import DataOptions
from sd_lora.config.options.objective import ObjectiveOptions, ValidationOptions
from sd_lora.config.options.run import ModelOptions, RunOptions
from sd_lora.config.options.training import TrainingOptions
from sd_lora.config.rows import MODES, Option, Section
from sd_lora.config.sources import SourceSpec, read_specs
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

    def __init__(self, **values: Any) -> None:
        values, notes = with_present_names(values)
        for note in notes:
            warnings.warn(note, DeprecationWarning, stacklevel=2)
        mode = values.get("mode", "text_to_image")
        for name, option in OPTIONS.items():
            # defaults that SDXL has otherwise wait for the base model: `resolve`
            if option.modes and values.get(name) is None and mode not in option.sdxl:
                values[name] = option.modes.get(mode, option.modes[MODES[0]])
        if isinstance(values.get("output_dir"), str):
            values["output_dir"] = str(Path(values["output_dir"]).expanduser())
        problems: list[Problem] = []
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = problems_of(error, OPTIONS)
        wrong = {problem.field for problem in problems}
        sound = {k: v for k, v in values.items() if k in OPTIONS and k not in wrong}
        problems += contradictions(type(self).model_construct(**sound), OPTIONS, wrong)
        refuse(problems)
        if self.sources is not None:  # before anything is read
            general = SourceSpec(prompt=self.caption_default or self.instance_prompt)
            read_specs(self.sources, general, "sources")

    def replace(self: T, **changes: Any) -> T:
        """The same configuration with other values, checked like a new one."""
        return type(self)(**(self.as_dict() | changes)).with_notes(self._notes)

    @property
    def base_model(self) -> str:
        """The base model: a folder, a file or a hub id."""
        return str(self.pretrained_model_name_or_path)

    @property
    def output_path(self) -> Path:
        """The folder of the run's files."""
        return Path(self.output_dir)

    @property
    def notes(self) -> tuple[str, ...]:
        """Hints about how the options were given, such as former names."""
        return self._notes

    def with_notes(self: T, notes: Sequence[str]) -> T:
        """This configuration with hints for the summary."""
        self._notes = tuple(notes)
        return self

    def resolve(self, family: str, resolution: int) -> "RunConfig":
        """The configuration for a base model, with the defaults that depend on it.

        Args:
            family: name of its family.
            resolution: side in pixels of its training images.

        Raises:
            UsageError: another family than `family` names, or options without effect for it.
        """
        if self.family is not None and self.family != family:
            raise UsageError(
                f"{self.pretrained_model_name_or_path} is a model of family {family}, and family "
                f"says {self.family} (--family, which the _sdxl scripts set)"
            )
        values = self.as_dict()
        for name, option in OPTIONS.items():
            if option.sdxl and values[name] is None:
                values[name] = option.default_for(self.mode, family.startswith("sdxl"))
        values["resolution"] = self.resolution or resolution
        if not self.train_text_encoder:  # a default for text encoders does not ask for them
            values |= {"text_encoder_lr": None, "adam_weight_decay_text_encoder": None}
        second = [n for n in OPTIONS if n.startswith("text_encoder_2_") and values[n] is not None]
        if second and family != "sdxl":
            raise UsageError(f"{min(second)} needs two text encoders, and {family} has one")
        return RunConfig(**values).with_notes(self._notes)

    def as_dict(self) -> dict[str, Any]:
        """Option → value."""
        return self.model_dump()

    def to_json(self) -> str:
        """All options as JSON text, which `--config` reads."""
        return json.dumps(self.as_dict(), indent=2, sort_keys=True)


class RunConfig(TrainConfig):
    """The options of a run on a known base model: every number that it needs is one."""

    learning_rate: float
    adam_weight_decay: float
    resolution: int

    def learning_rate_of(self, component: str) -> float:
        """Learning rate of a component's deltas: its own, or else the more general one."""
        rates: list[float | None] = [self.learning_rate]
        rates += [self.text_encoder_lr] if component != "unet" else []
        rates += [self.text_encoder_2_lr] if component == "text_encoder_2" else []
        return next(rate for rate in reversed(rates) if rate is not None)

    def weight_decay_of(self, component: str) -> float:
        """Weight decay of a component's deltas."""
        own = self.adam_weight_decay_text_encoder
        return self.adam_weight_decay if component == "unet" or own is None else own

    @property
    def new_words_learning_rate(self) -> float:
        """Learning rate of the embeddings of new words."""
        own = self.embedding_lr
        return self.learning_rate_of("text_encoder") if own is None else own

    def rank_and_alpha_of(self, component: str) -> tuple[int, float | None]:
        """Rank and alpha of a component; a text encoder of rank 0 is left out.

        An alpha that is not given is the rank if that is given, and else the more general alpha;
        None stands for each module's rank.
        """
        rank, alpha = self.rank, self.lora_alpha
        names = ["text_encoder"] if component != "unet" else []
        names += ["text_encoder_2"] if component == "text_encoder_2" else []
        for name in names:  # from the general to the particular
            own_rank, own_alpha = getattr(self, f"{name}_rank"), getattr(self, f"{name}_alpha")
            if own_rank is not None:
                rank, alpha = own_rank, float(own_rank)
            alpha = alpha if own_alpha is None else own_alpha
        return rank, alpha

    def stop_step_of(self, component: str) -> int | None:
        """Number of steps after which a text encoder's LoRA stops learning; None: never."""
        own = getattr(self, f"{component}_stop_step")
        return self.text_encoder_stop_step if own is None else own


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

FORMER_NAMES = {o.formerly: name for name, o in OPTIONS.items() if o.formerly}
"""Former name of an option → its name."""


def with_present_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values by the present names of options, and a note for each former name."""
    notes = [f"{old} is called {FORMER_NAMES[old]} now" for old in values if old in FORMER_NAMES]
    return {FORMER_NAMES.get(name, name): value for name, value in values.items()}, notes


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration, for editors and forms.

    Each property has its type, range, choices (`enum`), default and help (`description`), and under
    `x-` its section, defaults by mode and for SDXL, requirements, and names elsewhere.
    """
    schema = TrainConfig.model_json_schema()
    for name, option in OPTIONS.items():
        row: dict[str, Any] = schema["properties"][name]
        for key in ("choices", "header", "formerly", "scripts", "package"):
            row.pop(key, None)
        if option.choices:
            row["enum"] = [*option.choices, *([None] if row.get("default", "") is None else [])]
        for key in ("section", "modes", "sdxl", "only", "requires", "may_change"):
            row[f"x-{key}"] = row.pop(key)
        row.pop("names")
        row["x-names"] = option.names
        row.pop("title", None)
    return schema | {"x-sections": list(SECTIONS)}
