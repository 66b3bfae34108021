"""Compiled transformer blocks: measured before the first step, and used where they pay.

torch.compile makes one program for all blocks of a width, forward and backward, in which norms,
activations and sums that follow each other are one kernel. It takes tens of seconds and may win a
tenth of a step, or lose: at Stable Diffusion's widths a CPU is slower with it. So the run's first
batch goes both ways, and is thrown away, as in the trial of the largest batch.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from sd_lora.errors import RunError, UsageError
from sd_lora.report.events import Progress
from sd_lora.report.summary import duration
from sd_lora.training.fast.blocks import BlockParts, Pass, Way, block_pass
from sd_lora.training.out_of_memory import let_go
from sd_lora.training.recorders import told
from sd_lora.training.run import Run
from sd_lora.training.trial import Accumulate, Parts, StepOutOfMemory, go_once, step_memory

TIMES = 3
"""Passes of each way that are timed, after one that is not."""

SHORT = 120.0
"""Seconds of all of a run's passes below which nothing is compiled: it takes 20 to 100 seconds."""

Compiler = Callable[[Pass], Pass]


def inductor(compute: Pass) -> Pass:
    """Compiled by torch's own compiler, for the sizes that it meets; see `of_any_size`."""
    return torch.compile(compute, dynamic=False)


def of_any_size(compute: Pass) -> Pass:
    """A compiled pass whose program takes any number of images from two on, and of their tokens:
    else each bucket would have its own."""

    def marked(parts: BlockParts, h: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for tensor, dims in ((h, (0, 1)), (key, (0,)), (value, (0,))):
            for dim in dims:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return compute(parts, h, key, value)

    return marked


def try_compiled(run: Run, accumulate: Accumulate, compiler: Compiler = inductor) -> None:
    """Let a run's blocks compute by compiled programs from now on, if it is faster so.

    A resumed run goes the way that its checkpoint says, for the last bits differ. The summary has
    both times, or the reason why nothing is compiled.
    """
    if run.config.compile == "off":
        run.fit = replace(run.fit, compiled=False)
        return
    ways = [model.way for model in run.fast_models if model.way.blocks]
    reason = next((text for holds, text in REASONS if holds(run)), "")
    reason = reason or (
        "" if ways else "no block is Stable Diffusion's with plain LoRA in one run alone"
    )
    if reason:
        run.fit = replace(run.fit, compiled=False)
        run.summary.notes.append(f"nothing is compiled: {reason}")
    elif run.saved:
        run.summary.rows["compile"] = "nothing, as before the checkpoint"
        if run.fit.compiled:
            _compile_again(run, ways, accumulate, compiler)
            run.summary.rows["compile"] = "transformer blocks, as before the checkpoint"
    else:
        run.summary.rows["compile"] = _measured(run, ways, accumulate, compiler)


REASONS: tuple[tuple[Callable[[Run], bool], str], ...] = (
    (
        lambda run: run.accelerator.num_processes > 1,
        "on several processes no batch can go forward and backward alone",
    ),
    (lambda run: run.config.offloads, "the blocks' weights or activations come and go"),
    (
        lambda run: run.config.deterministic,
        "deterministic, and a stopwatch would choose between two ways with other last bits",
    ),
)
"""Runs without compiled blocks, and why."""


def _compile(run: Run, ways: list[Way], compiler: Compiler) -> None:
    compute = compiler(block_pass)
    if len(Parts.of(run).numbers) > 1:
        compute = of_any_size(compute)
    for way in ways:
        way.compute = compute


def _compile_again(run: Run, ways: list[Way], accumulate: Accumulate, compiler: Compiler) -> None:
    """Compile the blocks of a run that has gone so before.

    Raises:
        UsageError: it fails here.
    """
    with _timed(run, run.plan.epochs.first_of_step(run.first_step), accumulate, 1) as seconds:
        try:
            _compile(run, ways, compiler)
            with contextlib.suppress(RunError):  # a lost image, of which its own step tells
                seconds()
        except Exception as error:
            raise UsageError(
                f"the blocks of this run were compiled before its checkpoint, and here that fails: "
                f"{told(error)}. Go on with --compile off, with other last bits"
            ) from None


def _measured(run: Run, ways: list[Way], accumulate: Accumulate, compiler: Compiler) -> str:
    """Take the faster way; returns the line of the summary."""
    first = run.plan.epochs.first_of_step(run.first_step)
    left = len(run.stream) - first

    with _timed(run, first, accumulate, 2 * (1 + TIMES)) as seconds:
        try:
            with step_memory(run, first, run.first_step):
                seconds()
                plain = statistics.median(seconds() for _ in range(TIMES))
        except StepOutOfMemory as error:
            raise UsageError(str(error)) from None
        except RunError as error:  # a lost image, of which its own step tells
            return f"no: {error}"
        if plain * left < SHORT:
            return f"no: the run's {left} batches take {duration(plain * left)} without"
        try:
            _compile(run, ways, compiler)
            compiling = seconds()
            compiled = statistics.median(seconds() for _ in range(TIMES))
        except Exception as error:  # compilers, and the programs that they need, fail in many ways
            _plain(ways)
            let_go(error)
            return f"no: {told(error)}"
    both = f"a batch takes {compiled:.3g} s, {plain:.3g} s without"
    gain = plain - compiled
    if gain <= 0:
        _plain(ways)
        return f"no: {both}"
    run.fit = replace(run.fit, compiled=True)
    even = round((compiling - compiled) / gain)
    late = f", and the run has {left:,}" * (even > left)
    cost = f"{compiling:.0f} s of compiling are made up after {even:,} batches{late}"
    return f"transformer blocks: {both}; {cost}"


@contextmanager
def _timed(
    run: Run, number: int, accumulate: Accumulate, times: int
) -> Iterator[Callable[[], float]]:
    """A context with a function that goes forward and backward with a micro-batch, shows it as one
    of so many times, and returns its seconds."""
    done = 0

    def tell(ended: bool = False) -> None:
        run.emit(Progress("trying compiled blocks", done, times, "batch", ended))

    def seconds() -> float:
        nonlocal done
        started = time.perf_counter()
        go_once(run, number, accumulate)
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        taken, done = time.perf_counter() - started, done + 1
        tell()
        return taken

    tell()
    try:
        yield seconds
    finally:
        tell(ended=True)


def _plain(ways: list[Way]) -> None:
    for way in ways:
        way.compute = block_pass
