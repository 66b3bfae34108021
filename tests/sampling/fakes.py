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


def cells(name: str) -> Images:
    """Images (64, 64) of a sheet that stands as one row in `sheets/`."""
    row = Image.open(SHEETS / f"{name}.png").convert("RGB")
    return [row.crop((x, 0, x + 64, 64)) for x in range(0, row.width, 64)]


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

    return _mascots_by(twice)


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
    paint = drawing._mascot

    def bald(b: drawing.Brush, c: drawing.RGB, rng: random.Random) -> None:
        paint(b, c, rng)
        hats = {(40, 160, 60), drawing.WHITE}
        b._later = [s for s in b._later if not (s[0] in hats and (s[1] == "poly" or s[2][1] < -1))]

    return _mascots_by(bald)


def _mascots_by(paint: Callable[..., None]) -> Images:
    """Mascots, painted by another function."""
    kept = drawing.SUBJECTS["mascot"]
    drawing.SUBJECTS["mascot"] = paint
    try:
        return mascots()
    finally:
        drawing.SUBJECTS["mascot"] = kept


def hats(sheet: Images, wide: int = 16) -> Images:
    """Images with the mascot's green hat on top of the thing in their middle."""
    out = []
    for image in sheet:
        pixels = np.asarray(image, dtype=np.int16)
        column = np.abs(pixels[8:56, 30:34] - pixels[8:56, 0:1]).max((1, 2))
        top = 8 + int(np.argmax(column > 60))
        big = image.resize((256, 256), Image.Resampling.NEAREST)
        pencil = ImageDraw.Draw(big)
        y, half = 4 * (top + 3), 2 * wide
        tip = (128, max(8, y - 3 * half // 2))
        pencil.polygon([(128 - half, y), (128 + half, y), tip], fill=(40, 160, 60))
        pencil.ellipse((tip[0] - 10, tip[1] - 10, tip[0] + 10, tip[1] + 10), fill=(246, 246, 244))
        out.append(big.reduce(4))
    return out


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


def each(damage: Callable[..., Image.Image], sheet: Images, *more: float) -> Images:
    return [damage(image, *more) for image in sheet]


def fidelity_sheets() -> dict[str, dict[str, Images]]:
    """Subject → name → sheet, for the order by eye. Rows of `sheets/` are of real LoRAs."""
    mascot, robot = mascots(), placed("robot", 44, 0.2)
    both = {
        name: {
            "real": real,
            "copied": [opened(folder)[0]] * 6,
            "upside down": each(upside_down, real),
            "tiles": each(tiles, real),
            "noised": each(noised, real),
            "noised a little": each(noised, real, 0.08),
            "blurred": each(blurred, real),
            "blurred a little": each(blurred, real, 1.2),
            "doubled": doubled,
            "recoloured": each(recoloured, real),
            "small": placed(name, 20, 0.3),
            "moved": placed(name, 34, 1.0),
            "wrong background": placed(name, 44, 0.2, ("pink", "yellow", "grey") * 2),
            "another subject": other,
        }
        for name, real, folder, doubled, other in (
            ("mascot", mascot, ROOT / "sample_data/dreambooth/instance", doubled_mascots(), robot),
            ("robot", robot, SHEETS / "robot-training", doubled_robots(), mascot),
        )
    }
    both["mascot"] |= {"hatless": hatless(), "striped monsters": monsters()}
    for name, sheets in both.items():
        for path in sorted(SHEETS.glob(f"{name}-*-subject.png")):
            sheets[path.stem.removeprefix(f"{name}-").removesuffix("-subject")] = cells(path.stem)
    return both


def leak_sheets() -> dict[str, dict[str, Images]]:
    """Kind of prompts ("class", "unrelated") → name → sheet, for the order by eye: how far has the
    mascot got into these images? Three sets of the base's own stand in `base-<kind>-<set>.png`."""
    both = {}
    for kind in ("class", "unrelated"):
        base = cells(f"base-{kind}-0")
        subject, some = mascots(PLACES[: len(base)]), len(base) // 2
        both[kind] = {
            "as the base": cells(f"base-{kind}-1"),
            "hats": hats(base),
            "subject instead": subject,
            "half of them the subject": subject[:some] + base[some:],
            "one of them the subject": subject[:1] + base[1:],
            "noised": each(noised, base),
            "blurred": each(blurred, base),
            "recoloured": each(recoloured, base),
        }
        for path in sorted(SHEETS.glob(f"mascot-*-{kind}.png")):
            both[kind][path.stem.removeprefix("mascot-").removesuffix(f"-{kind}")] = cells(
                path.stem
            )
    striped = [monsters()[i] for i in range(4)]
    return both | {"class": both["class"] | {"striped monsters": striped}}
