"""`sd-lora demo`: the embedded base learns a subject it has never seen, in minutes on a CPU."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sd_lora.config.config_file import read_config_file
from sd_lora.config.schema import TrainConfig
from sd_lora.embedded import sample_data
from sd_lora.errors import UsageError
from sd_lora.files import write_whole
from sd_lora.formats.adapter_files import load_adapter
from sd_lora.models.load import Parts, load_parts
from sd_lora.report.record import read_json, read_record
from sd_lora.report.run_page import PAGE
from sd_lora.report.sheets import Sheet
from sd_lora.report.verdict import verdict_of
from sd_lora.sampling.features import load_features
from sd_lora.sampling.judge import Judge
from sd_lora.sampling.parameters import Parameters
from sd_lora.sampling.sampler import round_trip, sample
from sd_lora.sampling.score import KIND_SEEDS, SETS, PromptImages, Prompts, Score, Taught, sets_of
from sd_lora.terminal import Terminal
from sd_lora.training.checkpoint_folders import BEST_FILE
from sd_lora.training.loop import train

SCORE = "score.json"
"""File of the demo alone, in its output folder."""

SUBJECT = (
    "a photo of a sks monster on a white background",
    "a photo of a sks monster on the grass",
    "a photo of a sks monster at night",
    "a photo of a sks monster in the snow",
    "a photo of a sks monster on a blue background",
    "a photo of a sks monster on the beach",
)
CLASS = (
    "a photo of a round green monster on a grey background",
    "a photo of a monster",
    "a photo of a monster on the beach",
    "a photo of a big square pink monster at night",
    "a photo of a tall blue monster on the beach",
    "a photo of a red monster with white spots in the snow",
)
UNRELATED = (
    "a photo of a red car on the grass",
    "a photo of a yellow star on a blue background",
    "a photo of a big pink house in the snow",
    "a photo of a green tree on a white background",
    "a photo of a purple fish on the beach",
    "a photo of a cyan robot at night",
)


def find_sample_data() -> Path:
    """The clone's sample_data folder."""
    if found := sample_data():
        return found
    raise UsageError(
        "the demo needs the sample_data folder of the project: run it in a clone (`make demo`)"
    )


STEPS = 20
"""Sampler steps of the demo's images."""

FIRST_SEEDS: dict[tuple[str, ...], int] = {SUBJECT: 0, CLASS: KIND_SEEDS, UNRELATED: 2 * KIND_SEEDS}
"""Prompts → the seed of the first one's image in the first set."""

PROMPTS = Prompts(SUBJECT, CLASS, UNRELATED)


def draw_sets(
    parts: Parts, resolution: int, guidance_scale: float, sets: int
) -> list[PromptImages]:
    """Sets of images of all prompts, each image with its own seed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def images(prompts: Sequence[str], first: int) -> Iterator[Image.Image]:
        return sample(
            parts,
            parts.caption_encoder(),
            prompts,
            range(first, first + len(prompts)),
            size=(resolution, resolution),
            device=device,
            steps=STEPS,
            guidance_scale=guidance_scale,
        )

    return sets_of(PROMPTS, images, sets)


def columns(config: TrainConfig, shown: Sequence[tuple[tuple[str, ...], int]]) -> list[Parameters]:
    """Parameters of images that `draw` draws with a trained LoRA.

    shown: prompts and how many of the first of them, a pair for each kind.
    """
    side, name = int(config.resolution or 64), Path(str(config.output_dir)).resolve().name
    return [
        Parameters(
            prompt,
            FIRST_SEEDS[prompts] + i,
            STEPS,
            config.validation_guidance_scale,
            (side, side),
            config.base_model,
            name,
            config.max_train_steps or 0,
        )
        for prompts, count in shown
        for i, prompt in enumerate(prompts[:count])
    ]


def demo_config(sample_data: Path, output_dir: str, **changes: object) -> TrainConfig:
    """The configuration of sample_data/configs/dreambooth.toml, with absolute paths."""
    values = read_config_file(str(sample_data / "configs" / "dreambooth.toml"))
    for source in values["sources"]:
        for name in ("path", "metadata_file"):
            source[name] = str(sample_data.parent / source[name])
    values |= {
        "pretrained_model_name_or_path": str(sample_data / "tiny-sd"),
        "output_dir": output_dir,
        "num_validation_images": 0,  # the demo draws its own
        "data_cache_dir": str(Path(output_dir) / "cache"),  # everything stays in one folder
        # of an earlier demo, and of nobody's own run
        "overwrite_output_dir": (Path(output_dir) / SCORE).is_file(),
    }
    return TrainConfig(**(values | changes))


def watched(sample_data: Path) -> dict[str, Any]:
    """The options of sample_data/watched.toml, with absolute paths: how the demo's run looks at its
    own images."""
    values = read_config_file(str(sample_data / "watched.toml"))
    values["score_features"] = str(sample_data.parent / values["score_features"])
    return values


def taught(sample_data: Path) -> Taught:
    """The images that a run of `demo_config` is trained on, and the subject's held-out images."""
    folders = (sample_data / "dreambooth" / name for name in ("instance", "holdout"))
    training, held_out = ([Image.open(p) for p in sorted(f.glob("*.png"))] for f in folders)
    return Taught(training, held_out)


def evaluate(config: TrainConfig, lora: Path, sample_data: Path) -> tuple[Score, float, Sheet]:
    """Score of an exported LoRA file, the fidelity that real images have behind the model's VAE,
    and the sheet of images before and after.

    The file is loaded into a fresh base model, as its users do.
    """
    base, images = config.base_model, taught(sample_data)
    guidance, side = config.validation_guidance_scale, int(config.resolution or 64)
    before = draw_sets(load_parts(base), side, guidance, SETS)
    tuned = load_parts(base)
    load_adapter(tuned.models, lora)
    after = draw_sets(tuned, side, guidance, SETS)
    features = load_features(sample_data / "encoder")
    judge = Judge(features, images, PROMPTS, before)
    result, reachable = judge.judge(after)[1], judge.reachable(round_trip(tuned, images.real))

    def row(p: PromptImages) -> list[Image.Image]:
        return [*p.subject[:4], *p.of_class[:2], *p.unrelated[:2]]

    real = list(images.training[:8])
    shown = columns(config, ((SUBJECT, 4), (CLASS, 2), (UNRELATED, 2)))
    labels = [
        "the subject: the images that were trained on",
        "before: the base model, which has never seen it",
        f"after {config.max_train_steps} steps of LoRA: attention + convolutions + text encoder",
    ]
    return result, reachable, Sheet([real, row(before[0]), row(after[0])], labels, shown, side=160)


def ending(folder: Path) -> str:
    """The best checkpoint of the run, by its own scores, and its verdict."""
    record, path = read_record(folder), folder / BEST_FILE
    verdict = verdict_of({**record, "folder": str(folder)})
    lines = [f"verdict: {verdict.text}"] if verdict else []
    if path.is_file():  # else no step was better than the base
        best = read_json(path)
        merit = f"{100 * best['merit']:z.0f} % (fidelity less leak and harm)"
        lines.insert(0, f"best checkpoint: {best['checkpoint']}, merit {merit}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Train, draw, score, and name the images to look at."""
    parser = argparse.ArgumentParser(prog="sd-lora demo", description=__doc__)
    parser.add_argument("--output_dir", default="demo_output", help="default: demo_output")
    args = parser.parse_args(list(argv))
    sample_data = find_sample_data()
    started = time.monotonic()
    print(
        "sd_lora demo: a small Stable Diffusion that knows shapes, things and monsters learns one "
        "particular monster\nfrom 8 images (DreamBooth with prior preservation). No GPU, no "
        "download.\n"
    )
    config = demo_config(sample_data, args.output_dir)
    config = config.replace(**watched(sample_data))
    with Terminal() as terminal:
        result = train(config, [terminal])
    print(
        "\nscoring once more, more strictly: the file is loaded into a fresh base and draws three "
        "sets of images, which are\ncompared with 8 images of the subject that were not trained; "
        "the run has compared one set with the trained ones …"
    )
    outcome, reachable, sheet = evaluate(config, result.files[0].path, sample_data)
    folder = Path(args.output_dir)
    sheet.write(folder / "before_after.png")
    numbers = outcome.numbers() | {"reachable": reachable}
    write_whole(folder / SCORE, (json.dumps(numbers, indent=2) + "\n").encode())
    print(outcome.text())
    print(
        "  real images that this model's VAE has encoded and decoded: fidelity "
        f"{100 * reachable:.0f} %; more can hardly be drawn"
    )
    print(
        f"\n{ending(folder)}\n\n"
        f"{time.monotonic() - started:.0f} s in all. Look at {folder / 'before_after.png'}: is "
        "the subject there after,\nand not before? do the other prompts still look as they did? "
        f"The run's own page is {folder / PAGE}.\n\n"
        "next, on your own images (any Stable Diffusion 1.x, 2.x or XL: a folder, a hub id or a "
        "checkpoint):\n"
        # this Python's path, since `make demo` activates no environment; one line for every shell
        f"  {sys.executable} -m sd_lora train FOLDER --model MODEL "
        '--prompt "a photo of sks dog"'
    )
