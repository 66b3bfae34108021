"""A budget of memory: the blocks whose activations are computed again, as few operations as keep a
step below it, by count.

One step is counted with all blocks computed again. Each block's bytes and operations are those of
its second computation, and the step falls into laps, from one start of a block to the next. While a
block is at work, a step with other blocks takes the bytes of that count, and those of each earlier
block of the forward pass that is not computed again. So a choice is a knapsack with a bound at each
block, which is solved exactly, but for choices that differ by a ten-thousandth of all bytes.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from sd_lora.config.schema import RunConfig
from sd_lora.errors import UsageError
from sd_lora.files import size_text
from sd_lora.models.load import Base
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.training.advice import Place, Rung, beside_of, encodes_in_steps, flags_that_fit
from sd_lora.training.memory import RESERVE, HeldBytes, Shape, count_step
from sd_lora.training.plan import Plan
from sd_lora.training.recompute import All, Call, Recomputed, without_budget

FINENESS = 10_000
"""Parts of all bytes that blocks hold, in each of which one choice is kept, that of the fewest
operations: there are 2^130 choices for SDXL."""


@dataclass(frozen=True)
class Block:
    """A block of a model, in the order of the forward pass. saved: bytes that are not held if it is
    computed again. flop: operations of that."""

    name: str
    saved: int
    flop: int


class Laps:
    """A step as it goes: each block's bytes and operations, and the peak of each lap.

    peaks: number of blocks whose activations a lap would hold without computing them again → the
    most bytes of such laps.
    """

    def __init__(self, counter: HeldBytes) -> None:
        self.counter = counter
        self.names: list[str] = []
        self.blocks: dict[str, Block] = {}
        self.peaks: dict[int, int] = {}
        self._held = 0

    def __call__(self, name: str, call: Call) -> Call:
        def watched(*args: Any) -> Any:
            if name not in self.names:
                self.end_lap(len(self.names))
                self.names.append(name)
                out = call(*args)
                self.end_lap(len(self.names))
                return out
            self.end_lap(self.names.index(name))
            before, kernels = self.counter.now, len(self.counter.kernels)
            try:
                return call(*args)
            except Exception as end:  # torch's own, where nothing more is needed
                end.__traceback__ = None  # its frames would hold what nobody needs
                raise
            finally:
                flop = sum(flop for flop, _ in self.counter.kernels[kernels:])
                self.blocks[name] = Block(name, max(0, self.counter.now - before), flop)

        return watched

    def end_lap(self, held: int = 0) -> None:
        """End a lap. held: number of blocks of the next one."""
        self.peaks[self._held] = max(self.counter.peak, self.peaks.get(self._held, 0))
        self.counter.peak, self._held = self.counter.now, held


def count_blocks(
    config: RunConfig, configs: MetaPipeline, shape: Shape
) -> tuple[list[Block], dict[int, int], int]:
    """Blocks in the order of the forward pass, the peaks of `Laps`, and the operations of a step in
    which nothing is computed again."""
    found: list[Laps] = []

    def watched(counter: HeldBytes) -> Call:
        found.append(Laps(counter))
        return found[0]

    step = count_step(config, configs, shape, watched=watched)
    (laps,) = found
    laps.end_lap()
    blocks = [laps.blocks.get(name, Block(name, 0, 0)) for name in laps.names]
    return blocks, laps.peaks, step.flop - sum(block.flop for block in blocks)


Choice = tuple[int, int, tuple[str, ...]]
"""Blocks that are computed again: their operations, their bytes with a minus, their names."""


def least_recomputed(
    blocks: Sequence[Block], peaks: dict[int, int], room: int
) -> frozenset[str] | None:
    """The blocks to compute again, with the fewest operations, so that no lap takes more than a
    room; None if there are none.

    blocks, peaks: of `count_blocks`. room: bytes.
    """
    needs, held = [], 0  # bytes to be saved among the first blocks, for each number of them
    for number in range(len(blocks) + 1):
        needs.append(max(0, peaks.get(number, 0) + held - room))
        held += blocks[number].saved if number < len(blocks) else 0
    if needs[0]:
        return None
    grain = max(1, held // FINENESS)
    choices: dict[int, Choice] = {0: (0, 0, ())}
    for number, block in enumerate(blocks, 1):
        most = max(needs[number:])  # more than this is of no use
        following: dict[int, Choice] = {}
        for flop, less, names in choices.values():
            again = (flop + block.flop, max(-most, less - block.saved), (*names, block.name))
            for choice in ((flop, max(-most, less), names), again):
                place = choice[1] // grain
                if -choice[1] >= needs[number] and choice < following.get(place, (choice[0] + 1,)):
                    following[place] = choice
        choices = following
    if choices:
        return frozenset(min(choices.values())[2])
    fits = max(peaks.values()) <= room  # by less than choices are told apart
    return frozenset(block.name for block in blocks) if fits else None


def choose(
    config: RunConfig, configs: MetaPipeline, shape: Shape, room: int
) -> tuple[frozenset[str] | None, int, int, float]:
    """The blocks to compute again so that the bytes of a step are within a room, by count.

    Returns the blocks, None if all of them are not enough; the number of blocks; the bytes of the
    step then; and the share of its operations that are done twice.
    """
    blocks, peaks, flop = count_blocks(config, configs, shape)
    aim = room
    while (chosen := least_recomputed(blocks, peaks, aim)) is not None:
        peak = count_step(config, configs, shape, chosen).peak
        if peak <= room:
            twice = sum(block.flop for block in blocks if block.name in chosen)
            return chosen, len(blocks), peak, twice / flop
        aim -= peak - room
    everything: Container[str] = All()
    peak = count_step(config, configs, shape, everything).peak
    return None, len(blocks), peak, sum(block.flop for block in blocks) / flop


def within_budget(
    plan: Plan, base: Base, device: str, config: RunConfig | None = None
) -> Recomputed | None:
    """The blocks that a planned run computes again to stay within its budget; None without one.

    Args:
        device: type of the run's device, "cuda", "cpu", ….
        config: of the run on another card than that of this machine.

    Raises:
        UsageError: with all blocks computed again a step takes more; with the flags that fit.
    """
    config = config or plan.config
    if config.budget is None:
        return None
    beside = beside_of(config, base, encodes_in_steps(plan, base))
    reserve = RESERVE if device != "cpu" else 0
    held, configs, shape = sum(beside.values()) + reserve, base.meta_pipeline, largest_shape(plan)
    room = config.budget - held
    chosen, number, peak, share = choose(config, configs, shape, room)
    if chosen is not None:
        return Recomputed(chosen, number, share, peak + held, config.budget)
    whole = without_budget(config, checkpointing=True)
    step = Rung("", whole, shape, held)

    def bytes_of(rung: Rung) -> int:
        return count_step(rung.config, configs, rung.shape).peak + rung.beside

    flags, needed = flags_that_fit(Place(plan, device, beside), step, bytes_of, config.budget)
    remedy = "no flags here are enough"
    if flags:
        remedy = f"beside {flags} it takes {size_text(needed)}, which fits"
    raise UsageError(
        f"memory_budget {config.memory_budget} is too small: with all {number} blocks recomputed, "
        f"{shape.text} take {size_text(peak + held)} by count; {remedy}"
    )


def largest_shape(plan: Plan) -> Shape:
    """The images of a run's largest micro-batch on a process: of its largest bucket, with as many
    class images or preserved ones."""
    number = plan.epochs.batch // plan.num_processes * (1 + plan.beside)
    return Shape(number, max(plan.epochs.buckets, key=lambda size: size[0] * size[1]))
