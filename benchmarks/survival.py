"""Runs that are killed at any moment, and disks that are full at each write in turn.

    python benchmarks/survival.py kills --count 500 [--mode dreambooth]
    python benchmarks/survival.py full [--every 4]
    python benchmarks/survival.py small [--every 16]

Each run is started again by the same command, with `--resume_from_checkpoint latest-if-any`, until
it is finished; its files are then compared with those of an undisturbed run, to the last byte.
`kills` sends SIGKILL in each phase of a run in turn, and at moments drawn from its length. `full`
makes the n-th call that changes the disk, and each after it, fail with "No space left on device",
for n = 0, every, 2 · every, … up to the calls of a whole run. `small` gives the run a disk (tmpfs;
needs the right to mount) of `every`, 2 · `every`, … KiB, so that also writes within libraries fail.
After each the run must end with an error of the project that names a path, with whole checkpoints
and no unfinished files, and go on where there is room.
"""

import argparse
import errno
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sd_lora.files import UNFINISHED
from sd_lora.training.checkpoint_folders import checkpoints, fault
from tests.tiny import build_pipeline
from tests.training.survival import Trial, assert_same, exit_code, forked, inputs

EVERYTHING = {
    "save_lora_every": 2, "num_validation_images": 1, "validation_prompt": "a photo",
    "validation_epochs": 2, "validation_steps": 1,
    "report_to": "tensorboard",
}  # fmt: skip
"""Options by which a run writes all kinds of files."""


def kills(root: Path, mode: str, count: int, seed: int) -> None:
    """Kill runs at least `count` times."""
    trial = Trial(mode, root, seed, {"save_lora_every": 2})
    while trial.killed.total() < count:
        trial.survive(rounds=1)
        print(
            f"{mode}: {trial.killed.total()} kills ({dict(trial.killed)}) of {trial.starts} runs; "
            f"{trial.finished} came to their end, all equal to the byte",
            flush=True,
        )


class Results:
    """The messages of runs that met a full disk, and their faults."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        self.faults: list[str] = []
        self.tried = 0

    def add(self, trial: Trial, code: int, moment: str) -> None:
        """Look at a run's folder and words after it met a full disk."""
        self.tried += 1
        said = trial.said.read_text(encoding="utf-8").strip().splitlines()
        last = said[-1] if said else ""
        if code not in (0, 1):
            self.faults.append(f"{moment}: {last}")
        elif code == 1:
            plain = re.sub(r"[0-9.]+ [KM]iB", "N MiB", last.replace(str(trial.root), "ROOT"))
            self.messages[re.sub(r"\.?[0-9a-f]{16,}", "HEX", plain)] += 1
        out = trial.place / "out"
        broken = [path for path in checkpoints(out) if fault(path)]
        left = [path for path in out.rglob("*") if UNFINISHED.fullmatch(path.name)]
        if broken or left:
            self.faults.append(f"{moment}: left {[str(p) for p in [*broken, *left]]}")

    def show(self, title: str) -> None:
        """Print the counts, each kind of message, and the faults."""
        print(f"{title}: {self.tried} full disks, {len(self.faults)} faults")
        for message, count in self.messages.most_common():
            print(f"  {count:4} × {message}")
        for found in self.faults:
            print(f"  FAULT {found}")


def goes_on(trial: Trial, results: Results, moment: str) -> None:
    """Start the run again, with room, and compare it with the undisturbed one."""
    code = exit_code(forked(trial.config, lambda path: None, trial.said))
    if code:
        results.faults.append(f"{moment}: not resumed: {trial.said.read_text(encoding='utf-8')}")
        return
    for place in (trial.whole, trial.place):  # a tracker's file for each start, with its time
        shutil.rmtree(place / "out" / "logs", ignore_errors=True)
    try:
        assert_same(trial.whole, trial.place)
    except AssertionError as error:
        results.faults.append(f"{moment}: {error}")


def full(root: Path, mode: str, every: int) -> None:
    """Fail each `every`-th call that changes the disk, and all after it."""
    trial, results, after = Trial(mode, root, 0, EVERYTHING), Results(), 0
    while after < trial.calls.total():
        shutil.rmtree(trial.place, ignore_errors=True)
        left = [after]

        def fail(path: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        moment = f"call {after}"
        results.add(trial, exit_code(forked(trial.config, fail, trial.said)), moment)
        goes_on(trial, results, moment)
        after += every
    results.show(f"{mode}, of {trial.calls.total()} calls each {every}.")


@contextmanager
def disk(place: Path) -> Iterator[None]:
    """Mount an empty disk in memory at a folder."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def small(root: Path, mode: str, every: int) -> None:
    """Run on disks of `every` KiB, twice that, …, until one is large enough."""
    trial, results, size = Trial(mode, root, 0, EVERYTHING), Results(), every
    while True:
        with disk(trial.place):
            resize = ["mount", "-o", f"remount,size={size}k", trial.place]
            subprocess.run(resize, check=True)
            moment, code = (
                f"{size} KiB",
                exit_code(forked(trial.config, lambda p: None, trial.said)),
            )
            results.add(trial, code, moment)
            subprocess.run(["mount", "-o", "remount,size=1g", trial.place], check=True)
            goes_on(trial, results, moment)
        trial.place.rmdir()
        if code == 0:
            break
        size += every
    results.show(f"{mode}, disks of {every} to {size} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("kills", "full", "small"))
    parser.add_argument("--mode", choices=("captioned", "dreambooth"), default="captioned")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"  # the same bytes, headers included
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build_pipeline("sd1").save_pretrained(root / "tiny")
        inputs(root, root / "tiny")
        if args.kind == "kills":
            kills(root, args.mode, args.count, args.seed)
        else:
            {"full": full, "small": small}[args.kind](root, args.mode, args.every)


if __name__ == "__main__":
    main()
