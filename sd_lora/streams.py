"""Standard streams: a sign that one cannot encode is written in plain signs, and ends no run.

A pipe on Windows has a code page (cp1251, cp1252) and not UTF-8: it lacks "Δ" or "×", and the names
of folders in other scripts.
"""

import codecs
import io
import sys

PLAIN = {
    "×": "x", "Δ": "d", "‖": "|", "σ": "s", "Σ": "sum ", "²": "^2", "γ": "gamma", "−": "-",
    "–": "-", "→": "->", "…": "...", "≤": "<=", "≥": ">=", "’": "'", "▇": "#",
}  # fmt: skip
"""Signs of our own texts → ASCII; any other sign becomes "?"."""

_HANDLER = "sd_lora.plain"


def _in_plain_signs(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: the replacement, and the position after it."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(PLAIN.get(sign, "?") for sign in lost), error.end


def encode_everything() -> None:
    """Make the standard output and error stream write every text, whatever their encoding."""
    codecs.register_error(_HANDLER, _in_plain_signs)
    for stream in (sys.stdout, sys.stderr):
        # "strict" ends a run; any other handler was somebody's choice
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=_HANDLER)
