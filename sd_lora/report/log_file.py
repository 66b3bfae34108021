"""`training_log.jsonl`: one JSON object a step, with its loss, learning rate and gradient norm."""

import json
from pathlib import Path

from sd_lora.errors import RunError
from sd_lora.files import write_whole
from sd_lora.report.events import Event, StepsLogged


class LogFile:
    """The log of a run, as a listener."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, event: Event) -> None:
        """Append the records of logged steps; raises RunError if the disk refuses them."""
        if not isinstance(event, StepsLogged):
            return
        lines = [json.dumps({"step": r.step} | r.numbers()) for r in event.records]
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            raise RunError(f"{self.path} could not be written: {error.strerror}") from None

    def rows(self) -> list[dict[str, float]]:
        """All rows of the file, oldest first; none if there is no file."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def cut(self, last_step: int) -> None:
        """Remove the rows of later steps, which a resumed run does again."""
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= last_step]
        write_whole(self.path, "".join(kept).encode())
