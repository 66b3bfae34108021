"""`sd-lora compare`: does a change help? Short trainings as a run was, and with the change.

Both are trained for as many steps, from several seeds, and their LoRA files are measured as
`sd-lora judge` measures: the loss of the same images at the same noise. The images are those of the
run that the change leaves in, so that an image that is taken out does not count for itself.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_lora.config.schema import OPTIONS, TrainConfig
from sd_lora.errors import RunError, UsageError
from sd_lora.judge import judge
from sd_lora.report.events import Event, Listener, Progress, StepDone, TrainingStarted, to_all
from sd_lora.report.intervals import interval
from sd_lora.report.verdict import percent
from sd_lora.training.loop import train

MEASURED = ("model", "data", "objective")
"""Sections of options by which images are measured."""

NOT_MEASURED = (
    "with_prior_preservation", "class_data_dir", "class_prompt", "num_class_images",
    "sample_batch_size", "prior_loss_weight", "prior_generation_precision", "output_preservation",
    "preservation_class", "preservation_weight", "edm2_loss_weighting", "max_train_samples",
    "class_images", "caption_dropout",
)  # fmt: skip
"""Options of these sections that are of training alone."""

SHORT = {
    "validate_every": 0, "num_validation_images": 0, "report_to": "none",
    "checkpointing_steps": 10**9,
}  # fmt: skip
"""Option → its value in a short training, which leaves nothing but its file."""

AT_DEFAULT = (
    "holdout", "keep_best", "early_stopping_patience", "score_features", "score_every",
    "score_sets", "score_kind", "score_class_prompt", "validation_prompt", "sample_prompts",
    "sample_every", "validation_epochs", "logging_dir", "checkpoint_minutes", "save_lora_every",
    "save_lora_every_epochs", "num_train_epochs", "max_train_time", "resume_from_checkpoint",
    "push_to_hub", "hub_model_id", "hub_private_repo", "overwrite_output_dir",
)  # fmt: skip
"""Options that stand at their defaults there."""

OF_EACH = ("output_dir", "seed", "max_train_steps")
"""Options that each short training has its own of."""

AS_IT_WAS, CHANGED = "as it was", "changed"


@dataclass
class Compared:
    """The losses of short trainings: seed → name → loss of each item. base: the base model's.

    changed: option → its values before and after. steps: of each training.
    """

    changed: Mapping[str, tuple[Any, Any]]
    steps: int
    base: Sequence[float] = ()
    losses: dict[int, dict[str, Sequence[float]]] = field(default_factory=dict)

    def difference(self, seed: int) -> tuple[float, float]:
        """What the change adds to the loss, and half its 95 % interval, in parts of the base's."""
        base, found = sum(self.base) / len(self.base), self.losses[seed]
        mean, half = interval(found[CHANGED], found[AS_IT_WAS])
        return mean / base, half / base

    @property
    def helps(self) -> bool | None:
        """Whether the loss is lower with the change: beyond the interval with every seed. None: it
        is neither lower nor higher so."""
        found = [self.difference(seed) for seed in self.losses]
        if all(mean + half < 0 for mean, half in found):
            return True
        return False if all(mean - half > 0 for mean, half in found) else None

    def lines(self) -> list[str]:
        """The result for people."""
        told = [f"  {name}: {_value(o)} → {_value(n)}" for name, (o, n) in self.changed.items()]
        each = []
        for seed in self.losses:
            mean, half = self.difference(seed)
            each.append(f"  seed {seed}: {percent(mean)} ± {percent(half)} of the base's loss")
        words = {
            True: "the change helps: the other images are learned better",
            False: "the change hurts: the other images are learned less",
            None: "no difference that matters, after so few steps",
        }
        return [
            f"short trainings of {self.steps} steps, with and without", *told,
            "what the change adds to the loss of the images that are in both:", *each,
            words[self.helps],
        ]  # fmt: skip

    def numbers(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "changed": {name: list(values) for name, values in self.changed.items()},
            "steps": self.steps,
            "helps": self.helps,
            "seeds": [
                {"seed": seed, "difference": mean, "doubt": half}
                for seed in self.losses
                for mean, half in [self.difference(seed)]
            ],
        }


def _value(value: object) -> str:
    return "not given" if value is None else str(value)


def compare(
    before: TrainConfig,
    after: TrainConfig,
    steps: int,
    seeds: Sequence[int],
    listeners: Sequence[Listener] = (),
) -> Compared:
    """Train both configurations shortly with each seed, and measure them on the same images.

    Raises:
        UsageError: configurations that do not differ, or that train new words, whose embeddings no
            LoRA file has; and what `train` and `judge` raise.
    """
    new = after.as_dict()
    changed = {
        name: (value, new[name])
        for name, value in before.as_dict().items()
        if value != new[name] and name not in (*SHORT, *AT_DEFAULT, *OF_EACH)
    }
    if not changed:
        raise UsageError("nothing differs: give a flag of `sd-lora train` that is to be tried")
    if before.token_abstraction or after.token_abstraction:
        raise UsageError("runs that learn new words cannot be compared: no LoRA file has them")
    found, tell = Compared(changed, steps), to_all(listeners)

    def shown(event: Event) -> None:
        if isinstance(event, Progress | TrainingStarted | StepDone):
            tell(event)

    with tempfile.TemporaryDirectory(prefix="sd-lora-compare-") as folder:
        for seed in seeds:
            files = {}
            for name, config in ((AS_IT_WAS, before), (CHANGED, after)):
                place = Path(folder) / f"{seed} {name}"
                short: dict[str, Any] = {n: OPTIONS[n].default for n in AT_DEFAULT} | SHORT
                short |= {"max_train_steps": steps, "seed": seed, "output_dir": str(place)}
                files[name] = train(config.replace(**short), [shown]).files[0].path
            looked = measuring(before, after, seed, str(Path(folder) / f"{seed} measured"))
            measured, _ = judge([*files.values()], looked, [1.0], listeners=[shown])
            found.losses[seed] = {
                name: one.losses[1.0] for name, one in zip(files, measured, strict=True)
            }
            found.base = measured[0].losses[0.0]
    return found


def measuring(before: TrainConfig, after: TrainConfig, seed: int, folder: str) -> TrainConfig:
    """The configuration that measures files on the images that are in both."""
    values = {
        name: value
        for name, value in before.as_dict().items()
        if OPTIONS[name].section in MEASURED and name not in NOT_MEASURED
    }
    patterns = [text for text in (before.leave_out, after.leave_out) if text]
    values |= {
        "mode": before.mode, "output_dir": folder, "seed": seed, "report_to": "none",
        "mixed_precision": before.mixed_precision, "train_batch_size": before.train_batch_size,
        "rank": 1, "targets": "attention", "num_validation_images": 0, "validate_every": 1,
        "holdout": 0, "leave_out": ",".join(patterns) or None, "max_train_steps": 1,
        "train_text_encoder": before.train_text_encoder or after.train_text_encoder,
    }  # fmt: skip
    return TrainConfig(**values)


def steps_of(folder: Path, asked: int | None, record: Mapping[str, Any]) -> int:
    """Steps of the short trainings: those asked for, or a quarter of the run's.

    Raises:
        RunError: the run's record has no number of steps.
    """
    if asked:
        return asked
    if not record["num_steps"]:
        raise RunError(f"{folder} does not say how many steps the run has: give --steps")
    return max(1, round(record["num_steps"] / 4))
