"""Draw the images of docs/first-lora.md: a run that went well, and three that did not.

python dev/draw_first_lora.py FOLDER   # keeps its runs in FOLDER: four, some minutes each
"""

import sys
from pathlib import Path
from typing import Any

from PIL import Image

from sd_lora import demo
from sd_lora.formats.adapter_files import load_adapter
from sd_lora.models.load import load_parts
from sd_lora.report.sheets import Sheet, write_image
from sd_lora.terminal import Terminal
from sd_lora.training.loop import train

DOCS = Path(__file__).parent.parent / "docs"
SIDE = 112
"""Pixels of a shown image's side; the base draws 64."""

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "right": ("as in the tutorial", {}),
    "few": ("too short: 60 steps", {"max_train_steps": 60}),
    "fast": (
        "too fast: ten times the learning rates, 200 steps",
        {"learning_rate": 2e-2, "text_encoder_lr": 4e-3, "max_train_steps": 200},
    ),
    "alone": (
        "without class images: 300 steps",
        {
            "sources": demo.demo_config(demo.find_sample_data(), "unused").sources[:1],
            "max_train_steps": 300,
        },
    ),
}
"""Name of a run → its label, and where it differs from the tutorial's."""


def drawn(lora: Path | None) -> list[Image.Image]:
    """Four images of the subject, two of its class and two others, by the embedded base, with a
    LoRA file or without."""
    parts = load_parts(str(demo.find_sample_data() / "tiny-sd"))
    if lora:
        load_adapter(parts.models, lora)
    found = demo.draw_sets(parts, 64, 4.0, 1)[0]
    return [*found.subject[:4], *found.of_class[:2], *found.unrelated[:2]]


def trained(folder: Path, changes: dict[str, Any]) -> Path:
    """The LoRA file of a run in a folder; an earlier run's is taken."""
    file = folder / "pytorch_lora_weights.safetensors"
    if not file.exists():
        config = demo.demo_config(demo.find_sample_data(), str(folder), **changes)
        with Terminal() as terminal:
            train(config, [terminal])
    return file


def main() -> int:
    """Train, draw, and write the images; returns the exit code."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    place, data = Path(sys.argv[1]), demo.find_sample_data()
    rows = {name: drawn(trained(place / name, changes)) for name, (_, changes) in RUNS.items()}
    columns = demo.columns(
        demo.demo_config(data, "first-lora"),
        ((demo.SUBJECT, 4), (demo.CLASS, 2), (demo.UNRELATED, 2)),
    )
    instances = sorted((data / "dreambooth" / "instance").glob("*.png"))
    good = [[Image.open(path) for path in instances[:8]], drawn(None), rows["right"]]
    labels = ["the images that were trained on", "before", "after 1200 steps"]
    bad = [name for name in RUNS if name != "right"]
    wrong = Sheet([rows[name] for name in bad], [RUNS[name][0] for name in bad], columns, SIDE)
    sheets = {"first_lora.png": Sheet(good, labels, columns, SIDE), "first_lora_wrong.png": wrong}
    for name, sheet in sheets.items():  # of 128 colours: a third of the bytes
        write_image(DOCS / name, sheet.draw().quantize(128))
    return 0


if __name__ == "__main__":
    sys.exit(main())
