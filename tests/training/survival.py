"""Runs that are killed at chosen moments, and disks that are full at a chosen write.

A moment is the n-th call that changes the disk in a phase of the run, or a time. The machinery of
`test_survival.py` and of `benchmarks/survival.py`.
"""

import contextlib
import gc
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sd_lora
from sd_lora.config.schema import TrainConfig
from sd_lora.training.loop import train
from tests.training.runs import dreambooth, images, text_to_image

CLOCK = "any moment"
"""In place of a phase: a time, drawn from the length of a whole run."""

PHASES = {
    "caching": re.compile(r"cache/"),
    "class images": re.compile(r"class/"),
    "save": re.compile(r"out/(checkpoint-|\.[0-9a-f]{16}\.part(/|$))"),
    "export": re.compile(r"out/(lora-\d+/)?(unverified|[^/]+\.safetensors)"),
    "log and settings": re.compile(r"out/[^/]+\.jsonl?$"),
    "samples": re.compile(r"out/(samples/|[^/]+\.png)"),
}
"""Phase of a run → its paths below the folder of `config_of`; the first that fits. A small file
counts as a part of a save until it is renamed from the name under which it is written."""

CALLS = ("fsync", "write", "replace", "mkdir")
"""Calls of `os` that change the disk."""


def inputs(root: Path, model: Path) -> Path:
    """Put the model and the images of `config_of` into a folder."""
    (root / "model").symlink_to(model)
    images(root / "data", 4, (96, 64))
    return root


def config_of(mode: str, root: Path, **changes: object) -> TrainConfig:
    """A run of four steps, few modules and a checkpoint after each step.

    root: a folder of `inputs`. All that the run writes is in `run`: `out`, `cache`, `class`.
    """
    place = root / "run"
    options: dict[str, Any] = {
        "max_train_steps": 4, "checkpointing_steps": 1, "checkpoints_total_limit": 2,
        "targets": "conv_in|.*attn1.to_q", "lora_dropout": 0.2, "rank": 2, "cache_latents": "disk",
        "lr_scheduler": "cosine", "lr_warmup_steps": 2, "data_cache_dir": str(place / "cache"),
        "resume_from_checkpoint": "latest-if-any",
    }  # fmt: skip
    if mode == "dreambooth":
        options |= {
            "train_text_encoder": True, "with_prior_preservation": True, "num_class_images": 2,
            "class_data_dir": str(place / "class"), "class_prompt": "a thing",
            "sample_batch_size": 1, "num_validation_images": 1, "validation_steps": 1,
        }  # fmt: skip
        return dreambooth(root / "model", root / "data", place / "out", **(options | changes))
    options |= {"bucket_step": 16, "random_flip": True, "caption_dropout": 0.2}
    return text_to_image(root / "model", root / "data", place / "out", **(options | changes))


@contextlib.contextmanager
def watched(place: Path, before: Callable[[str], None]) -> Iterator[None]:
    """Tell of each call that changes the disk below a folder, before it is made.

    before: called with the path below the folder, of a moved file the new one.
    """
    originals = {name: getattr(os, name) for name in CALLS}

    def path_of(name: str, args: tuple) -> str:
        if name in ("replace", "mkdir"):
            return os.fspath(args[-1] if name == "replace" else args[0])
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{args[0]}")
        return ""

    def telling(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            path = path_of(name, args)
            if path.startswith(f"{place}/"):
                before(path.removeprefix(f"{place}/"))
            return originals[name](*args, **options)

        return call

    try:
        for name in CALLS:
            setattr(os, name, telling(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def phase_of(path: str) -> str | None:
    """The phase that writes a path."""
    return next((name for name, pattern in PHASES.items() if pattern.match(path)), None)


def forked(config: TrainConfig, before: Callable[[str], None], said: Path) -> int:
    """Train in a new process; returns its id.

    It ends with 0, also where the run had all its files; with 1 after an error of the project, and
    with 2 after any other. before: as for `watched`. said: file that gets the error's text.
    """
    process = os.fork()
    if process:
        return process
    code = 2
    with open(said, "w", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        try:
            with watched(config.output_path.parent, before):
                train(config)
            code = 0
        except (sd_lora.UsageError, sd_lora.RunError) as error:
            file.write(f"{error}\n")
            code = 0 if "has done all steps" in str(error) else 1
        except BaseException as error:
            file.write(f"{type(error).__name__}: {error}\n")
        finally:
            file.flush()
            os._exit(code)


def exit_code(process: int) -> int:
    """Wait for a process; returns its exit code, or the negative number of the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@dataclass
class Trial:
    """A configuration that is run undisturbed, then killed and run again to its end.

    root: a folder of `inputs`. calls: phase → calls of the undisturbed run. killed: phase → kills.
    starts: runs that were begun. finished: runs that came to their end, with files equal to those
    of the undisturbed one.
    """

    mode: str
    root: Path
    seed: int
    changes: Mapping[str, object] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    finished: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # moments, no secrets
        self.place, self.whole = self.root / "run", self.root / "whole"
        self.said = self.root / "said"

        def count(path: str) -> None:
            if phase := phase_of(path):
                self.calls[phase] += 1

        with watched(self.place, count):
            train(self.config)  # here: libraries are imported once, before processes fork
        self.place.rename(self.whole)

    @property
    def config(self) -> TrainConfig:
        """The configuration of each run."""
        return config_of(self.mode, self.root, **self.changes)

    def survive(self, rounds: int) -> None:
        """Kill the run in each phase and at any moment, `rounds` times, and see it to its end."""
        gc.freeze()  # forks look for their own garbage alone, in a tenth of the time
        try:
            for _ in range(rounds):
                for phase in (*self.calls, CLOCK):
                    while not self._is_killed(phase):
                        self._compare()
            assert not self._is_killed("")
            self._compare()
        finally:
            gc.unfreeze()

    def _is_killed(self, phase: str) -> bool:
        """Start the run, and kill it in a phase; False if it came to its end before."""
        left = [self.random.randint(1, self.calls[phase]) if phase in self.calls else 0]

        def kill(path: str) -> None:
            if phase_of(path) == phase:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        self.starts += 1
        started = time.monotonic()
        process = forked(self.config, kill, self.said)
        if phase == CLOCK:
            time.sleep(self.random.uniform(0.1, 1.0) * self.seconds)
            os.kill(process, signal.SIGKILL)
        code = exit_code(process)
        if code == -signal.SIGKILL:
            self.killed[phase] += 1
            return True
        assert code == 0, self.said.read_text(encoding="utf-8")
        self.seconds = time.monotonic() - started
        return False

    def _compare(self) -> None:
        """Compare the finished run with the undisturbed one, and remove it."""
        assert_same(self.whole, self.place)
        self.finished += 1
        shutil.rmtree(self.place)


def contents(folder: Path) -> dict[str, bytes]:
    """Path → bytes of a run's files. Left out are the cache, whose keys are of a time, the run's
    page and its record, which tell the time that it took, and class images that were begun: another
    run may write them."""
    there = [*folder.glob("out/**/*"), *folder.glob("class/*.png")]
    kept = [path for path in there if path.is_file() and path.stem != "report"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def assert_same(whole: Path, other: Path) -> None:
    """Every file of two runs is the same to the last byte: LoRA files, checkpoints, log, images."""
    want, have = contents(whole), contents(other)
    names = sorted(want.keys() | have.keys())
    differing = [name for name in names if want.get(name) != have.get(name)]
    assert not differing, f"other than undisturbed: {', '.join(differing)}"
