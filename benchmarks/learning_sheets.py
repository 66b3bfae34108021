"""Images of the bench of learning (learning.py): a sheet of each training, and pictures of some."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import (
    BASE,
    GUIDANCE,
    SAMPLER_STEPS,
    SIDE,
    Cell,
    cell_of,
    done_cells,
    kept_images,
    stored_sets,
)
from PIL import Image
from taught import LESSONS, Lesson

from sd_lora.report.sheets import Sheet
from sd_lora.sampling.interval import Interval
from sd_lora.sampling.parameters import Parameters
from sd_lora.sampling.score import PromptImages


def write_sheet(
    path: Path,
    lesson: Lesson,
    trained: Sequence[Image.Image],
    before: PromptImages,
    after: Sequence[PromptImages],
) -> None:
    """Training images; the base's images; the LoRA's of each set of seeds."""

    def row(images: PromptImages) -> list[Image.Image]:
        return [*images.subject, *images.of_class[:3], *images.unrelated[:3]]

    prompts = lesson.prompts
    shown = (*prompts.subject, *prompts.of_class[:3], *prompts.unrelated[:3])
    columns = [
        Parameters(text, i, SAMPLER_STEPS, GUIDANCE, (SIDE, SIDE), str(BASE), lesson.name, 0)
        for i, text in enumerate(shown)
    ]
    real: list[Image.Image | None] = [*trained[: len(shown)]]
    real += [None] * (len(shown) - len(real))
    rows = [real, row(before), *(row(images) for images in after)]
    labels = ["trained on", "the base", *(f"LoRA, seeds {1000 * i} …" for i in range(len(after)))]
    path.parent.mkdir(parents=True, exist_ok=True)
    Sheet(rows, labels, columns, side=96).write(path)


def shown_of(whole: Any, others: bool) -> list[Any]:
    """The subject's images or prompts of a set, and some of the class and of other things."""
    return (
        [*whole.subject, *whole.of_class[:3], *whole.unrelated[:3]] if others else [*whole.subject]
    )


SHOWN_AS = {
    "600 steps, no text encoder": "one of the class images beside each",
    "600 steps, class preserved, drawn in 2": "--output_preservation class, no class images",
    "recipe": "attention, feed-forward and convolutions, rank 16",
    "attention": "attention alone, rank 79, as many parameters",
}
"""Row → its words in a picture, for readers who do not know the table."""


def write_picture(args: argparse.Namespace) -> None:
    """Images of the first set of the first seed, of some rows and lessons."""
    cells = {cell_of(line): line for line in done_cells(args.out)}
    rows: list[list[Image.Image | None]] = []
    labels, columns = [], []
    for name in args.lessons:
        lesson, seed, images = LESSONS[name], args.seeds[0], args.images[0]
        texts = shown_of(lesson.prompts, args.all)
        real = [image for image, _ in lesson.images(images)][: len(texts)]
        rows.append([*real, *[None] * (len(texts) - len(real))])
        labels.append(f"{name}: {len(real)} of the {images} images that were trained on")
        if args.all:
            rows.append(shown_of(stored_sets(args.out, lesson)[0], args.all))
            labels.append("the base")
        for row in args.rows:
            cell = Cell(row, name, images, seed, args.steps)
            if cell not in cells:
                raise SystemExit(f"{cell.name} is not done: run it first")
            kept = args.out / "images" / f"{cell.name}.png"
            rows.append(shown_of(kept_images(kept, lesson.prompts)[0], args.all))
            found = Interval(tuple(cells[cell]["score"]["fidelity"]["values"])).text()
            labels.append(f"{SHOWN_AS.get(row, row)}: fidelity {found}")
        columns = [  # the same for all lessons
            Parameters(
                text.replace(lesson.word, "…"),
                i,
                SAMPLER_STEPS,
                GUIDANCE,
                (SIDE, SIDE),
                str(BASE),
                name,
                0,
            )
            for i, text in enumerate(texts)
        ]
    Sheet(rows, labels, columns, side=128).write(args.file)
