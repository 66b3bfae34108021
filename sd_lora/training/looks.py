"""The share of a run's time in which it is looked at: samples, validation, scores.

Before the run it is counted in forward passes of the UNet, after it in seconds.
"""

import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sd_lora.training.run import Run

MOST = 0.1
"""Share of the work above which the summary names the frequency that costs no more."""

LESS = {
    "samples": "--num_validation_images 1 or 0, fewer --validation_steps, or more --steps",
    "validation": "--validate_every 0 leaves the validation out",
    "scores": "--score_sets 1, fewer --validation_steps, or more --steps",
}
"""Kind of look → the options that make it cheaper where no frequency does."""


@contextmanager
def timed(run: Run, kind: str) -> Iterator[None]:
    """Count the time of a block as spent on a kind of work, without that of blocks within it."""
    started, before = time.monotonic(), sum(run.spent.values())
    try:
        yield
    finally:
        within = sum(run.spent.values()) - before
        run.spent[kind] = run.spent.get(kind, 0.0) + time.monotonic() - started - within


@dataclass(frozen=True)
class Look:
    """One way to look at a run.

    kind: its name. verb: --VERB_every are the steps between two. forwards: passes of the UNet, each
    time. at_ends: times before and after the steps, which no frequency changes. between: in
    mid-run.
    """

    kind: str
    verb: str
    forwards: int
    at_ends: int
    between: int

    @property
    def work(self) -> int:
        """Forward passes of the whole run."""
        return self.forwards * (self.at_ends + self.between)


def looks_of(run: Run) -> dict[str, Look]:
    """Kind → the look of it that a run plans, of those that it does at all; of this process's
    work, as `training_forwards`."""
    steps = run.plan.num_steps
    # the base and, where that is another model, the one at step 0; then the last one
    ends = 3 if run.config.init_path else 2
    drawn = run.schedule
    found = [Look("samples", "sample", drawn.forwards, drawn.at_ends, len(drawn.steps))]
    if every := run.validation.every:
        items = sum(map(len, run.validation.items.values()))
        mine = items if run.joint else math.ceil(items / run.plan.num_processes)
        found.append(Look("validation", "validate", mine, ends, math.ceil(steps / every) - 1))
    if scores := run.scores:
        times = math.ceil(steps / scores.every) - 1
        found.append(Look("scores", "score", scores.forwards, ends, times))
    return {look.kind: look for look in found if look.forwards}


def too_many_looks(looks: Collection[Look], steps: int, training: int) -> str:
    """A line on looks that take more than MOST of the work, with frequencies that would not; ""
    where they take less.

    steps: of the run. training: forward passes that its steps are worth.
    """
    work = sum(look.work for look in looks)
    if work <= MOST * (work + training):
        return ""
    parts = ", ".join(f"{look.kind} {_percent(look.work, work + training)}" for look in looks)
    return (
        f"about {_percent(work, work + training)} of the time is for looking at the run "
        f"({parts}): {'; '.join(_remedies(looks, steps, MOST / (1 - MOST) * training))}"
    )


def _remedies(looks: Collection[Look], steps: int, most: float) -> list[str]:
    """Frequencies with which looks take `most` forward passes: as few of the looks as suffice are
    changed, the dearest in mid-run first, and share the room alike. Where no frequency suffices,
    another option comes first, and then those of the other looks."""
    if sum(look.work for look in looks) <= most:
        return []
    ranked = sorted(looks, key=lambda look: -look.forwards * look.between)
    for count in range(1, len(ranked) + 1):
        room = most - sum(look.forwards * look.at_ends for look in ranked[:count])
        room -= sum(look.work for look in ranked[count:])
        if room >= 0:
            return [f"{' and '.join(_frequencies(ranked[:count], steps, room))} would take less"]
    ends = {look.kind: look.forwards * look.at_ends for look in looks}
    kind = max(ends, key=ends.__getitem__)
    if "validation" in ends and sum(ends.values()) - ends["validation"] <= most:
        kind = "validation"  # which can be left out
    remedy = LESS[kind]
    if kind != "validation":
        who = f"the {kind}" if ends[kind] > most else f"{' and '.join(ends)}"
        remedy = f"{who} before and after training alone take more than a tenth: {remedy}"
    return [remedy, *_remedies([look for look in looks if look.kind != kind], steps, most)]


def _frequencies(looks: Sequence[Look], steps: int, room: float) -> Iterator[str]:
    """Yield the frequency of each look with which they take `room` forward passes in mid-run."""
    for i, look in enumerate(looks):
        between = math.floor(room / (len(looks) - i) / look.forwards)
        room -= between * look.forwards
        yield f"--{look.verb}_every {math.ceil(steps / (between + 1))}"


def _percent(part: int, whole: int) -> str:
    return f"{max(1, round(100 * part / whole))} %"
