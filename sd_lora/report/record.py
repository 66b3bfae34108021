"""`report.json`: a run's summary, warnings, time, files and changes, for its page."""

import json
import re
import time
from pathlib import Path
from typing import Any

from sd_lora.data.check.page import report_lines
from sd_lora.errors import UsageError
from sd_lora.files import write_whole
from sd_lora.report.events import (
    Event,
    Exported,
    RunEnded,
    RunPlanned,
    StepDone,
    TrainingStarted,
    Validated,
    Warned,
)

RECORD = "report.json"


class Record:
    """Keeps a run's record, as a listener; `write` puts it into the output folder.

    folder: of the run. A resumed run adds its time to that of the record that is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {"warnings": [], "seconds": 0.0, "ended": False}
        self._before, self._since = 0.0, time.monotonic()

    def __call__(self, event: Event) -> None:
        """Take the facts of an event."""
        facts = self.facts
        match event:
            case Warned():
                facts["warnings"] += [_private(finding.line()) for finding in event.findings]
            case RunPlanned():
                facts["rows"] = {k: _private(v) for k, v in event.summary.rows.items()}
                facts["notes"] = [_private(note) for note in event.summary.notes]
                facts["findings"] = [_private(x) for x in report_lines(event.summary.findings)]
            case TrainingStarted():
                facts["num_steps"] = event.num_steps
                if event.first_step and (self.folder / RECORD).is_file():
                    self._before = float(read_record(self.folder).get("seconds", 0.0))
                self._since = time.monotonic()
            case StepDone():
                facts["step"] = event.step
            case Validated():
                facts["replayed"] = {"first": event.first, "trained": event.trained}
            case Exported():
                facts["files"] = [file.path.name for file in event.files]
                facts["usage"] = [_private(line) for line in event.usage]
                facts["changes"] = event.changes
            case RunEnded():
                facts["ended"] = True

    def write(self) -> None:
        """Write the file, whole or not at all; raises RunError on a failed write."""
        self.facts["seconds"] = self._before + time.monotonic() - self._since
        text = json.dumps(self.facts, indent=1, ensure_ascii=False).replace("NaN", "null")
        write_whole(self.folder / RECORD, text.encode())


_FOLDERS = re.compile(r"(?<![\w.~:/\\])(?:[A-Za-z]:)?(?:[\\/][^\\/\s'\"(),;:]+)+(?=[\\/])[\\/]")
"""The folders of an absolute path, up to its last name."""


def _private(text: str) -> str:
    """A text without this machine's folders: the page is passed on."""
    return _FOLDERS.sub("", text.replace(str(Path.home()), "~"))


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run; raises UsageError for a folder without one, or a broken one."""
    path = folder / RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        text = (
            f"{folder} has no {RECORD}: it is no output folder of a run, or of an earlier version"
        )
        raise UsageError(text) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no record of a run")
    return found
