"""A step of the whole trainer on the embedded base against diffusers' script, in CPU seconds.

    OMP_NUM_THREADS=1 python benchmarks/trainer.py PATH/train_text_to_image_lora.py

The path is that of examples/text_to_image in diffusers' repository. It needs torchvision, which
this project does not: `--torchvision FOLDER` names one beside it (`pip install --target FOLDER
--no-deps torchvision`), of which the transforms alone are read.

Both train attention at rank 8 on sample_data/captioned, batch 4, float32, AdamW. Runs take turns;
the median of a run's steps counts, without its first ten and without anything around the loop.
Fewer than 300 steps of ours are other ones: a form of batch is recorded where 100 of it follow.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

SAMPLE_DATA = Path(__file__).parents[1] / "sample_data"
BASE, IMAGES = SAMPLE_DATA / "tiny-sd", SAMPLE_DATA / "captioned"
SETTINGS = {
    "pretrained_model_name_or_path": str(BASE), "train_data_dir": str(IMAGES), "resolution": 64,
    "train_batch_size": 4, "rank": 8, "learning_rate": 1e-4, "seed": 1, "mixed_precision": "no",
    "checkpointing_steps": 10_000,
}  # fmt: skip

Stamps = list[float]


def ours(stamps: Stamps, settings: dict[str, Any], _: argparse.Namespace) -> None:
    import sd_lora
    from sd_lora.config.schema import TrainConfig
    from sd_lora.report.events import StepDone
    from sd_lora.terminal import Terminal

    def stamp(event: object) -> None:
        if isinstance(event, StepDone):
            stamps.append(time.process_time())

    more: dict[str, Any] = {"targets": "attention", "lora_alpha": 8.0}
    sd_lora.train(TrainConfig(**settings, **more), [Terminal(), stamp])


def theirs(stamps: Stamps, settings: dict[str, Any], given: argparse.Namespace) -> None:
    import peft  # noqa: F401  this and the next two before they see torchvision
    import tqdm.auto
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    if given.torchvision:
        part: Any = types.ModuleType("torchvision")  # its operators need a build for this torch
        part.__spec__ = ModuleSpec("torchvision", None, is_package=True)
        part.extension = types.SimpleNamespace(_HAS_OPS=False)
        part.__path__ = [str(given.torchvision / "torchvision")]
        sys.modules["torchvision"] = part

    class Bar(tqdm.auto.tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            if str(self.desc).startswith("Steps"):
                stamps.append(time.process_time())
            return super().update(n)

    vars(tqdm.auto)["tqdm"] = Bar
    flags = [f"--{name}={value}" for name, value in settings.items()]
    sys.argv = [str(given.script), *flags, "--caption_column=text"]
    runpy.run_path(str(given.script), run_name="__main__")


WAYS: dict[str, Callable[[Stamps, dict[str, Any], argparse.Namespace], None]] = {
    "ours": ours,
    "theirs": theirs,
}


def run(way: str, given: argparse.Namespace) -> None:
    """Train one way in this process, and print the median seconds of its steps."""
    import torch

    torch.set_num_threads(1)
    stamps: Stamps = []
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | {"max_train_steps": given.steps, "output_dir": folder + "/run"}
        WAYS[way](stamps, settings, given)
    steps = [b - a for a, b in zip(stamps, stamps[1:], strict=False)][10:]
    print("\n" + json.dumps({"seconds": statistics.median(steps)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path)
    parser.add_argument("--torchvision", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--way", choices=WAYS, help="in this process, once")
    given = parser.parse_args()
    if given.way:
        return run(given.way, given)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(given.rounds):
        for way, seconds in found.items():
            command = [sys.executable, *sys.argv, "--way", way]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            seconds.append(json.loads(done.stdout.splitlines()[-1])["seconds"])
        print({way: f"{seconds[-1]:.4f}" for way, seconds in found.items()}, flush=True)
    medians = {way: statistics.median(seconds) for way, seconds in found.items()}
    print(f"ours {medians['ours']:.4f} s, theirs {medians['theirs']:.4f} s: ", end="")
    print(f"{medians['theirs'] / medians['ours']:.2f} times")


if __name__ == "__main__":
    main()
