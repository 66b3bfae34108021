"""CPU time from the command to a training's first step on the embedded base, and its imports.

run as: OMP_NUM_THREADS=1 python benchmarks/start.py time --rounds 5 [--beside CHECKOUT] [FLAG …]
    OMP_NUM_THREADS=1 python benchmarks/start.py imports [FLAG …]

`time` starts `sd-lora train` as a user does, one process after another on one core, and reads the
user and system seconds of the process from /proc when it says that a stage is reached; checkouts
take turns. `imports` adds up Python's own report (`-X importtime`) by package. Other flags are
those of `train`. Caches of latents and embeddings are warm from the second run on.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "flags and places are checked": b"loading torch and diffusers",
    "libraries are loaded": b"checking:",
    "the run is planned": b"sd_lora trains a LoRA",
    "training begins": b"\rtraining:   0%",
    "the first step is done": b"1/1 [",
}
"""Stage → text that the terminal shows when it is reached, in order."""

TICKS = os.sysconf("SC_CLK_TCK")


def command(out: Path, flags: list[str], *python: str) -> list[str]:
    """The words of a training of one step."""
    return [
        *(sys.executable, *python, "-m", "sd_lora", "train", "sample_data/captioned"),
        *("--model", "sample_data/tiny-sd", "--caption_column", "text", "--max_train_steps", "1"),
        *("--output_dir", str(out), *flags),
    ]  # fmt: skip


def environment(checkout: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}


def seconds_of(pid: int) -> float:
    """User and system seconds of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def measure(checkout: Path, flags: list[str]) -> dict[str, float]:
    """Stage → CPU seconds since the command of a run."""
    with tempfile.TemporaryDirectory() as folder:
        words = command(Path(folder) / "out", flags)
        process = subprocess.Popen(
            words, cwd=checkout, env=environment(checkout), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        found: dict[str, float] = {}
        said, left = b"", list(STAGES)
        while chunk := os.read(process.stdout.fileno(), 65536):
            said += chunk
            while left and STAGES[left[0]] in said:
                said = said.partition(STAGES[left[0]])[2]
                found[left.pop(0)] = seconds_of(process.pid)
        if process.wait():
            sys.exit(said.decode())
    return found


def show_times(checkouts: list[Path], rounds: int, flags: list[str]) -> None:
    """Print the median and the least CPU seconds of each stage, a column a checkout."""
    runs: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    for _ in range(rounds):
        for checkout in checkouts:
            runs[checkout].append(measure(checkout, flags))
    names = [checkout.name for checkout in checkouts]
    print(f"| CPU seconds, median (least) of {rounds}", *names, sep=" | ", end=" |\n")
    print("|---" * (1 + len(checkouts)) + "|")
    for stage in STAGES:
        columns = [[run[stage] for run in runs[checkout]] for checkout in checkouts]
        cells = [f"{statistics.median(column):.2f} ({min(column):.2f})" for column in columns]
        print(f"| {stage}", *cells, sep=" | ", end=" |\n")


def show_imports(flags: list[str]) -> None:
    """Print the packages whose modules take longest to import, each without those it imports."""
    with tempfile.TemporaryDirectory() as folder:
        words = command(Path(folder) / "out", flags, "-X", "importtime")
        done = subprocess.run(
            words, cwd=ROOT, env=environment(ROOT), capture_output=True, text=True, check=True
        )
    rows = re.findall(r"^import time: +(\d+) \| +\d+ \| +(\w+)", done.stderr, re.MULTILINE)
    spent, modules = Counter[str](), Counter(package for _, package in rows)
    for own, package in rows:
        spent[package] += int(own)
    print("| package | modules | ms |\n|---|---|---|")
    for package, microseconds in spent.most_common(12):
        print(f"| {package} | {modules[package]:,} | {microseconds / 1000:.0f} |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("look", choices=("time", "imports"))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--beside", type=Path, action="append", default=[])
    args, flags = p.parse_known_args()
    if args.look == "imports":
        show_imports(flags)
    else:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        show_times([ROOT, *(path.resolve() for path in args.beside)], args.rounds, flags)


if __name__ == "__main__":
    main()
