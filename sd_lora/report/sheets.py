"""Sheets of images: rows under their labels, prompt, seed and size under the columns."""

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sd_lora.files import write_whole
from sd_lora.sampling.parameters import Parameters

GAP, LINE = 8, 19
"""Pixels between cells, and from one line of text to the next."""

INK, SOFT = "#000000", "#666666"

FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc"),
    *("arial.ttf", "msyh.ttc", "YuGothM.ttc", "malgun.ttf"),
    *("Arial Unicode.ttf", "Hiragino Sans GB.ttc"),
)
"""System fonts for text that Pillow's own font lacks: of Linux, Windows, macOS. Pillow's has little
more than ASCII."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Sheet:
    """Rows of images, and how the images of each column are drawn.

    rows: of images; None leaves a cell empty.
    labels: one a row.
    columns: of drawn images; their prompts, seeds and sizes stand below, an equal prompt of
        neighbours once. Rows differ in the model: those of the last row are given.
    side: pixels of a cell. A smaller image is enlarged without smoothing, a larger one reduced.
    """

    rows: Sequence[Sequence[Image.Image | None]]
    labels: Sequence[str]
    columns: Sequence[Parameters] = ()
    side: int = 256

    def draw(self) -> Image.Image:
        """The sheet as an RGB image, as high as its text needs."""
        count = max(len(cells) for cells in [*self.rows, self.columns])
        width = self._left(count)
        font = font_for("".join([*self.labels, *(column.caption for column in self.columns)]))
        texts: list[tuple[int, int, str, str]] = []  # left, top, colour, line
        cells: list[tuple[int, Sequence[Image.Image | None]]] = []  # top, images
        y = GAP
        for row, label in zip(self.rows, self.labels, strict=True):
            for line in wrapped(label, width - 2 * GAP, font):
                texts.append((GAP, y, INK, line))
                y += LINE
            cells.append((y + 3, row))
            y += 3 + self.side + GAP
        for column, parameters in enumerate(self.columns):
            texts.append((self._left(column), y, SOFT, parameters.place))
        y += LINE * bool(self.columns)
        lowest = y
        for first, number, prompt in self._prompts():
            room = number * (self.side + GAP) - GAP
            lines = wrapped(prompt, room, font)
            texts += [(self._left(first), y + n * LINE, INK, s) for n, s in enumerate(lines)]
            lowest = max(lowest, y + len(lines) * LINE)
        sheet = Image.new("RGB", (width, lowest + GAP), "white")
        for top, row in cells:
            for column, image in enumerate(row):
                if image is not None:
                    self._paste(sheet, image, self._left(column), top)
        drawing = ImageDraw.Draw(sheet)
        for left, top, colour, line in texts:
            drawing.text((left, top), line, fill=colour, font=font)
        return sheet

    def write(self, path: Path) -> None:
        """Write the sheet as a PNG with its parameters; raises RunError on a failed write."""
        write_image(path, self.draw(), self.columns)

    def _left(self, column: int) -> int:
        """Left edge of a column in pixels."""
        return GAP + column * (self.side + GAP)

    def _prompts(self) -> Iterator[tuple[int, int, str]]:
        """Yield first column, number of columns and prompt of neighbours with an equal prompt."""
        first = 0
        for prompt, equal in groupby(parameters.caption for parameters in self.columns):
            number = len(list(equal))
            yield first, number, prompt
            first += number

    def _paste(self, sheet: Image.Image, image: Image.Image, left: int, top: int) -> None:
        """Put an image into the middle of a cell, in its own shape."""
        longest = max(image.size)
        size = [max(1, round(side * self.side / longest)) for side in image.size]
        kind = Image.Resampling.NEAREST if longest <= self.side else Image.Resampling.LANCZOS
        corner = (left + (self.side - size[0]) // 2, top + (self.side - size[1]) // 2)
        sheet.paste(image.resize((size[0], size[1]), kind), corner)


def font_for(text: str) -> Font:
    """Pillow's own font if it has all characters of a text, else the system font that lacks the
    fewest of them."""
    fonts = _fonts() if missing(_fonts()[0], text) else _fonts()[:1]
    return min(fonts, key=lambda font: len(missing(font, text)))


@cache
def _fonts() -> list[Font]:
    """Pillow's own font, and those of `FONTS` that this system has."""
    fonts: list[Font] = [ImageFont.load_default(14)]
    for name in FONTS:
        with suppress(OSError):
            fonts.append(ImageFont.truetype(name, 14))
    return fonts


def missing(font: Font, text: str) -> set[str]:
    """Characters of a text that a font draws as it draws one that does not exist."""
    nothing = bytes(font.getmask("\uffff"))
    return {c for c in set(text) if not c.isspace() and bytes(font.getmask(c)) == nothing}


def wrapped(text: str, width: int, font: Font) -> list[str]:
    """All of a text as lines of at most `width` pixels; a longer word is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:  # nearly always the whole word fits
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def write_image(path: Path, image: Image.Image, parameters: Sequence[Parameters] = ()) -> None:
    """Write a PNG, complete or not at all; raises RunError on a failed write.

    parameters: of a drawn image, or of a sheet's columns. They become the texts `parameters`, the
    one that A1111 and its like read, `parameters 2`, `parameters 3`, …
    """
    texts = PngInfo()
    for number, drawn in enumerate(parameters, 1):
        text = drawn.text().encode("utf-8", "replace").decode()  # PNG holds no lone surrogates
        texts.add_text(f"parameters {number}" if number > 1 else "parameters", text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=texts)
    write_whole(path, buffer.getvalue())
