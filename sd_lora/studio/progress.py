"""A run as it stands: from the files of its output folder and the output of its process."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sd_lora.errors import UsageError
from sd_lora.files import mib
from sd_lora.folders import RUN_LOG
from sd_lora.report.log_file import LogFile
from sd_lora.report.page_images import Drawn, samples_of
from sd_lora.report.record import EMPTY, RECORD, read_record
from sd_lora.report.run_page import curves_of
from sd_lora.report.summary import duration
from sd_lora.report.verdict import verdict_of
from sd_lora.studio.keeper import Keeper, last_lines
from sd_lora.studio.store import RUNNING, Job
from sd_lora.training.checkpoint_folders import RESUME


@dataclass(frozen=True)
class Progress:
    """A run on its page.

    record: `report.json`, empty values where it has none. step: of the newest one that is logged.
    rows: of the log. left: words for the time that is left, or "". memory: of its processes. last:
    lines of its output.
    """

    job: Job
    record: Mapping[str, Any]
    step: int
    rows: list[dict[str, float]]
    left: str
    memory: str
    last: list[str]

    @property
    def num_steps(self) -> int:
        return int(self.record["num_steps"])

    @property
    def now(self) -> str:
        """The last line of the output: a bar, or an error."""
        return self.last[-1] if self.last else ""

    @property
    def error(self) -> str:
        """The text with which a failed job ended."""
        starts = [i for i, line in enumerate(self.last) if line.startswith("error:")]
        return "\n".join(self.last[starts[-1] :]).removeprefix("error: ") if starts else self.now

    @property
    def drawn(self) -> Drawn:
        """Its sample images."""
        return samples_of(Path(self.job.folder), max(self.step, 0))

    @property
    def verdict(self) -> str:
        """The verdict on the validations so far, or ""."""
        verdict = verdict_of({**self.record, "folder": Path(self.job.folder).name})
        return verdict.text if verdict else ""

    @property
    def curves(self) -> dict[str, list[float | None]]:
        return curves_of(self.rows)


class Watch:
    """Looks at runs, and remembers the pace of each since it was first looked at."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self._first: dict[tuple[int, float | None], tuple[float, int]] = {}

    def of(self, job: Job) -> Progress:
        """The progress of a run that is queued, running or over."""
        folder = Path(job.folder)
        fresh = _is_of(job, folder / RUN_LOG)
        rows = LogFile(folder / RUN_LOG).rows() if fresh else []
        record: Mapping[str, Any] = EMPTY
        if _is_of(job, folder / RECORD):
            with suppress(UsageError):
                record = read_record(folder)
        step = max(int(rows[-1]["step"]) if rows else 0, int(record["step"]))
        left, memory = "", ""
        if job.state == RUNNING:
            left = self._left(job, folder / RUN_LOG, step, int(record["num_steps"]))
            memory = self._memory(job)
        lines = last_lines(self.keeper.log_of(job), 20_000)
        return Progress(job, record, step, rows, left, memory, lines)

    def _left(self, job: Job, log: Path, step: int, num_steps: int) -> str:
        """The time that the steps left take at the pace so far, in words."""
        with suppress(OSError):
            written = log.stat().st_mtime
            since, first = self._first.setdefault((job.id, job.started), (written, step))
            if step > first and written > since:
                seconds = (num_steps - step) * (written - since) / (step - first)
                return duration(max(0.0, seconds - (time.time() - written)))
        return ""

    def _memory(self, job: Job) -> str:
        process = self.keeper.process(job)
        if process is None:
            return ""
        total = 0
        for one in [process, *_children(process)]:
            with suppress(psutil.Error):
                total += one.memory_info().rss
        return mib(total)


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


def has_begun(job: Job) -> bool:
    """Whether a job's process has come to its steps, and listens to requests: it writes its record
    then, over that of an earlier process."""
    with suppress(OSError):
        return (Path(job.folder) / RECORD).stat().st_mtime >= (job.started or math.inf)
    return False


def _is_of(job: Job, path: Path) -> bool:
    """Whether a file of an output folder is this job's, and not an earlier run's there."""
    if not job.folder or job.started is None:
        return False
    with suppress(OSError):
        written = path.stat().st_mtime
        return RESUME.split()[0] in job.words or written >= job.started
    return False
