"""The time of a run's steps, kept for each device: of its last run, and of the one before."""

import datetime
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import node
from typing import TYPE_CHECKING, Any

from sd_lora.config.schema import OPTIONS, SHORT_NAMES
from sd_lora.errors import RunError
from sd_lora.files import write_whole
from sd_lora.folders import state_folder
from sd_lora.report.events import (
    CheckpointSaved,
    Event,
    LoraSaved,
    RunEnded,
    RunPlanned,
    SamplesDrawn,
    StepsLogged,
    TrainingStarted,
    ValidationDone,
)

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

KEPT = 2
"""Runs of a device that are remembered: the last one, and the one that it is compared with."""

LIBRARIES = ("sd_lora", "torch", "diffusers", "transformers", "accelerate", "peft")
"""Packages on which the time of a step depends."""

SECTIONS = ("model", "data", "adapter", "training")
"""Sections with options on which it depends."""

MODEL = SHORT_NAMES["model"]


@dataclass(frozen=True)
class StepTime:
    """The time of a run's steps.

    seconds: median of a step. steps: number of steps that were timed. date: of the run's end.
    versions: of the libraries. options: by name.
    """

    seconds: float
    steps: int
    date: str
    versions: Mapping[str, str]
    options: Mapping[str, Any]

    def changes(self, versions: Mapping[str, str]) -> list[str]:
        """Versions since this run, in words: "torch 2.12.0 → 2.13.0"."""
        return _changes(self.versions, versions, "none")

    def changes_to(self, later: "StepTime") -> list[str]:
        """Versions and options in which a later run differs: "--rank 8 → 16"."""
        flags = [{f"--{name}": v for name, v in run.options.items()} for run in (self, later)]
        return [*self.changes(later.versions), *_changes(flags[0], flags[1], "not given")]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], without: str) -> list[str]:
    names = dict.fromkeys([*before, *now])
    pairs = [(name, before.get(name), now.get(name)) for name in names]

    def word(value: object) -> str:
        if isinstance(value, bool):
            return "on" if value else "off"
        return without if value is None else str(value)

    return [f"{name} {word(old)} → {word(new)}" for name, old, new in pairs if old != new]


class StepTimes:
    """A listener that writes the time of a run's steps at its end, beside that of the run before.

    Only whole spans between two reads of the loss count, each of which waits for the device, and
    only those without other work, such as samples. A folder that cannot be written costs the
    record, and not the run: `sd-lora doctor` tells of it.
    """

    def __init__(self, config: "TrainConfig", clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options_of(config)
        self.clock = clock
        self._device = ""
        self._since: float | None = None
        self._spans: list[tuple[float, int]] = []  # seconds a step, steps

    def __call__(self, event: Event) -> None:
        """Take the time of one event."""
        match event:
            case RunPlanned():
                self._device = event.summary.rows["device"].rpartition(",")[0]
            case StepsLogged():
                now, number = self.clock(), len(event.records)
                if self._since is not None:
                    self._spans.append(((now - self._since) / number, number))
                self._since = now
            case TrainingStarted() | SamplesDrawn() | ValidationDone():
                self._since = None
            case CheckpointSaved() | LoraSaved():
                self._since = None
            case RunEnded() if self._spans:
                self._write()

    def _write(self) -> None:
        seconds = statistics.median(span for span, _ in self._spans)
        steps = sum(number for _, number in self._spans)
        today = datetime.date.today().isoformat()
        this = StepTime(seconds, steps, today, versions(), self.options)
        runs = [*read(self._device), this][-KEPT:]
        path = path_of(self._device)
        with suppress(OSError, RunError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps([asdict(run) for run in runs], indent=2).encode())


def options_of(config: "TrainConfig") -> dict[str, Any]:
    """Options that can bear on the time of a step, by name: no paths and prompts."""
    values = config.as_dict()
    return {
        name: values[name]
        for name, row in OPTIONS.items()
        if row.section in SECTIONS
        and row.short != "steps"
        and (row.kind not in ("str", "list") or row.choices or name == MODEL)
    }


def versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Package → version, of those that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def path_of(device: str) -> Path:
    """The file of a device of this machine. device: in words, "cuda (NVIDIA L4)"."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{node()} {device}".lower()).strip("-")
    return state_folder() / "step_times" / f"{name}.json"


def read(device: str) -> list[StepTime]:
    """The runs that are remembered of a device, the last one at the end; none where the file is not
    there, or is of another form."""
    with suppress(OSError, ValueError, TypeError):
        return [StepTime(**run) for run in json.loads(path_of(device).read_text("utf-8"))]
    return []
