"""The trial: the run's largest micro-batch goes forward and backward before the first step, so that
a run that cannot fit ends at once, and `--fit auto` can look for a way.

It costs one micro-batch, or with `--fit auto` one for each way that is tried: at most 2 + log₂ of
the images at once. Gradients are thrown away, random states put back, and the data does not move
on, so a run with it and a run without give the same bits.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from torch import Tensor

from sd_lora.data.batches.stream import Batch
from sd_lora.data.images.buckets import Size
from sd_lora.errors import RunError, UsageError
from sd_lora.training.advice import shape_of, step_advice
from sd_lora.training.fit import Fit
from sd_lora.training.optimizers import optimizer_of
from sd_lora.training.out_of_memory import OutOfMemory, is_out_of_memory, let_go, told_by, wanted
from sd_lora.training.recompute import enable_checkpointing
from sd_lora.training.run import Run

Accumulate = Callable[[Run, int, Batch, int], Tensor]
"""The loop's forward and backward pass of a micro-batch by its number, after a number of steps."""

MOST_LOOKED = 100_000
"""Micro-batches among which the largest one is looked for."""

PLAIN = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
"""Engines whose processes can go backward alone; in others they exchange weights or gradients."""


class StepOutOfMemory(OutOfMemory):
    """A forward or backward pass without enough memory: the model is as the step before left it."""


def try_largest(run: Run, accumulate: Accumulate) -> None:
    """Find a way for the run's largest micro-batch through the device, and take it.

    A resumed run goes the way that its checkpoint says. With `fit` off nothing is tried where the
    first step has as large a micro-batch itself.

    Raises:
        UsageError: out of memory, on any process, in each way that the run may go.
    """
    automatic, parts = run.config.fit == "auto", Parts.of(run)
    take(run, Fit.of(run.saved.progress.fit) if run.saved else Fit())
    if run.joint and run.fit.at_once:
        raise UsageError(
            "the checkpoint is of a run with --fit auto that computes fewer images at once, and "
            "the processes of FSDP2 must compute alike: go on without it"
        )
    alone = run.accelerator.distributed_type in PLAIN and not run.joint
    if alone and (automatic or parts.grow(run)):
        refused: list[str] = []
        for fit in ways(run, parts.most) if automatic else [run.fit]:
            take(run, fit)
            number = parts.largest(fit.at_once)
            faults = gather_object([_attempt(run, number, accumulate)])
            fault = next((fault for fault in faults if fault), "")
            if not fault:
                break
            refused.append(fault)
        if fault:
            raise UsageError(
                f"out of memory in the run's largest batch, tried before step {run.first_step + 1}"
                f": {'; '.join(refused)}\n{_advice(run, number, run.saved is not None)}"
            )
    elif automatic:
        run.summary.notes.append(
            "--fit auto tries nothing here: the processes exchange weights or gradients in the "
            "backward pass, and one without memory would leave the others waiting"
        )
        return
    if automatic or run.fit.text:
        run.summary.rows["memory"] = run.fit.text or "the largest batch fits as it is"


def ways(run: Run, most: int) -> Iterator[Fit]:
    """Yield the ways that a run may go, from the cheapest on: as it is, with checkpointing, then
    with half as many images at once, down to one.

    most: images of one size in a micro-batch.
    """
    fit = run.fit
    yield fit
    if not (fit.checkpointing or run.config.recomputes):
        fit = replace(fit, checkpointing=True)
        yield fit
    at_once = min(most, fit.at_once or most)
    while at_once > 1:
        at_once = -(-at_once // 2)
        yield replace(fit, at_once=at_once)


def take(run: Run, fit: Fit) -> None:
    """Let a run's steps go this way from now on."""
    if fit.checkpointing and not run.fit.checkpointing:
        enable_checkpointing(_unwrapped(run))
    run.fit = fit


def step_memory(run: Run, number: int, done: int) -> AbstractContextManager[None]:
    """A context that raises StepOutOfMemory, with the flags that take less, where a micro-batch is
    too large.

    number: of the micro-batch. done: steps before.
    """
    return told_by(
        lambda error: StepOutOfMemory(
            f"out of memory in step {done + 1} of {run.plan.num_steps}: "
            f"{_refused(run, number, error)}\n{_advice(run, number, done > 0)}"
        )
    )


def _refused(run: Run, number: int, error: BaseException) -> str:
    """A micro-batch that did not fit: "4 images of 768×512 at once, with …: 2 GiB could not …"."""
    shape = shape_of(run.stream.batch(number), run.fit)
    rank = run.accelerator.process_index
    where = f"on process {rank}, " if run.accelerator.num_processes > 1 else ""
    how = " with gradient checkpointing" if run.fit.checkpointing else ""
    return f"{where}{shape.text} at once{how}, {wanted(error)}"


def _advice(run: Run, number: int, works: bool) -> str:
    """Flags that take less than a micro-batch does now. works: whether steps are done already."""
    try:
        return step_advice(run, shape_of(run.stream.batch(number), run.fit), works)
    except (UsageError, RunError) as error:  # the message and the steps done count for more
        return f"(no flags can be counted here: {error})"


@dataclass(frozen=True)
class Parts:
    """The parts of micro-batches that go through the device, one a process, by their images' sizes.

    numbers: images of a part by size → number of the first micro-batch with it. most: images of one
    size in any part.
    """

    numbers: dict[frozenset[tuple[Size, int]], int]

    @classmethod
    def of(cls, run: Run) -> "Parts":
        """The parts of an epoch from a run's first step on; of the whole run, where class images
        have several sizes, since the next epoch joins others."""
        stream, start = run.stream, run.plan.epochs.first_of_step(run.first_step)
        end = min(len(stream), start + MOST_LOOKED)
        if stream.prior is None or len(set(stream.prior.buckets)) == 1:
            end = min(end, start + run.plan.epochs.num_micro_batches)
        return cls(_numbers(run, range(start, max(start + 1, end))))

    @property
    def most(self) -> int:
        return max(count for part in self.numbers for _, count in part)

    def largest(self, at_once: int | None) -> int:
        """The number of the micro-batch that takes the most memory. at_once: see `Fit`."""
        return self.numbers[max(self.numbers, key=lambda part: _area(part, at_once))]

    def grow(self, run: Run) -> bool:
        """Whether the largest part comes after the first step."""
        epochs, first = run.plan.epochs, run.first_step
        here = _numbers(run, range(epochs.first_of_step(first), epochs.first_of_step(first + 1)))
        at_once = run.fit.at_once
        return max(_area(p, at_once) for p in self.numbers) > max(_area(p, at_once) for p in here)


def _numbers(run: Run, micros: range) -> dict[frozenset[tuple[Size, int]], int]:
    """Images by size → the first of some micro-batches with such a part."""
    numbers: dict[frozenset[tuple[Size, int]], int] = {}
    for number in micros:
        for sizes in run.stream.sizes_of(number):
            numbers.setdefault(frozenset(Counter(sizes).items()), number)
    return numbers


def _area(part: frozenset[tuple[Size, int]], at_once: int | None) -> int:
    """Pixels of a part that go through the device together."""
    areas = [width * height * min(count, at_once or count) for (width, height), count in part]
    return sum(areas) if at_once is None else max(areas)


def _attempt(run: Run, number: int, accumulate: Accumulate) -> str:
    """Go forward and backward with a micro-batch, and forget it; returns "", or the reason why it
    does not fit."""
    try:
        go_once(run, number, accumulate)
    except RunError:  # a lost image, of which its own step tells
        return ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        let_go(error)
        return _refused(run, number, error)
    return ""


def go_once(run: Run, number: int, accumulate: Accumulate) -> None:
    """Go forward and backward with a micro-batch, and forget it, beside the room of all that comes
    after the first step: the optimiser's state, and the buckets of gradients that
    DistributedDataParallel makes anew then."""
    bare, device = _unwrapped(run), run.accelerator.device
    text = replace(run.text, learning={name: bare[name] for name in run.text.learning})
    alone = replace(run, prepared=bare, text=text, graphs=None)
    kind = device.type if device.type in ("cuda", "xpu") else ""
    try:
        with torch.random.fork_rng([device] if kind else [], device_type=kind or "cuda"):
            room = torch.empty(later_bytes(run), dtype=torch.uint8, device=device)
            accumulate(alone, number, run.stream.batch(number), run.first_step)
            del room
    finally:
        forget(run)


def forget(run: Run) -> None:
    """Throw away the gradients of a trial."""
    for parameter in run.parameters:
        parameter.grad = None
    if run.objective.uncertainty:
        run.objective.uncertainty.forget()


def later_bytes(run: Run) -> int:
    """Bytes that come after the first step: the optimiser's state, and the buckets of gradients
    that DistributedDataParallel makes anew then."""
    each = optimizer_of(run.config).state_bytes + 4 * (run.accelerator.num_processes > 1)
    return round(each * sum(p.numel() for p in run.parameters))


def _unwrapped(run: Run) -> dict[str, torch.nn.Module]:
    """Component → model that learns, without the engine's wrapper."""
    return {name: run.models.get(name) or run.text.encoders[name] for name in run.prepared}
