"""Several LoRAs learned together over one base, against one after another: CPU seconds a step.

    OMP_NUM_THREADS=1 python benchmarks/jobs.py --jobs 1 2 4 --batch 1 4

On the embedded base, rank 8; a step is one micro-batch of each job with its conditions, forward
and backward. Rounds are interleaved, so that a busy machine slows both alike.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sd_lora.config.schema import TrainConfig  # noqa: E402
from sd_lora.training.jobs.base import SharedBase  # noqa: E402
from sd_lora.training.jobs.together import Together  # noqa: E402
from sd_lora.training.loop import Turn  # noqa: E402
from sd_lora.training.run import Run  # noqa: E402
from sd_lora.training.setup import (  # noqa: E402
    checked_run,
    load_base,
    prepare,
    ready,
    released,
)


def config_of(out: Path, number: int, batch: int, targets: str) -> TrainConfig:
    """One job: a subject of the sample data, with a seed of its own."""
    return TrainConfig(
        mode="dreambooth", pretrained_model_name_or_path=str(ROOT / "sample_data" / "tiny-sd"),
        instance_data_dir=str(ROOT / "sample_data" / "dreambooth" / "instance"),
        instance_prompt="a photo of a sks monster", output_dir=str(out / str(number)),
        resolution=64, train_batch_size=batch, max_train_steps=1000, rank=8, targets=targets,
        seed=number, num_validation_images=0, report_to="none", data_cache_dir=str(out / "cache"),
    )  # fmt: skip


def turn_of(run: Run, number: int) -> Turn:
    return Turn(run, number, run.stream.batch(number), 0)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of some work."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(jobs: int, batch: int, targets: str, rounds: int, out: Path) -> tuple[float, float]:
    """Median seconds of a step of all jobs: one after another, and together."""
    configs = [config_of(out / "alone", n, batch, targets) for n in range(jobs)]
    shared = [config_of(out / "together", n, batch, targets) for n in range(jobs)]
    with released([*configs, *shared]):
        alone = [prepare(config) for config in configs]
        base = SharedBase(load_base)
        runs = [ready(checked_run(config), (), base) for config in shared]
        together = Together(runs, base.unet())
        found: dict[str, list[float]] = {"alone": [], "together": []}
        for number in range(rounds):
            one = [turn_of(run, number) for run in alone]
            all_ = [turn_of(run, number) for run in runs]
            found["alone"].append(seconds(lambda one=one: [asked.learn() for asked in one]))
            found["together"].append(seconds(lambda all_=all_: together.learn(all_)))
            for run in (*alone, *runs):
                for parameter in run.parameters:
                    parameter.grad = None
    after = {kind: statistics.median(times[2:]) for kind, times in found.items()}
    return after["alone"], after["together"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--targets", nargs="+", default=["attention", "attention+conv"])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print("| targets | batch of each | jobs | one after another, ms | together, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for targets in args.targets:
        for batch in args.batch:
            for jobs in args.jobs:
                with ExitStack() as stack:
                    out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    one, all_ = measure(jobs, batch, targets, args.rounds, out)
                row = f"{1000 * one:.1f} | {1000 * all_:.1f} | {all_ / one:.2f}"
                print(f"| {targets} | {batch} | {jobs} | {row} |", flush=True)


if __name__ == "__main__":
    main()
