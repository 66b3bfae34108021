"""The two errors that a user may meet: what was found, where, and what to do about it.

The command line prints them without a traceback and leaves with their `exit_code`.
Anything else that reaches the user is a bug of this project.
"""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """What was asked for cannot be done: a flag, a path, a pattern, a contradiction."""

    exit_code = 2


class RunError(RuntimeError):
    """What was asked for failed on the way: a broken image, a full disk, a diverged loss."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean X?' for the nearest of the `known` words, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""
