"""Standard streams: a sign that one cannot encode is written in plain signs, and ends no run; notes
that libraries log while they are imported are kept out.

A pipe on Windows has a code page (cp1251, cp1252) and not UTF-8: it lacks "Δ" or "×", and the names
of folders in other scripts.
"""

import codecs
import io
import logging
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


UNASKED = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "torch.utils._pytree": "%s is an Enum subclass",
    "torchao": "Failed to load ",
}
"""Logger → beginning of a message about parts that a package of an extra could have, and does
without (bitsandbytes 0.50, torchao 0.18 with torch 2.13 and diffusers 0.42)."""


def quiet_imports() -> None:
    """Keep these messages from the log; others, and all errors, are logged as before."""
    for name, start in UNASKED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Unasked) for known in logger.filters):
            logger.addFilter(_Unasked(start))


class _Unasked(logging.Filter):
    """A filter of the messages with a beginning."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message is logged."""
        return not str(record.msg).startswith(self.start)
