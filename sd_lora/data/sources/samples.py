"""One image of a source, and a source: what every kind of source comes down to."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sd_lora.config.sources import SourceSpec
from sd_lora.data.images.decode import BACKGROUND, decode
from sd_lora.errors import RunError
from sd_lora.findings import Finding


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its captions; it can be pickled.

    name: for messages: the full path, or "set, row 7". read: returns its bytes or raises OSError;
    of a stream, it holds them. captions: at least one, any of which may be empty. source: what is
    done with it. digest: blake2b of its bytes, 16 bytes in hex, and size: upright (width, height),
    both known only after `check.scan`.
    """

    name: str
    read: Callable[[], bytes]
    captions: tuple[str, ...]
    source: SourceSpec
    digest: str = ""
    size: tuple[int, int] = (0, 0)

    def image(self, background: tuple[int, int, int] = BACKGROUND) -> Image.Image:
        """Returns the decoded image; raises RunError by name if that cannot be done."""
        try:
            data = self.read()
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{self.name} could not be read: {reason}") from None
        return decode(data, self.name, background)


@dataclass
class Source:
    """Samples, and what was found on the way to them.

    rows: returns the samples from the first on, each time that it is called. findings: of a
    stream, they are of its rows and grow while these are read. count: None where that is not known
    before the rows were read.
    """

    spec: SourceSpec
    rows: Callable[[], Iterator[Sample]]
    findings: list[Finding]
    count: int | None = None


EMPTY_CAPTION = (
    "its caption is empty: what is trained is the prompt if there is one, else what prefix, suffix "
    "and trigger word make of nothing"
)
NO_CAPTION = (
    "Write one, or say a caption for all that have none by --caption_default (in [[sources]]: "
    "prompt)"
)


def filled(captions: tuple[str, ...], prompt: str | None) -> tuple[str, ...]:
    """Returns captions with the prompt in the place of those without words."""
    return tuple(caption if caption.strip() else prompt or "" for caption in captions)


def has_empty(captions: tuple[str, ...]) -> bool:
    return not all(caption.strip() for caption in captions)


def shown(path: Path) -> str:
    """Returns a path as it can be printed: a file name may hold bytes that are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
