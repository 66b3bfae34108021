"""Samples and sheets of scored images on the page of a run, as small as they must be."""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from PIL import Image

SAMPLES = "samples"
OF_STRENGTH = "strength-"
"""Start of the name of a folder of samples at another strength, within those of their step."""

K = TypeVar("K", int, float)

MOST_BYTES, SHEET_BYTES = 5_500_000, 1_500_000
"""Bytes of all samples of a page, and of all sheets of scored images; beyond, they are made
smaller, and then fewer. Pictures of 200 images, curves and their tables take less than 2 MB."""

SIDES, SHEET_SIDES = (512, 384, 256, 160, 96), (1400, 1000, 700)
"""Longest sides of a sample and of a sheet on the page, the first that fits."""

TRIED = 12
"""Images by whose bytes the others' are judged."""


@dataclass(frozen=True)
class Drawn:
    """Sample images of a run. prompts: one a column. steps: of the rows. images: step → files.
    strengths: strength → files, of the last step. parameters: of its first image."""

    prompts: list[str]
    images: dict[int, list[Path]]
    strengths: dict[float, list[Path]] = field(default_factory=dict)
    parameters: str = ""

    @property
    def steps(self) -> list[int]:
        return sorted(self.images)


def samples_of(folder: Path, last: int) -> Drawn:
    """The single images `samples/step-000100/00.png`, in their order, and their prompts; of the
    last step those at other strengths, too, `samples/step-000100/strength-0.5/00.png`.

    last: number of steps done; later images are of an earlier run.
    """
    images: dict[int, list[Path]] = {}
    for place in sorted((folder / SAMPLES).glob("step-*")):
        number = place.name.removeprefix("step-")
        if place.is_dir() and number.isdecimal() and int(number) <= last:
            files = sorted(place.glob("*.png"))
            images |= {int(number): files} if files else {}
    if not images:
        return Drawn([], {})
    texts = []
    for path in images[max(images)]:
        text = ""
        with suppress(OSError), Image.open(path) as image:
            text = str(image.info.get("parameters", ""))
        texts.append(text)
    prompts = [text.partition("\nNegative")[0] for text in texts]
    strengths: dict[float, list[Path]] = {}
    for place in images[max(images)][0].parent.glob(f"{OF_STRENGTH}*"):
        number, files = place.name.removeprefix(OF_STRENGTH), sorted(place.glob("*.png"))
        if _STRENGTH.fullmatch(number) and len(files) == len(texts):
            strengths[float(number)] = files
    return Drawn(prompts, images, dict(sorted(strengths.items())), texts[0])


_STRENGTH = re.compile(r"\d{1,3}(\.\d{1,6})?")


def data_uri(path: Path, side: int) -> str:
    """An image as WebP in a data URI, at most `side` pixels; one of at most 128 without loss; grey
    for one that cannot be read."""
    try:
        return _encoded(path, path.stat().st_mtime_ns, side)
    except OSError:
        return _uri(Image.new("RGB", (8, 8), "#888888"))


@lru_cache(maxsize=4096)
def _encoded(path: Path, written: int, side: int) -> str:
    with Image.open(path) as image:
        size, small = image.size, image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _uri(small, lossless=max(size) <= 128)


def _uri(image: Image.Image, lossless: bool = False) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88, method=4, lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def fitting(
    drawn: Sequence[Drawn], sides: Sequence[int] = SIDES, most: int = MOST_BYTES
) -> tuple[list[Drawn], int]:
    """The images that a page holds of all runs, and their side: smaller ones if there are many, and
    of still more every second, third, … step, always with the first and the last, and none at other
    strengths. Their bytes are those of TRIED of them."""
    rows = [row for d in drawn for row in (*d.images.values(), *d.strengths.values())]
    files = [path for row in rows for path in row]
    some = files[:: max(1, -(-len(files) // TRIED))]
    for side in sides:
        total = len(files) * fmean([len(data_uri(path, side)) for path in some] or [0])
        if total <= most:
            break
    every = math.ceil(total / most)
    if every <= 1:
        return [*drawn], side
    return [
        replace(
            d, images={s: d.images[s] for s in {*d.steps[::every], *d.steps[-1:]}}, strengths={}
        )
        for d in drawn
    ], side


def sheets_of(folder: Path, last: int) -> Drawn:
    """The sheets of scored images, `samples/score-000100-subject.png`, one a kind of prompts. last:
    number of steps done."""
    found = {
        (int(match[1]), match[2])
        for path in (folder / SAMPLES).glob("score-*.png")
        if (match := _SHEET.fullmatch(path.name)) and int(match[1]) <= last
    }
    kinds = [kind for kind in KINDS if any(kind == of for _, of in found)]
    images = {
        step: [folder / SAMPLES / f"score-{step:06}-{kind}.png" for kind in kinds]
        for step in sorted({step for step, _ in found})
    }
    return Drawn([KINDS[kind] for kind in kinds], images)


KINDS = {
    "subject": "prompts of what is learned, below images of the folder",
    "class": "prompts of its class, which should stay as the base draws them",
    "unrelated": "prompts of other things, which should stay as the base draws them",
}
"""Kind of prompts → its words on the page."""

_SHEET = re.compile(r"score-(\d{6,})-([a-z]+)\.png")


def uris(rows: Mapping[K, Sequence[Path]], side: int) -> dict[K, list[str]]:
    """Step or strength → images in data URIs, in ascending order; "" for one that is not there."""
    return {
        key: [data_uri(path, side) if path.is_file() else "" for path in rows[key]]
        for key in sorted(rows)
    }
