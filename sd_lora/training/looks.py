"""The share of a run's time in which it is looked at: samples, validation, scores.

Before the run it is counted in forward passes of the UNet, after it in seconds.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sd_lora.training.run import Run

MOST = 0.1
"""Share of the work above which the summary names the frequency that costs no more."""


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


def looks_of(run: Run) -> list[Look]:
    """The looks that a run plans, those that it does at all."""
    steps = run.plan.num_steps
    found = [Look("samples", "sample", run.schedule.forwards, 2, len(run.schedule.steps))]
    if every := run.validation.every:
        items = sum(map(len, run.validation.items.values())) // run.plan.num_processes
        found.append(Look("validation", "validate", items, 2, math.ceil(steps / every) - 1))
    if scores := run.scores:
        times = math.ceil(steps / scores.every) - 1
        found.append(Look("scores", "score", scores.forwards, 2, times))
    return [look for look in found if look.forwards]


def too_many_looks(looks: Sequence[Look], steps: int, training: int) -> str:
    """A line on looks that take more than MOST of the work, with the frequency of the dearest that
    would not; "" where they take less.

    steps: of the run. training: forward passes that its steps are worth.
    """
    work = sum(look.work for look in looks)
    if work <= MOST * (work + training):
        return ""
    dearest = max(looks, key=lambda look: look.work)
    room = MOST / (1 - MOST) * training - (work - dearest.work)
    between = math.floor(room / dearest.forwards) - dearest.at_ends
    if between > 0:
        remedy = f"--{dearest.verb}_every {math.ceil(steps / (between + 1))} would take less"
    elif dearest.kind == "validation":
        remedy = f"--{dearest.verb}_every 0 leaves it out"
    else:
        remedy = (
            f"even before and after alone the {dearest.kind} are as much: draw fewer images, with "
            "fewer sampler steps, or train longer"
        )
    parts = ", ".join(f"{look.kind} {_percent(look.work, work + training)}" for look in looks)
    return (
        f"about {_percent(work, work + training)} of the time are for looking at the run "
        f"({parts}): {remedy}"
    )


def _percent(part: int, whole: int) -> str:
    return f"{max(1, round(100 * part / whole))} %"
