"""What a check found, told: in lines, as JSON, on a page with every image in its frame."""

import base64
import io
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from sd_lora.files import write_whole
from sd_lora.findings import LEVELS, Finding

QUALITY = 80
"""Of the thumbnails, JPEG: about 8 KB for 256 × 192 pixels, so that 2,000 make a page of 20 MB."""

MUCH = 0.2
"""The part cut away from which on the page counts an image among those that lose much: a 4:3
image in a square loses a quarter, in its nearest bucket a few hundredths."""

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that turn the direction of what follows: "gpj.exe" could pass for "exe.jpg"."""


def printable(text: str) -> str:
    """Returns text with what would act on a terminal or a page written as its code: control
    characters, line ends, marks of direction, and the surrogates of a name that is not UTF-8."""
    return "".join(
        c.encode("unicode_escape").decode()
        if c in _BIDI or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        else c
        for c in text
    )


def data_uri(image: Image.Image) -> str:
    """Returns an image as the address of an <img>, a JPEG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True, slots=True)
class PageBucket:
    """A row of the bucket table.

    width, height: in pixels. images: in it. samples: of it in an epoch. batches: in an epoch.
    left_over: samples of its last batch where that is not full, else 0.
    """

    width: int
    height: int
    images: int
    samples: int
    batches: int
    left_over: int = 0


@dataclass(frozen=True, slots=True)
class PageImage:
    """An image as it will be trained.

    thumbnail: see `data_uri`. size: (width, height), upright, in pixels. crop: (left, top, right,
    bottom) of what is seen, as parts of the image's width and height. bucket: "512×768".
    crop_loss: the part of the image that is cut away. scale: how much larger it is made, below 1
    smaller. random_crop: the place of the crop differs each time. caption: as it is at its
    longest; None where there is none. tokens: of it. findings: on it.
    """

    name: str
    thumbnail: str
    size: tuple[int, int]
    crop: tuple[float, float, float, float]
    bucket: str
    crop_loss: float = 0.0
    scale: float = 1.0
    random_crop: bool = False
    caption: str | None = None
    tokens: int | None = None
    findings: tuple[Finding, ...] = ()

    def __post_init__(self) -> None:
        if not self.thumbnail.startswith("data:image/"):
            raise ValueError(f"{self.name}: a thumbnail is a data URI, and this is another address")
        left, top, right, bottom = self.crop
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"{self.name}: the crop {self.crop} does not lie within the image")

    @property
    def marks(self) -> str:
        """What the page's filters go by, as CSS classes."""
        marks = {
            "found": bool(self.findings),
            "odd": any(finding.level == "warning" for finding in self.findings),
            "cut": self.crop_loss >= MUCH,
            "larger": self.scale > 1,
        }
        return " ".join(mark for mark, holds in marks.items() if holds)


@dataclass(frozen=True, slots=True)
class PageReport:
    """What the page shows.

    title: what was checked. verdict: what comes of it, in a sentence. rows: label → text, the
    summary. leftovers: what becomes of a bucket's last, unfilled batch, in a sentence. images:
    those that are shown, of `total` that are trained; total: None if all of them are shown.
    findings: all of them.
    """

    title: str
    verdict: str
    rows: dict[str, str] = field(default_factory=dict)
    buckets: list[PageBucket] = field(default_factory=list)
    leftovers: str = ""
    images: list[PageImage] = field(default_factory=list)
    total: int | None = None
    findings: list[Finding] = field(default_factory=list)


def grouped(findings: list[Finding]) -> dict[str, dict[str, list[Finding]]]:
    """Returns level → code → findings: the gravest level first, in a level the commonest code."""
    groups: dict[str, dict[str, list[Finding]]] = {}
    for level in LEVELS:
        of_level = [finding for finding in findings if finding.level == level]
        counts = Counter(finding.code for finding in of_level)
        if of_level:
            groups[level] = {
                code: [finding for finding in of_level if finding.code == code]
                for code in sorted(counts, key=lambda code: (-counts[code], code))
            }
    return groups


def report_lines(findings: list[Finding], limit: int = 5) -> list[str]:
    """Returns the findings for a terminal, by level and code, of each code the first `limit`; what
    is the same of all files of a code is said once."""
    lines = []
    for level, codes in grouped(findings).items():
        lines.append(f"{level}: {sum(map(len, codes.values()))}")
        for code, of_code in codes.items():
            same = len(of_code) > 1 and len({finding.text for finding in of_code}) == 1
            lines.append(f"  {code}: {len(of_code)}" + f": {of_code[0].text}" * same)
            lines += [f"    {f.name if same else f.line()}" for f in of_code[:limit]]
            if len(of_code) > limit:
                more = len(of_code) - limit
                lines.append(f"    … and {more} more (sd-lora check --json names all)")
    return [printable(line) for line in lines]


def findings_as_json(findings: list[Finding]) -> dict[str, Any]:
    """Returns {"counts": {level: how many}, "findings": [{level, code, name, text}, …]}: every
    level is counted, and every finding is there, in its order."""
    counts = Counter(finding.level for finding in findings)
    return {
        "counts": {level: counts[level] for level in LEVELS},
        "findings": [finding.as_dict() for finding in findings],
    }


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names and captions are other people's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    return environment.get_template("page.html.j2")


def page(report: PageReport) -> str:
    """Returns the page: HTML in one piece, without scripts, that asks nobody for anything."""
    counts = {
        mark: sum(mark in image.marks.split() for image in report.images)
        for mark in ("found", "cut", "larger")
    }
    return _template().render(
        report=report,
        groups=grouped(report.findings),
        counts=counts,
        much=MUCH,
        total=len(report.images) if report.total is None else report.total,
        most=max((bucket.samples for bucket in report.buckets), default=1),
    )


def write_page(path: Path, report: PageReport) -> None:
    """Writes the page, whole or not at all.

    Raises:
        RunError: it could not be written.
    """
    write_whole(path, page(report).encode())
