"""The two errors for users. Their texts name the finding, its place, and the remedy.

The command line prints them without a traceback and exits with their `exit_code`.
Any other exception that reaches a user is a bug of this project.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration. field: its option. remedy: may be empty."""

    field: str
    text: str
    remedy: str = ""

    def line(self) -> str:
        """Text and remedy in a line."""
        return f"{self.text}. {self.remedy}" if self.remedy else self.text


class UsageError(ValueError):
    """A request that cannot work: a wrong flag, path or pattern, or a contradiction.

    problems: the mistakes of a configuration, one a field; empty for other requests. told: whether
    another process of the run says it; None: not known.
    """

    exit_code = 2
    told: bool | None = None

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)


def refuse(problems: Sequence[Problem]) -> None:
    """Raise a UsageError with all problems, a line each; nothing for none."""
    if problems:
        raise UsageError("\n".join(problem.line() for problem in problems), problems)


@contextmanager
def named(field: str) -> Iterator[None]:
    """Give the UsageErrors of a block the option that they are about."""
    try:
        yield
    except UsageError as error:
        raise UsageError(str(error), error.problems or [Problem(field, str(error))]) from None


class RunError(RuntimeError):
    """A failure during the work: a broken image, a full disk, a diverged loss.

    told: as of a UsageError.
    """

    exit_code = 1
    told: bool | None = None


class Interrupted(RunError):
    """An end before the last step, at somebody's request: the steps so far are saved."""

    exit_code = 3


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 step", "3 steps"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def did_you_mean(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """Hint ' Did you mean X?' with the nearest of the known words; empty if none is near.

    likeness: share of the letters that two words have in common, from where on they are near.
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)
    return f" Did you mean {close[0]}?" if close else ""


def near_path(path: Path, is_one: Callable[[Path], bool] = Path.exists) -> str:
    """Hint ". Did you mean X?" with the path on disk that differs from a missing one in one name
    alone, and that nearest; empty if none is near.

    is_one: whether a path is of the wanted kind.
    """
    path = path.expanduser()
    there = next((folder for folder in path.parents if folder.is_dir()), None)
    if there is None:
        return ""
    missing, *below = path.relative_to(there).parts
    try:
        names = [child.name for child in there.iterdir() if is_one(child.joinpath(*below))]
    except OSError:
        return ""
    close = difflib.get_close_matches(missing, names, n=1, cutoff=0.6)
    return f". Did you mean {there.joinpath(close[0], *below)}?" if close else ""


def install_line(extra: str) -> str:
    """The command that installs the packages of one of our extras: `pip install "compel>=2.5"`.

    The packages by their own names, since the project is on no package index; in double quotes,
    which every shell takes.
    """
    rows = (row.partition(";") for row in requires("sd_lora") or ())
    of_extra = (
        name.strip() for name, _, marker in rows if f"'{extra}'" in marker.replace('"', "'")
    )
    return " ".join(["pip install", *(f'"{name}"' for name in of_extra)])
