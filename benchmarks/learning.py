"""The bench of learning: how well settings teach the embedded base four subjects and two styles.

    python benchmarks/learning.py run --out FOLDER [--rows ROW…] [--lessons NAME…] [--images 8]
    python benchmarks/learning.py rescore --out FOLDER
    python benchmarks/learning.py table --out FOLDER
    python benchmarks/learning.py picture --out FOLDER --file PNG [--rows ROW…] [--lessons NAME…]

A cell is one training: a row of settings, a lesson (taught.py), a number of images and a seed. Its
score (sd_lora/sampling/score.py) is a line of FOLDER/cells.jsonl, its images are in FOLDER/images
and, with their prompts, a sheet in FOLDER/sheets. Started again, it goes on with the cells that are
missing; several may run side by side with one --out and other rows, lessons or seeds. `rescore`
scores the images of all cells anew, after a change of the score or its encoder. `table` prints
means over lessons and seeds with 95 % intervals over the trainings, and the difference from the
first row, pair by pair. `picture` shows the images of the first seed: of each lesson, what was
trained on, and a line a row of settings.
"""

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import (
    BASE,
    SAMPLE_DATA,
    Cell,
    cell_of,
    done_cells,
    draw_sets,
    keep_images,
    kept_images,
    stored_sets,
)
from choices import METHODS, OBJECTIVES, OPTIMIZERS
from learning_sheets import write_picture, write_sheet
from PIL import Image
from taught import AT_PLACES, COLOURS, LESSONS, Lesson
from tqdm import tqdm

from sd_lora.config.schema import TrainConfig
from sd_lora.data.cache.store import digest_of
from sd_lora.files import write_whole
from sd_lora.formats.adapter_files import load_adapter
from sd_lora.models.load import load_parts
from sd_lora.sampling.features import Features, load_features
from sd_lora.sampling.interval import Interval
from sd_lora.sampling.judge import Judge
from sd_lora.sampling.sampler import round_trip
from sd_lora.sampling.score import Taught
from sd_lora.training.loop import train
from sd_lora.training.optimizer_rows import OPTIMIZERS as OPTIMIZER_ROWS

COMMON = {
    "resolution": 64,
    "train_batch_size": 4,
    "gradient_checkpointing": False,
    "mixed_precision": "no",
    "num_validation_images": 0,
    "checkpointing_steps": 10**6,
    "max_train_steps": 1200,
    "learning_rate": 2e-3,
}
OF_SUBJECT = COMMON | {
    "preset": "subject",
    "text_encoder_lr": 2e-3,
    "lr_warmup_steps": 20,
    "with_prior_preservation": True,
    "num_class_images": 48,
}
OF_STYLE = COMMON | {"preset": "style", "lr_warmup_steps": 20}

EQUAL_RANK = {"subject": 79, "style": 158}
"""Ranks at which attention alone has the parameters of the presets' targets: 1,097,152 for
1,094,912 (subjects), 2,194,304 for 2,189,824 (styles)."""
ATTENTION = {"targets": "attention", "rank": EQUAL_RANK, "lora_alpha": EQUAL_RANK}

RECIPES: dict[str, dict[str, Any]] = {
    "recipe": {},
    "constant, 600 steps": {
        "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": 600,
    },
    "cosine, 600 steps": {"max_train_steps": 600},
    "constant, 1200 steps": {"lr_scheduler": "constant", "lr_warmup_steps": 0},
    "cosine, 2400 steps": {"max_train_steps": 2400},
    "rate 1e-3": {"learning_rate": 1e-3, "text_encoder_lr": 1e-3},
    "attention": ATTENTION,
    "attention, rate 1e-3": ATTENTION | {"learning_rate": 1e-3, "text_encoder_lr": 1e-3},
    "attention, rate 4e-3": ATTENTION | {"learning_rate": 4e-3},
    "text encoder at 4e-4": {"text_encoder_lr": 4e-4},
    "no text encoder": {"train_text_encoder": False},
    "ema": {"use_ema": True},
    "no class images": {"with_prior_preservation": False},
    "no flips": {"random_flip": False},
    "flips": {"random_flip": True},
    "one prompt for all": {
        "captions_from": None, "class_prompt": lambda lesson: f"a photo of a {lesson.class_word}",
    },
    "one prompt for the class": {
        "class_prompt": lambda lesson: f"a photo of a {lesson.class_word}",
    },
    "the class in colours and places alone": {
        "class_prompt": lambda lesson:
            f"a photo of a {{big |}}{{{COLOURS}}} {lesson.class_word} {AT_PLACES}",
    },
}  # fmt: skip
"""Name → options that differ from the recipe of subjects or styles; a value may be one for each."""

CONSTANT = RECIPES["constant, 600 steps"]
PRESERVED: dict[str, Any] = {
    "with_prior_preservation": False,
    "train_text_encoder": False,
    "output_preservation": "class",
    "preservation_class": lambda lesson: f"{{big |}}{{{COLOURS}}} {lesson.class_word}",
    "trigger_word": lambda lesson: lesson.word,
}
SHORT: dict[str, dict[str, Any]] = {
    "600 steps, debiased": CONSTANT | {"debiased_estimation_loss": True},
    "600 steps, no text encoder": CONSTANT | {"train_text_encoder": False},
    "600 steps, 96 class images": CONSTANT | {"num_class_images": 96},
    "600 steps, class preserved": CONSTANT | PRESERVED | {"preservation_sampler_steps": 0},
    **{
        f"600 steps, class preserved, drawn in {steps}": CONSTANT
        | PRESERVED
        | {"preservation_sampler_steps": steps}
        for steps in (2, 4, 8)
    },
}
"""Name → options that differ from the recipe, for first looks at half the cost; a value may be a
function of the lesson."""

ROWS = RECIPES | SHORT | OPTIMIZERS | METHODS | OBJECTIVES

NEEDED_BY = {
    "with_prior_preservation": ("num_class_images", "class_data_dir", "class_prompt"),
    "train_text_encoder": ("text_encoder_lr",),
}
"""Option → options that mean nothing where it is off."""


def config_of(cell: Cell, out: Path, work: Path) -> TrainConfig:
    """The training of a cell, its images written into `work`."""
    lesson = LESSONS[cell.lesson]
    folder = work / "images"
    folder.mkdir(parents=True)
    for i, (image, caption) in enumerate(lesson.images(cell.images)):
        image.save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(caption, encoding="utf-8")
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": str(BASE),
        "output_dir": str(work / "lora"),
        "data_cache_dir": str(work / "cache"),
        "seed": cell.seed,
    }
    if lesson.kind == "subject":
        values |= OF_SUBJECT | {
            "mode": "dreambooth",
            "instance_data_dir": str(folder),
            "instance_prompt": f"a photo of a {lesson.word}",
            "captions_from": "sidecar",
            "class_prompt": lesson.class_prompt,
            "random_flip": lesson.symmetric,
        }
    else:
        values |= OF_STYLE | {"mode": "text_to_image", "train_data_dir": str(folder)}
    values |= changes(cell.row, lesson)
    if lesson.kind == "subject":  # class images are shared by all cells with as many of a prompt
        name = (
            f"{lesson.name}, {values['num_class_images']}, {digest_of(values['class_prompt'])[:8]}"
        )
        values["class_data_dir"] = str(out / "class" / name)
    for option, others in NEEDED_BY.items():
        if values.get(option) is False:
            values = {k: v for k, v in values.items() if k not in others}
    if cell.steps:
        values["max_train_steps"] = cell.steps
    return TrainConfig(**values)


OF_SUBJECTS_ALONE = {
    "with_prior_preservation", "random_flip", "train_text_encoder", "text_encoder_lr",
    "num_class_images", "output_preservation", "preservation_class", "trigger_word",
    "captions_from", "class_prompt", "preservation_sampler_steps",
}  # fmt: skip
"""Class images and flips are for subjects, and a style's recipe trains no text encoder."""


def changes(row: str, lesson: Lesson) -> dict[str, Any]:
    """The options of a row that mean something for a lesson."""
    options = {k: v[lesson.kind] if isinstance(v, dict) else v for k, v in ROWS[row].items()}
    options = {k: v(lesson) if callable(v) else v for k, v in options.items()}
    if lesson.kind == "style":
        options = {k: v for k, v in options.items() if k not in OF_SUBJECTS_ALONE}
    return options


def run_cell(cell: Cell, out: Path, features: Features) -> dict[str, Any]:
    """Train, draw, score; the cell's line."""
    lesson = LESSONS[cell.lesson]
    work = out / "work" / f"{cell.name}"
    shutil.rmtree(work, ignore_errors=True)
    before = stored_sets(out, lesson)
    started, cpu = time.monotonic(), time.process_time()
    result = train(config_of(cell, out, work), [])
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    tuned = load_parts(str(BASE))
    load_adapter(tuned.models, result.files[0].path)
    after = draw_sets(tuned, lesson.prompts)
    keep_images(out / "images" / f"{cell.name}.png", after)
    trained = [image for image, _ in lesson.images(cell.images)]
    write_sheet(out / "sheets" / f"{cell.name}.png", lesson, trained, before[0], after)
    outcome = score_of(cell, out, features)
    line = vars(cell) | {"seconds": seconds, "cpu_seconds": cpu, "score": outcome}
    with (out / "cells.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    shutil.rmtree(work)
    return line


def score_of(cell: Cell, out: Path, features: Features) -> dict[str, Any]:
    """The score of a cell's images, with intervals over the sets; and what real images have behind
    the base's VAE."""
    lesson = LESSONS[cell.lesson]
    taught = Taught([i for i, _ in lesson.images(cell.images)], lesson.held_out, lesson.kind)
    after = kept_images(out / "images" / f"{cell.name}.png", lesson.prompts)
    judge = Judge(features, taught, lesson.prompts, stored_sets(out, lesson))
    reachable = judge.reachable(round_trip(load_parts(str(BASE)), taught.real))
    found = judge.judge(after)[1].numbers() | {"reachable": reachable}
    before = stored_sets(out, lesson)
    for name, kind in (("class_change", "of_class"), ("rest_change", "unrelated")):
        pairs = [(getattr(a, kind), getattr(b, kind)) for a, b in zip(after, before, strict=True)]
        found[name] = {"mean": statistics.fmean(change(*pair) for pair in pairs)}
    return found


def change(now: Sequence[Image.Image], before: Sequence[Image.Image]) -> float:
    """Mean difference of all pixels of images and the base's from the same seeds, from 0 to 1."""
    a, b = (np.stack([np.asarray(i, float) for i in images]) for images in (now, before))
    return float(np.abs(a - b).mean()) / 255


def rescore(out: Path, features: Features) -> None:
    """Score all cells anew, from their images."""
    lines = done_cells(out)
    for line in tqdm(lines, "cells"):
        cell = cell_of(line)
        line["score"] = score_of(cell, out, features)
    write_whole(out / "cells.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def missing(args: argparse.Namespace) -> Iterator[Cell]:
    """The cells that were asked for and are not done; none where a row changes nothing."""
    done = {cell_of(line) for line in done_cells(args.out)}
    for seed in args.seeds:
        for images in args.images:
            for lesson in args.lessons:
                for row in args.rows:
                    cell = Cell(row, lesson, images, seed, args.steps)
                    same = bool(ROWS[row]) and not changes(row, LESSONS[lesson])
                    if not same and cell not in done:
                        yield cell


def interval(values: Sequence[float]) -> str:
    """Mean ± half of Student's 95 % interval, in percent, of the numbers that are known."""
    known = tuple(v for v in values if not math.isnan(v))
    return Interval(known).text().replace(" %", "") if known else "-"


MEASURES = {
    "fidelity": "fidelity", "followed": "prompts", "class_leak": "class leak",
    "unrelated_leak": "unrelated leak", "harm": "harm", "class_change": "change of the class",
    "rest_change": "of the rest",
}  # fmt: skip
"""Measure → its words in the table. Changes are of pixels, from the base's images."""


def table(cells: Iterable[dict[str, Any]]) -> str:
    """Markdown: a line a row and kind of lesson; the difference of fidelity from the first row over
    the trainings that both have."""
    cells = list(cells)
    lines = [
        "| row | lessons | trainings | fidelity | of what is reachable | against the first row | "
        f"{' | '.join([*MEASURES.values()][1:])} | copies | CPU s | bytes |",
        "|" + "---|" * (9 + len(MEASURES) - 1),
    ]
    for kind in ("subject", "style"):
        among = [c for c in cells if LESSONS[c["lesson"]].kind == kind]
        known = {
            (c["row"], c["lesson"], c["images"], c["seed"]): mean(c, "fidelity") for c in among
        }
        first = next(iter(ROWS))
        for row in ROWS:
            mine = [c for c in among if c["row"] == row]
            if not mine:
                continue
            pairs = [
                value - known[first, *key[1:]]
                for key, value in known.items()
                if key[0] == row and (first, *key[1:]) in known
            ]
            names = dict.fromkeys(c["lesson"] for c in mine)
            shown = [interval([mean(c, m) for c in mine]) for m in MEASURES]
            copies = statistics.fmean(mean(c, "copies") for c in mine)
            reached = interval(
                [mean(c, "fidelity") / c["score"].get("reachable", math.nan) for c in mine]
            )
            seconds = statistics.median(c["cpu_seconds"] for c in mine)
            lines.append(
                f"| {row} | {', '.join(names)} | {len(mine)} | {shown[0]} | {reached} | "
                f"{'' if row == first else interval(pairs)} | {' | '.join(shown[1:])} | "
                f"{100 * copies:.0f} | {seconds:.0f} | {state_bytes(row):g} |"
            )
    return "\n".join(lines)


def mean(cell: dict[str, Any], measure: str) -> float:
    return float(cell["score"].get(measure, {"mean": math.nan})["mean"])


def state_bytes(row: str) -> float:
    """Bytes of the optimiser's state a parameter."""
    return OPTIMIZER_ROWS[ROWS[row].get("optimizer", "adamw")].state_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "rescore", "table", "picture"))
    parser.add_argument("--file", type=Path, help="the image that `picture` writes")
    parser.add_argument("--all", action="store_true", help="the class and other things, too")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*RECIPES])
    parser.add_argument("--lessons", nargs="+", choices=LESSONS, default=[*LESSONS])
    parser.add_argument("--images", nargs="+", type=int, default=[4, 8, 30])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of all rows, not their own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "rescore":
        rescore(args.out, load_features(SAMPLE_DATA / "encoder"))
    if args.command == "run":
        features = load_features(SAMPLE_DATA / "encoder")
        for cell in tqdm(list(missing(args)), "cells"):
            line = run_cell(cell, args.out, features)
            tqdm.write(f"{cell.name}: fidelity {100 * mean(line, 'fidelity'):.0f} %")
    if args.command == "picture":
        if args.file is None or {LESSONS[name].kind for name in args.lessons} != {"subject"}:
            parser.error("picture needs --file, and --lessons of subjects, whose prompts are alike")
        return write_picture(args)
    print(table(c for c in done_cells(args.out) if c.get("steps") == args.steps))


if __name__ == "__main__":
    main()
