"""Host's time of a step's end outside of a recorded pass: clipping and fused AdamW.

    OMP_NUM_THREADS=1 python benchmarks/update.py

Tensors of 16 numbers, so that hardly anything is computed: Python's and torch's own time is left.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.utils import clip_grad_norm_

NUMBERS = (256, 800, 1600, 2400)
"""Trained tensors."""


def milliseconds(work: Callable[[], object], rounds: int = 20) -> float:
    """Median of a work's times, after one that is not counted."""
    work()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def main() -> None:
    print("| tensors | clipping ms | AdamW ms |\n|---|---|---|")
    for number in NUMBERS:
        parameters = [torch.nn.Parameter(torch.randn(16)) for _ in range(number)]
        for parameter in parameters:
            parameter.grad = torch.randn(16)
        optimizer = torch.optim.AdamW(parameters, fused=True)
        clipping = milliseconds(lambda p=parameters: clip_grad_norm_(p, 1.0))
        print(f"| {number} | {clipping:.2f} | {milliseconds(optimizer.step):.2f} |")


if __name__ == "__main__":
    main()
