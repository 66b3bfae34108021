"""Draw the images of docs/first-lora.md: a run that went well, and three that did not.

python dev/draw_first_lora.py FOLDER   # keeps its runs in FOLDER: four, some minutes each
"""

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sd_lora import demo
from sd_lora.formats.adapter_files import load_adapter
from sd_lora.models.load import load_parts
from sd_lora.report.sheets import grid, write_image
from sd_lora.sampling.sampler import sample
from sd_lora.terminal import Terminal
from sd_lora.training.loop import train

DOCS = Path(__file__).parent.parent / "docs"
SIDE = 96
"""Pixels of a shown image's side; the base draws 64."""

PROMPTS = (*demo.SUBJECT[:4], demo.CLASS[0], demo.CLASS[1], *demo.UNRELATED[:2])

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
            "with_prior_preservation": False,
            "class_data_dir": None,
            "class_prompt": None,
            "num_class_images": 100,
            "max_train_steps": 300,
        },
    ),
}
"""Name of a run → its label, and where it differs from the tutorial's."""


def drawn(lora: Path | None) -> list[Image.Image]:
    """Images of all prompts by the embedded base, with a LoRA file or without."""
    parts = load_parts(str(demo.find_sample_data() / "tiny-sd"))
    if lora:
        load_adapter(parts.models, lora)
    images = sample(
        parts, parts.caption_encoder(), PROMPTS, range(len(PROMPTS)),
        resolution=64, device=torch.device("cpu"), steps=20, guidance_scale=4.0,
    )  # fmt: skip
    return list(images)


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
    place = Path(sys.argv[1])
    rows = {name: drawn(trained(place / name, changes)) for name, (_, changes) in RUNS.items()}
    instances = sorted((demo.find_sample_data() / "dreambooth" / "instance").glob("*.png"))
    good = [[Image.open(path) for path in instances[:8]], drawn(None), rows["right"]]
    labels = ["the images that were trained on", "before", "after 1200 steps"]
    write_image(DOCS / "first_lora.png", grid(good, labels, list(PROMPTS), side=SIDE))
    bad = [name for name in RUNS if name != "right"]
    labels = [RUNS[name][0] for name in bad]
    sheet = grid([rows[name] for name in bad], labels, list(PROMPTS), side=SIDE)
    write_image(DOCS / "first_lora_wrong.png", sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
