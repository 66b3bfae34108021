"""Numbers that are not sound: the batch that gave them, factors that give them, deltas that get no
gradient. Nothing of the kind is saved."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sd_lora.adapters.inject import deltas_of
from sd_lora.data.batches.stream import Batch
from sd_lora.errors import RunError
from sd_lora.findings import Finding
from sd_lora.report.events import Warned
from sd_lora.training.checkpoint_folders import RESUME
from sd_lora.training.run import Run

MOST_NAMED = 6
"""Images, or modules, that a message names."""

LOWER = f"Lower --learning_rate, and start anew or with {RESUME}"

NOT_SAVED = f": the run has diverged, and nothing of this step is saved. {LOWER}"


class Diverged(RunError):
    """Numbers of a step that are not finite. step, found: its number, and the fault, known to all
    processes."""

    step: int
    found: str


def diverged(step: int, found: str, remedy: str) -> Diverged:
    """The error of a step; its text is the fault and the remedy."""
    error = Diverged(f"{found}{remedy}")
    error.step, error.found = step, found  # an exception is pickled by its text and attributes
    return error


BatchLoss = Callable[[Run, Batch, int], Tensor]
"""The loop's loss of a micro-batch, after a number of steps."""


def images_of(run: Run, step: int) -> str:
    """The images of a step on all processes, with captions and timesteps, for messages."""
    epochs, timesteps = run.plan.epochs, run.objective.timesteps
    named: list[str] = []
    number = 0
    for micro in range(epochs.first_of_step(step - 1), epochs.first_of_step(step)):
        items = run.stream.items_of(micro)
        number += len(items)
        strata, pixels = [item.stratum for item in items], [item.crop.pixels for item in items]
        drawn = timesteps.draw([item.address for item in items], strata, pixels).tolist()
        for item, t in list(zip(items, drawn, strict=True))[: MOST_NAMED - len(named)]:
            name = run.stream.sets[item.kind].samples[item.index].name
            named.append(f"{name} ({item.caption!r}, timestep {t})")
    more = f" and {number - len(named)} more" * (number > len(named))
    return f"{'; '.join(named)}{more}"


@contextmanager
def overflow_is_divergence(step: int) -> Iterator[None]:
    """Raise Diverged for an update beyond float32, as of a rate of 1e38."""
    try:
        yield
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        found = f"the update of step {step} is beyond float32"
        raise diverged(step, found, f": the learning rate is far too high. {LOWER}") from None


@torch.no_grad()
def refuse_ruined(run: Run, step: int, batch_loss: BatchLoss) -> None:
    """Check a model before it is saved: its factors, and its loss on a batch of the last step.

    An update can ruin a model in the very step that is saved, whose own loss was finite.

    Args:
        run: as it is after the step.
        step: number of steps done.
        batch_loss: the loss of a micro-batch.

    Raises:
        Diverged: factors or a loss that are not finite.
    """
    ruined = [
        f"{component} {name}"
        for component, model in run.models.items()
        for name, largest in _largest(model).items()
        if not math.isfinite(largest)
    ]
    if ruined:
        found = f"{len(ruined)} modules hold NaN or infinite values after step {step} ({ruined[0]}"
        raise diverged(step, f"{found} the first)", NOT_SAVED)
    batch = run.batch(run.plan.epochs.first_of_step(step) - 1)
    if batch is None:  # an image is lost, of which its own step tells
        return
    alone = dataclasses.replace(run, prepared=run.models, text=run.text.without_learning())
    with evaluating([*run.models.values(), *run.text.encoders.values()]):
        value = batch_loss(alone, batch, step)
        # where all processes check, all find the same
        loss = float(run.accelerator.reduce(value, "mean") if run.joint else value)
    if not math.isfinite(loss):
        found = f"after step {step} the loss on images of this step is {loss}"
        raise diverged(step, found, NOT_SAVED)


def _largest(model: nn.Module) -> dict[str, float]:
    """Delta name → largest number of its tensors, read from the device at once."""
    largest = {
        name: torch.stack(torch._foreach_norm([*delta.tensors().values()], math.inf)).sum()
        for name, delta in deltas_of(model).items()
    }
    return dict(zip(largest, torch.stack([*largest.values()]).tolist(), strict=True))


@contextmanager
def evaluating(models: list[nn.Module]) -> Iterator[None]:
    """Models without dropout for a while; each module has its own mode afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def tell_silent(run: Run, step: int) -> None:
    """Warn of deltas and new words without any gradient in the first step: they cannot learn.

    B alone has one there, since B = 0 leaves A's at zero. step: number of steps done.
    """
    if run.config.module_dropout:  # leaves modules out by chance
        return
    stopped = {id(p) for p in run.text.stops.stopped_parameters(step)}
    groups = {
        f"{component} {name}": [p for p in delta.parameters() if id(p) not in stopped]
        for component, model in run.models.items()
        for name, delta in deltas_of(model).items()
    }
    tokens = run.text.tokens
    if tokens:
        groups |= {
            f"new words of the {component}": [p for p in [table.new] if id(p) not in stopped]
            for component, table in tokens.embeddings.items()
        }
    grads = {name: [p.grad for p in ps if p.grad is not None] for name, ps in groups.items() if ps}
    flat = [grad for found in grads.values() for grad in found]
    sizes = iter(torch.stack(torch._foreach_norm(flat)).tolist() if flat else ())
    norms = {name: [next(sizes) for _ in found] for name, found in grads.items()}
    # NaN is a gradient, too, of which the log tells
    silent = [name for name, found in norms.items() if all(norm == 0 for norm in found)]
    if silent:
        named = ", ".join(silent[:MOST_NAMED]) + ", …" * (len(silent) > MOST_NAMED)
        details = f"{len(silent)} of {len(grads)} trained modules have no gradient: {named}"
        run.emit(Warned([Finding("no-gradient", f"step {step + 1}", details)]))
