"""Report a check: lines for a terminal, JSON, and a page of the images with their crops."""

import base64
import io
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from sd_lora.files import write_whole
from sd_lora.findings import LEVELS, Finding

QUALITY = 80
"""JPEG quality of thumbnails: about 8 KB for 256 × 192 pixels, so 2,000 make a page of 20 MB."""

LARGE_CROP_LOSS = 0.2
"""Crop loss from which the page's filter "cut" selects an image: a 4:3 image in a square loses a
quarter, in its nearest bucket a few hundredths."""

MAX_GROUPS, MAX_ALIKE = 50, 12
"""Groups of alike images that the page shows side by side, and images of one group: each thumbnail
is in the page once more."""

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Mark that turn the direction of the text after them: "gpj.exe" could pass for "exe.jpg"."""


def printable(text: str) -> str:
    """Escape the characters of a text that would act on a terminal or a page.

    They are control characters, line ends, marks of direction, and the surrogates of a name that
    is not UTF-8.
    """
    return "".join(
        c.encode("unicode_escape").decode()
        if c in _BIDI or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        else c
        for c in text
    )


def printable_lines(text: str) -> str:
    """The same for a text of several lines, which keeps its line ends and tabs."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def data_uri(image: Image.Image) -> str:
    """An image as a JPEG data URI, for the `src` of an <img>."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True, slots=True)
class PageBucket:
    """A row of the bucket table.

    width, height: in pixels.
    images: number of images in the bucket.
    samples, batches: in an epoch.
    left_over: samples in its last batch if that is not full, else 0.
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

    thumbnail: see `data_uri`.
    size: upright (width, height) in pixels.
    crop: (left, top, right, bottom) as parts of the image's width and height.
    bucket: "512×768".
    crop_loss: part of the image that is cut away.
    scale: factor of resizing: above 1 enlarged, below 1 reduced.
    random_crop: the crop is elsewhere each time.
    caption: its longest form; None without a caption.
    tokens: number of tokens of the caption.
    findings: on this image.
    of_class: a class image, for prior preservation.
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
    of_class: bool = False

    def __post_init__(self) -> None:
        if not self.thumbnail.startswith("data:image/"):
            raise ValueError(f"{self.name}: the thumbnail is not a data URI")
        left, top, right, bottom = self.crop
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"{self.name}: the crop {self.crop} does not lie within the image")

    @property
    def marks(self) -> str:
        """CSS classes for the page's filters."""
        marks = {
            "found": bool(self.findings),
            "odd": any(finding.level == "warning" for finding in self.findings),
            "cut": self.crop_loss >= LARGE_CROP_LOSS,
            "larger": self.scale > 1,
            "of-class": self.of_class,
        }
        return " ".join(mark for mark, holds in marks.items() if holds)


@dataclass(frozen=True, slots=True)
class PageReport:
    """Content of the page.

    title: names of the data.
    verdict: one sentence with the counts.
    rows: label → text of the summary.
    leftovers: how a bucket's last, unfilled batch is handled, in a sentence.
    images: images shown.
    total: number of images trained; None if all of them are shown.
    findings: all findings.
    rates: factors of the learning rate at equal distances over the run, from 0 to about 1.
    """

    title: str
    verdict: str
    rows: dict[str, str] = field(default_factory=dict)
    buckets: list[PageBucket] = field(default_factory=list)
    leftovers: str = ""
    images: list[PageImage] = field(default_factory=list)
    total: int | None = None
    findings: list[Finding] = field(default_factory=list)
    rates: Sequence[float] = ()


def curve(values: Sequence[float]) -> str:
    """Points of a line over values, for a drawing of 200 × 40 with y downwards: "0,40 1,39.5"."""
    height = max(1.0, *values)
    return " ".join(
        f"{200 * i / max(1, len(values) - 1):g},{40 - 40 * value / height:.4g}"
        for i, value in enumerate(values)
    )


def group_findings(findings: list[Finding]) -> dict[str, dict[str, list[Finding]]]:
    """Level → code → findings: the gravest level first, in a level the most frequent code."""
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
    """Findings as lines for a terminal, by level and code.

    limit: number of findings shown for each code. A text that all findings of a code share is
    printed once.
    """
    lines = []
    for level, codes in group_findings(findings).items():
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
    """Findings for JSON: {"counts": {level: number}, "findings": [{level, code, name, text}, …]}.

    Every level has a count; the findings keep their order.
    """
    counts = Counter(finding.level for finding in findings)
    return {
        "counts": {level: counts[level] for level in LEVELS},
        "findings": [finding.as_dict() for finding in findings],
    }


def alike_groups(images: Sequence[PageImage]) -> list[list[tuple[PageImage, str]]]:
    """Groups of images that repeat one another, each image with the code of its finding.

    The first of a group is the image that the others repeat; its code is empty.
    """
    by_name = {image.name: image for image in images}
    groups: dict[str, list[tuple[PageImage, str]]] = {}
    for image in images:
        for finding in image.findings:
            first = by_name.get(finding.other)
            if first is not None and first.name != image.name:
                groups.setdefault(first.name, [(first, "")]).append((image, finding.code))
    return list(groups.values())


@cache
def template_at(path: Path) -> Template:
    """The template of a page, with the filters of all pages."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,  # names and captions are not ours
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    environment.filters["printable_lines"] = printable_lines
    environment.filters["curve"] = curve
    return environment.get_template(path.name)


def page(report: PageReport) -> str:
    """The page: one HTML file without scripts and without requests to other places."""
    counts = {
        mark: sum(mark in image.marks.split() for image in report.images)
        for mark in ("found", "cut", "larger", "of-class")
    }
    alike = alike_groups(report.images)
    return template_at(Path(__file__).with_name("page.html.j2")).render(
        report=report,
        groups=group_findings(report.findings),
        counts=counts,
        alike=[(group[:MAX_ALIKE], len(group) - MAX_ALIKE) for group in alike[:MAX_GROUPS]],
        more_alike=len(alike) - MAX_GROUPS,
        much=LARGE_CROP_LOSS,
        total=len(report.images) if report.total is None else report.total,
        most=max((bucket.samples for bucket in report.buckets), default=1),
    )


def write_page(path: Path, report: PageReport) -> None:
    """Write the page, whole or not at all; raises RunError on a failed write."""
    write_whole(path, page(report).encode())
