"""A sample (one image with its captions) and a source of samples."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sd_lora.config.sources import SourceSpec
from sd_lora.data.images.hand_crops import HandCrop
from sd_lora.findings import Finding


@dataclass(frozen=True, slots=True)
class Mask:
    """The mask of an image: white counts in the loss, black does not, grey in between; picklable.

    name, read, digest: as of a sample.
    """

    name: str
    read: Callable[[], bytes]
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its captions; picklable.

    name: for messages: the full path, or "set, row 7".
    read: returns the bytes of the image, or raises OSError; holds the bytes of a streamed row.
    captions: at least one; may be empty strings.
    source: repeats, loss weight, flips, crops and caption rules.
    digest: blake2b of the bytes, 16 bytes in hex; empty before `check.scan`.
    size: upright (width, height) in pixels; (0, 0) before `check.scan`.
    mask: its mask; None: all of it counts.
    resolution: side in pixels of its squares, or of the area of its buckets; None: the run's.
    hand_crop: its crop by hand; None: cropped as the run says.
    """

    name: str
    read: Callable[[], bytes]
    captions: tuple[str, ...]
    source: SourceSpec
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    mask: Mask | None = None
    resolution: int | None = None
    hand_crop: HandCrop | None = None


@dataclass
class Source:
    """Samples, and the findings made while listing them.

    rows: returns an iterator over all samples, from the first, at each call.
    findings: for a stream, they grow while its rows are read.
    count: number of samples; None if unknown before the rows are read.
    """

    spec: SourceSpec
    rows: Callable[[], Iterator[Sample]]
    findings: list[Finding]
    count: int | None = None


def fill_empty_captions(captions: tuple[str, ...], prompt: str | None) -> tuple[str, ...]:
    """Captions with blank ones replaced by the prompt, or by "" without a prompt."""
    return tuple(caption if caption.strip() else prompt or "" for caption in captions)


def has_empty_caption(captions: tuple[str, ...]) -> bool:
    """Whether a caption is blank."""
    return not all(caption.strip() for caption in captions)


def printable_path(path: Path) -> str:
    """A path as valid text: bytes of a file name that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
