"""Sheets of images: rows under their labels, prompts under their columns."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sd_lora.files import write_whole


def grid(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    captions: Sequence[str] = (),
    side: int = 256,
) -> Image.Image:
    """Sheet of rows of images, each under its label, with a caption under each column.

    side: pixels of a cell; smaller images are enlarged without smoothing, larger ones reduced.
    """
    gap, line = 8, 22
    columns = max(len(row) for row in rows)
    font = ImageFont.load_default(14)
    height = len(rows) * (line + side + gap) + (2 * line if captions else 0) + gap
    sheet = Image.new("RGB", (gap + columns * (side + gap), height), "white")
    draw = ImageDraw.Draw(sheet)
    y = gap
    for row, label in zip(rows, labels, strict=True):
        draw.text((gap, y), label, fill="black", font=font)
        for column, image in enumerate(row):
            filter = Image.Resampling.NEAREST if image.width <= side else Image.Resampling.LANCZOS
            sheet.paste(image.resize((side, side), filter), (gap + column * (side + gap), y + line))
        y += line + side + gap
    for column, caption in enumerate(captions):
        for n, text in enumerate(_wrapped(caption, side, font)):
            draw.text((gap + column * (side + gap), y + n * 18), text, fill="#444444", font=font)
    return sheet


def _wrapped(
    text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, lines: int = 2
) -> list[str]:
    """Lines of text that fit the width, at most `lines` of them; a cut text ends in "…"."""
    rows: list[str] = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width or not rows[-1]:
            rows[-1] = longer
        elif len(rows) < lines:
            rows.append(word)
        else:
            rows[-1] += " …"
            break
    return rows


def write_image(path: Path, image: Image.Image) -> None:
    """Write a PNG, complete or not at all; raises RunError on a failed write."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())
