"""The trainings of the bench of learning (learning.py): their names, their lines, their images."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from taught import Lesson

from sd_lora.models.load import Parts, load_parts
from sd_lora.sampling.sampler import sample
from sd_lora.sampling.score import PromptImages, Prompts, sets_of

SAMPLE_DATA = Path(__file__).parent.parent / "sample_data"
BASE = SAMPLE_DATA / "tiny-sd"
GUIDANCE, SAMPLER_STEPS, SETS = 4.0, 20, 3
SIDE = 64
"""Pixels of an image's side."""


@dataclass(frozen=True)
class Cell:
    """One training. steps: in place of the row's, where given."""

    row: str
    lesson: str
    images: int
    seed: int
    steps: int | None = None

    @property
    def name(self) -> str:
        length = f", {self.steps} steps" if self.steps else ""
        return f"{self.row}, {self.lesson}, {self.images} images, seed {self.seed}{length}"


def cell_of(line: dict[str, Any]) -> Cell:
    """The cell of a line."""
    return Cell(*(line.get(name) for name in Cell.__dataclass_fields__))  # type: ignore[arg-type]


def done_cells(out: Path) -> list[dict[str, Any]]:
    """The lines of finished cells; the last one may be torn by a kill."""
    path = out / "cells.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def draw_sets(parts: Parts, prompts: Prompts) -> list[PromptImages]:
    """SETS sets of images of all prompts, each image with a seed of its own."""

    def images(texts: Sequence[str], first: int) -> Iterator[Image.Image]:
        return sample(
            parts, parts.caption_encoder(), texts, range(first, first + len(texts)),
            size=(SIDE, SIDE), device=torch.device("cpu"), steps=SAMPLER_STEPS,
            guidance_scale=GUIDANCE,
        )  # fmt: skip

    return sets_of(prompts, images, SETS)


def stored_sets(out: Path, lesson: Lesson) -> list[PromptImages]:
    """The base's own images of a lesson's prompts, drawn once."""
    path = out / "base" / f"{lesson.name}.png"
    if not path.is_file():
        keep_images(path, draw_sets(load_parts(str(BASE)), lesson.prompts))
    return kept_images(path, lesson.prompts)


def keep_images(path: Path, sets: Sequence[PromptImages]) -> None:
    """Write the images of all sets side by side into one file, a set a line."""
    rows = [[*one.subject, *one.of_class, *one.unrelated] for one in sets]
    whole = Image.new("RGB", (SIDE * len(rows[0]), SIDE * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            whole.paste(image, (SIDE * x, SIDE * y))
    path.parent.mkdir(parents=True, exist_ok=True)
    # several processes may write the same images; none reads half a file
    part = path.with_suffix(f".{time.time_ns()}.png")
    whole.save(part)
    part.replace(path)


def kept_images(path: Path, prompts: Prompts) -> list[PromptImages]:
    """The images that `keep_images` wrote."""
    with Image.open(path) as file:
        whole = file.convert("RGB")
    a, b = len(prompts.subject), len(prompts.subject) + len(prompts.of_class)
    sets = []
    for y in range(0, whole.height, SIDE):
        row = [whole.crop((x, y, x + SIDE, y + SIDE)) for x in range(0, whole.width, SIDE)]
        sets.append(PromptImages(row[:a], row[a:b], row[b:]))
    return sets
