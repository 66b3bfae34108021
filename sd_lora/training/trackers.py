"""Trackers of a run, by Accelerate: its numbers and samples in TensorBoard, W&B, MLflow, …"""

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from sd_lora.config.schema import TrainConfig
from sd_lora.errors import RunError, UsageError, install_line
from sd_lora.files import write_fault
from sd_lora.findings import Finding
from sd_lora.report.events import (
    Event,
    ImagesScored,
    Listener,
    SamplesDrawn,
    StepsLogged,
    TrainingStarted,
    ValidationDone,
    Warned,
)
from sd_lora.report.summary import Summary


def trackers(config: TrainConfig, summary: Summary) -> list[str]:
    """Accelerate's names of the trackers to use; adds a note on how to look at them, or where the
    default one is missing."""
    chosen = config.report_to or "tensorboard"
    if chosen == "none":
        return []
    if chosen != "all" and not importlib.util.find_spec(chosen):
        if config.report_to:
            raise UsageError(f"report_to {chosen} needs a package: pip install {chosen}")
        summary.notes.append(f"no tracker: {install_line('tensorboard')} for curves")
        return []
    if chosen in KNOWN and (command := KNOWN[chosen].looked_at):
        folder = config.output_path / config.logging_dir
        summary.notes.append(f"curves as it goes: {command.format(folder=folder)}")
    return [chosen]


def check_trackers_of_several(config: TrainConfig) -> None:
    """Raise UsageError for a tracker that follows one run of a process: of several it would mix the
    numbers. Those whose run is a folder follow any."""
    chosen = config.report_to
    if chosen not in (None, "none") and (chosen not in KNOWN or KNOWN[chosen].id_of):
        raise UsageError(
            f"report_to {chosen} follows one run of a process, and [[jobs]] are several: take "
            "tensorboard, or none"
        )


@contextmanager
def tracker_errors(accelerator: Accelerator) -> Iterator[None]:
    """Raise RunError where the disk refuses a tracker's files."""
    try:
        yield
    except OSError as error:
        place = Path(accelerator.logging_dir or ".")
        raise RunError(
            f"the tracker's files in {place} could not be written: {write_fault(error, place)}"
        ) from None


@dataclass(frozen=True)
class Shown:
    """Sample images of one size, after a step. name: of the set. prompts: one an image."""

    name: str
    images: Sequence[Image.Image]
    prompts: Sequence[str]
    step: int

    @property
    def each(self) -> Iterator[tuple[str, Image.Image, str]]:
        """Yield a name of its own, the image and its prompt."""
        for i, (image, prompt) in enumerate(zip(self.images, self.prompts, strict=True)):
            yield f"{self.name}/{i}", image, prompt


def _tensorboard_images(tracker: Any, shown: Shown) -> None:
    stacked = np.stack([np.asarray(image) for image in shown.images])
    tracker.log_images({shown.name: stacked}, step=shown.step, dataformats="NHWC")
    lines = "\n".join(f"{i}. {prompt}" for i, prompt in enumerate(shown.prompts))
    tracker.writer.add_text(f"{shown.name}/prompts", lines, shown.step)


def _wandb_images(tracker: Any, shown: Shown) -> None:
    wrap = importlib.import_module("wandb").Image
    listed = [wrap(image, caption=prompt) for _, image, prompt in shown.each]
    tracker.log({shown.name: listed}, step=shown.step)


def _trackio_images(tracker: Any, shown: Shown) -> None:
    wrap = importlib.import_module("trackio").Image
    found = {name: wrap(image, caption=prompt) for name, image, prompt in shown.each}
    tracker.tracker.log(found, step=shown.step)


def _mlflow_images(tracker: Any, shown: Shown) -> None:
    log_image = importlib.import_module("mlflow").log_image  # takes no caption
    for name, image, _ in shown.each:
        log_image(image, key=name, step=shown.step)


def _comet_images(tracker: Any, shown: Shown) -> None:
    for name, image, prompt in shown.each:
        of = {"prompt": prompt}
        tracker.tracker.log_image(image, name=name, step=shown.step, metadata=of)


def _mlflow_name(name: str) -> str:
    """A name that MLflow takes: letters, digits and some signs, and no folder "lr" of its store of
    files beside the file "lr". "lr/unet ×16, decay ×0" is "lr_unet x16 decay x0"."""
    return re.sub(r"[^\w .:/-]", "", name.replace("lr/", "lr_", 1).replace("×", "x"))


@dataclass(frozen=True)
class Tracker:
    """One of Accelerate's trackers.

    log_images: logs images of one size, with their prompts where it takes them. looked_at: the
    command that shows its runs; {folder} is where its files are. id_of: the id of its run, by which
    a resumed one goes on in it. going_on: id → arguments of its start. The last two are None where
    the run is the folder. fixed: whether the options of a run that goes on stay as they were.
    named: name of a number → the one that the tracker takes.
    """

    log_images: Callable[[Any, Shown], None]
    looked_at: str = ""
    id_of: Callable[[Any], str] | None = None
    going_on: Callable[[str], dict[str, Any]] | None = None
    fixed: bool = False
    named: Callable[[str], str] = str


KNOWN: dict[str, Tracker] = {
    "tensorboard": Tracker(_tensorboard_images, 'tensorboard --logdir "{folder}"'),
    # https://docs.wandb.ai/guides/runs/resuming
    "wandb": Tracker(
        _wandb_images,
        id_of=lambda run: run.id,
        going_on=lambda id: {"id": id, "resume": "allow"},
    ),
    # https://huggingface.co/docs/trackio/api
    "trackio": Tracker(
        _trackio_images,
        "trackio show --project sd_lora",
        id_of=lambda run: run.name,
        going_on=lambda name: {"name": name, "resume": "allow"},
    ),
    # https://mlflow.org/docs/latest/api_reference/python_api/mlflow.html#mlflow.start_run
    "mlflow": Tracker(
        _mlflow_images,
        "mlflow ui",
        id_of=lambda run: run.info.run_id,
        going_on=lambda id: {"run_id": id},
        fixed=True,
        named=_mlflow_name,
    ),
    # https://comet.com/docs/v2/api-and-sdk/python-sdk/reference/start
    "comet_ml": Tracker(
        _comet_images,
        id_of=lambda found: found.get_key(),
        going_on=lambda key: {"experiment_key": key},
    ),
}
"""Accelerate's name → tracker; W&B and Comet print the address of a run by themselves."""

OTHER = Tracker(lambda *_: None)
"""Any other one that `report_to all` finds: it gets numbers alone."""


def start_trackers(
    accelerator: Accelerator, options: Mapping[str, object], step: int, runs: Mapping[str, str]
) -> None:
    """Start the trackers, those of a resumed run where they ended.

    options: of the run, as others may see them. step: number of steps done. runs: tracker → id of
    its run.

    Raises:
        RunError: a disk that refuses a tracker's files, a tracker without its key or its server.
    """
    plain = int | float | str | bool  # all that trackers take
    values = {k: v if isinstance(v, plain) else str(v) for k, v in options.items()}
    arguments = {
        name: going_on(id) for name, id in runs.items() if (going_on := KNOWN[name].going_on)
    }
    # hides the later steps of a run that was killed, which are done again
    arguments["tensorboard"] = {"purge_step": step + 1}
    used = [*map(str, accelerator.log_with)]
    fixed = any(KNOWN[name].fixed for name in runs if name in used)
    with tracker_errors(accelerator):
        try:
            accelerator.init_trackers(
                "sd_lora", config=None if fixed else values, init_kwargs=arguments
            )
        except OSError:
            raise
        except Exception as error:  # of a library: no key, no server, another version
            raise RunError(
                f"{' and '.join(used)} could not be started: {error}. Mend it, or leave out "
                "--report_to"
            ) from error


def tracker_runs(accelerator: Accelerator) -> dict[str, str]:
    """Tracker → id of its run on a server; none on other processes than the main one."""
    trackers = accelerator.trackers if accelerator.is_main_process else []
    known = [(tracker, KNOWN[tracker.name]) for tracker in trackers if tracker.name in KNOWN]
    return {tracker.name: row.id_of(tracker.tracker) for tracker, row in known if row.id_of}


class Lost(GeneralTracker):
    """Stands for a tracker that has failed, and takes nothing more; its run can go on later."""

    requires_logging_directory = False

    def __init__(self, failed: GeneralTracker) -> None:
        super().__init__(_blank=True)
        self.name, self.run = failed.name, failed.tracker

    @property
    def tracker(self) -> Any:
        return self.run


def _each(
    accelerator: Accelerator, work: Callable[[GeneralTracker, Tracker], None], tell: Listener
) -> None:
    """Do some work with each tracker. One that fails, such as a server that is gone, costs a
    warning, and is left alone from then on; a disk that refuses a tracker's files is an error."""
    for i, tracker in enumerate(accelerator.trackers):
        if isinstance(tracker, Lost):
            continue
        try:
            work(tracker, KNOWN.get(tracker.name, OTHER))
        except Exception as error:  # of a library and of the network
            if isinstance(error, OSError) and tracker.requires_logging_directory:
                raise
            accelerator.trackers[i] = Lost(tracker)
            text = str(error).strip().partition("\n")[0] or type(error).__name__
            tell(Warned([Finding("tracker-lost", tracker.name, text)]))


def end_trackers(accelerator: Accelerator, tell: Listener) -> None:
    """Let the trackers write the rest and end, as `_each`.

    Raises:
        RunError: a disk that refuses a tracker's files.
    """
    with tracker_errors(accelerator):
        if accelerator.is_main_process:
            _each(accelerator, lambda tracker, _: tracker.finish(), tell)
        accelerator.trackers.clear()
        accelerator.end_training()


class Trackers:
    """Accelerate's trackers as a listener: losses, rates, validation, and sample images.

    tell: takes the warning on a tracker that fails.
    """

    def __init__(self, accelerator: Accelerator, tell: Listener) -> None:
        self.accelerator, self.tell, self.first_step = accelerator, tell, 0

    def __call__(self, event: Event) -> None:
        """Log steps, validations and samples; raises RunError if the disk refuses them."""
        with tracker_errors(self.accelerator):
            self._log(event)

    def _numbers(self, numbers: Mapping[str, float], step: int) -> None:
        """Log the numbers of a step, by name."""

        def log(tracker: GeneralTracker, row: Tracker) -> None:
            tracker.log({row.named(name): value for name, value in numbers.items()}, step=step)

        _each(self.accelerator, log, self.tell)

    def _log(self, event: Event) -> None:
        match event:
            case StepsLogged():
                for record in event.records:
                    self._numbers(record.numbers(), record.step)
            case ValidationDone():
                means = {
                    f"validation/{group.replace(' ', '_')}": sum(losses) / len(losses)
                    for group, losses in event.losses.items()
                }
                self._numbers(means, event.step)
            case ImagesScored():
                score = {
                    f"score/{name}": values.mean
                    for name, values in event.score.intervals.items()
                    if math.isfinite(values.mean)
                }
                if rows := event.record.get("rows"):
                    score["score/merit"] = rows[-1]["merit"]
                self._numbers(score, event.step)
            case TrainingStarted():
                self.first_step = event.first_step
            case SamplesDrawn() if (
                event.step >= self.first_step
            ):  # the run that is gone on with has them
                for size in dict.fromkeys(image.size for image in event.images):
                    self._images(event, size)

    def _images(self, event: SamplesDrawn, size: tuple[int, int]) -> None:
        """Log the images of one size."""
        pairs = zip(event.images, event.prompts, strict=True)
        images, prompts = zip(*(pair for pair in pairs if pair[0].size == size), strict=True)
        shown = Shown(f"samples/{size[0]}x{size[1]}", images, prompts, event.step)
        _each(self.accelerator, lambda tracker, row: row.log_images(tracker, shown), self.tell)
