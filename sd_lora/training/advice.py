"""Flags that make a step fit, by counted bytes: for a run that is out of memory, and for one that
is only planned."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import nn

from sd_lora.adapters.inject import lora_layers
from sd_lora.config.rows import LOWER
from sd_lora.config.schema import OPTIONS, RunConfig
from sd_lora.data.batches.stream import Batch
from sd_lora.errors import UsageError
from sd_lora.files import size_text
from sd_lora.models.families import INPAINTING
from sd_lora.models.load import Base
from sd_lora.models.meta_pipeline import build_on_meta
from sd_lora.training.fit import Fit
from sd_lora.training.memory import RESERVE, Shape, count_step, room_of
from sd_lora.training.offload import modules_of
from sd_lora.training.out_of_memory import flag, remedies
from sd_lora.training.plan import Plan
from sd_lora.training.processes import vae_dtype
from sd_lora.training.recompute import without_budget
from sd_lora.training.run import Run

SMALLER = (0.75, 0.5)
"""Shares of the images' sides that a message tries."""


@dataclass(frozen=True)
class Rung:
    """A step with some flags. words: the last of them. beside: bytes on the device that the count
    of a step leaves out."""

    words: str
    config: RunConfig
    shape: Shape
    beside: int


@dataclass(frozen=True)
class Place:
    """The run and the device that a step belongs to.

    at_once: see `Fit`. device: "cuda", "cpu", …. beside: option that keeps frozen models off the
    device → their bytes on it. resumes: whether steps are done, with options that may not change.
    """

    plan: Plan
    device: str
    beside: Mapping[str, int]
    at_once: int | None = None
    resumes: bool = False


def shape_of(batch: Batch, fit: Fit) -> Shape:
    """The images that go through the device at once, all as large as the largest."""
    sizes = [item.crop.size for item in batch.items]
    number = len(sizes) if fit.at_once is None else min(len(sizes), fit.at_once)
    return Shape(number, max(sizes, key=lambda size: size[0] * size[1]))


def step_advice(run: Run, shape: Shape, resumes: bool) -> str:
    """Lines on a step's memory by count, the room for it, and flags that take less, the cheapest
    first, down to the first that fits.

    A count takes half a second for SD 1.5, and some seconds for SDXL.

    shape: of the step. resumes: whether there are steps that a resumed run keeps, and with them the
    options that it may not change.
    """
    device, blocks = run.accelerator.device, None
    config = without_budget(run.config, run.fit.checkpointing)
    if run.recomputed and not run.fit.checkpointing:
        blocks = run.recomputed.blocks
    beside = {name: _on_device(run, {name: held}) for name, held in _beside(run).items()}
    place = Place(run.plan, device.type, beside, run.fit.at_once, resumes)
    now = Rung("", config, shape, sum(beside.values()))
    count = count_step(config, run.meta_pipeline, shape, blocks)
    total, room = (
        count.peak + now.beside,
        room_of(device, count.frozen + _trained(run) + now.beside),
    )
    reserve = RESERVE if device.type != "cpu" else 0
    parts = f"frozen {size_text(count.frozen + now.beside)}, trained {size_text(count.trained)}"
    lines = [f"By count the step takes {size_text(total)} ({parts}, rest {size_text(count.rest)})"]
    if room is not None:
        lines[0] += f", and {device.type} has {size_text(room)} for it"
        if total + reserve <= room:
            lines[0] += ": other programs, or fragments between tensors, take the rest"
    lines.append("With less memory, each flag beside those before it:")
    for rung in rungs(place, now):
        needed = count_step(rung.config, run.meta_pipeline, rung.shape).peak + rung.beside
        fits = room is not None and needed + reserve <= room and needed < total
        lines.append(f"  {rung.words}: {size_text(needed)}" + ", which fits" * fits)
        if fits:
            break
    if run.config.fit == "off" or resumes:
        lines.append(
            "or --fit auto, which tries checkpointing and fewer images at once before the first "
            "step, and keeps samples and order (docs/memory.md)"
        )
    return "\n".join(lines)


def rungs(place: Place, step: Rung) -> Iterator[Rung]:
    """Yield flags that take less memory, each with those before it, in order of least cost."""
    found = [(n, v) for n, v in remedies(step.config, "a step") if _is_of_use(place, n)]
    # with other options a resumed run would be another one; else fewer images at once come first
    free = [*(filter if place.resumes else takewhile)(_may_change, found)]
    for name, value in free:
        step = _with(place, step, name, value)
        yield step
    if place.resumes:
        return
    if place.at_once is None:
        batches = [*_smaller_batches(place.plan, step)]
        yield from batches
        step = batches[-1] if batches else step
    for name, value in found:
        if (name, value) in free:
            continue
        if value != LOWER:
            try:
                step = _with(place, step, name, value)
            except UsageError:  # it does not go with the run's other options
                continue
            yield step
            continue
        for share in SMALLER:
            side = int(getattr(step.config, name) * share) // 64 * 64
            words = f"--{name} {max(64, side)}"
            yield replace(step, words=words, shape=_scaled(step.shape, share))


def flags_that_fit(
    place: Place, step: Rung, bytes_of: Callable[[Rung], int], room: int
) -> tuple[str | None, int]:
    """Flags with which a step takes no more than a room, None if none are enough, and its bytes
    then. bytes_of: a step with some flags → its bytes."""
    words, needed = list[str](), 0
    for rung in rungs(place, step):
        needed, name = bytes_of(rung), rung.words.split()[0]
        # a later value of a flag replaces the one before
        words = [w for w in words if w.split()[0] != name] + [rung.words]
        if needed <= room:
            return ", ".join(words), needed
    return None, needed


def _with(place: Place, step: Rung, name: str, value: object) -> Rung:
    """A step with one flag more."""
    costs = OPTIONS[name].costs
    words = flag(name, value) + (f" ({costs})" if costs else "")
    config = step.config.replace(**{name: value})
    beside = step.beside - place.beside.get(name, 0)
    return replace(step, words=words, config=config, beside=beside)


def _smaller_batches(plan: Plan, step: Rung) -> Iterator[Rung]:
    """Yield the same number of images a step, fewer and fewer at once, down to one."""
    batch = plan.epochs.batch // plan.num_processes
    accumulation, part = plan.epochs.accumulation, batch
    while part > 1:
        part = next(n for n in range(part // 2, 0, -1) if part % n == 0)
        steps = accumulation * batch // part
        words = f"--batch {part} --gradient_accumulation_steps {steps} (as many images a step)"
        number = -(-step.shape.number * part // batch)
        config = step.config.replace(gradient_accumulation_steps=steps)
        yield replace(step, words=words, config=config, shape=Shape(number, step.shape.size))


def _may_change(remedy: tuple[str, object]) -> bool:
    return OPTIONS[remedy[0]].may_change


def _is_of_use(place: Place, name: str) -> bool:
    """Whether a flag takes less memory on this device."""
    return place.device == "cuda" or not OPTIONS[name].without_gpu


def _scaled(shape: Shape, factor: float) -> Shape:
    """Smaller images, in multiples of 64 pixels as UNets of Stable Diffusion take them."""
    width, height = (max(64, round(side * factor / 64) * 64) for side in shape.size)
    return Shape(shape.number, (width, height))


def _beside(run: Run) -> dict[str, list[nn.Module]]:
    """Option that keeps frozen models off the device → these models, which no count has: the VAE,
    and text encoders that do not learn."""
    encoders = [] if len(run.models) > 1 else [*run.text.encoders.values()]
    return {"cache_latents": [run.parts.vae], "cache_text_embeddings": encoders}


def encodes_in_steps(plan: Plan, base: Base) -> bool:
    """Whether a run's steps encode images; those of an inpainting UNet do so with what their masks
    leave."""
    return plan.encodes_images or base.task is INPAINTING


def beside_of(config: RunConfig, base: Base, encodes: bool) -> dict[str, int]:
    """Option that keeps frozen models off the device → their bytes on it beside a step; see
    `Place`. encodes: whether steps encode images."""
    beside = {}
    if encodes:
        vae = build_on_meta("vae", base.vae_config)
        width = vae_dtype(config).itemsize
        beside["cache_latents"] = width * sum(p.numel() for p in _staying(config, vae))
    if config.cache_text_embeddings == "no" and not config.trains_text:
        size = sum(p.nbytes for e in encoders_of(base) for p in _staying(config, e))
        beside["cache_text_embeddings"] = size
    return beside


def encoders_of(base: Base) -> list[nn.Module]:
    """The text encoders of a base, in float32 on the meta device."""
    models = base.meta_pipeline.models
    return [models[name] for name in base.family.text_encoders if name in models]


def _staying(config: RunConfig, model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a frozen model that are on the device beside a step."""
    inside = modules_of(model) if config.offload_weights else set[nn.Module]()
    for module in model.modules():
        if module not in inside:
            yield from module.parameters(recurse=False)


def _on_device(run: Run, models: dict[str, list[nn.Module]]) -> int:
    """Bytes of those models that are on the run's device."""
    kind = run.accelerator.device.type
    found = [p for group in models.values() for model in group for p in model.parameters()]
    return sum(p.nbytes for p in found if p.device.type == kind)


def _trained(run: Run) -> int:
    """Bytes of the deltas and of the optimiser's state that are there now."""
    layers = [p for model in run.models.values() for p in lora_layers(model)]
    state = [v for s in run.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return sum(t.nbytes for t in (*layers, *state))
