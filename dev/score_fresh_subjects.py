"""Fidelity of spoilt subjects that nothing was chosen by: thirty, drawn anew by subjects.py.

    python dev/score_fresh_subjects.py [ENCODER]

For each kind of defect of tests/sampling/fakes.py it prints fidelity as parts of a real
rendition's: mean, tenth and ninetieth percentile over the subjects, and the share of subjects for
which it is where the calibration wants it. 0 is the mean of five other subjects, as the base's
images are in a score. A subject that a damage leaves nearly as it was (a ball upside down) is left
out of its row. With --write the figures go into the encoder's training.json. About a minute.
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import subjects
import torch
from PIL import Image

from sd_lora.sampling.features import Features, load_features
from sd_lora.sampling.judge import Scale, way
from sd_lora.sampling.score import Taught

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests.sampling import fakes  # noqa: E402

COUNT, POSES, OTHERS = 30, 6, 5
Images = list[Image.Image]

FAR = ("tiles", "noised", "blurred", "upside down", "recoloured", "doubled parts", "doubled head")
WANTED = dict.fromkeys(FAR, (0.0, 0.6)) | {
    "real": (0.85, 1.0),
    "small": (0.8, 9.0),
    "moved": (0.8, 9.0),
    "wrong background": (0.8, 9.0),
    "another subject": (0.0, 0.25),
}
"""Kind → fidelity from and to; of all but "real" as a part of the real rendition's."""


def cropped(sticker: Image.Image) -> Image.Image:
    return sticker.crop(sticker.getchannel("A").point(lambda v: 255 * (v > 60)).getbbox())


def placed(
    stickers: Images, longest: int, spread: float, places: tuple[str, ...] = fakes.PLACES
) -> Images:
    """Stickers `longest` pixels long on backgrounds, scattered by `spread`, from 0 to 1."""
    rng = random.Random(7)
    at = [(0.5 + rng.uniform(-spread, spread) / 2, 0.6 + 0.4 * spread * rng.uniform(-1, 1))
          for _ in places]  # fmt: skip
    return [
        fakes.pasted(cropped(stickers[i % POSES]), place, longest, at[i])
        for i, place in enumerate(places)
    ]


def two_heads(sticker: Image.Image) -> Image.Image:
    """The sticker with its upper half again over its lower half."""
    cut = cropped(sticker)
    box, half = sticker.getchannel("A").point(lambda v: 255 * (v > 60)).getbbox(), cut.height // 2
    head, out = cut.crop((0, 0, cut.width, half)), sticker.copy()
    out.paste(head, (box[0], box[1] + half - 4), head)
    return out


def sheets(number: int) -> dict[str, Images]:
    """Kind → six images of a subject; "held out" are the real ones to compare with."""
    shape = subjects.subject(random.Random(f"fresh {number}"))

    def poses(one: subjects.Subject, seed: str = "p") -> Images:
        return [subjects.pose(one, random.Random(f"{seed}{number}{k}")) for k in range(POSES)]

    stickers = poses(shape)
    real = placed(stickers, 44, 0.2)
    grounds = ("pink", "white", "grass", "night", "snow", "beach")
    out = {
        "held out": placed(poses(shape, "h"), 42, 0.4, grounds),
        "real": real,
        "small": placed(stickers, 20, 0.3),
        "moved": placed(stickers, 34, 1.0),
        "wrong background": placed(stickers, 44, 0.2, ("pink", "yellow", "grey") * 2),
    }
    out |= {kind: fakes.each(fakes.DAMAGES[kind], real) for kind in ("tiles", "noised", "blurred")}

    def unlike(spoilt: Image.Image, most: float) -> bool:
        return subjects.likeness(stickers[0], spoilt) < most

    hues = fakes.recoloured(stickers[0].convert("RGB"))
    hues.putalpha(stickers[0].getchannel("A"))
    for kind, spoilt in (("upside down", fakes.upside_down(stickers[0])), ("recoloured", hues)):
        if unlike(spoilt, 0.4):
            out[kind] = fakes.each(fakes.DAMAGES[kind], real)
    over = [s for s in shape.shapes if s[0] == "over"]
    again = [(*s[:3], subjects._moved(*s[2:], 0, 0.5)) for s in over]
    for kind, twice, most in (
        ("doubled parts", poses(replace(shape, shapes=(*shape.shapes, *again))), 0.7),
        ("doubled head", [two_heads(s) for s in stickers], 0.5),
    ):
        if unlike(twice[0], most):
            out[kind] = placed(twice, 44, 0.2)
    return out


def figures(features: Features) -> dict[str, dict[str, float]]:
    """Kind → mean, percentiles, share of subjects where it is as wanted, and their number."""
    drawn, found = [sheets(i) for i in range(COUNT)], {kind: [] for kind in WANTED}
    for i, own in enumerate(drawn):
        scale = Scale(features, Taught(own["held out"]))
        others = [drawn[(i + k) % COUNT]["real"] for k in range(1, OTHERS + 2)]
        start = torch.stack([scale.nearness(other).mean() for other in others[1:]]).mean()
        fidelity = {
            kind: float(way(start, scale.nearness(images), scale.level).mean())
            for kind, images in (own | {"another subject": others[0]}).items()
        }
        for kind in WANTED.keys() & fidelity.keys():
            found[kind].append(fidelity[kind] / (1 if kind == "real" else fidelity["real"]))
    out = {}
    for kind, (low, high) in WANTED.items():
        values = np.array(found[kind])
        out[kind] = {
            "mean": values.mean(),
            "10 %": np.quantile(values, 0.1),
            "90 %": np.quantile(values, 0.9),
            "as wanted": ((values >= low) & (values <= high)).mean(),
            "subjects": len(values),
        }
    return {kind: {k: round(float(v), 2) for k, v in row.items()} for kind, row in out.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("encoder", nargs="?", type=Path, default=ROOT / "sample_data" / "encoder")
    p.add_argument("--write", action="store_true", help="keep the figures in training.json")
    args = p.parse_args()
    torch.set_num_threads(1)
    table = figures(load_features(args.encoder))
    for kind, row in table.items():
        print(f"{kind:18}", *(f"{name} {value:g}".ljust(16) for name, value in row.items()))
    if args.write:
        record = args.encoder / "training.json"
        kept = json.loads(record.read_text()) | {"fresh subjects": table}
        record.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
