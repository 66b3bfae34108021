"""`report.json`: a run's summary, warnings, time, files and changes, for its page."""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd_lora.config.schema import TrainConfig
from sd_lora.data.check.page import report_lines
from sd_lora.errors import UsageError, near_path
from sd_lora.files import write_whole
from sd_lora.report.events import (
    BestTaken,
    Event,
    Exported,
    ImagesScored,
    LedgerRead,
    RunEnded,
    RunPlanned,
    StepDone,
    TrainingStarted,
    Validated,
    ValidationDone,
    Warned,
)

RECORD = "report.json"

EMPTY: dict[str, Any] = {
    "warnings": [], "seconds": 0.0, "ended": False, "rows": {}, "notes": [], "findings": [],
    "num_steps": 0, "step": 0, "replayed": {}, "files": [], "usage": [], "changes": {},
    "validation": {}, "scores": {}, "ledger": [], "image_set": {}, "checkpoints": [], "spent": {},
    "process_seconds": 0.0, "early": "", "peak_bytes": 0, "alike": [],
}  # fmt: skip
"""Fact of a record → its value where it is not known; another type than this one's is none."""


ALIKE = ("duplicate", "near-duplicate")
"""Codes of findings on an image that is there twice; "alike" has its name and the other's."""


class Record:
    """Keeps a run's record, as a listener; `write` puts it into the output folder.

    A resumed run adds its time and warnings to those of the record that is there. Texts have the
    names of the configuration's files and folders without their places: the page is passed on.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.folder = config.output_path
        self.facts: dict[str, Any] = {"warnings": [], "seconds": 0.0, "ended": False}
        self._places = places_of(config)
        self._before, self._since = 0.0, -math.inf

    def __call__(self, event: Event) -> None:
        """Take the facts of an event."""
        facts = self.facts
        match event:
            case Warned():
                facts["warnings"] += [self._shown(finding.line()) for finding in event.findings]
            case RunPlanned():
                facts["rows"] = {k: self._shown(v) for k, v in event.summary.rows.items()}
                facts["notes"] = [self._shown(note) for note in event.summary.notes]
                lines = report_lines(event.summary.findings)
                facts["findings"] = [self._shown(line) for line in lines]
                facts["alike"] = [
                    [self._shown(finding.name), self._shown(finding.other)]
                    for finding in event.summary.findings
                    if finding.code in ALIKE
                ]
            case TrainingStarted():
                facts["num_steps"] = event.num_steps
                if self._since == -math.inf:  # else the run goes back to a checkpoint
                    self._since = time.monotonic()
                    self._go_on(event.first_step)
            case StepDone():
                facts["step"] = event.step
            case Validated():
                numbers = {"first": event.first, "trained": event.trained}
                known = {name: n for name, n in numbers.items() if math.isfinite(n)}
                facts["replayed"] = known
            case ValidationDone():
                facts["validation"] = event.record
            case ImagesScored():
                facts["scores"] = event.record
            case BestTaken():
                facts["early"], facts["step"] = event.text(), event.step
                facts["scores"] = event.record or facts.get("scores", {})
            case LedgerRead():
                facts["ledger"] = [
                    {**image, **{key: self._shown(image[key]) for key in ("name", "file")}}
                    for image in event.images
                ]
                facts["image_set"] = {"trained": event.trained, "window": event.window}
            case Exported():
                facts["files"] = [file.path.name for file in event.files]
                facts["usage"] = [self._shown(line) for line in event.usage]
                facts["changes"] = event.changes
            case RunEnded():
                facts["ended"] = True
                facts["spent"] = {kind: round(time, 3) for kind, time in event.spent.items()}
                facts["process_seconds"] = round(event.seconds, 3)
                facts["peak_bytes"] = event.peak_bytes

    def _go_on(self, first_step: int) -> None:
        """Take over the time and the warnings of a resumed run's earlier part."""
        self.facts["step"] = first_step
        if first_step and (self.folder / RECORD).is_file():
            earlier = read_record(self.folder)
            self._before = earlier["seconds"]
            for name in ("validation", "scores", "ledger", "image_set"):
                self.facts.setdefault(name, earlier[name])
            warnings = [*earlier["warnings"], *self.facts["warnings"]]
            self.facts["warnings"] = list(dict.fromkeys(map(str, warnings)))

    def write(self) -> None:
        """Write the file, whole or not at all; raises RunError on a failed write."""
        self.facts["seconds"] = self._before + time.monotonic() - self._since
        text = json.dumps(self.facts, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(self.folder / RECORD, text.encode())

    def _shown(self, text: str) -> str:
        """A text without the places of the configuration's paths, and of the home folder."""
        for place, name in self._places.items():
            text = text.replace(place, name)
        home = str(Path.home())
        return text if home in ("/", "\\") else text.replace(home, "~")


def kept_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in an output folder."""
    names = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def places_of(config: TrainConfig) -> dict[str, str]:
    """Absolute path → name of each file and folder of a configuration, the longest first."""
    values = [v for v in texts_in(config.as_dict()) if os.sep in v or os.path.exists(v)]
    paths = [Path(value).expanduser() for value in (*values, str(config.output_path))]
    forms = {form for path in paths for form in (Path(os.path.abspath(path)), path.resolve())}
    named = sorted((form for form in forms if form.name), key=lambda form: -len(str(form)))
    return {str(form): form.name for form in named}


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for item in value.values() for text in texts_in(item))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in texts_in(item))


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run, with `EMPTY` for each fact that is missing or of another type, and the
    steps of the checkpoints that are there.

    Raises:
        UsageError: no folder, a folder without a record, or a record that cannot be read.
    """
    path = folder / RECORD
    if not folder.is_dir():
        text = f"there is no output folder {folder}{near_path(folder, Path.is_dir)}"
        raise UsageError(text)
    if not path.is_file():
        text = (
            f"{folder} has no {RECORD}: it is no output folder of a run, or of an earlier version"
        )
        raise UsageError(text)
    found = read_json(path)
    number = int | float
    return {
        name: found[name]
        if isinstance(found.get(name), number if isinstance(usual, float) else type(usual))
        else usual
        for name, usual in EMPTY.items()
    } | {"checkpoints": kept_steps(folder)}


def read_json(path: Path) -> dict[str, Any]:
    """A table in a JSON file; raises UsageError for a file that holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no table")
    return found
