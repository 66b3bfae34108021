"""Images of two objectives, trained on the embedded base, and the variance of timesteps.

    python benchmarks/objectives.py dark      # zero terminal SNR on dark images
    python benchmarks/objectives.py masked    # a subject of which masks leave out a half
    python benchmarks/objectives.py variance --steps 4096   # of stratified timesteps

The first two print a table for README.md each, and leave their runs with their sheets in --folder.
All runs of a table have the same images, steps and seeds. The last prints the factors of
docs/objectives.md as they come out over so many steps, beside the page's exact ones; it takes a
quarter of a minute for 4,096.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sd_lora.config.schema import TrainConfig
from sd_lora.data.images.buckets import pixels_of
from sd_lora.demo import find_sample_data
from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.diffusion.timesteps import Timesteps
from sd_lora.models.load import load_parts
from sd_lora.sampling.interval import Interval
from sd_lora.training.loop import train

sys.path.insert(0, str(Path(__file__).parent.parent / "dev"))
import images

SHARED: dict[str, Any] = {
    "pretrained_model_name_or_path": str(find_sample_data() / "tiny-sd"),
    "seed": 0, "report_to": "none", "mixed_precision": "no",
    "lr_scheduler": "constant", "targets": "all", "checkpointing_steps": 100_000,
    "validation_epochs": 100_000,
}  # fmt: skip


def run(folder: Path, **options: Any) -> list[Image.Image]:
    """Train in a folder, anew; returns the last sample images."""
    shutil.rmtree(folder, ignore_errors=True)
    train(TrainConfig(**SHARED | options, output_dir=str(folder)))
    last = max(folder.glob("samples/step-*"))
    return [Image.open(path).convert("RGB") for path in sorted(last.glob("*.png"))]


def brightness(shown: Sequence[Image.Image]) -> float:
    """Mean of all pixels, from 0, black, to 1, white."""
    return float(np.mean([np.asarray(image) for image in shown]) / 255)


SIDE, SEEDS = 96, (0, 1, 2, 3, 4)
"""Pixels of a dark image's side: the noise of the last timestep hides the mean of 24 × 24 latents
less than that of fewer. Seeds of its trainings."""

SCHEDULES: dict[str, dict[str, Any]] = {
    "v, the same schedule": {"prediction_type": "v_prediction"},
    "v, zero terminal SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


def dark(folder: Path, steps: int) -> None:
    """Whole UNets, trained on nearly black and nearly white images, by noise schedule: brightness
    of black ones, as the VAE gives them back and as drawn, with the interval over SEEDS."""
    data, base = folder / "data", load_parts(SHARED["pretrained_model_name_or_path"])
    data.mkdir(parents=True, exist_ok=True)
    black = []
    for seed in range(32):
        scene = images.random_scene(random.Random(seed))
        shown = images.draw(scene).resize((SIDE, SIDE))
        pixels = np.asarray(shown).astype(float) / 16 + 239 * (seed % 2)
        image = Image.fromarray(pixels.round().astype(np.uint8))
        image.save(data / f"{seed}.png")
        (data / f"{seed}.txt").write_text("by day" if seed % 2 else "at night")
        black += [] if seed % 2 else [pixels_of(image, False)]
    with torch.no_grad():
        back = base.vae(torch.stack(black)).sample.clamp(-1, 1)
    print(f"| the VAE's own | {float(back.mean()) / 2 + 0.5:.3f} |", flush=True)
    for name, options in SCHEDULES.items():
        found = []
        for seed in SEEDS:
            drawn = run(
                folder / name.replace(" ", "-").replace(",", ""), mode="text_to_image",
                train_data_dir=str(data), resolution=SIDE, method="full", learning_rate=1e-3,
                train_batch_size=8, max_train_steps=steps, validation_prompt="at night",
                validation_guidance_scale=1.0, num_validation_images=8, seed=seed, **options,
            )  # fmt: skip
            found.append(brightness(drawn))
        interval = Interval(tuple(found))
        each = ", ".join(f"{value:.3f}" for value in found)
        print(f"| {name} | {interval.mean:.3f} ± {interval.half:.3f} | {each} |", flush=True)


HALVES = {"whole images": {}, "the upper half, by masks": {"mask_folder": "masks"}}


GREEN, CYAN = images.COLOURS["green"], images.COLOURS["cyan"]
BELOW = ("orange", "purple", "cyan")
"""The subject's colours below its eyes."""


def near(shown: np.ndarray, colour: images.RGB) -> float:
    """Share of pixels (N, H, W, 3) within 70 of 255 of a colour, as a distance."""
    return float((np.linalg.norm(shown - np.array(colour), axis=-1) < 70).mean())


def row(name: str, shown: Sequence[Image.Image]) -> str:
    """Share of the hat's green where hats are, of the feet's cyan where feet are, and of the
    subject's orange, purple and cyan in the lower half."""
    pixels = np.asarray(shown, float)
    hat, feet = near(pixels[:, :24, 20:44], GREEN), near(pixels[:, 40:], CYAN)
    below = sum(near(pixels[:, 32:], images.COLOURS[colour]) for colour in BELOW)
    return f"| {name} | {hat:.3f} | {feet:.3f} | {below:.3f} |"


def masked(folder: Path, steps: int) -> None:
    """A subject, whole and with masks of its upper half: its hat and its feet in the samples."""
    source, masks = find_sample_data() / "dreambooth" / "instance", folder / "masks"
    masks.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:32] = 255
    for path in source.glob("*.png"):
        Image.fromarray(mask).save(masks / path.name)
    real = [Image.open(path).convert("RGB") for path in sorted(source.glob("*.png"))]
    print(row("the subject", real))
    for name, options in HALVES.items():
        place = folder / name.split(",")[0].replace(" ", "-")
        after = run(
            place, mode="dreambooth", instance_data_dir=str(source), resolution=64,
            instance_prompt="a photo of a sks monster", learning_rate=2e-3, rank=16,
            targets="attention+conv", train_batch_size=4, max_train_steps=steps,
            validation_prompt="a photo of a sks monster", num_validation_images=8,
            validation_guidance_scale=4.0,
            **{key: str(folder / value) for key, value in options.items()},
        )  # fmt: skip
        paths = sorted((place / "samples/step-000000").glob("*.png"))
        print(row(f"the base, before: {name}", [Image.open(p).convert("RGB") for p in paths]))
        print(row(name, after), flush=True)


COUNTS = (1, 2, 3, 4, 6, 8, 16)
"""Images of a step."""


def variance(folder: Path, steps: int) -> None:
    """The factors by which stratified timesteps lower the variance of a step's mean loss, by the
    loss's course over the timesteps and the images of a step."""
    scheduler = load_parts(SHARED["pretrained_model_name_or_path"]).scheduler
    schedule = NoiseSchedule.of(scheduler, "min_snr", gamma=5.0)
    error = schedule.snr / (1 + schedule.snr)
    courses = {
        "a straight line in t": torch.arange(schedule.num_timesteps).float(),
        "SNR / (1 + SNR), about an SD model's own error": error,
        "the same with min-SNR 5": error * schedule.weights,
    }
    factors: dict[str, list[str]] = {name: [] for name in courses}
    for count in COUNTS:
        places = range(steps * count)
        addresses = [(0, "instance", "position", place) for place in places]
        strata = [(place % count, count) for place in places]
        plain, even = (
            Timesteps(0, schedule.num_timesteps, stratified=stratified).draw(addresses, strata)
            for stratified in (False, True)
        )
        for name, course in courses.items():
            of_plain, of_even = (course[t].view(steps, count).mean(1).var() for t in (plain, even))
            factors[name].append(f"{float(of_plain / of_even):.3g}")
    print(f"| n | {' | '.join(map(str, COUNTS))} |")
    for name, row in factors.items():
        print(f"| {name} | {' | '.join(row)} |")


TABLES = {"dark": dark, "masked": masked, "variance": variance}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "objectives")
    args = parser.parse_args()
    torch.set_num_threads(1)
    TABLES[args.table](args.folder, args.steps)


if __name__ == "__main__":
    main()
