"""Draw everything under sample_data but the model and the configurations, the same every time.

python dev/draw_sample_data.py           # write the images
python dev/draw_sample_data.py --check   # compare with what is there
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from images import BODIES, COLOURS, LEADS, Scene, caption, draw, mascot, place, snail
from PIL import Image

ROOT = Path(__file__).parent.parent / "sample_data"

INSTANCE = (
    ("white", "big", "centre"),
    ("grass", "big", "left"),
    ("night", "big", "centre"),
    ("snow", "medium", "right"),
    ("blue", "medium", "centre"),
    ("beach", "big", "right"),
    ("yellow", "medium", "left"),
    ("grey", "big", "centre"),
)
HOLDOUT = (
    ("pink", "big", "centre"),
    ("white", "medium", "left"),
    ("grass", "medium", "right"),
    ("night", "medium", "left"),
    ("snow", "big", "centre"),
    ("beach", "medium", "centre"),
    ("blue", "big", "right"),
    ("black", "big", "centre"),
)
WITHOUT_LOOKS: dict[str, Any] = {
    "colour": (0, 0, 0), "texture": "plain", "body": "", "size": "medium"
}  # fmt: skip
"""Changes of a scene whose caption says nothing of its looks."""
SNAIL_PLACES = ("white", "grass", "night", "snow", "beach", "yellow", "grey", "pink", "black")
SNAIL_SIZES = ((64, 64),) * 5 + ((96, 64), (64, 96))


def monsters(count: int) -> list[Scene]:
    """Returns monsters that are not the mascot, each one different."""
    rng = random.Random(7)
    backgrounds = ("white", "grass", "night", "snow", "grey", "beach", "yellow", "blue")
    scenes = []
    for i in range(count):
        background = backgrounds[i % len(backgrounds)]
        taken = {background, {"grass": "green", "beach": "yellow", "night": "blue"}.get(background)}
        colours = [name for name in COLOURS if name not in taken]
        scenes.append(
            Scene(
                "monster",
                colours[i % len(colours)],
                ("plain", "striped", "spotted")[i % 3],
                rng.choice(("white", "black")),
                rng.choice(("medium", "big")),
                "centre",
                background,
                BODIES[(i // 3) % 3],
                seed=i,
            )
        )
    return scenes


def row(file_name: str, text: str) -> str:
    """A line of metadata.jsonl."""
    return json.dumps({"file_name": file_name, "text": text})


def everything() -> dict[str, Image.Image | str]:
    """Returns path below sample_data → image or text."""
    files: dict[str, Image.Image | str] = {}
    captions: dict[str, list[str]] = {"instance": [], "class": []}
    for name, places in (("instance", INSTANCE), ("holdout", HOLDOUT)):
        for i, (background, size, position) in enumerate(places):
            scene = mascot(background, size, position, seed=100 * (name == "holdout") + i)
            files[f"dreambooth/{name}/{i:02}-{background}.png"] = draw(scene)
            if name in captions:
                text = f"{LEADS[0]} a sks monster {place(scene)}"
                captions[name].append(row(f"{i:02}-{background}.png", text))
    for i, scene in enumerate(monsters(24)):
        files[f"dreambooth/class/{i:02}-{scene.colour}.png"] = draw(scene)
        # a third each with all that it shows, its place, and nothing: where all captions name a
        # colour, the class by its word alone becomes the subject
        said = caption(scene if i < 8 else replace(scene, **WITHOUT_LOOKS))
        if i >= 16:
            said = said.replace(f" {place(scene)}", "")
        captions["class"].append(row(f"{i:02}-{scene.colour}.png", said))
    for name, lines in captions.items():
        files[f"dreambooth/{name}.jsonl"] = "\n".join(lines) + "\n"
    rows = []
    for i in range(28):
        width, height = SNAIL_SIZES[i % len(SNAIL_SIZES)]
        plain = snail(SNAIL_PLACES[i % len(SNAIL_PLACES)], seed=i, width=width, height=height)
        scene = replace(
            plain,
            # no two look the same: their hashes differ in 12 of 64 bits or more, by search
            size=("medium", "big", "small")[(i + i // 9) % 3],
            position=("centre", "right", "left")[(i + i // 5) % 3],
        )
        name = f"{i:02}-{scene.background}.png"
        files[f"captioned/{name}"] = draw(scene)
        rows.append(row(name, caption(plain, name="sks snail")))
    files["captioned/metadata.jsonl"] = "\n".join(rows) + "\n"
    return files


def is_same(path: Path, content: Image.Image | str) -> bool:
    """Whether a file holds this text, or this image pixel for pixel."""
    if not path.is_file():
        return False
    if isinstance(content, str):
        return path.read_text(encoding="utf-8") == content
    with Image.open(path) as image:
        return np.array_equal(np.asarray(image), np.asarray(content))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; 1 if anything differs")
    args = parser.parse_args()
    differing = [
        name for name, content in everything().items() if not is_same(ROOT / name, content)
    ]
    if args.check:
        print("\n".join(f"differs: sample_data/{name}" for name in differing) or "all the same")
        return 1 if differing else 0
    for name, content in everything().items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            content.save(path, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
