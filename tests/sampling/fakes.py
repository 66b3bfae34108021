"""Sheets made by hand, for the score's calibration: a subject copied, spoilt, moved, replaced.

A sheet is a `PromptImages` whose prompts are those of `PROMPTS`. The mascot is painted by
dev/images.py in scenes that no folder holds; the robot and the style come from small images in
`sheets/`. Every damage keeps the images' scenes, so that only the subject's look changes.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ROOT = Path(__file__).parents[2]
SHEETS = Path(__file__).parent / "sheets"
sys.path.insert(0, str(ROOT / "dev"))

import images as drawing  # noqa: E402

Images = list[Image.Image]

PLACES = ("white", "grass", "night", "snow", "blue", "beach")
"""Backgrounds of the six prompts with the subject, as in the demo."""


def opened(folder: Path) -> Images:
    """All images of a folder, RGB, in the order of their names."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def cells(name: str, count: int = 6) -> Images:
    """Images (64, 64) of a sheet that stands as one row in `sheets/`."""
    row = Image.open(SHEETS / f"{name}.png").convert("RGB")
    return [row.crop((64 * i, 0, 64 * i + 64, 64)) for i in range(count)]


# ---------------------------------------------------------------------------------------------
# Renditions
# ---------------------------------------------------------------------------------------------


def mascots(places: Sequence[str] = PLACES, seed: int = 500, size: str = "medium") -> Images:
    """The mascot on these backgrounds, in poses that no folder holds."""
    return [drawing.draw(drawing.mascot(p, size, seed=seed + i)) for i, p in enumerate(places)]


def cut_out(image: Image.Image) -> Image.Image:
    """A subject on a plain background, cut out: RGBA, cropped to what differs from the corner."""
    pixels = np.asarray(image, dtype=np.int16)
    alpha = (np.abs(pixels - pixels[0, 0]).max(2) > 30).astype(np.uint8) * 255
    # a pixel as pale as the ground but enclosed by the subject belongs to it
    outside = Image.fromarray(alpha).copy()
    for corner in ((0, 0), (63, 0), (0, 63), (63, 63)):
        ImageDraw.floodfill(outside, corner, 128)
    whole = outside.point(lambda v: 0 if v == 128 else 255)
    cut = image.convert("RGBA")
    cut.putalpha(whole)
    return cut.crop(whole.getbbox())


def pasted(cut: Image.Image, place: str, longest: int, at: tuple[float, float]) -> Image.Image:
    """A cut-out subject on a background, `longest` pixels, its middle at parts of the room left."""
    back = drawing._background(place, (256, 256), random.Random(place)).reduce(4)
    scale = longest / max(cut.size)
    small = cut.resize([round(edge * scale) for edge in cut.size], Image.Resampling.BOX)
    corner = [round((64 - edge) * part) for edge, part in zip(small.size, at, strict=True)]
    back.paste(small, (corner[0], corner[1]), small)
    return back


def cuts(subject: str) -> list[Image.Image]:
    """The subject, cut out of images with a plain, coloured ground: mascot or robot."""
    if subject == "robot":
        return [cut_out(Image.open(SHEETS / "robot-held-out" / f"{n}.png").convert("RGB"))
                for n in ("00-pink", "06-blue", "07-black")]  # fmt: skip
    return [cut_out(image) for image in mascots(("pink", "grey", "black"), 700, "big")]


def placed(subject: str, longest: int, spread: float, places: Sequence[str] = PLACES) -> Images:
    """The subject `longest` pixels high, scattered over the images by `spread`, from 0 to 1."""
    rng, poses = random.Random(7), cuts(subject)
    at = [(0.5 + rng.uniform(-spread, spread) / 2, 0.6 + 0.4 * spread * rng.uniform(-1, 1))
          for _ in places]  # fmt: skip
    return [pasted(poses[i % 3], place, longest, at[i]) for i, place in enumerate(places)]


# ---------------------------------------------------------------------------------------------
# Damages, of an image
# ---------------------------------------------------------------------------------------------


def upside_down(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


def tiles(image: Image.Image, side: int = 16) -> Image.Image:
    """Tiles of `side` pixels, shuffled."""
    corners = [(x, y) for y in range(0, 64, side) for x in range(0, 64, side)]
    out = image.copy()
    order = random.Random(3).sample(corners, len(corners))
    for (x, y), (u, v) in zip(corners, order, strict=True):
        out.paste(image.crop((u, v, u + side, v + side)), (x, y))
    return out


def noised(image: Image.Image, sigma: float = 0.3) -> Image.Image:
    draw = np.random.default_rng(4).standard_normal((64, 64, 3))
    pixels = np.asarray(image, dtype=np.float32) + 255 * sigma * draw
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def blurred(image: Image.Image, radius: float = 3.0) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def recoloured(image: Image.Image) -> Image.Image:
    """All hues turned by a third."""
    h, s, v = image.convert("HSV").split()
    return Image.merge("HSV", (h.point(lambda x: (x + 85) % 256), s, v)).convert("RGB")


DAMAGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "upside down": upside_down,
    "tiles": tiles,
    "noised": noised,
    "blurred": blurred,
    "recoloured": recoloured,
}


# ---------------------------------------------------------------------------------------------
# Whole sheets
# ---------------------------------------------------------------------------------------------


def doubled_mascots() -> Images:
    """Mascots with a second pair of eyes, below the first."""
    paint = drawing._mascot

    def twice(b: drawing.Brush, c: drawing.RGB, rng: random.Random) -> None:
        paint(b, c, rng)
        for x in (-0.33, 0.33):
            b.over(drawing.WHITE, "oval", x, 0.6, 0.29, 0.29)
            b.over(drawing.DARK, "oval", x, 0.62, 0.15, 0.15)

    drawing.SUBJECTS["mascot"] = twice
    try:
        return mascots()
    finally:
        drawing.SUBJECTS["mascot"] = paint


def doubled_robots() -> Images:
    """Robots with a second head over their bodies."""
    out = []
    for cut in cuts("robot"):
        twice, half = cut.copy(), cut.height // 2
        head = cut.crop((0, 0, cut.width, half))
        twice.paste(head, (0, half - 4), head)
        out.append(twice)
    return [pasted(out[i % 3], place, 44, (0.5, 0.7)) for i, place in enumerate(PLACES)]


def monsters(**changes: object) -> Images:
    """A monster that is not the subject, in the same six places."""
    scene = drawing.Scene("monster", "orange", "striped", "purple", "big", body="round")
    scene = replace(scene, **changes)  # type: ignore[arg-type]
    return [drawing.draw(replace(scene, background=p, seed=i)) for i, p in enumerate(PLACES)]


def hatless() -> Images:
    """Mascots without a hat: an orange body with bands, eyes and feet."""
    return [_bald(b) for b in mascots()]


def _bald(image: Image.Image) -> Image.Image:
    """The image with the mascot's green and its bobble painted as the row above its tip."""
    pixels = np.asarray(image).copy()
    h = np.asarray(image.convert("HSV")).astype(int)
    green = (abs(h[..., 0] - 92) < 16) & (h[..., 1] > 120)
    rows = np.flatnonzero(green[:46].sum(1) > 2)
    del rows, h
    pixels[green & (np.arange(64)[:, None] < 40)] = pixels[2, 2]
    return Image.fromarray(pixels)


def styled(paper: drawing.RGB | str = (250, 218, 40), width: int = 8, seed: int = 0) -> Images:
    """Six things with outlines `width` quarters of a pixel wide on a paper; 0 leaves them out."""
    things = (("cup", "red"), ("bird", "blue"), ("boat", "purple"), ("mushroom", "red"),
              ("ring", "green"), ("robot", "pink"))  # fmt: skip
    out = []
    for i, (thing, colour) in enumerate(things):
        big = drawing.draw_large(
            drawing.Scene(thing, colour, size="big", background=paper, seed=seed + i)
        )
        if width:
            big.paste((16, 14, 18), (0, 0), drawing._outlines(big, width))
        out.append(big.reduce(4))
    return out
