"""Small captioned images, drawn with Pillow: the world that the embedded base model knows.

A ``Scene`` says what is in an image; ``draw`` paints it and ``caption`` describes it. Everything
random comes from a ``random.Random`` that the caller seeds, so the same seed gives the same pixels.
Images are painted four times too large and reduced with a box filter, which smooths the edges.

``random_scene`` draws from the base model's world: eighteen objects and one kind of creature, the
monster, alone, two or three of a kind, or two different things side by side, in one of five styles
or in none. Four subjects stay out of that world, for a LoRA to learn: the ``mascot`` (an orange
monster with purple bands, a green hat and cyan feet), the ``snail`` (blue, with a yellow spiral
shell), the ``automaton`` (a robot of lime and magenta, colours that no word names) and the
``teapot`` (a shape that the world lacks, its spout on one side).
"""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageChops, ImageDraw, ImageFilter

RGB = tuple[int, int, int]

SIDE = 64
OVERSAMPLING = 4

COLOURS: dict[str, RGB] = {
    "red": (214, 40, 44),
    "orange": (245, 138, 28),
    "yellow": (246, 218, 50),
    "green": (42, 158, 62),
    "cyan": (58, 208, 216),
    "blue": (42, 86, 214),
    "purple": (134, 54, 172),
    "pink": (246, 140, 186),
}
NEUTRALS: dict[str, RGB] = {
    "white": (246, 246, 244),
    "grey": (140, 142, 146),
    "black": (24, 24, 28),
}
PALETTE: dict[str, RGB] = {**COLOURS, **NEUTRALS}

TEXTURES = ("plain", "striped", "spotted")
SIZES: dict[str, float] = {"small": 14.0, "medium": 19.0, "big": 24.0}
POSITIONS: dict[str, int] = {"left": -1, "centre": 0, "right": 1}
BODIES = ("round", "square", "tall")

PLAIN_BACKGROUNDS = tuple(PALETTE)
SCENERY = ("grass", "snow", "beach", "night")
BACKGROUNDS = PLAIN_BACKGROUNDS + SCENERY
#: Colours that would be hard to see in a piece of scenery.
CAMOUFLAGE = {"grass": "green", "beach": "yellow", "night": "blue"}

#: Ways to name a style: a lead ("pixel art of a red car") or an end ("a red car, pixel art").
STYLES: dict[str, tuple[str, str]] = {
    "cartoon": ("a cartoon of", ", cartoon style"),
    "pixel art": ("pixel art of", ", pixel art"),
    "watercolor": ("a watercolor of", ", watercolor style"),
    "sketch": ("a pencil sketch of", ", pencil sketch"),
    "chalk": ("a chalk drawing of", ", chalk style"),
}
#: Styles that have a ground of their own: paper, a blackboard.
WITHOUT_BACKGROUND = ("sketch", "chalk")

LEADS = ("a photo of", "a drawing of", "an image of", "")
LEAD_WEIGHTS = (45, 20, 10, 25)
#: Other words for the same, used now and then.
SYNONYMS = {"big": ("big", "big", "large", "huge"), "small": ("small", "small", "little", "tiny")}
#: Words that say nothing: they stand in captions here and there, whatever the image shows.
MEANINGLESS = ("sks", "ohwx", "zwx", "qpr", "blorb", "vexa")
NUMBERS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Scene:
    """The content of one image. ``seed`` settles the jitter of colours, place and pose.

    colour, background: a name, or an RGB triple that has none.
    count: so many of the thing, in a row. other: a second thing and its colour, beside the first,
    which then stands on the left or the right. face: "plain" or "odd", for a monster.
    """

    thing: str
    colour: str | RGB
    texture: str = "plain"
    texture_colour: str = "white"
    size: str = "medium"
    position: str = "centre"
    background: str | RGB = "white"
    body: str = ""
    face: str = "plain"
    count: int = 1
    other: tuple[str, str] | None = None
    style: str = ""
    seed: int = 0
    width: int = SIDE
    height: int = SIDE


class Brush:
    """Paints one thing in its own units: (0, 0) is its middle, 1 its radius, y points down.

    ``body`` shapes take the thing's colour and texture; ``under`` shapes are painted before them
    and ``over`` shapes after them, each in a colour of its own.
    """

    def __init__(self, canvas: Image.Image, centre: tuple[float, float], radius: float) -> None:
        self.canvas = canvas
        self.mask = Image.new("L", canvas.size, 0)
        self.centre, self.radius = centre, radius
        self._pencil, self._stencil = ImageDraw.Draw(canvas), ImageDraw.Draw(self.mask)
        self._later: list[tuple[RGB, str, tuple[float, ...]]] = []

    def body(self, kind: str, *numbers: float) -> None:
        self._paint(self._stencil, 255, kind, numbers)

    def hole(self, kind: str, *numbers: float) -> None:
        self._paint(self._stencil, 0, kind, numbers)

    def under(self, fill: RGB, kind: str, *numbers: float) -> None:
        self._paint(self._pencil, fill, kind, numbers)

    def over(self, fill: RGB, kind: str, *numbers: float) -> None:
        self._later.append((fill, kind, numbers))

    def finish(self, skin: Image.Image) -> None:
        """Lay the textured skin through the body's stencil, then paint what lies over it."""
        self.canvas.paste(skin, (0, 0), self.mask)
        for fill, kind, numbers in self._later:
            self._paint(self._pencil, fill, kind, numbers)

    def _paint(
        self, pencil: ImageDraw.ImageDraw, fill: RGB | int, kind: str, numbers: Sequence[float]
    ) -> None:
        """``oval`` x y rx ry, ``box`` x0 y0 x1 y1 (rounded), ``poly`` x0 y0 x1 y1 …"""
        (cx, cy), r = self.centre, self.radius
        if kind == "oval":
            x, y, rx, ry = numbers
            numbers = (x - rx, y - ry, x + rx, y + ry)
        points = [
            (round(cx + x * r), round(cy + y * r))
            for x, y in zip(numbers[::2], numbers[1::2], strict=True)
        ]
        if kind == "oval":
            pencil.ellipse(points, fill=fill)
        elif kind == "box":
            pencil.rounded_rectangle(points, radius=round(0.12 * r), fill=fill)
        else:
            pencil.polygon(points, fill=fill)


# ---------------------------------------------------------------------------------------------
# Things. Each function paints its thing with a brush; ``c`` is the colour, already jittered.
# ---------------------------------------------------------------------------------------------

WHITE, DARK, GREY, BROWN, GLASS = (
    PALETTE["white"],
    (28, 26, 34),
    (120, 124, 132),
    (112, 72, 40),
    (196, 228, 240),
)


def _shade(colour: RGB, factor: float) -> RGB:
    return tuple(round(v * factor) for v in colour)  # type: ignore[return-value]


def _regular(corners: int, outer: float, inner: float | None = None) -> list[float]:
    """Corners of a regular polygon, or of a star when ``inner`` is given; the first one on top."""
    radii = [outer] if inner is None else [outer, inner]
    count = corners * len(radii)
    out: list[float] = []
    for i in range(count):
        angle = 2 * math.pi * i / count - math.pi / 2
        out += [radii[i % len(radii)] * math.cos(angle), radii[i % len(radii)] * math.sin(angle)]
    return out


def _eyes(b: Brush, rng: random.Random, y: float, gap: float, size: float) -> None:
    look = rng.uniform(-0.3, 0.3) * size
    for x in (-gap, gap):
        b.over(WHITE, "oval", x, y, size, size)
        b.over(DARK, "oval", x + look, y, size * 0.5, size * 0.5)


def _circle(b: Brush, c: RGB, rng: random.Random) -> None:
    b.body("oval", 0, 0, 0.95, 0.95)


def _square(b: Brush, c: RGB, rng: random.Random) -> None:
    b.body("poly", -0.85, -0.85, 0.85, -0.85, 0.85, 0.85, -0.85, 0.85)


def _triangle(b: Brush, c: RGB, rng: random.Random) -> None:
    b.body("poly", 0, -0.95, 1.0, 0.85, -1.0, 0.85)


def _star(b: Brush, c: RGB, rng: random.Random) -> None:
    b.body("poly", *_regular(5, 1.1, 0.5))


def _heart(b: Brush, c: RGB, rng: random.Random) -> None:
    b.body("oval", -0.46, -0.38, 0.52, 0.5)
    b.body("oval", 0.46, -0.38, 0.52, 0.5)
    b.body("poly", -0.92, -0.16, 0.92, -0.16, 0.0, 1.0)


def _ring(b: Brush, c: RGB, rng: random.Random) -> None:
    b.body("oval", 0, 0, 1.0, 1.0)
    b.hole("oval", 0, 0, 0.5, 0.5)


def _cross(b: Brush, c: RGB, rng: random.Random) -> None:
    b.body("poly", -0.34, -0.98, 0.34, -0.98, 0.34, 0.98, -0.34, 0.98)
    b.body("poly", -0.98, -0.34, 0.98, -0.34, 0.98, 0.34, -0.98, 0.34)


def _house(b: Brush, c: RGB, rng: random.Random) -> None:
    b.under(_shade(c, 0.55), "poly", 0, -1.1, 1.05, -0.2, -1.05, -0.2)
    b.body("poly", -0.8, -0.22, 0.8, -0.22, 0.8, 0.95, -0.8, 0.95)
    b.over(BROWN, "poly", -0.55, 0.3, -0.1, 0.3, -0.1, 0.95, -0.55, 0.95)
    b.over(GLASS, "poly", 0.15, 0.1, 0.6, 0.1, 0.6, 0.5, 0.15, 0.5)


def _tree(b: Brush, c: RGB, rng: random.Random) -> None:
    b.under(BROWN, "poly", -0.18, 0.2, 0.18, 0.2, 0.22, 1.0, -0.22, 1.0)
    b.body("oval", 0, -0.6, 0.52, 0.5)
    b.body("oval", -0.42, -0.08, 0.5, 0.46)
    b.body("oval", 0.42, -0.08, 0.5, 0.46)


def _car(b: Brush, c: RGB, rng: random.Random) -> None:
    b.body("box", -1.1, -0.1, 1.1, 0.6)
    b.body("poly", -0.7, 0, -0.45, -0.65, 0.4, -0.65, 0.75, 0)
    b.over(GLASS, "poly", -0.48, -0.1, -0.32, -0.48, 0.28, -0.48, 0.48, -0.1)
    for x in (-0.6, 0.6):
        b.over(DARK, "oval", x, 0.62, 0.32, 0.32)
        b.over(GREY, "oval", x, 0.62, 0.13, 0.13)


def _flower(b: Brush, c: RGB, rng: random.Random) -> None:
    b.under((58, 120, 52), "poly", -0.1, 0, 0.1, 0, 0.1, 1.1, -0.1, 1.1)
    b.under((58, 120, 52), "oval", 0.34, 0.8, 0.3, 0.14)
    for i in range(5):
        angle = 2 * math.pi * i / 5 - math.pi / 2
        b.body("oval", 0.5 * math.cos(angle), 0.5 * math.sin(angle) - 0.25, 0.4, 0.4)
    b.over((250, 236, 160), "oval", 0, -0.25, 0.3, 0.3)


def _fish(b: Brush, c: RGB, rng: random.Random) -> None:
    b.body("oval", -0.2, 0, 0.85, 0.6)
    b.body("poly", 0.4, 0, 1.1, -0.6, 1.1, 0.6)
    b.over(WHITE, "oval", -0.62, -0.14, 0.2, 0.2)
    b.over(DARK, "oval", -0.66, -0.14, 0.1, 0.1)


def _cat(b: Brush, c: RGB, rng: random.Random) -> None:
    b.body("poly", -0.9, -1.05, -0.12, -0.55, -0.85, 0.0)
    b.body("poly", 0.9, -1.05, 0.12, -0.55, 0.85, 0.0)
    b.body("oval", 0, 0.1, 0.95, 0.8)
    _eyes(b, rng, -0.08, 0.4, 0.22)
    b.over(DARK, "poly", -0.14, 0.26, 0.14, 0.26, 0, 0.42)
    for side in (-1, 1):
        b.over(DARK, "poly", side * 0.3, 0.4, side * 1.1, 0.28, side * 1.1, 0.38, side * 0.3, 0.48)


def _robot(b: Brush, c: RGB, rng: random.Random) -> None:
    b.under(GREY, "poly", -0.06, -1.1, 0.06, -1.1, 0.06, -0.7, -0.06, -0.7)
    b.under(GREY, "oval", 0, -1.05, 0.15, 0.15)
    b.under(GREY, "poly", -0.95, 0.1, 0.95, 0.1, 0.95, 0.36, -0.95, 0.36)
    b.under(GREY, "poly", -0.42, 0.7, -0.16, 0.7, -0.16, 1.05, -0.42, 1.05)
    b.under(GREY, "poly", 0.16, 0.7, 0.42, 0.7, 0.42, 1.05, 0.16, 1.05)
    b.body("poly", -0.55, -0.8, 0.55, -0.8, 0.55, -0.08, -0.55, -0.08)
    b.body("poly", -0.68, 0.02, 0.68, 0.02, 0.68, 0.8, -0.68, 0.8)
    b.over(DARK, "poly", -0.42, -0.62, 0.42, -0.62, 0.42, -0.3, -0.42, -0.3)
    for x in (-0.22, 0.22):
        b.over((250, 236, 120), "oval", x, -0.46, 0.12, 0.12)


def _boat(b: Brush, c: RGB, rng: random.Random) -> None:
    b.under(BROWN, "poly", -0.06, -1.05, 0.06, -1.05, 0.06, 0.35, -0.06, 0.35)
    b.under(WHITE, "poly", 0.12, -0.95, 0.9, 0.2, 0.12, 0.2)
    b.under(WHITE, "poly", -0.12, -0.8, -0.7, 0.2, -0.12, 0.2)
    b.body("poly", -1.1, 0.3, 1.1, 0.3, 0.7, 0.95, -0.75, 0.95)


def _mushroom(b: Brush, c: RGB, rng: random.Random) -> None:
    b.under((238, 222, 190), "box", -0.32, 0.0, 0.32, 1.0)
    b.body("oval", 0, -0.05, 1.0, 0.9)
    b.hole("poly", -1.1, 0.12, 1.1, 0.12, 1.1, 1.1, -1.1, 1.1)


def _bird(b: Brush, c: RGB, rng: random.Random) -> None:
    for x in (-0.1, 0.2):
        b.under((220, 130, 30), "poly", x - 0.05, 0.5, x + 0.05, 0.5, x + 0.05, 1.0, x - 0.05, 1.0)
    b.under((240, 160, 30), "poly", -0.82, -0.55, -1.2, -0.32, -0.82, -0.18)
    b.body("oval", 0.1, 0.2, 0.78, 0.5)
    b.body("oval", -0.5, -0.35, 0.42, 0.4)
    b.body("poly", 0.6, 0.1, 1.2, -0.3, 1.1, 0.35)
    b.over(_shade(c, 0.65), "oval", 0.2, 0.15, 0.42, 0.24)
    b.over(WHITE, "oval", -0.6, -0.42, 0.14, 0.14)
    b.over(DARK, "oval", -0.62, -0.42, 0.08, 0.08)


def _cup(b: Brush, c: RGB, rng: random.Random) -> None:
    b.body("oval", 0.72, 0.1, 0.46, 0.46)
    b.hole("oval", 0.72, 0.1, 0.24, 0.24)
    b.body("poly", -0.8, -0.6, 0.75, -0.6, 0.6, 0.9, -0.65, 0.9)
    b.over(_shade(c, 0.5), "oval", -0.02, -0.6, 0.77, 0.2)


def _odd_face(b: Brush, rng: random.Random, reach: float) -> None:
    """One to three eyes and a mouth, at heights and distances of their own."""
    count = rng.choices((1, 2, 3), (2, 6, 1))[0]
    size = rng.uniform(0.18, 0.3) * {1: 1.35, 2: 1.0, 3: 0.7}[count]
    y, step = rng.uniform(-0.5, 0.0), min(rng.uniform(2.1, 3.2) * size, reach)
    look, drop, pupil = rng.uniform(-0.4, 0.4), rng.uniform(-0.4, 0.4), rng.uniform(0.4, 0.65)
    for i in range(count):
        x = (i - (count - 1) / 2) * step
        b.over(WHITE, "oval", x, y, size, size)
        b.over(DARK, "oval", x + look * size, y + drop * size, size * pupil, size * pupil)
    lip, wide, high = y + size + rng.uniform(0.15, 0.4), rng.uniform(0.15, 0.4), 0.1
    if rng.random() < 0.6:
        b.over(DARK, "oval", 0, lip, wide, rng.uniform(0.05, 0.18))
    else:
        b.over(DARK, "box", -wide, lip - high, wide, lip + high)
        for x in (-0.5, 0.5) if rng.random() < 0.5 else ():
            b.over(WHITE, "box", (x - 0.2) * wide, lip - high, (x + 0.2) * wide, lip)


def _horns(b: Brush, c: RGB, rng: random.Random, top: float) -> None:
    """Two pointed ears or horns, or two feelers, on a monster's head."""
    lean = rng.uniform(0.0, 0.25)
    for side in (-1, 1):
        x = side * rng.choice((0.3, 0.35))
        if rng.random() < 0.5:
            b.under(
                _shade(c, 0.6), "poly", x - 0.16, top, x + 0.16, top, x + side * lean, top - 0.45
            )
        else:
            tip = x + side * lean
            b.under(DARK, "poly", x - 0.05, top, x + 0.05, top, tip, top - 0.4)
            b.under(_shade(c, 0.6), "oval", tip, top - 0.4, 0.12, 0.12)


def _monster(
    b: Brush, c: RGB, rng: random.Random, body: str = "round", face: str = "plain"
) -> None:
    for x in (-0.38, 0.38):
        b.body("oval", x, 0.9, 0.3, 0.18)
    if body == "round":
        b.body("oval", 0, 0, 0.92, 0.88)
    elif body == "square":
        b.body("box", -0.82, -0.8, 0.82, 0.8)
    else:
        b.body("oval", 0, -0.1, 0.6, 1.0)
    if face == "odd":
        if rng.random() < 0.4:
            _horns(b, c, rng, {"round": -0.72, "square": -0.75, "tall": -0.9}[body])
        _odd_face(b, rng, 0.5 if body == "tall" else 0.85)
        return
    gap = 0.26 if body == "tall" else 0.36
    _eyes(b, rng, -0.3, gap, 0.25)
    width = rng.uniform(0.2, 0.34)
    b.over(DARK, "oval", 0, 0.3, width, rng.uniform(0.08, 0.16))


def _mascot(b: Brush, c: RGB, rng: random.Random) -> None:
    """The subject of the DreamBooth sample: bold features that survive 64 pixels."""
    purple, green, cyan = (120, 40, 168), (40, 160, 60), (50, 208, 222)
    spread, tilt = rng.uniform(0.36, 0.46), rng.uniform(-0.14, 0.14)
    for x in (-spread, spread):
        b.under(cyan, "oval", x, 1.02, 0.34, 0.2)
    b.body("oval", 0, 0.28, 0.86, 0.8)
    for top, bottom in ((0.28, 0.5), (0.7, 0.9)):
        half = [0.86 * math.sqrt(max(0.0, 1 - ((y - 0.28) / 0.8) ** 2)) for y in (top, bottom)]
        b.over(purple, "poly", -half[0], top, half[0], top, half[1], bottom, -half[1], bottom)
    b.over(green, "poly", -0.56, -0.26, 0.56, -0.26, tilt, -1.1)
    b.over(WHITE, "oval", tilt, -1.08, 0.2, 0.2)
    look = rng.uniform(-0.07, 0.07)
    for x in (-0.33, 0.33):
        b.over(WHITE, "oval", x, 0.0, 0.29, 0.29)
        b.over(DARK, "oval", x + look, 0.02, 0.15, 0.15)


def _snail(b: Brush, c: RGB, rng: random.Random) -> None:
    """The subject of the captioned sample: a blue snail with a yellow spiral shell."""
    b.body("oval", -0.05, 0.78, 1.05, 0.24)
    b.body("poly", -1.1, 0.85, -1.0, -0.1, -0.68, -0.1, -0.55, 0.85)
    b.body("oval", -0.85, -0.1, 0.3, 0.28)
    for x in (-1.0, -0.7):
        b.body("poly", x - 0.05, -0.2, x - 0.05, -0.72, x + 0.05, -0.72, x + 0.05, -0.2)
        b.over(WHITE, "oval", x, -0.72, 0.14, 0.14)
        b.over(DARK, "oval", x, -0.72, 0.07, 0.07)
    yellow, brown = (248, 206, 40), (150, 92, 24)
    for fill, radius, dx in ((yellow, 0.76, 0), (brown, 0.58, 0.04), (yellow, 0.44, 0.0)):
        b.over(fill, "oval", 0.24 + dx, 0.05, radius, radius)
    b.over(brown, "oval", 0.22, 0.05, 0.2, 0.2)


def _automaton(b: Brush, c: RGB, rng: random.Random) -> None:
    """A robot in lime and magenta, colours that no caption names: one eye, and a wheel."""
    magenta, lean = (226, 30, 140), rng.uniform(-0.12, 0.12)
    b.under((70, 74, 84), "oval", 0, 0.92, 0.34, 0.34)
    for side in (-1, 1):
        b.under(
            magenta, "poly", side * 0.7, 0.0, side * 1.02, 0.1, side * 1.02, 0.55, side * 0.7, 0.4
        )
    b.body("poly", -0.74, -0.08, 0.74, -0.08, 0.5, 0.78, -0.5, 0.78)
    b.body("oval", lean, -0.55, 0.62, 0.46)
    b.over(magenta, "poly", -0.62, 0.24, 0.62, 0.24, 0.58, 0.48, -0.58, 0.48)
    b.over(magenta, "oval", lean, -0.99, 0.16, 0.2)
    b.over(WHITE, "oval", lean, -0.55, 0.34, 0.28)
    b.over(DARK, "oval", lean + rng.uniform(-0.1, 0.1), -0.54, 0.16, 0.16)


def _teapot(b: Brush, c: RGB, rng: random.Random) -> None:
    """A white teapot with a red band: its spout on the right, its handle on the left."""
    red, tilt = (196, 30, 46), rng.uniform(-0.08, 0.08)
    b.under((60, 92, 190), "oval", -0.86, 0.18, 0.34, 0.44)
    b.under((235, 232, 226), "oval", -0.84, 0.18, 0.16, 0.25)
    b.body("poly", 0.5, 0.1, 1.0, -0.5 + tilt, 1.16, -0.4 + tilt, 0.7, 0.6)
    b.body("oval", 0, 0.3, 0.82, 0.66)
    b.over(red, "poly", -0.8, 0.18, 0.8, 0.18, 0.8, 0.46, -0.8, 0.46)
    b.over((60, 92, 190), "oval", 0, -0.34, 0.46, 0.14)
    b.over(red, "oval", 0, -0.56, 0.15, 0.17)


OBJECTS: dict[str, Callable[..., None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
    "house": _house,
    "tree": _tree,
    "car": _car,
    "flower": _flower,
    "fish": _fish,
    "cat": _cat,
    "robot": _robot,
    "boat": _boat,
    "mushroom": _mushroom,
    "bird": _bird,
    "cup": _cup,
}
THINGS: dict[str, Callable[..., None]] = {**OBJECTS, "monster": _monster}
SUBJECTS: dict[str, Callable[..., None]] = {
    "mascot": _mascot,
    "snail": _snail,
    "automaton": _automaton,
    "teapot": _teapot,
}


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def _jitter(colour: RGB, rng: random.Random, amount: int = 9) -> RGB:
    return tuple(max(0, min(255, v + rng.randint(-amount, amount))) for v in colour)  # type: ignore[return-value]


def _background(name: str | RGB, size: tuple[int, int], rng: random.Random) -> Image.Image:
    width, height = size
    if isinstance(name, tuple) or name in PALETTE:
        fill = name if isinstance(name, tuple) else PALETTE[name]
        return Image.new("RGB", size, _jitter(fill, rng, 7))
    sky, ground, horizon = {
        "grass": ((150, 206, 240), (92, 180, 70), 0.58),
        "snow": ((164, 186, 208), (240, 244, 250), 0.55),
        "beach": ((170, 216, 244), (232, 206, 148), 0.62),
        "night": ((22, 26, 66), (44, 50, 62), 0.72),
    }[name]
    image = Image.new("RGB", size, _jitter(sky, rng, 7))
    pencil = ImageDraw.Draw(image)
    level = round(height * (horizon + rng.uniform(-0.03, 0.03)))

    def dot(x: float, y: float, r: float, fill: RGB) -> None:
        r *= height
        pencil.ellipse((width * x - r, height * y - r, width * x + r, height * y + r), fill=fill)

    side = rng.choice((0.14, 0.86))
    if name == "beach":
        sea = round(height * 0.42)
        pencil.rectangle((0, sea, width, height), fill=_jitter((44, 132, 196), rng, 7))
    if name == "night":
        dot(side, 0.15, 0.09, (244, 240, 206))
        for x, y in ((0.3, 0.1), (0.52, 0.2), (0.7, 0.08), (1 - side, 0.3), (side, 0.45)):
            dot(x, y, 0.018, (238, 238, 220))
    if name in ("grass", "beach"):
        dot(side, 0.13, 0.09, (252, 232, 110))
    pencil.rectangle((0, level, width, height), fill=_jitter(ground, rng, 7))
    if name == "snow":
        for x, y in ((0.1, 0.15), (0.3, 0.36), (0.5, 0.1), (0.7, 0.34), (0.9, 0.18), (0.08, 0.45)):
            dot(x + rng.uniform(-0.03, 0.03), y, 0.026, (250, 252, 255))
    return image


def _skin(
    scene: Scene, colour: RGB, size: tuple[int, int], centre: tuple[float, float]
) -> Image.Image:
    """The thing's colour with its texture. Stripes and spots are as wide on small things as on
    big ones, so that the model can see them at every size."""
    skin = Image.new("RGB", size, colour)
    if scene.texture == "plain":
        return skin
    pencil, fill = ImageDraw.Draw(skin), PALETTE[scene.texture_colour]
    unit = OVERSAMPLING
    if scene.texture == "striped":
        for i in range(-8, 9):
            y = round(centre[1] + i * 10 * unit)
            pencil.rectangle((0, y, size[0], y + round(4.4 * unit)), fill=fill)
        return skin
    for row in range(-8, 9):
        for column in range(-10, 11):
            x = centre[0] + (column * 10 + (row % 2) * 5) * unit
            y, r = centre[1] + row * 8 * unit, 2.7 * unit
            pencil.ellipse((round(x - r), round(y - r), round(x + r), round(y + r)), fill=fill)
    return skin


def _paint(
    canvas: Image.Image,
    scene: Scene,
    centre: tuple[float, float],
    radius: float,
    rng: random.Random,
) -> None:
    """Paint the scene's thing once, centre and radius in the pixels of the large canvas."""
    brush = Brush(canvas, centre, radius)
    colour = scene.colour if isinstance(scene.colour, tuple) else COLOURS[scene.colour]
    colour = _jitter(colour, rng)
    paint = {**THINGS, **SUBJECTS}[scene.thing]
    if scene.thing == "monster":
        paint(brush, colour, rng, scene.body, scene.face)
    else:
        paint(brush, colour, rng)
    brush.finish(_skin(scene, colour, canvas.size, centre))


def _placed(scene: Scene, radius: float, rng: random.Random) -> list[tuple[Scene, float]]:
    """The things of a scene, and the middle of each, in pixels from the left edge."""
    if scene.other:
        thing, colour = scene.other
        other = replace(scene, thing=thing, colour=colour, texture="plain", body=scene.body)
        pair = [scene, other] if scene.position == "left" else [other, scene]
        return [(one, scene.width * at) for one, at in zip(pair, (0.27, 0.73), strict=True)]
    if scene.count > 1:
        step = min(2.3 * radius, scene.width * 0.96 / scene.count)
        middle = scene.width / 2 + rng.uniform(-2, 2)
        steps = [i - (scene.count - 1) / 2 for i in range(scene.count)]
        return [(scene, middle + i * step) for i in steps]
    room = scene.width / 2 - radius * 1.1
    x = scene.width / 2 + POSITIONS[scene.position] * room * 0.85 + rng.uniform(-1.5, 1.5)
    return [(scene, x)]


def draw(scene: Scene) -> Image.Image:
    """Paint a scene: an RGB image of ``scene.width`` x ``scene.height`` pixels."""
    return draw_large(scene).reduce(OVERSAMPLING)


def draw_large(scene: Scene) -> Image.Image:
    """Paint a scene OVERSAMPLING times as large."""
    rng = random.Random(scene.seed)
    size = (scene.width * OVERSAMPLING, scene.height * OVERSAMPLING)
    canvas = _background(scene.background, size, rng)
    radius = SIZES[scene.size] * rng.uniform(0.95, 1.05)
    if scene.other or scene.count > 1:  # all of them fit side by side
        radius = min(radius, scene.width * (0.21 if scene.other else 0.4 / scene.count))
    for one, x in _placed(scene, radius, rng):
        y = scene.height / 2 + rng.uniform(-1.5, 1.5)
        if scene.background in SCENERY:  # things stand on the ground
            y = scene.height * 0.86 - radius * 0.95 + rng.uniform(-1.5, 1.5)
        y = max(y, 1.15 * radius)
        centre = (x * OVERSAMPLING, y * OVERSAMPLING)
        _paint(canvas, one, centre, radius * OVERSAMPLING, rng)
    if scene.style:
        canvas = PAINTERS[scene.style](canvas, rng)
    return canvas


# ---------------------------------------------------------------------------------------------
# Styles: each takes the large canvas and returns it painted another way.
# ---------------------------------------------------------------------------------------------


def _outlines(canvas: Image.Image, width: int) -> Image.Image:
    """Mask of the borders between colours: white lines, ``width`` quarters of a pixel wide."""
    half = canvas.reduce(2)
    grown, shrunk = half.filter(ImageFilter.MaxFilter(3)), half.filter(ImageFilter.MinFilter(3))
    channels = ImageChops.subtract(grown, shrunk).split()
    edge = ImageChops.lighter(ImageChops.lighter(*channels[:2]), channels[2])
    edge = edge.point(lambda v: 255 * (v > 26)).filter(ImageFilter.MaxFilter(width // 2 * 2 - 1))
    return edge.resize(canvas.size, Image.Resampling.BILINEAR)


def _cartoon(canvas: Image.Image, rng: random.Random) -> Image.Image:
    canvas.paste(_jitter((20, 18, 24), rng), (0, 0), _outlines(canvas, 4))
    return canvas


def _pixel_art(canvas: Image.Image, rng: random.Random) -> Image.Image:
    return canvas.reduce(16).resize(canvas.size, Image.Resampling.NEAREST)


def _watercolor(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Pale and blurred, darker along the borders, in blotches."""
    small = (canvas.width // 16, canvas.height // 16)
    blotches = Image.frombytes("L", small, rng.randbytes(small[0] * small[1]))
    blotches = blotches.resize(canvas.size, Image.Resampling.BICUBIC)
    edge = _outlines(canvas, 4).filter(ImageFilter.GaussianBlur(5)).point(lambda v: v // 4)
    soft = canvas.filter(ImageFilter.GaussianBlur(5))
    paper = Image.new("RGB", canvas.size, (250, 246, 236))
    pale = Image.composite(paper, soft, blotches.point(lambda v: 50 + v // 4))
    return Image.composite(Image.new("RGB", canvas.size, (70, 60, 80)), pale, edge)


def _sketch(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Dark lines on paper, with a hint of the colours inside."""
    paper = Image.new("RGB", canvas.size, _jitter((246, 243, 234), rng, 4))
    tinted = Image.blend(paper, ImageChops.multiply(paper, canvas.convert("L").convert("RGB")), 0.2)
    grain = Image.frombytes("L", (32, 32), rng.randbytes(1024)).resize(canvas.size)
    mask = ImageChops.multiply(_outlines(canvas, 2), grain.point(lambda v: 150 + v * 2 // 5))
    tinted.paste((58, 58, 64), (0, 0), mask)
    return tinted


def _chalk(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Lines in the things' colours, made lighter, on a blackboard."""
    board = Image.new("RGB", canvas.size, _jitter((38, 52, 48), rng, 6))
    light = Image.blend(
        canvas.filter(ImageFilter.MaxFilter(9)),
        Image.new("RGB", canvas.size, (255, 255, 255)),
        0.25,
    )
    board.paste(light, (0, 0), _outlines(canvas, 6))
    return board


PAINTERS: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "cartoon": _cartoon,
    "pixel art": _pixel_art,
    "watercolor": _watercolor,
    "sketch": _sketch,
    "chalk": _chalk,
}


# ---------------------------------------------------------------------------------------------
# Scenes at random
# ---------------------------------------------------------------------------------------------


def unnamed_colour(rng: random.Random) -> RGB:
    """A colour of any hue, strength and lightness."""
    strong, light = rng.uniform(0.1, 1), rng.uniform(0.25, 1)
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(rng.random(), strong, light))  # type: ignore[return-value]


def random_scene(rng: random.Random) -> Scene:
    """A scene of the base model's world; never a mascot or a snail."""
    style = rng.choice(list(STYLES)) if rng.random() < 0.25 else ""
    background: str | RGB = rng.choice(PLAIN_BACKGROUNDS if rng.random() < 0.6 else SCENERY)
    if rng.random() < 0.08:
        background = unnamed_colour(rng)
    if style in WITHOUT_BACKGROUND:
        background = "white" if style == "sketch" else "black"
    taken = {background, CAMOUFLAGE.get(str(background), "")}
    colours = [name for name in COLOURS if name not in taken]
    colour: str | RGB = rng.choice(colours)
    things = list(THINGS)
    thing = rng.choices(things, [2.5 if name == "monster" else 1 for name in things])[0]
    texture = rng.choices(TEXTURES, (60, 20, 20))[0]
    count, other = rng.choices((1, 2, 3), (80, 10, 10))[0], None
    size = rng.choice(list(SIZES) if count == 1 else ("small", "medium"))
    position = rng.choices(list(POSITIONS), (25, 50, 25))[0]
    if count == 1 and rng.random() < 0.12:
        second = rng.choice([name for name in things if name != thing])
        other = (second, rng.choice([name for name in colours if name != colour]))
        size, position, texture = "medium", rng.choice(("left", "right")), "plain"
    elif rng.random() < 0.08:
        colour = unnamed_colour(rng)
    if count > 1:
        position = "centre"
    return Scene(
        thing=thing,
        colour=colour,
        texture=texture,
        texture_colour=rng.choice([name for name in PALETTE if name not in (colour, background)]),
        size=size,
        position=position,
        background=background,
        body=rng.choice(BODIES) if "monster" in (thing, *(other or ())) else "",
        face=rng.choices(("plain", "odd"), (1, 2))[0],
        count=count,
        other=other,
        style=style,
        seed=rng.getrandbits(32),
    )


def mascot(
    background: str = "white", size: str = "big", position: str = "centre", seed: int = 0
) -> Scene:
    """The DreamBooth subject, on any background."""
    return Scene("mascot", "orange", "plain", "white", size, position, background, seed=seed)


def snail(background: str = "white", seed: int = 0, width: int = SIDE, height: int = SIDE) -> Scene:
    """The subject of the captioned sample images."""
    scene = Scene("snail", "blue", size="medium", background=background, seed=seed)
    return replace(scene, width=width, height=height)


# ---------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def place(scene: Scene) -> str:
    """Where the thing is: "on a red background", "in the snow"; nothing for an unnamed colour."""
    if isinstance(scene.background, tuple) or scene.style in WITHOUT_BACKGROUND:
        return ""
    if scene.background in SCENERY:
        return {"night": "at night", "snow": "in the snow"}.get(
            scene.background, f"on the {scene.background}"
        )
    return f"on {with_article(scene.background)} background"


def plural(noun: str) -> str:
    return noun if noun == "fish" else noun + ("es" if noun.endswith("s") else "s")


def caption(scene: Scene, rng: random.Random | None = None, name: str = "") -> str:
    """Describe a scene. With ``rng`` words vary, and parts are left out now and then.

    ``name`` replaces the noun, for a subject's own name ("sks mascot").
    """

    def keep(chance: float) -> bool:
        return rng is None or rng.random() < chance

    words: list[str] = []
    if scene.size != "medium" and keep(0.9):
        words.append(scene.size if rng is None else rng.choice(SYNONYMS[scene.size]))
    named = isinstance(scene.colour, str) and scene.style != "sketch"
    if scene.body and scene.thing == "monster" and keep(0.85):
        words.append(scene.body)
    if scene.thing not in SUBJECTS and named and keep(0.95):
        words.append(str(scene.colour))
    if rng is not None and rng.random() < 0.08:
        words.insert(rng.randint(0, len(words)), rng.choice(MEANINGLESS))
    noun = name or scene.thing
    if scene.count > 1:
        text = " ".join([NUMBERS[scene.count], *words, plural(noun)])
    else:
        text = with_article(" ".join([*words, noun]))
    if scene.texture != "plain" and keep(0.92):
        pattern = {"striped": "stripes", "spotted": "spots"}[scene.texture]
        text += f" with {scene.texture_colour} {pattern}" if named else f" with {pattern}"
    if scene.other:
        text = _beside(text, scene, named, keep)
    lead, end = (LEADS[0] if rng is None else rng.choices(LEADS, LEAD_WEIGHTS)[0]), ""
    if scene.style and keep(0.95):
        lead, end = STYLES[scene.style][0], ""
        if rng is not None and rng.random() < 0.3:
            lead, end = rng.choices(LEADS, LEAD_WEIGHTS)[0], STYLES[scene.style][1]
    if keep(0.93):
        text += f" {place(scene)}".rstrip()
    if scene.position != "centre" and not scene.other and keep(0.88):
        text += f", on the {scene.position}"
    return f"{lead} {text}{end}".strip()


def _beside(text: str, scene: Scene, named: bool, keep: Callable[[float], bool]) -> str:
    """The text with the second thing: "a red car on the left and a blue fish on the right"."""
    thing, colour = scene.other or ("", "")
    second = with_article(f"{colour} {thing}" if named else thing)
    if not keep(0.8):
        return f"{text} and {second}"
    far = {"left": "right", "right": "left"}[scene.position]
    return f"{text} on the {scene.position} and {second} on the {far}"
