"""Images of any colour, texture and line: the embedded base's VAE learns no palette by heart.

``pattern`` paints coloured grounds, textures, shapes with and without outlines, strokes and
letters. ``photographs`` cuts crops out of a folder of photographs. Everything random comes from a
``random.Random`` that the caller seeds.
"""

import colorsys
import math
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
SIDE, OVERSAMPLING = 64, 4
BIG = SIDE * OVERSAMPLING
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789?!&%#@+=*"


def any_colour(rng: random.Random) -> RGB:
    """A colour of any hue: vivid, pale, dark or grey."""
    kind = rng.random()
    if kind < 0.15:
        level = rng.choice((0, 255, rng.randint(0, 255)))
        return (level, level, level)
    strong, light = (rng.uniform(0.6, 1), rng.uniform(0.6, 1))
    if kind < 0.4:
        strong, light = rng.uniform(0.05, 0.4), rng.uniform(0.8, 1)
    elif kind < 0.6:
        strong, light = rng.uniform(0.2, 1), rng.uniform(0.08, 0.5)
    r, g, b = colorsys.hsv_to_rgb(rng.random(), strong, light)
    return (round(255 * r), round(255 * g), round(255 * b))


def as_image(levels: np.ndarray, a: RGB, b: RGB) -> Image.Image:
    """An image whose pixels go from colour a, at level 0, to colour b, at level 1."""
    mixed = np.asarray(a) + levels[..., None] * (np.asarray(b, float) - np.asarray(a))
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


@cache
def axes() -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a large image, from 0 to 1."""
    y, x = np.mgrid[0:BIG, 0:BIG] / BIG
    return y, x


def turned(rng: random.Random) -> np.ndarray:
    """Position along a random direction; an image's side is 1."""
    y, x = axes()
    angle = rng.choice((0, math.pi / 2, rng.uniform(0, math.pi)))
    return x * math.cos(angle) + y * math.sin(angle)


def flat(rng: random.Random) -> Image.Image:
    return Image.new("RGB", (BIG, BIG), any_colour(rng))


def gradient(rng: random.Random) -> Image.Image:
    along = turned(rng)
    if rng.random() < 0.3:
        y, x = axes()
        along = np.hypot(y - rng.random(), x - rng.random())
    levels = (along - along.min()) / (along.max() - along.min())
    return as_image(levels, any_colour(rng), any_colour(rng))


def stripes(rng: random.Random) -> Image.Image:
    period, share = rng.uniform(3, 20) / SIDE, rng.uniform(0.25, 0.75)
    levels = (turned(rng) / period + rng.random()) % 1 < share
    return as_image(levels.astype(float), any_colour(rng), any_colour(rng))


def checks(rng: random.Random) -> Image.Image:
    y, x = axes()
    a, b = (rng.uniform(3, 14) / SIDE for _ in range(2))
    levels = ((y // a + x // (a if rng.random() < 0.6 else b)) % 2).astype(float)
    return as_image(levels, any_colour(rng), any_colour(rng))


def dots(rng: random.Random) -> Image.Image:
    image, fill = flat(rng), any_colour(rng)
    pencil = ImageDraw.Draw(image)
    gap = rng.uniform(5, 18) * OVERSAMPLING
    r = gap * rng.uniform(0.15, 0.45)
    for row in range(int(BIG / gap) + 2):
        for column in range(int(BIG / gap) + 2):
            x, y = column * gap + (row % 2) * gap / 2, row * gap
            pencil.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    return image


def noise(rng: random.Random) -> Image.Image:
    """Clouds, grain or paper: noise of one or several sizes between two colours."""
    draw = np.random.default_rng(rng.getrandbits(32))
    levels = np.zeros((BIG, BIG))
    for side in rng.sample((4, 8, 16, 32, 64), rng.randint(1, 3)):
        grain = Image.fromarray(draw.random((side, side)).astype(np.float32))
        levels += np.asarray(grain.resize((BIG, BIG), Image.Resampling.BICUBIC))
    levels = (levels - levels.min()) / (levels.max() - levels.min())
    if rng.random() < 0.3:
        levels = (levels > 0.5).astype(float)
    return as_image(levels, any_colour(rng), any_colour(rng))


GROUNDS: dict[Callable[[random.Random], Image.Image], int] = {
    flat: 6, gradient: 3, stripes: 2, checks: 2, dots: 2, noise: 3,
}  # fmt: skip


def ground(rng: random.Random) -> Image.Image:
    return rng.choices(list(GROUNDS), list(GROUNDS.values()))[0](rng)


def blob(rng: random.Random, middle: tuple[float, float], radius: float) -> list[tuple]:
    """Corners of a regular, irregular, pointed or smooth shape."""
    corners = rng.choice((3, 4, 4, 5, 6, 40))
    rough = rng.choice((0, 0.3, 0.6))
    first, flatness = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 1)
    points = []
    for i in range(corners * (2 if rough and corners < 40 else 1)):
        angle = first + 2 * math.pi * i / corners / (2 if rough and corners < 40 else 1)
        r = radius * (1 - (rough if i % 2 and corners < 40 else 0))
        points.append((middle[0] + r * math.cos(angle), middle[1] + r * flatness * math.sin(angle)))
    return points


def shape(image: Image.Image, rng: random.Random) -> None:
    """Paint one shape, filled with a ground of its own, outlined or both."""
    middle = (rng.uniform(0, BIG), rng.uniform(0, BIG))
    points = blob(rng, middle, BIG * rng.choice((0.06, 0.12, 0.2, 0.3, 0.45)))
    filled, outlined = rng.choice(((True, False), (True, False), (True, True), (False, True)))
    if filled:
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).polygon(points, fill=255)
        image.paste(flat(rng) if rng.random() < 0.7 else ground(rng), (0, 0), mask)
    if outlined:
        width = round(rng.uniform(0.8, 4.5) * OVERSAMPLING)
        fill = rng.choice(((16, 16, 20), any_colour(rng)))
        ImageDraw.Draw(image).line([*points, points[0]], fill=fill, width=width, joint="curve")


def stroke(image: Image.Image, rng: random.Random) -> None:
    """Draw a line, straight or curved."""
    a, b, c = ((rng.uniform(0, BIG), rng.uniform(0, BIG)) for _ in range(3))
    points = []
    for s in (i / 12 for i in range(13)):  # a quadratic Bézier curve
        u, v, w = (1 - s) ** 2, 2 * s * (1 - s), s * s
        points.append((u * a[0] + v * b[0] + w * c[0], u * a[1] + v * b[1] + w * c[1]))
    width = round(rng.uniform(0.8, 5) * OVERSAMPLING)
    ImageDraw.Draw(image).line(points, fill=any_colour(rng), width=width, joint="curve")


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def letters(image: Image.Image, rng: random.Random) -> None:
    """Write a few letters, in lines of one size."""
    size, fill = round(rng.uniform(8, 44) * OVERSAMPLING), any_colour(rng)
    y = rng.uniform(-0.2, 0.8) * BIG
    for _ in range(rng.randint(1, 3)):
        text = "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 9)))
        ImageDraw.Draw(image).text((rng.uniform(-0.2, 0.6) * BIG, y), text, fill, font(size))
        y += size


def pattern(rng: random.Random) -> Image.Image:
    """An image (64, 64) of shapes, lines and letters on a ground."""
    image = ground(rng)
    for _ in range(rng.choice((0, 1, 2, 3, 5, 8))):
        rng.choices((shape, stroke, letters), (6, 2, 1))[0](image, rng)
    return image.reduce(OVERSAMPLING)


@cache
def photographs(folder: Path) -> list[Image.Image]:
    """All photographs of a folder, RGB, in the order of their names."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".png", ".jpg"))
    return [Image.open(p).convert("RGB") for p in files]


def crop(folder: Path, rng: random.Random) -> Image.Image:
    """A square crop (64, 64) of one of a folder's photographs."""
    return crop_of(rng.choice(photographs(folder)), rng)


def crop_of(photo: Image.Image, rng: random.Random) -> Image.Image:
    """A square crop of a photograph, at any scale, reduced to (64, 64)."""
    longest = min(photo.size)
    side = round(math.exp(rng.uniform(math.log(min(80, longest)), math.log(longest))))
    x, y = (rng.randint(0, edge - side) for edge in photo.size)
    box = (x, y, x + side, y + side)
    return photo.resize((SIDE, SIDE), Image.Resampling.BOX, box)
