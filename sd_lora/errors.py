"""The two errors for users. Their texts name the finding, its place, and the remedy.

The command line prints them without a traceback and exits with their `exit_code`.
Any other exception that reaches a user is a bug of this project.
"""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A request that cannot work: a wrong flag, path or pattern, or a contradiction."""

    exit_code = 2


class RunError(RuntimeError):
    """A failure during the work: a broken image, a full disk, a diverged loss."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Hint ' Did you mean X?' with the nearest of the known words; empty if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""
