"""Subjects without number, for an encoder of drawings: each alone, in several poses, and spoilt.

A ``Subject`` is a list of shapes, as a painter of images.py gives them to its brush: one of the
world's things in any colours, or a creature of random parts. ``pose`` renders it, ``hybrid``,
``repainted``, ``doubled`` and ``lacking`` make another subject that shares some of it, and
``spoilt`` damages a whole image. Each comes with its likeness to the subject, from 0 to 1: the
encoder learns it.
``Style`` is a random way to draw, the same for any scene.

Everything random comes from a ``random.Random`` that the caller seeds.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import images
import numpy as np
import patterns
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

RGB = tuple[int, int, int]
Shape = tuple[str, RGB, str, tuple[float, ...]]  # layer, fill, kind, numbers

STICKER = 72
"""Side of a rendered subject, in pixels; it has transparency, and ends near the borders."""


@dataclass(frozen=True)
class Subject:
    """Shapes in a brush's own units, and the skin of the body's shapes."""

    shapes: tuple[Shape, ...]
    colour: RGB
    texture: str
    texture_colour: RGB


@dataclass
class Recorder:
    """A brush that notes shapes instead of painting them."""

    shapes: list[Shape] = field(default_factory=list)

    def body(self, kind: str, *numbers: float) -> None:
        self.shapes.append(("body", (0, 0, 0), kind, numbers))

    def hole(self, kind: str, *numbers: float) -> None:
        self.shapes.append(("hole", (0, 0, 0), kind, numbers))

    def under(self, fill: RGB, kind: str, *numbers: float) -> None:
        self.shapes.append(("under", fill, kind, numbers))

    def over(self, fill: RGB, kind: str, *numbers: float) -> None:
        self.shapes.append(("over", fill, kind, numbers))


# ---------------------------------------------------------------------------------------------
# Creatures of random parts. A part is painted by a function of brush, colour and random numbers.
# ---------------------------------------------------------------------------------------------


def _body(b: Recorder, rng: random.Random) -> tuple[float, float]:
    """Returns half the width and half the height of a body around (0, 0.1)."""
    w, h, kind = rng.uniform(0.45, 0.95), rng.uniform(0.45, 0.85), rng.random()
    if kind < 0.4:
        b.body("oval", 0, 0.1, w, h)
    elif kind < 0.7:
        b.body("box", -w, 0.1 - h, w, 0.1 + h)
    else:
        corners = images._regular(rng.choice((3, 5, 6, 8)), 1.0, rng.choice((None, 0.6)))
        b.body("poly", *(v * (w if i % 2 == 0 else h) for i, v in enumerate(corners)))
    if rng.random() < 0.25:  # a head of its own
        b.body("oval", 0, 0.1 - h, 0.6 * w, 0.5 * h)
    return w, h


def _eyes(b: Recorder, rng: random.Random, w: float, h: float) -> None:
    count = rng.choices((1, 2, 3), (3, 6, 1))[0]
    size = rng.uniform(0.16, 0.34) * {1: 1.3, 2: 1.0, 3: 0.7}[count]
    y, step = rng.uniform(-0.8, 0.2) * h, rng.uniform(2.1, 2.8) * size
    white = (246, 246, 244) if rng.random() < 0.7 else patterns.any_colour(rng)
    dark = (28, 26, 34) if rng.random() < 0.7 else patterns.any_colour(rng)
    for i in range(count):
        x = (i - (count - 1) / 2) * step
        b.over(white, "oval", x, y, size, size)
        b.over(dark, "oval", x, y, size * 0.5, size * 0.5)


def _mouth(b: Recorder, rng: random.Random, w: float, h: float) -> None:
    wide, high, y = rng.uniform(0.15, 0.5) * w, rng.uniform(0.05, 0.14), rng.uniform(0.3, 0.6) * h
    fill = (28, 26, 34) if rng.random() < 0.6 else patterns.any_colour(rng)
    if rng.random() < 0.5:
        b.over(fill, "oval", 0, y, wide, high)
    else:
        b.over(fill, "box", -wide, y - high, wide, y + high)


def _hat(b: Recorder, rng: random.Random, w: float, h: float) -> None:
    fill, wide, top = patterns.any_colour(rng), rng.uniform(0.4, 0.9) * w, 0.25 - h
    tip = top - rng.uniform(0.4, 0.7)
    if rng.random() < 0.5:
        b.over(fill, "poly", -wide, top, wide, top, 0, tip)
        if rng.random() < 0.5:
            b.over(patterns.any_colour(rng), "oval", 0, tip, 0.17, 0.17)
    else:
        b.over(fill, "box", -1.3 * wide, top - 0.16, 1.3 * wide, top)
        b.over(fill, "box", -0.8 * wide, tip + 0.1, 0.8 * wide, top)


def _feelers(b: Recorder, rng: random.Random, w: float, h: float) -> None:
    fill, out, top = patterns.any_colour(rng), rng.uniform(0.2, 0.8) * w, 0.2 - h
    tip, kind = top - rng.uniform(0.35, 0.6), rng.random()
    for side in (-1, 1):
        x = side * out
        if kind < 0.4:
            b.under(fill, "poly", x - 0.2, top, x + 0.2, top, 1.2 * x, tip)
        elif kind < 0.7:
            b.under(fill, "oval", x, top - 0.1, 0.24, 0.4)
        else:
            b.under(images.DARK, "poly", x - 0.06, top, x + 0.06, top, 1.3 * x, tip)
            b.under(fill, "oval", 1.3 * x, tip, 0.14, 0.14)


def _feet(b: Recorder, rng: random.Random, w: float, h: float) -> None:
    fill, count, low = patterns.any_colour(rng), rng.choice((1, 2, 2, 3)), 0.1 + h
    kind, hub = rng.random(), patterns.any_colour(rng)
    for i in range(count):
        x = (i - (count - 1) / 2) * 1.2 * w / max(1, count - 1)
        if kind < 0.35:
            b.under(fill, "oval", x, low, 0.32, 0.2)
        elif kind < 0.7:
            b.over(fill, "oval", x, low, 0.22, 0.22)
            b.over(hub, "oval", x, low, 0.1, 0.1)
        else:
            b.under(fill, "poly", x - 0.12, low - 0.3, x + 0.12, low - 0.3, x + 0.12, low + 0.3,
                    x - 0.12, low + 0.3)  # fmt: skip


def _arms(b: Recorder, rng: random.Random, w: float, h: float) -> None:
    fill, y, out = patterns.any_colour(rng), rng.uniform(-0.2, 0.4) * h, rng.uniform(0.25, 0.5)
    sides, kind = rng.choice(((-1, 1), (-1, 1), (1,), (-1,))), rng.random()
    for side in sides:
        if kind < 0.4:
            b.under(fill, "oval", side * w, y, out, 0.2)
        elif kind < 0.7:
            b.under(fill, "poly", side * 0.8 * w, y, side * (w + out), y - 0.35,
                    side * (w + out), y + 0.35)  # fmt: skip
        else:
            ends = sorted((side * 0.7 * w, side * (w + out)))
            b.under(fill, "poly", ends[0], y - 0.1, ends[1], y - 0.1, ends[1], y + 0.1,
                    ends[0], y + 0.1)  # fmt: skip


def _bands(b: Recorder, rng: random.Random, w: float, h: float) -> None:
    fill, count, half = patterns.any_colour(rng), rng.randint(1, 3), rng.uniform(0.06, 0.14)
    for i in range(count):
        y, wide = 0.1 + h * (0.1 + 0.5 * i / count) + half, w * rng.uniform(0.6, 0.85)
        b.over(fill, "poly", -wide, y - half, wide, y - half, wide, y + half, -wide, y + half)


def _patch(b: Recorder, rng: random.Random, w: float, h: float) -> None:
    fill, y, r = patterns.any_colour(rng), 0.1 + rng.uniform(-0.2, 0.4) * h, rng.uniform(0.2, 0.6)
    kind = rng.choice(("oval", "box", "star"))
    if kind == "oval":
        b.over(fill, "oval", 0, y, r * w, r * h)
    elif kind == "box":
        b.over(fill, "box", -r * w, y - r * h, r * w, y + r * h)
    else:
        corners = images._regular(5, r * w, 0.5 * r * w)
        b.over(fill, "poly", *(v + (y if i % 2 else 0) for i, v in enumerate(corners)))


PARTS: dict[Callable[..., None], float] = {
    _patch: 0.35, _bands: 0.3, _hat: 0.4, _feelers: 0.45, _feet: 0.7, _arms: 0.5, _mouth: 0.5,
    _eyes: 0.85,
}  # fmt: skip
"""Chance of each part, in the order of painting."""


def subject(rng: random.Random) -> Subject:
    """A creature of random parts, or a thing of the world, in any colours."""
    brush, colour = Recorder(), patterns.any_colour(rng)
    if rng.random() < 0.3:
        paint = rng.choice(list(images.THINGS))
        more = (rng.choice(images.BODIES), "odd") if paint == "monster" else ()
        images.THINGS[paint](brush, colour, rng, *more)
    else:
        w, h = _body(brush, rng)
        for part, chance in PARTS.items():
            if rng.random() < chance:
                part(brush, rng, w, h)
    texture = rng.choices(("plain", "striped", "spotted", "checked"), (60, 15, 15, 10))[0]
    return Subject(tuple(brush.shapes), colour, texture, patterns.any_colour(rng))


def hybrid(a: Subject, b: Subject, rng: random.Random) -> Subject:
    """One subject with another one's parts: what lies over it, under it, or its whole body."""
    taken = rng.choice((("over",), ("under",), ("body", "hole"), ("over", "under")))
    shapes = [s for s in a.shapes if s[0] not in taken] + [s for s in b.shapes if s[0] in taken]
    if "body" in taken or rng.random() < 0.3:
        a = replace(a, colour=b.colour, texture=b.texture, texture_colour=b.texture_colour)
    return replace(a, shapes=tuple(shapes))


def doubled(a: Subject, rng: random.Random) -> Subject:
    """The subject with a few of its shapes twice: a second face, a second hat."""
    layer = rng.choice(("over", "over", "under"))
    pool = [s for s in a.shapes if s[0] == layer] or list(a.shapes)
    dx, dy = rng.choice(((0, 0.5), (0, -0.5), (0.5, 0), (-0.5, 0), (0, 0.8), (0.4, 0.4)))
    twice = [(lay, fill, kind, _moved(kind, n, dx, dy)) for lay, fill, kind, n in pool]
    return replace(a, shapes=(*a.shapes, *twice))


def _moved(kind: str, numbers: tuple[float, ...], dx: float, dy: float) -> tuple[float, ...]:
    if kind == "oval":
        return (numbers[0] + dx, numbers[1] + dy, *numbers[2:])
    return tuple(v + (dy if i % 2 else dx) for i, v in enumerate(numbers))


def repainted(a: Subject, b: Subject, rng: random.Random) -> Subject:
    """Another subject's shapes in this one's colours."""
    fills = [fill for layer, fill, _, _ in a.shapes if layer in ("under", "over")] or [a.colour]
    shapes = [(lay, rng.choice(fills), kind, numbers) for lay, _, kind, numbers in b.shapes]
    return replace(a, shapes=tuple(shapes))


def lacking(a: Subject, rng: random.Random) -> Subject:
    """The subject without a part of its shapes."""
    layer = rng.choice(("over", "under"))
    return replace(a, shapes=tuple(s for s in a.shapes if s[0] != layer) or a.shapes[:1])


def mixed(a: Image.Image, b: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    """Two stickers, mixed as a half-learned subject is: each pixel is of one of them, by soft
    patches, or all of it is between the two. And its likeness to the first."""
    if rng.random() < 0.4:
        part = rng.uniform(0.2, 0.8)
        return Image.blend(a, b, part), max(0.1, 0.95 - 1.2 * part)
    side = rng.choice((2, 3, 4, 6))
    patches = Image.frombytes("L", (side, side), rng.randbytes(side * side))
    level = rng.uniform(60, 195)
    patches = patches.resize(a.size, Image.Resampling.BICUBIC)
    patches = patches.point(lambda v: min(255, max(0, round(128 + 4 * (v - level)))))
    out = Image.composite(a, b, patches)
    return out, likeness(a, out)


def _skin(a: Subject, side: int) -> Image.Image:
    skin = Image.new("RGB", (side, side), a.colour)
    if a.texture == "plain":
        return skin
    pencil, step = ImageDraw.Draw(skin), side // 10
    for i in range(11):
        for j in range(11) if a.texture != "striped" else (0,):
            x, y = j * step, i * step
            if a.texture == "striped":
                pencil.rectangle((0, y, side, y + step * 0.45), fill=a.texture_colour)
            elif a.texture == "checked" and (i + j) % 2:
                pencil.rectangle((x, y, x + step, y + step), fill=a.texture_colour)
            elif a.texture == "spotted":
                x += (i % 2) * step // 2
                pencil.ellipse((x, y, x + step * 0.55, y + step * 0.55), fill=a.texture_colour)
    return skin


def pose(a: Subject, rng: random.Random) -> Image.Image:
    """The subject on a transparent ground, RGBA (STICKER, STICKER); lightly moved and coloured."""
    big, jitter = 3 * STICKER, lambda amount: rng.uniform(-amount, amount)
    centre, radius = (big * (0.5 + jitter(0.01)), big * (0.5 + jitter(0.01))), 0.36 * big
    seed, angle = rng.getrandbits(32), jitter(5) if rng.random() < 0.5 else 0.0
    fills = {fill: images._jitter(fill, rng) for _, fill, _, _ in a.shapes}
    skin = _skin(replace(a, colour=images._jitter(a.colour, rng)), big)
    drawn = []
    for ground in ((0, 0, 0), (255, 255, 255)):
        canvas, shake = Image.new("RGB", (big, big), ground), random.Random(seed)
        brush = images.Brush(canvas, centre, radius)
        for layer, fill, kind, numbers in a.shapes:
            dx, dy = (shake.uniform(-0.025, 0.025) for _ in range(2))
            moved = _moved(kind, numbers, dx, dy)
            if layer in ("body", "hole"):
                getattr(brush, layer)(kind, *numbers)
            else:
                getattr(brush, layer)(fills[fill], kind, *moved)
        brush.finish(skin)
        drawn.append(canvas.rotate(angle, fillcolor=ground).reduce(3))
    on_black, on_white = (np.asarray(d, dtype=np.float32) for d in drawn)
    alpha = (255 - (on_white - on_black).mean(2)).clip(0, 255)
    rgb = (on_black * 255 / np.maximum(alpha, 1)[..., None]).clip(0, 255)
    return Image.fromarray(np.dstack([rgb, alpha]).round().astype(np.uint8), "RGBA")


def likeness(a: Image.Image, b: Image.Image) -> float:
    """Likeness of two stickers of one pose: of all pixels of either, the share that is the same,
    and half as much again of the share above three quarters, so that small defects count."""
    x, y = (np.asarray(i, dtype=np.int16) for i in (a, b))
    either = (x[..., 3] > 127) | (y[..., 3] > 127)
    same = (np.abs(x - y).max(2) < 40) & either
    share = float(same.sum() / max(1, either.sum()))
    return 0.5 * share + 0.5 * max(0.0, 1 - 4 * (1 - share))


# ---------------------------------------------------------------------------------------------
# Damages: a function of a sticker, or of a whole image, and random numbers returns it with its
# likeness to the subject. The levels are those that a reader gave to damages of these kinds.
# ---------------------------------------------------------------------------------------------


def _upside_down(image: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    turns = (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180)
    return image.transpose(rng.choice(turns)), 0.3


def _quarter_turn(image: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270)
    return image.transpose(rng.choice(turns)), 0.3


def _colours(image: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    kind, rgb = rng.random(), image.convert("RGB")
    if kind < 0.55:
        angle = rng.uniform(40, 215)
        h, s, v = rgb.convert("HSV").split()
        h = h.point(lambda value: (value + round(angle)) % 256)
        out, level = Image.merge("HSV", (h, s, v)).convert("RGB"), 0.35
    elif kind < 0.75:
        out, level = Image.merge("RGB", rng.sample(rgb.split(), 3)), 0.35
    elif kind < 0.9:
        out, level = ImageOps.grayscale(rgb).convert("RGB"), 0.35
    else:
        out, level = ImageChops.invert(rgb), 0.2
    if image.mode == "RGBA":
        out.putalpha(image.getchannel("A"))
    return out, level


def _tiles(image: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    side = rng.choice((8, 16, 16, 32))
    corners = [(x, y) for y in range(0, 64, side) for x in range(0, 64, side)]
    out = image.copy()
    for (x, y), (u, v) in zip(corners, rng.sample(corners, len(corners)), strict=True):
        out.paste(image.crop((u, v, u + side, v + side)), (x, y))
    return out, {8: 0.0, 16: 0.1, 32: 0.2}[side]


def _noise(image: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    draw, sigma = np.random.default_rng(rng.getrandbits(32)), rng.uniform(0.06, 0.5)
    pixels = np.asarray(image, dtype=np.float32)
    if rng.random() < 0.2:
        hit = draw.random(pixels.shape[:2]) < sigma
        pixels = np.where(hit[..., None], draw.choice([0.0, 255.0], hit.shape)[..., None], pixels)
    else:
        pixels = pixels + 255 * sigma * draw.standard_normal(pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), max(0.05, 0.85 - 1.7 * sigma)


def _blur(image: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    radius = rng.uniform(1, 6)
    return image.filter(ImageFilter.GaussianBlur(radius)), max(0.1, 0.9 - 0.2 * radius)


def _smeared(image: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    side, far = rng.choice((4, 6, 8)), rng.uniform(1.5, 8)  # pixels
    draw = np.random.default_rng(rng.getrandbits(32))
    moves = []
    for _ in range(2):
        coarse = Image.fromarray(draw.standard_normal((side, side)).astype(np.float32))
        moves.append(far * np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC)))
    y, x = np.mgrid[0:64, 0:64] + np.round(moves).astype(int)
    pixels = np.asarray(image)[y.clip(0, 63), x.clip(0, 63)]
    soft = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.7))
    return soft, max(0.1, 0.9 - 0.09 * far)


def _stretched(image: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    factor = rng.uniform(1.5, 2.2)
    box = (0, 32 - 32 / factor, 64, 32 + 32 / factor)
    if rng.random() < 0.5:
        box = (box[1], box[0], box[3], box[2])
    return image.resize((64, 64), Image.Resampling.BILINEAR, box), 0.5


def _copied_part(image: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    w, h = rng.randint(12, 30), rng.randint(12, 30)
    (x, u), (y, v) = ([rng.randint(4, 60 - side) for _ in range(2)] for side in (w, h))
    out = image.copy()
    out.paste(image.crop((x, y, x + w, y + h)), (u, v))
    return out, 0.5


OF_STICKERS = {_upside_down: 3, _quarter_turn: 1, _colours: 3}
"""Damages that may change a subject little, a ball turned or a grey thing: its sticker is damaged,
and its likeness is at least that of the two stickers."""

OF_IMAGES = {_tiles: 3, _noise: 3, _blur: 2, _smeared: 3, _stretched: 1, _copied_part: 1}


def spoilt_sticker(sticker: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    """A sticker damaged in one way, and its likeness to the subject."""
    out, level = rng.choices(list(OF_STICKERS), list(OF_STICKERS.values()))[0](sticker, rng)
    return out, max(level, likeness(sticker, out))


def spoilt(image: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    """An image (64, 64), damaged in one way, and its likeness to the subject that it showed."""
    return rng.choices(list(OF_IMAGES), list(OF_IMAGES.values()))[0](image, rng)


def ground(rng: random.Random) -> tuple[Image.Image, int]:
    """A background (64, 64), and its number in images.BACKGROUNDS; -100 for one without a name."""
    kind, number = rng.random(), rng.randrange(len(images.BACKGROUNDS))
    if kind < 0.6:
        name = images.BACKGROUNDS[number]
        return images._background(name, (256, 256), rng).reduce(4), number
    if kind < 0.88:
        return Image.new("RGB", (64, 64), patterns.any_colour(rng)), -100
    return patterns.ground(rng).reduce(4), -100


def compose(
    sticker: Image.Image, back: Image.Image, rng: random.Random
) -> tuple[Image.Image, Image.Image]:
    """A sticker on a background, at any place, 16 to 64 pixels long, and seldom cut off; and its
    mask, L."""
    box = sticker.getchannel("A").point(lambda v: 255 * (v > 60)).getbbox() or (0, 0, 8, 8)
    longest = max(box[2] - box[0], box[3] - box[1])
    wanted = rng.uniform(16, 64)
    size = [max(4, round(edge * wanted / longest)) for edge in (box[2] - box[0], box[3] - box[1])]
    small = sticker.resize((size[0], size[1]), Image.Resampling.HAMMING, box)
    slack = 0.12 * wanted if rng.random() < 0.15 else 0
    place = [round(rng.uniform(-slack, 64 - edge + slack)) for edge in size]
    out, mask = back.copy(), Image.new("L", back.size)
    for canvas, ink in ((out, small), (mask, small.getchannel("A"))):
        canvas.paste(ink, (place[0], place[1]), small)
    return out, mask


def lightly(image: Image.Image, rng: random.Random) -> Image.Image:
    """An image as a decoder gives it back: a little softer, off in colour and grainy."""
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    if rng.random() < 0.6:
        gains = [rng.uniform(0.93, 1.07) for _ in range(3)]
        image = Image.merge(
            "RGB",
            [c.point(lambda v, g=g: v * g) for c, g in zip(image.split(), gains, strict=True)],
        )
    if rng.random() < 0.3:
        draw = np.random.default_rng(rng.getrandbits(32))
        pixels = np.asarray(image, dtype=np.float32) + draw.normal(0, 5, (64, 64, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image


# ---------------------------------------------------------------------------------------------
# Styles
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """A way to draw, the same for every scene: paper, lines, and how colours are laid."""

    paper: RGB | None
    line: RGB
    width: int
    paint: str
    number: float
    a: RGB
    b: RGB


PAINTS = ("plain", "duotone", "posterised", "pixels", "soft", "grain", "hatched", "turned", "pale")


def style(rng: random.Random) -> Style:
    paint = rng.choice(PAINTS)
    return Style(
        paper=patterns.any_colour(rng) if rng.random() < 0.6 else None,
        line=(16, 16, 20) if rng.random() < 0.6 else patterns.any_colour(rng),
        width=rng.choice((0, 2, 4, 8, 12)) if paint != "plain" else rng.choice((2, 6, 10)),
        paint=paint,
        number=rng.random(),
        a=patterns.any_colour(rng),
        b=patterns.any_colour(rng),
    )


def in_style(scene: images.Scene, way: Style, rng: random.Random) -> Image.Image:
    """A scene drawn in a style, RGB (64, 64)."""
    scene = replace(scene, style="", background=way.paper or scene.background)
    big = images.draw_large(scene)
    edges = images._outlines(big, way.width) if way.width else None
    big = _laid(big, way, rng)
    if edges:
        big.paste(way.line, (0, 0), edges)
    return big.reduce(images.OVERSAMPLING)


def _laid(image: Image.Image, way: Style, rng: random.Random) -> Image.Image:
    """The large image with its colours laid as the style does."""
    n, side = way.number, image.width
    if way.paint == "duotone":
        return ImageOps.colorize(ImageOps.grayscale(image), way.a, way.b)
    if way.paint == "posterised":
        return ImageOps.posterize(image, 1 + round(n))
    if way.paint == "pixels":
        small = image.reduce(8 + 4 * round(3 * n))
        return small.resize((side, side), Image.Resampling.NEAREST)
    if way.paint == "soft":
        return image.filter(ImageFilter.GaussianBlur(4 + 8 * n))
    if way.paint == "grain":
        size = side // (2 + round(6 * n))
        grain = Image.frombytes("L", (size, size), rng.randbytes(size * size)).resize((side, side))
        return Image.composite(image, Image.new("RGB", image.size, way.a), grain.point(
            lambda v: min(255, 90 + v)))  # fmt: skip
    if way.paint == "hatched":
        lines, gap = image.copy(), 12 + round(16 * n)
        pencil = ImageDraw.Draw(lines)
        for x in range(-side, 2 * side, gap):
            pencil.line((x, 0, x + side * round(2 * n - 1), side), fill=way.a, width=gap // 4)
        return lines
    if way.paint == "turned":
        h, s, v = image.convert("HSV").split()
        h = h.point(lambda value: (value + 40 + round(150 * n)) % 256)
        return Image.merge("HSV", (h, s, v)).convert("RGB")
    if way.paint == "pale":
        return Image.blend(image, Image.new("RGB", image.size, way.a), 0.3 + 0.4 * n)
    return image
