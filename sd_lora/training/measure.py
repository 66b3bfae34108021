"""Losses of a run's model on its validation items, in eval mode: nothing of the run changes. And
on its first steps, when it is trained.

The latents are read once, so that an image lost later ends no run that only measures it.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from sd_lora.adapters.merging import switched_off
from sd_lora.data.batches.stream import BatchItem, ImageSet
from sd_lora.diffusion.loss import target_of
from sd_lora.models.families import INPAINTING
from sd_lora.report.events import Validated, ValidationDone
from sd_lora.training.batch_loss import Question, batch_loss
from sd_lora.training.looks import timed
from sd_lora.training.out_of_memory import memory_for
from sd_lora.training.run import Run
from sd_lora.training.soundness import evaluating
from sd_lora.training.validation import Losses

FIRST_STEPS = 20
"""Number of first steps whose batches and noise the trained model is asked again."""


def validate_if_due(run: Run, step: int) -> None:
    """Validate after a step where that, or a score, is due: a verdict is of both."""
    if validation_is_due(run, step):
        validate(run, step)


def validation_is_due(run: Run, step: int) -> bool:
    """Whether the model is to be measured after a step."""
    validation, scores, num_steps = run.validation, run.scores, run.plan.num_steps
    due = validation.is_due(step, num_steps)
    if scores and validation.every and step not in validation.rows:
        due |= scores.is_due(step, num_steps)
    return due


def validate(run: Run, step: int) -> None:
    """Measure the model after a step, as it would be exported, and tell the losses; the base model
    too, the first time. All processes must do it, each measures a part."""
    validation = run.validation
    with memory_for("checking the model", run.config), timed(run, "validation"):
        if validation.base is None:
            with ExitStack() as stack:
                for model in run.models.values():
                    stack.enter_context(switched_off(model))
                validation.base = measured(run, 0)
        is_base = step == 0 and run.start is None  # ΔW is 0
        if is_base:
            validation.rows[step] = validation.base
        else:
            with run.averaged():
                validation.rows[step] = measured(run, step)
    run.emit(ValidationDone(step, validation.rows[step], validation.record()))


@torch.no_grad()
def measured(run: Run, step: int) -> Losses:
    """Loss of each item of the run's validation, by its models as they are, on all processes.
    step: number of steps done."""
    alone = dataclasses.replace(run, prepared=run.models, text=run.text.without_learning())
    losses: dict[str, list[float]] = {}
    with evaluating([*run.models.values(), *run.text.encoders.values()]):
        for group, items in run.validation.items.items():
            values = torch.zeros(len(items), device=run.accelerator.device)
            for places in _parts(run, items):
                part = [items[place] for place in places]
                key = (group, places[0])
                if key not in run.validation.held:
                    held = _read(run, run.validation.groups[group], part)
                    run.validation.held[key] = [x if x is None else x.cpu() for x in held]
                values[places] = _losses(alone, part, run.validation.held[key], step)
            process, number = run.accelerator.process_index, run.accelerator.num_processes
            mine = torch.zeros_like(values)
            mine[process::number] = values[process::number]
            losses[group] = run.accelerator.reduce(mine, "sum").tolist()
    return losses


def _parts(run: Run, items: list[BatchItem]) -> Iterator[list[int]]:
    """Yield the places of items that this process measures together: of one size, as many as a
    training step has room for. Processes that share a base all measure everything."""
    process, number = run.accelerator.process_index, run.accelerator.num_processes
    most = run.fit.at_once or run.plan.epochs.batch // number
    groups: dict[object, list[int]] = {}
    for place in range(len(items)) if run.joint else range(process, len(items), number):
        groups.setdefault(items[place].crop.size, []).append(place)
    for places in groups.values():
        for start in range(0, len(places), most):
            yield places[start : start + most]


def _read(run: Run, images: ImageSet, items: list[BatchItem]) -> list[Tensor | None]:
    """Latents x0 (B, C, H, W) of items of one size, their masks (B, 1, H, W), and an inpainting
    UNet's further channels (B, 1 + C, H, W)."""
    loaded = [
        run.latents.table.loaded(
            images.samples[item.index], item.crop, False, images.is_random(item.index)
        )
        for item in items
    ]
    drawn = run.latents.latents(items, loaded)
    further = run.latents.masked(items, loaded) if run.parts.task is INPAINTING else None
    run.latents.check()
    return [drawn.x0, drawn.mask, further]


def _losses(run: Run, items: list[BatchItem], held: Sequence[Tensor | None], step: int) -> Tensor:
    """Losses of items of one size (B,), as training has them, at their own timesteps. held: their
    latents, of `_read`."""
    objective, device = run.objective, run.accelerator.device
    schedule, addresses = objective.schedule, [item.address for item in items]
    x0, mask, further = (None if x is None else x.to(device) for x in held)
    assert x0 is not None
    noise = objective.noise.draw(x0 / schedule.data_std, addresses)
    places = [item.stratum[0] for item in items if item.stratum]
    t = torch.tensor([run.validation.timesteps[place] for place in places], device=device)
    x_t = schedule.add_noise(x0, noise, t)
    if further is not None:
        x_t = torch.cat([x_t, further], dim=1)
    x_t, target = x_t.to(run.text.dtype), target_of(x0, noise, t, schedule)
    conditions = run.conditions(items, step)
    question = Question(x_t, schedule.timesteps[t], conditions, target, t, mask)
    return question.losses(run.prepared["unet"], objective)


@torch.no_grad()
def replay(run: Run) -> tuple[float, float]:
    """Mean loss of the first steps as logged, and of the same batches and noise now.

    Single losses say little: they differ tenfold by timestep. Randomness is a function of the
    position, so the first steps can be computed once more. The first number is NaN on other
    processes than the main one, and where a resumed run's log is gone.
    """
    steps = min(FIRST_STEPS, run.plan.num_steps)
    first = []
    if run.main:
        first = [row["loss"] for row in run.log.rows() if row["step"] <= steps]
    for model in run.models.values():
        model.eval()
    # no gradients, so nothing to exchange
    alone = dataclasses.replace(run, prepared=run.models, text=run.text.without_learning())
    losses = []
    for number in range(run.plan.epochs.first_of_step(steps)):
        batch = run.batch(number)
        if batch is None:  # a lost image costs a number now, not the trained LoRA
            losses = [torch.tensor(math.nan, device=run.accelerator.device)]
            break
        losses.append(batch_loss(alone, batch, run.plan.num_steps) / batch.accumulation_steps)
    mean = torch.stack(losses).sum() / steps
    trained = float(run.accelerator.reduce(mean, "mean"))
    mean_first = sum(first) / steps if len(first) == steps else math.nan
    run.emit(Validated(steps, mean_first, trained))
    return mean_first, trained
