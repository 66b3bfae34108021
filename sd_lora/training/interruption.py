"""Requests to a run, to end, save or draw: signals, the clock, files named `stop` and `sample`."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STOP_FILE = "stop"
"""A file of this name in the output folder ends a run, where no signal reaches it."""

SAMPLE_FILE = "sample"
"""A file of this name in the output folder asks for samples now; it may hold prompts."""

ENDING = (
    b"\nending after this step, with a checkpoint; the same signal again ends at once, without\n"
)
"""The answer to a signal that asks to end: a step may take seconds."""

LOOK_EVERY = 1.0
"""Seconds between two looks for these files: on a network's disk each takes milliseconds."""


class _Drawing(BaseException):
    """A signal in the middle of drawing, where it is obeyed at once."""


class Requests:
    """The requests that a run has met.

    Args:
        folder: of the run, for the stop file.
        end: time of the monotonic clock at which the run shall end; None: never.
        limit: words for this time, as the option has it.
    """

    def __init__(self, folder: Path, end: float | None = None, limit: str | None = None) -> None:
        self.folder, self.end, self.limit = folder, end, limit
        self.signals: list[str] = []
        self.wants_save = False
        self.is_drawing = False
        self._looked: dict[str, float] = {}

    @property
    def reason(self) -> str:
        """The reason to end after the step, or ""."""
        if self.signals:
            return f"interrupted by {self.signals[0]}"
        if self.end is not None and time.monotonic() >= self.end:
            return f"ended by --max_train_time {self.limit}"
        if self._sees(STOP_FILE):
            self._looked.pop(STOP_FILE)  # it stays there, until the run has ended
            return f"ended by the file {self.folder / STOP_FILE}"
        return ""

    def _sees(self, name: str) -> bool:
        """Whether a file is there; between two looks it is not."""
        now = time.monotonic()
        if now - self._looked.get(name, -LOOK_EVERY) < LOOK_EVERY:
            return False
        self._looked[name] = now
        return (self.folder / name).exists()

    @property
    def wants_sample(self) -> bool:
        """Whether a file asks for samples now."""
        return self._sees(SAMPLE_FILE)

    def take_sample(self) -> str | None:
        """The text of the file that asks for samples, which is removed; None without one."""
        path = self.folder / SAMPLE_FILE
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            path.unlink()
        except OSError:
            return None
        return text

    def take_save(self) -> bool:
        """Whether SIGUSR1 has asked for a checkpoint since the last call."""
        wanted, self.wants_save = self.wants_save, False
        return wanted

    def forget_file(self) -> None:
        """Remove the stop file."""
        (self.folder / STOP_FILE).unlink(missing_ok=True)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Leave the block at once when a signal asks to end."""
        self.is_drawing = True
        try:
            with suppress(_Drawing):
                yield
        finally:
            self.is_drawing = False


@contextmanager
def listening(*of_runs: Requests) -> Iterator[None]:
    """Take SIGINT and SIGTERM as requests to end, and SIGUSR1, where there is one, to save; a
    second signal to end goes to the handler of before.

    of_runs: the requests of each run of this process.
    """
    previous: dict[int, Any] = {}

    def end(number: int, frame: object) -> None:
        if any(requests.signals for requests in of_runs):
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        for requests in of_runs:
            requests.signals.append(signal.Signals(number).name)
        with suppress(OSError):  # past Python's buffers, in which the signal may have come
            os.write(2, ENDING)
        if any(requests.is_drawing for requests in of_runs):
            raise _Drawing

    def save(number: int, frame: object) -> None:
        for requests in of_runs:
            requests.wants_save = True

    handlers: dict[int, Any] = {signal.SIGINT: end, signal.SIGTERM: end}
    handlers |= {signal.SIGUSR1: save} if hasattr(signal, "SIGUSR1") else {}  # Windows has none
    try:
        for number, handler in handlers.items():
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread: whoever started this one handles signals
        pass
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
