"""`sd-lora compare`: does a change help? Short trainings as a run was, and with the change.

Both are trained for as many epochs, so that each image is seen as often, from several seeds, and
the loss of the images that are in both is measured at the same noise: of each file by its own
captions. The difference is told from chance by the spread of the seeds, for two trainings of other
seeds differ as well.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from sd_lora.check import check
from sd_lora.config.schema import OPTIONS, TrainConfig
from sd_lora.errors import Interrupted, RunError, UsageError
from sd_lora.formats.lora_file import open_lora
from sd_lora.judge import losses_of
from sd_lora.report.events import Event, Listener, Progress, StepDone, TrainingStarted, to_all
from sd_lora.report.intervals import interval
from sd_lora.report.verdict import percent
from sd_lora.sample import Loras, Mix
from sd_lora.sampling.interval import student
from sd_lora.tool_flags import measuring
from sd_lora.training.loop import train
from sd_lora.training.setup import prepared_run

OF_MEASURE = ("model", "data", "objective")
"""Sections of options by which images are measured."""

OF_TRAINING = (
    "with_prior_preservation", "class_data_dir", "class_prompt", "num_class_images",
    "sample_batch_size", "prior_loss_weight", "prior_generation_precision", "output_preservation",
    "preservation_class", "preservation_sampler_steps", "preservation_weight",
    "edm2_loss_weighting",
)  # fmt: skip
"""Options of these sections that are of training alone."""

OF_THE_LOSS = (
    "prediction_type", "rescale_betas_zero_snr", "flow_shift", "do_edm_style_training",
    "resolution", "resolutions",
)  # fmt: skip
"""Options, beside those of the model, with which a loss is another number: none is compared."""

SHORT: dict[str, Any] = {
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
    """The losses of short trainings: name → seed → loss of each item. base: the base model's.

    changed: option → its values before and after. steps: name → steps of a training.
    """

    changed: Mapping[str, tuple[Any, Any]]
    steps: Mapping[str, int]
    base: Sequence[float] = ()
    losses: dict[str, dict[int, Sequence[float]]] = field(
        default_factory=lambda: {AS_IT_WAS: {}, CHANGED: {}}
    )

    @property
    def difference(self) -> tuple[float, float]:
        """Loss with the change less the loss as it was, and half its 95 % interval, in parts of the
        base's.

        The interval is the larger of two: of the trainings, by the spread of their means over the
        seeds (two-sample Student's t), infinite for one seed; and of the measured items, in pairs.
        """
        new, old = ([*self.losses[name].values()] for name in (CHANGED, AS_IT_WAS))
        base, n = fmean(self.base), len(new)
        items = [[fmean(item) for item in zip(*of, strict=True)] for of in (new, old)]
        mean, of_items = interval(*items)
        of_seeds = math.inf
        if n > 1:
            spread = fmean(variance(map(fmean, of)) for of in (new, old))
            of_seeds = student(2 * (n - 1)) * math.sqrt(2 * spread / n)
        return mean / base, max(of_items, of_seeds) / base

    @property
    def helps(self) -> bool | None:
        """Whether the loss is lower with the change, beyond the interval; None: neither lower nor
        higher."""
        mean, half = self.difference
        return None if abs(mean) <= half else mean < 0

    def lines(self) -> list[str]:
        """The result for people."""
        told = [
            f"  {name}: {_value(old)} → {_value(new)}" for name, (old, new) in self.changed.items()
        ]
        mean, half = self.difference
        doubt = f" ± {percent(half)}" if math.isfinite(half) else ""
        words = {
            True: "the change helps: these images are learned better",
            False: "the change hurts: these images are learned less",
            None: "no difference that matters, after so short trainings",
        }
        number = len(self.losses[CHANGED])
        return [
            f"{number} short trainings as it was ({self.steps[AS_IT_WAS]} steps), and {number} "
            f"with the change ({self.steps[CHANGED]} steps, as many epochs):",
            *told,
            f"the loss of the images that are in both changes by {percent(mean)}{doubt} of the "
            "base model's",
            words[self.helps] if number > 1 else "of one seed, which tells nothing from chance",
        ]  # fmt: skip

    def numbers(self) -> dict[str, Any]:
        """Everything, for JSON."""
        mean, half = self.difference
        return {
            "changed": {name: list(values) for name, values in self.changed.items()},
            "steps": dict(self.steps),
            "helps": self.helps,
            "difference": mean,
            "doubt": half if math.isfinite(half) else None,
            "losses": {
                name: {str(seed): fmean(items) for seed, items in of.items()}
                for name, of in self.losses.items()
            },
            "base_loss": fmean(self.base),
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

    steps: of a training as it was.

    Raises:
        UsageError: configurations that do not differ, or whose losses cannot be compared.
        UsageError, RunError: as `train` raises them.
    """
    changed = changes(before, after)
    tell = to_all(listeners)

    def shown(event: Event) -> None:
        if isinstance(event, Progress | TrainingStarted | StepDone):
            tell(event)

    configs = {AS_IT_WAS: before, CHANGED: after}
    with tempfile.TemporaryDirectory(prefix="sd-lora-compare-") as folder, _apart():
        short = {
            name: config.replace(**{n: OPTIONS[n].default for n in AT_DEFAULT}, **SHORT)
            for name, config in configs.items()
        }
        planned = _as_many_epochs(short, steps, shown)
        found = Compared(changed, planned)
        files: dict[str, dict[int, Path]] = {AS_IT_WAS: {}, CHANGED: {}}
        for seed in seeds:
            for name, config in short.items():
                own = {"max_train_steps": planned[name], "seed": seed}
                place = str(Path(folder) / f"{seed} {name}")
                result = train(config.replace(**own, output_dir=place), [shown])
                files[name][seed] = result.files[0].path
        _measure(configs, files, found, Path(folder), shown)
    return found


def changes(before: TrainConfig, after: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Option → its values, of those that differ.

    Raises:
        UsageError: none does, one that a short training does not have, or one with which a loss is
            another number.
    """
    old, new = before.as_dict(), after.as_dict()
    found = {name: (old[name], new[name]) for name in old if old[name] != new[name]}
    found.pop("output_dir", None)
    idle = [name for name in found if name in (*SHORT, *AT_DEFAULT, *OF_EACH, "preset")]
    if idle:
        raise UsageError(
            f"{', '.join(idle)}: not compared. The short trainings have their own (--steps, "
            "--seeds), draw and validate nothing, and the run has a value of each option of a "
            "preset: give these options"
        )
    if not found:
        raise UsageError("nothing differs: give a flag of `sd-lora train` that is to be tried")
    other = [n for n in found if OPTIONS[n].section == "model" or n in OF_THE_LOSS]
    if other:
        raise UsageError(f"{', '.join(other)}: with another one a loss is another number")
    if before.token_abstraction or after.token_abstraction:
        raise UsageError("runs that learn new words cannot be compared: no LoRA file has them")
    return found


@contextmanager
def _apart() -> Iterator[None]:
    """A context in which an interruption says that the run itself lost nothing."""
    try:
        yield
    except Interrupted:
        raise RunError("interrupted: the short trainings are gone, the run is as it was") from None


def _as_many_epochs(
    configs: Mapping[str, TrainConfig], steps: int, shown: Listener
) -> dict[str, int]:
    """Name → steps of a training, in which each image is seen as often as in the first's."""
    found: dict[str, int] = {}
    epochs = 0.0
    for name, config in configs.items():
        plan = check(config.replace(max_train_steps=steps), page=False, listeners=[shown]).plan
        a_step = plan.samples_per_step / plan.epochs.num_samples
        epochs = epochs or steps * a_step
        found[name] = max(1, round(epochs / a_step))
    return found


def _measure(
    configs: Mapping[str, TrainConfig],
    files: Mapping[str, Mapping[int, Path]],
    found: Compared,
    folder: Path,
    shown: Listener,
) -> None:
    """Measure the files on the images that are in both, each by its own captions."""
    patterns = ",".join(config.leave_out for config in configs.values() if config.leave_out)
    digests: list[str] = []
    paths = [path for of in files.values() for path in of.values()]
    text = bool({component for path in paths for component in open_lora(path).adapter} - {"unet"})
    for name, config in configs.items():
        looked = looking(config, configs[AS_IT_WAS], patterns, text, str(folder / f"of {name}"))
        with prepared_run(looked, [shown]) as run:
            own = [sample.digest for sample in run.images.instances.samples]
            if digests and own != digests:
                raise UsageError(
                    "the images of both differ by more than --leave_out, captions and repeats: "
                    "there are none to compare on"
                )
            digests, loras = own, Loras(run.parts)
            loras.put_on(Mix())
            found.base = found.base or losses_of(run)
            for seed, path in files[name].items():
                loras.put_on(Mix(((path, 1.0),)))
                found.losses[name][seed] = losses_of(run)


def looking(
    config: TrainConfig, first: TrainConfig, patterns: str, text: bool, folder: str
) -> TrainConfig:
    """The configuration that measures files: with the images and captions of one run, and the
    objective of the first. patterns: images that are left out. text: whether text encoders learn.
    """
    values = {
        name: getattr(first if option.section == "objective" else config, name)
        for name, option in OPTIONS.items()
        if option.section in OF_MEASURE and name not in OF_TRAINING
    }
    own = {
        "mode": first.mode, "output_dir": folder, "seed": 0, "repeats": 1, "max_train_steps": 1,
        "mixed_precision": first.mixed_precision, "train_batch_size": first.train_batch_size,
        "num_validation_images": 0, "leave_out": patterns or None,
    }  # fmt: skip
    return TrainConfig(**values | measuring(text) | own)


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
