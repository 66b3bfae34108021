"""What a check finds: which file, what is wrong, and what becomes of it."""

from dataclasses import asdict, dataclass
from typing import Literal

from sd_lora.errors import RunError

Level = Literal["left out", "warning", "note"]
LEVELS: tuple[Level, ...] = ("left out", "warning", "note")

MAX_NAMED = 20
"""How many files one error names."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a user should know of a file.

    level: "left out": it is not trained. "warning": it is trained, and probably not as meant.
    "note": it is trained, and something was done to it. code: a word for scripts, such as
    "truncated". name: the file. text: what was found, and what to do.
    """

    level: Level
    code: str
    name: str
    text: str

    def line(self) -> str:
        return f"{self.name}: {self.text}"

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def refuse(findings: list[Finding], what: str) -> None:
    """Raises RunError naming findings, the first of them in full; nothing for none."""
    if not findings:
        return
    more = len(findings) - MAX_NAMED
    lines = [f.line() for f in findings[:MAX_NAMED]]
    raise RunError(
        f"{what}\n  " + "\n  ".join(lines) + (f"\n  … and {more} more" if more > 0 else "")
    )
