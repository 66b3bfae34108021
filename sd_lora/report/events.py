"""Events of a run: typed records for its listeners.

A listener is a function of one event: the terminal, the log file, trackers, a page. A run tells and
never prints; events come from the main process alone, in the order in which things happen.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from sd_lora.findings import Finding
from sd_lora.report.digest import Digest
from sd_lora.report.summary import Summary

if TYPE_CHECKING:  # pages of runs are read without torch
    from sd_lora.formats.verify import Verified
    from sd_lora.sampling.score import Score

T = TypeVar("T")


@dataclass(frozen=True)
class FindingMade:
    """A finding of the data check; `RunPlanned` has all of them, too."""

    finding: Finding


@dataclass(frozen=True)
class Progress:
    """Work beside the training steps, item by item.

    label: the work, such as "checking". done: finished items. total: None while unknown.
    unit: name of an item. ended: no further event of this label follows.
    """

    label: str
    done: int
    total: int | None
    unit: str = "image"
    ended: bool = False


@dataclass(frozen=True)
class Warned:
    """Warnings: on settings, before anything is loaded, and on numbers of a step. findings: one at
    least."""

    findings: Sequence[Finding]


@dataclass(frozen=True)
class JobsPlanned:
    """Several runs over one base are ready for their first steps. rows: label → text, of what they
    share."""

    rows: Mapping[str, str]


@dataclass(frozen=True)
class RunPlanned:
    """All checks have passed, and everything is loaded. summary: with the findings."""

    summary: Summary


@dataclass(frozen=True)
class TrainingStarted:
    """The next step is `first_step` + 1 of `num_steps`; again after a return to a checkpoint."""

    first_step: int
    num_steps: int


@dataclass(frozen=True)
class StepDone:
    """One optimiser step is done; its loss is still on the device. step: counted from 1."""

    step: int


@dataclass(frozen=True)
class StepRecord:
    """Numbers of one step. loss: mean over processes. learning_rate: of modules without a factor of
    their own. grad_norm: before clipping; None where fp16's loss scaling skipped the step.
    learning_rates: parameter group → its rate. fit: means by which the step took less memory."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    fit: Mapping[str, float] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Loss, learning rate ("lr", and "lr/unet ×16" where there are several groups), gradient
        norm and "fit/at_once" by name, as the log and trackers have them; without a norm that is
        None."""
        numbers = {"loss": self.loss, "lr": self.learning_rate}
        if len(self.learning_rates) > 1:
            numbers |= {f"lr/{group}": rate for group, rate in self.learning_rates.items()}
        numbers |= {f"fit/{name}": value for name, value in self.fit.items()}
        return numbers if self.grad_norm is None else numbers | {"grad_norm": self.grad_norm}


@dataclass(frozen=True)
class StepsLogged:
    """Records of the steps since the last such event."""

    records: tuple[StepRecord, ...]

    @property
    def mean_loss(self) -> float:
        return sum(record.loss for record in self.records) / len(self.records)


@dataclass(frozen=True)
class SamplesDrawn:
    """Sample images of the model after `step` steps, 0 for the base, one a prompt. They stand in
    their files."""

    step: int
    prompts: Sequence[str]
    images: Sequence[Image.Image]


@dataclass(frozen=True)
class CheckpointSaved:
    """A complete checkpoint folder."""

    step: int
    path: Path


@dataclass(frozen=True)
class LoraSaved:
    """LoRA files in mid-run. files: verified ones. words: files of new words."""

    step: int
    files: "Sequence[Verified]"
    words: Sequence[Path]


@dataclass(frozen=True)
class Validated:
    """Mean loss of the first steps' batches and noise, in training and by the trained model.

    num_steps: number of these steps. first: NaN where the log of an earlier part is gone.
    """

    num_steps: int
    first: float
    trained: float


@dataclass(frozen=True)
class ValidationDone:
    """The model is measured on images and noise that are not trained.

    step: number of steps done. losses: group of images → loss of each item. record: all
    measurements so far, for `report.json`.
    """

    step: int
    losses: Mapping[str, Sequence[float]]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class ImagesScored:
    """Prompts are drawn by the model as it is now, and their images are scored.

    step: number of steps done. score: of the images. record: all scores so far, for `report.json`.
    """

    step: int
    score: "Score"
    record: Mapping[str, Any]


@dataclass(frozen=True)
class BestTaken:
    """A run that ends early after step `ended` takes its best one. record: all scores, as of
    `ImagesScored`; empty without scores."""

    step: int
    ended: int
    record: Mapping[str, Any]

    def text(self) -> str:
        """Why the run has ended, and of which step its files are."""
        return (
            f"ended early after step {self.ended}: nothing better since step {self.step}, of which "
            "the files are"
        )


@dataclass(frozen=True)
class LedgerRead:
    """The images of a run, each loss against that of all. images: see `image_rows`; not all of a
    large set. trained: number of those that are trained. window: steps of a window."""

    images: Sequence[Mapping[str, Any]]
    trained: int
    window: int


@dataclass(frozen=True)
class Exported:
    """The files of a finished run. files: verified LoRA files. usage: lines on how to load them.
    changes: component → part of the model → ‖ΔW‖ / ‖W‖ of its adapted modules."""

    files: "Sequence[Verified]"
    usage: Sequence[str]
    changes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pushed:
    """The files are on the hub. address: of the repository."""

    address: str


@dataclass(frozen=True)
class RunEnded:
    """A run that did all its steps. seconds: of this process. sheet: samples before and after.
    page: the run on one page. spent: kind of work → its seconds in this process: training, samples,
    validation, scores. peak_bytes: most memory that the process had at once, on its device if that
    has its own; 0 where the system does not tell."""

    seconds: float
    sheet: Path | None
    digest: Digest
    page: Path | None = None
    spent: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


Event = (
    FindingMade
    | Progress
    | Warned
    | RunPlanned
    | JobsPlanned
    | TrainingStarted
    | StepDone
    | StepsLogged
    | SamplesDrawn
    | CheckpointSaved
    | LoraSaved
    | Validated
    | ValidationDone
    | ImagesScored
    | BestTaken
    | LedgerRead
    | Exported
    | Pushed
    | RunEnded
)
Listener = Callable[[Event], None]


def to_all(listeners: Sequence[Listener]) -> Listener:
    """A listener that passes each event on to all of these, in their order."""

    def emit(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return emit


@contextmanager
def counting(
    emit: Listener, label: str, total: int | None, unit: str
) -> Iterator[Callable[[], None]]:
    """A function to call after each of `total` items, with `Progress` events around them."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        emit(Progress(label, done, total, unit))

    emit(Progress(label, 0, total, unit))
    try:
        yield advance
    finally:
        emit(Progress(label, done, total, unit, ended=True))


def tracked(
    items: Iterable[T], emit: Listener, label: str, total: int | None = None, unit: str = "image"
) -> Iterator[T]:
    """Yield items, with `Progress` events before the first and after each."""
    with counting(emit, label, total, unit) as advance:
        for item in items:
            yield item
            advance()
