"""Runs that are killed at random moments, and disks that are full at each write in turn.

    python benchmarks/survival.py kills --count 25 [--mode dreambooth]
    python benchmarks/survival.py full [--every 4]

Each run is started again by the same command, with `--resume_from_checkpoint latest-if-any`, until
it is finished; its files and log are then compared with those of an undisturbed run, to the last
bit. `kills` sends SIGKILL to a forked process at a moment drawn from the length of a whole run, so
that many fall into caching, saving and exporting. `full` makes the n-th write, and each after it,
fail with "No space left on device", for n = 0, every, 2 · every, … up to the writes of a whole run:
the run must end with an error of the project, and go on when there is room.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import sd_lora
from sd_lora.config.schema import TrainConfig
from sd_lora.training.loop import train  # before the processes fork
from tests.tiny import build_pipeline
from tests.training.runs import dreambooth, images, text_to_image

AGAIN = {"resume_from_checkpoint": "latest-if-any"}


def config_of(mode: str, root: Path, out: str, **changes: object) -> TrainConfig:
    """A run of twelve steps with a checkpoint after each and LoRA files after each fourth."""
    options: dict[str, Any] = {
        "max_train_steps": 12, "checkpointing_steps": 1, "checkpoints_total_limit": 2,
        "save_lora_every": 4, "lora_dropout": 0.2, "rank": 2, "cache_latents": "disk",
        "lr_scheduler": "cosine", "lr_warmup_steps": 2, "data_cache_dir": str(root / "cache"),
    }  # fmt: skip
    options |= changes
    if mode == "dreambooth":
        options |= {
            "train_text_encoder": True, "with_prior_preservation": True, "num_class_images": 4,
            "class_data_dir": str(root / "class"), "class_prompt": "a thing",
        }  # fmt: skip
        return dreambooth(root / "model", root / "data", root / out, **options)
    options |= {"bucket_step": 16, "random_flip": True, "caption_dropout": 0.2}
    return text_to_image(root / "model", root / "data", root / out, **options)


def forked(config: TrainConfig, errors: Path) -> int:
    """Train in a new process; returns its id. It ends with 0, or 1 after an error."""
    process = os.fork()
    if process:
        return process
    code = 1
    with open(errors, "a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        try:
            train(config)
            code = 0
        except (sd_lora.UsageError, sd_lora.RunError) as error:
            file.write(f"{error}\n")
            code = 0 if "has done all steps" in str(error) else 1
        finally:
            file.flush()
            os._exit(code)


def assert_same(root: Path, out: str) -> None:
    """The LoRA files of `out`, in mid-run too, and its log are those of `whole`."""
    for path in (root / "whole").rglob("*.safetensors"):
        if path.parent.name.startswith("checkpoint-"):
            continue
        name = str(path.relative_to(root / "whole")).replace("whole", out)
        ours, theirs = load_file(root / out / name), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    logs = [(root / name / "training_log.jsonl").read_bytes() for name in ("whole", out)]
    assert logs[0] == logs[1]


def kills(root: Path, mode: str, count: int, seed: int) -> None:
    """Kill runs `count` times."""
    errors, rng = root / "errors", random.Random(seed)  # noqa: S311  moments, no secrets
    started = time.monotonic()
    os.waitpid(forked(config_of(mode, root, "whole"), errors), 0)
    length = time.monotonic() - started
    killed = finished = refused = 0
    while killed < count:
        process = forked(config_of(mode, root, "out", **AGAIN), errors)
        time.sleep(rng.uniform(0.1, 1.0) * length)
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif os.WEXITSTATUS(status):
            refused += 1
        else:
            finished += 1
            assert_same(root, "out")
            shutil.rmtree(root / "out")
            shutil.rmtree(root / "cache")
    print(
        f"{mode}: {killed} kills, {finished} runs finished, all equal; {refused} failed to resume"
    )
    if refused:
        print(errors.read_text(encoding="utf-8"))


@contextlib.contextmanager
def full_disk(root: Path, after: int) -> Iterator[list[int]]:
    """Calls that change the disk below `root` fail from the one after `after` on; yields a list of
    one number, that of the calls."""
    calls, names = [0], ("fsync", "write", "replace", "mkdir")
    originals = {name: getattr(os, name) for name in names}

    def place(name: str, first: object) -> str:
        if name not in ("fsync", "write"):
            return str(first)
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{first}")
        return ""

    def failing(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if str(root) in place(name, args[0]):
                calls[0] += 1
                if calls[0] > after:
                    raise OSError(28, "No space left on device")
            return originals[name](*args, **options)

        return call

    try:
        for name in names:
            setattr(os, name, failing(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def full(root: Path, mode: str, every: int) -> None:
    """Fill the disk at each `every`-th write of a run."""
    samples = {
        "num_validation_images": 1, "validation_prompt": "a photo", "validation_steps": 1,
        "validation_epochs": 1, "max_train_steps": 4, "save_lora_every": 2,
        "checkpointing_steps": 2, "report_to": "tensorboard",
    }  # fmt: skip
    train(config_of(mode, root, "whole", **samples))
    after = tried = 0
    while True:
        for name in ("out", "cache"):
            shutil.rmtree(root / name, ignore_errors=True)
        config = config_of(mode, root, "out", **samples)
        with full_disk(root, after) as calls, contextlib.suppress(sd_lora.RunError):
            train(config)
        if calls[0] <= after:
            print(f"{mode}: full at {tried} of {calls[0]} writes, all went on to equal files")
            return
        if not list((root / "out").glob("*.safetensors")):
            train(config.replace(**AGAIN))
        assert_same(root, "out")
        after, tried = after + every, tried + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("kills", "full"))
    parser.add_argument("--mode", choices=("captioned", "dreambooth"), default="captioned")
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build_pipeline("sd1").save_pretrained(root / "model")
        images(root / "data", 4, (96, 64))
        images(root / "class", 4)
        if args.what == "kills":
            kills(root, args.mode, args.count, args.seed)
        else:
            full(root, args.mode, args.every)


if __name__ == "__main__":
    main()
