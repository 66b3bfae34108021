"""Devices, processes, precision and trackers of a run, by Accelerate."""

import importlib.util
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)

from sd_lora.config.schema import TrainConfig
from sd_lora.errors import RunError, UsageError, install_line
from sd_lora.report.events import Event, SamplesDrawn, StepsLogged
from sd_lora.report.summary import Summary
from sd_lora.training import checkpoint

DTYPES = {
    "no": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""Name of a precision → dtype."""


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen base model."""
    return DTYPES[accelerator.mixed_precision]


def trackers(config: TrainConfig, summary: Summary) -> list[str]:
    """Accelerate's names of the trackers to use; adds a note where the default one is missing."""
    chosen = config.report_to
    if chosen == "none":
        return []
    if chosen is None:
        if importlib.util.find_spec("tensorboard"):
            return ["tensorboard"]
        summary.notes.append(f"no tracker: {install_line('tensorboard')} for curves")
        return []
    if chosen != "all" and not importlib.util.find_spec(chosen):
        raise UsageError(f"report_to {chosen} needs a package: pip install {chosen}")
    return [chosen]


def build_accelerator(config: TrainConfig, summary: Summary) -> Accelerator:
    """The Accelerator of a run: device, processes, precision, trackers; not accumulation."""
    log_with = trackers(config, summary) or None
    project = ProjectConfiguration(
        project_dir=str(config.output_path),
        logging_dir=str(config.output_path / config.logging_dir),
    )
    try:
        return Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=log_with,
            project_config=project,
            kwargs_handlers=[
                # base and inputs have one dtype already, and a layer casts its factors itself;
                # autocast would look at every operand of every operator once more
                AutocastKwargs(enabled=False),
                # all buffers are constants
                DistributedDataParallelKwargs(
                    broadcast_buffers=False,
                    find_unused_parameters=config.has_idle_parameters,
                ),
                # processes wait while the main one draws samples: on a slow device, for hours
                InitProcessGroupKwargs(timeout=timedelta(hours=6)),
            ],
        )
    except ValueError as error:
        raise UsageError(f"mixed_precision {config.mixed_precision}: {error}") from None


class Trackers:
    """Accelerate's trackers as a listener: losses, and sample images where a tracker takes them."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def __call__(self, event: Event) -> None:
        """Log steps and samples."""
        match event:
            case StepsLogged():
                for record in event.records:
                    self.accelerator.log(record.numbers(), step=record.step)
            case SamplesDrawn():
                array = np.stack([np.asarray(image) for image in event.images])  # (N, H, W, 3)
                for tracker in self.accelerator.trackers:
                    if tracker.name in IMAGE_TRACKERS:
                        options = IMAGE_TRACKERS[tracker.name]
                        tracker.log_images({"validation": array}, step=event.step, **options)


IMAGE_TRACKERS: dict[str, dict[str, str]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}
"""Tracker that takes images → options of its call."""

T = TypeVar("T")


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` on the main process; returns its result, or raises its error, on all processes.

    The result must be picklable.
    """
    if accelerator.num_processes == 1:
        return work()
    done: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            done[0] = work()
        except (UsageError, RunError) as error:  # the others would wait for ever
            done[1] = error
    broadcast_object_list(done)
    if done[1] is not None:
        raise done[1]
    return done[0]


def check_processes(accelerator: Accelerator) -> None:
    """Raise UsageError if a launcher started several processes and Accelerate joined none.

    Accelerate does this silently for torchrun on a CPU: each process would train alone, and all
    into one folder.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UsageError(
            f"the launcher started {started} processes, and accelerate joined "
            f"{accelerator.num_processes}: on a CPU, set ACCELERATE_USE_CPU=true"
        )


def agreed_seed(config: TrainConfig, resumed: Path | None) -> int:
    """The run's seed, the same on all processes: given, resumed, or drawn."""
    if config.seed is not None:
        return config.seed
    if resumed:
        return checkpoint.read_progress(resumed).seed
    drawn = [int.from_bytes(os.urandom(4), "little")]
    return int(broadcast_object_list(drawn)[0])
