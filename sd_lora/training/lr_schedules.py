"""Learning-rate schedules: factors of the rate by the number of optimiser steps done."""

import bisect
import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler

from sd_lora.config.options.training import step_rules
from sd_lora.config.schema import RunConfig
from sd_lora.errors import UsageError
from sd_lora.files import utf8_text

Factor = Callable[[int], float]
"""Number of optimiser steps done → factor of the learning rate."""


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: RunConfig, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A learning-rate schedule counted in optimiser steps; `config.rows.SCHEDULES` has the names.

    The loop steps it once per optimiser step. Accelerate would step it once per process; so neither
    accumulation nor the number of processes changes it. It counts the optimiser's steps by another
    `step`, and must do so before Accelerate keeps that for fp16: torch would warn.
    """
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor_of(config, num_steps))


def factor_of(config: RunConfig, num_steps: int) -> Factor:
    """The schedule of a run of `num_steps` optimiser steps.

    Raises:
        UsageError: a file of points that cannot be read.
    """
    warmup = config.num_warmup_steps(num_steps)
    last = max(num_steps, warmup + 1)  # no division by 0, in the call after the last step too
    shape = SHAPES.get(config.lr_scheduler, _of_diffusers)(config, warmup, last)
    least = config.lr_min_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return least + (1 - least) * shape(step)

    return factor


def _of_diffusers(config: RunConfig, warmup: int, num_steps: int) -> Factor:
    """A schedule of diffusers. Its polynomial one ends at a rate of 1e-7 whatever the first one is,
    here at 1e-4 of any rate, which is the same beside 1e-3."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)  # of which it takes that rate
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=warmup,
        num_training_steps=num_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    return schedule.lr_lambdas[0]


def _piecewise(config: RunConfig, warmup: int, num_steps: int) -> Factor:
    """Constant between steps, as diffusers' schedule of that name."""
    rules = step_rules(config.lr_step_rules or "1")
    return lambda step: next(factor for factor, before in rules if step < before)


def _inverse_sqrt(config: RunConfig, warmup: int, num_steps: int) -> Factor:
    """1/√(step / warm-up) after a warm-up (Vaswani et al. 2017, section 5.3)."""
    start = max(1, warmup)
    return lambda step: math.sqrt(start / max(start, step))


def _warmup_stable_decay(config: RunConfig, warmup: int, num_steps: int) -> Factor:
    """Constant, then 1 − √x over the last steps (Hägele et al. 2024, section 3)."""
    given = config.lr_decay_steps
    decay = max(1, min(round(given * num_steps) if given < 1 else given, num_steps - warmup))
    start = num_steps - decay
    return lambda step: 1 - math.sqrt(min(1.0, max(0, step - start) / decay))


def _rex(config: RunConfig, warmup: int, num_steps: int) -> Factor:
    """(1 − x) / (1 − x/2), between linear and delayed linear (Chen et al. 2021, section 3)."""
    length = num_steps - warmup

    def factor(step: int) -> float:
        left = 1 - min(1.0, (step - warmup) / length)
        return left / (0.5 + 0.5 * left)

    return factor


def _points(config: RunConfig, warmup: int, num_steps: int) -> Factor:
    """Straight lines between the points of a file; constant before the first and after the last."""
    points = read_points(Path(config.lr_points or ""), num_steps)
    steps = [step for step, _ in points]

    def factor(step: int) -> float:
        after = bisect.bisect_right(steps, step)
        if after in (0, len(points)):
            return points[max(0, after - 1)][1]
        (a, low), (b, high) = points[after - 1], points[after]
        return low + (high - low) * (step - a) / (b - a)

    return factor


SHAPES: dict[str, Callable[[RunConfig, int, int], Factor]] = {
    "piecewise_constant": _piecewise,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
    "rex": _rex,
    "points": _points,
}
"""Name of a schedule that is not diffusers' → its factors after the warm-up, by the configuration,
the steps of warm-up and the steps of the run."""


def read_points(path: Path, num_steps: int) -> list[tuple[float, float]]:
    """(Step, factor) of each line of a file: "0 0", "10% 1", "1000 0.1".

    num_steps: of the run, of which a percentage is a share. Empty lines, and what follows a #, are
    left out; a comma may stand between the numbers.

    Raises:
        UsageError: no such file; a line without two numbers; steps that fall; a factor below 0.
    """
    if not path.is_file():
        raise UsageError(f"lr_points {path} does not exist")
    try:
        lines = utf8_text(path).splitlines()
    except UsageError as error:
        raise UsageError(f"lr_points {path} {error}") from None
    points: list[tuple[float, float]] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            place, value = words
            share = place.endswith("%")
            step = float(place.rstrip("%")) * (num_steps / 100 if share else 1)
            factor = float(value)
            sound = math.isfinite(step) and 0 <= factor < math.inf and step >= 0
            sound = sound and not (points and step < points[-1][0])
        except ValueError:
            sound = False
        if not sound:
            raise UsageError(
                f"lr_points {path}, line {number}: {line.strip()!r:.40} is not a step, or a "
                "percentage of the run, and a factor of the learning rate, both from 0 on, the "
                "steps in their order: 100 0.5"
            )
        points.append((step, factor))
    if not points:
        raise UsageError(f"lr_points {path} holds no points")
    return points
