"""Draw the sheets of the score's calibration as pages without names, for a reader to mark by eye.

    python dev/draw_calibration.py OUT

Each page has the real subject above, then numbered rows in a random order; OUT/names.json says
which row is which sheet, and is opened after the marks are written. The marks stand in
tests/sampling/sheets/marks.json.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.sampling import fakes

CELL, LEFT = 96, 40


def page(
    real: list[Image.Image], sheets: dict[str, list[Image.Image]], order: list[str]
) -> Image.Image:
    """Real images, then numbered rows."""
    rows = [real, *(sheets[name] for name in order)]
    wide = max(len(row) for row in rows)
    out = Image.new("RGB", (LEFT + wide * (CELL + 4), len(rows) * (CELL + 8)), "white")
    for y, row in enumerate(rows):
        top = y * (CELL + 8)
        ImageDraw.Draw(out).text((4, top + 40), str(y or "real"), "black", font_size=18)
        for x, image in enumerate(row):
            big = image.resize((CELL, CELL), Image.Resampling.NEAREST)
            out.paste(big, (LEFT + x * (CELL + 4), top))
    return out


def main() -> None:
    out, names = Path(sys.argv[1]), {}
    out.mkdir(parents=True, exist_ok=True)
    real = {
        "mascot": fakes.opened(fakes.ROOT / "sample_data" / "dreambooth" / "holdout"),
        "robot": fakes.opened(fakes.SHEETS / "robot-held-out"),
    }
    pages = {f"fidelity-{k}": (real[k], v) for k, v in fakes.fidelity_sheets().items()}
    pages |= {f"leak-{k}": (real["mascot"], v) for k, v in fakes.leak_sheets().items()}
    for name, (above, sheets) in pages.items():
        order = sorted(sheets)
        random.Random(name).shuffle(order)
        names[name] = order
        page(above[:6], sheets, order).save(out / f"{name}.png")
    (out / "names.json").write_text(json.dumps(names, indent=1) + "\n")


if __name__ == "__main__":
    main()
