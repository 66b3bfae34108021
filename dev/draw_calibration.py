"""Draw the sheets of the score's calibration as pages without names, for a reader to mark by eye.

    python dev/draw_calibration.py OUT

Each page has the real subject above, then numbered rows in a random order; OUT/names.json says
which sheet a row is, and is opened after the marks are written. The marks stand in
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
ROWS = 9
"""Rows a page at most: a page is seen whole."""


def page(real: list[Image.Image], sheets: list[list[Image.Image]], first: int) -> Image.Image:
    """Real images, then rows numbered from `first`."""
    rows = [real, *sheets]
    wide = max(len(row) for row in rows)
    out = Image.new("RGB", (LEFT + wide * (CELL + 4), len(rows) * (CELL + 8)), "white")
    for y, row in enumerate(rows):
        top = y * (CELL + 8)
        number = str(first + y - 1) if y else "real"
        ImageDraw.Draw(out).text((4, top + 40), number, "black", font_size=18)
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
        for i in range(0, len(order), ROWS):
            rows = [sheets[row] for row in order[i : i + ROWS]]
            page(above[:6], rows, i + 1).save(out / f"{name}-{i // ROWS + 1}.png")
    (out / "names.json").write_text(json.dumps(names, indent=1) + "\n")


if __name__ == "__main__":
    main()
