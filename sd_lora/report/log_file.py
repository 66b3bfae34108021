"""`training_log.jsonl`: one JSON object a step, with its loss, learning rate and gradient norm."""

import json
import os
from contextlib import suppress
from pathlib import Path

from sd_lora.errors import RunError
from sd_lora.files import write_fault, write_whole
from sd_lora.report.events import Event, StepsLogged


class LogFile:
    """The log of a run, as a listener."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, event: Event) -> None:
        """Append the records of logged steps, whole lines alone; raises RunError if the disk
        refuses them."""
        if not isinstance(event, StepsLogged):
            return
        lines = [json.dumps({"step": r.step} | r.numbers()) for r in event.records]
        data = ("\n".join(lines) + "\n").encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                self._append(file.fileno(), data)
        except OSError as error:
            reason = write_fault(error, self.path)
            raise RunError(f"{self.path} could not be written: {reason}") from None

    @staticmethod
    def _append(file: int, data: bytes) -> None:
        """Append all of the data and bring it to the disk, or leave the file as it was."""
        before = os.fstat(file).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, before)
            raise

    def rows(self) -> list[dict[str, float]]:
        """All whole rows of the file, oldest first; none if there is no file.

        A process that is killed, or a machine without power, leaves a part of a line or zeros.
        """
        if not self.path.is_file():
            return []
        found = map(_row, self.path.read_bytes().splitlines())
        return [row for row in found if row is not None]

    def cut(self, last_step: int) -> None:
        """Remove the rows of later steps, which a resumed run does again, and broken lines."""
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= last_step]
        write_whole(self.path, "".join(kept).encode())


def _row(line: bytes) -> dict[str, float] | None:
    """A line's row; None for a line that is not whole."""
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
