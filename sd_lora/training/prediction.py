"""A planned run on a card: whether its steps fit, and their least time, by count."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch

from sd_lora.config.rows import Work
from sd_lora.config.schema import RunConfig
from sd_lora.data.cache.encode import at_once_on_card
from sd_lora.data.images.buckets import Size
from sd_lora.files import size_text
from sd_lora.models.load import Base
from sd_lora.models.meta_pipeline import MetaPipeline, build_on_meta
from sd_lora.report.summary import duration
from sd_lora.sampling.sampler import LARGEST_WHOLE
from sd_lora.training.advice import (
    Place,
    Rung,
    beside_of,
    encoders_of,
    encodes_in_steps,
    flags_that_fit,
)
from sd_lora.training.budget import largest_shape
from sd_lora.training.cards import Card
from sd_lora.training.memory import GIB, RESERVE, Shape, StepBytes, count_step, count_vae
from sd_lora.training.out_of_memory import flag, remedies
from sd_lora.training.plan import Plan
from sd_lora.training.processes import chosen_precision, of_card, vae_dtype
from sd_lora.training.recompute import Recomputed, without_budget

MOST_COUNTED = 3
"""Buckets whose steps are counted: the largest, and those with most samples. A count takes a second
for SD 1.5 and four for SDXL, once with and once without checkpointing; a run may have 30 buckets,
nearly alike in area."""


@dataclass(frozen=True)
class Step:
    """A step of a bucket on a card. peak: bytes on it, the reserve included. seconds: at least."""

    peak: int
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """Memory and time of a run's steps on a card.

    config: of the run there, its precision chosen. steps: bucket → step without gradient
    checkpointing, but that of the run's budget, and step with it. flags: that are needed, "" if it
    fits as it is, None if none are enough. needed: bytes with them. others: work of the run outside
    of its steps, "encoding images", "drawing sample images" → bytes, the reserve included.
    """

    card: Card
    config: RunConfig
    num_images: int
    num_steps: int
    shares: Mapping[Size, float]
    steps: Mapping[Size, tuple[Step, Step]]
    flags: str | None
    needed: int
    others: Mapping[Work, int]

    @property
    def checkpointed(self) -> bool:
        """Whether the run, as it is, has gradient checkpointing."""
        return self.config == self.config.replace(gradient_checkpointing=True)

    @property
    def peak(self) -> int:
        """Most bytes of any step, as the run is."""
        chosen = self.checkpointed
        return max(pair[chosen].peak for pair in self.steps.values())

    @property
    def seconds(self) -> float:
        """Least seconds of a step, on average over the buckets, as the run is."""
        chosen = self.checkpointed
        return sum(share * self.steps[b][chosen].seconds for b, share in self.shares.items())

    @property
    def answer(self) -> str:
        """One line: whether it fits, with which flags, and the time that it takes at least."""
        room = f"{self.card.memory:.0f} GiB"
        took = f"a step takes {size_text(self.peak)} of {room}"
        if self.flags == "":
            total = duration(self.num_steps * self.seconds)
            return (
                f"fits {self.card.name}: {took}, and at least {self.seconds:.2g} s; the run "
                f"({self.num_steps} steps) at least {total}{self.of_others}"
            )
        if self.flags is None:
            return f"does not fit {self.card.name}: {took}, and no flags here are enough"
        return (
            f"does not fit {self.card.name}: {took}; with {self.flags} it takes "
            f"{size_text(self.needed)}, which fits{self.of_others}"
        )

    @property
    def of_others(self) -> str:
        """Remarks on other work for which the card has too little memory; "" if it has enough."""
        return "".join(
            f". {work.capitalize()} takes {size_text(needed)}, and does not fit: add "
            f"{flag(*remedies(self.config, work)[0])}"
            for work, needed in self.others.items()
            if needed > self.card.memory * GIB
        )

    @property
    def table(self) -> list[tuple[str, ...]]:
        """Rows of cells: bucket, memory and time of a step, without and with checkpointing."""
        head = ("bucket", "memory", "s a step", "checkpointed", "s a step")
        rows = [
            (f"{w}×{h}", *(c for s in pair for c in (size_text(s.peak), f"{s.seconds:.2g}")))
            for (w, h), pair in sorted(self.steps.items(), key=lambda item: -_area(item[0]))
        ]
        return [head, *rows]

    def numbers(self) -> dict[str, object]:
        """Everything for scripts; bytes and seconds."""
        buckets = [
            {"bucket": bucket, "checkpointing": on, "bytes": step.peak, "seconds": step.seconds}
            for bucket, pair in self.steps.items()
            for on, step in zip((False, True), pair, strict=True)
        ]
        fits = {
            "fits": self.flags == "" and not self.of_others, "flags": self.flags,
            "bytes_with_flags": self.needed,
            "bytes_of_encoding": self.others["encoding images"],
            "bytes_of_samples": self.others.get("drawing sample images", 0),
        }  # fmt: skip
        return {"card": self.card.name, "bytes": int(self.card.memory * GIB), **fits} | {
            "seconds_a_step": self.seconds, "buckets": buckets,
        }  # fmt: skip


def predict(
    plan: Plan,
    base: Base,
    card: Card,
    recomputed: Recomputed | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Prediction:
    """Predict a planned run on a card.

    Args:
        recomputed: the blocks of the run's budget on this card, which its steps without
            checkpointing compute again.
        advance: called after both counts of each of the `counted_buckets`.
    """
    config = without_budget(of_card(plan.config, card.precision))
    number = largest_shape(plan).number
    chosen = recomputed.blocks if recomputed else None
    encodes = encodes_in_steps(plan, base)
    configs, beside = base.meta_pipeline, beside_of(config, base, encodes)
    held = sum(beside.values())
    counted: dict[Size, tuple[StepBytes, StepBytes]] = {}
    for bucket in counted_buckets(plan):
        pair = []
        for on in (False, True):
            shape, one = Shape(number, bucket), config.replace(gradient_checkpointing=on)
            pair.append(count_step(one, configs, shape, None if on else chosen))
        counted[bucket] = (pair[0], pair[1])
        advance()
    precision = chosen_precision(config)

    def step(count: StepBytes) -> Step:
        seconds = plan.epochs.accumulation * card.least_seconds(count, precision)
        return Step(count.peak + held + RESERVE, seconds)

    steps: dict[Size, tuple[Step, Step]] = {}
    for bucket in plan.epochs.buckets:
        # no smaller one: what is not counted takes less than this says
        like = min((b for b in counted if _area(b) >= _area(bucket)), key=_area)
        steps[bucket] = (step(counted[like][0]), step(counted[like][1]))
    total = sum(plan.epochs.buckets.values())
    shares = {bucket: samples / total for bucket, samples in plan.epochs.buckets.items()}
    largest = max(counted, key=_area)
    first = Rung("", config, Shape(number, largest), held)
    place = Place(plan, "cuda", beside)
    flags, needed = _flags(place, first, configs, card, counted[largest])
    count, in_steps = counted[largest][0], number * encodes
    others: dict[Work, int] = {
        "encoding images": _encoding(config, base, _encoded_at_once(plan), in_steps, count)
    }
    if config.draws_samples:
        others["drawing sample images"] = _drawing(config, base, largest, count)
    return Prediction(card, config, number, plan.num_steps, shares, steps, flags, needed, others)


def counted_buckets(plan: Plan) -> list[Size]:
    """Buckets whose steps are counted: the largest one first."""
    buckets = plan.epochs.buckets
    largest = max(buckets, key=_area)
    most = sorted(buckets, key=lambda bucket: (bucket != largest, -buckets[bucket]))
    return most[:MOST_COUNTED]


def _flags(
    place: Place, step: Rung, configs: MetaPipeline, card: Card, pair: tuple[StepBytes, StepBytes]
) -> tuple[str | None, int]:
    """Flags with which a step fits a card, and its bytes; see `Prediction`.

    pair: the step's counts without and with checkpointing.
    """
    room = int(card.memory * GIB)
    known = [
        (step.config.replace(gradient_checkpointing=on), pair[on].peak) for on in (False, True)
    ]

    def bytes_of(rung: Rung) -> int:
        same = [peak for config, peak in known if (config, step.shape) == (rung.config, rung.shape)]
        peak = same[0] if same else count_step(rung.config, configs, rung.shape).peak
        return peak + rung.beside + RESERVE

    needed = bytes_of(step)
    return ("", needed) if needed <= room else flags_that_fit(place, step, bytes_of, room)


def _encoded_at_once(plan: Plan) -> dict[Size, int]:
    """Size → images that a card encodes at once: no more than there are, with their flips."""
    there = Counter[Size]()
    for sample, size in zip(plan.images.samples, plan.images.buckets, strict=True):
        there[size] += 1 + sample.source.random_flip
    return {
        size: at_once_on_card(size) if plan.has_classes else min(at_once_on_card(size), number)
        for size, number in there.items()
    }


def _encoding(
    config: RunConfig, base: Base, most: Mapping[Size, int], in_steps: int, count: StepBytes
) -> int:
    """Bytes while images are encoded: by the VAE alone, or, where that is more, beside what a step
    holds of weights and states; see `Prediction`.

    most: size → images at once. in_steps: images that a step encodes; 0 where all are cached.
    count: of a step.
    """
    dtype = vae_dtype(config)
    vae = build_on_meta("vae", base.vae_config).to(dtype)

    def bytes_of(numbers: Mapping[Size, int]) -> int:
        size = max(numbers, key=lambda size: numbers[size] * _area(size))
        shape = (numbers[size], 3, *reversed(size))

        def encode(vae: Any) -> object:
            return vae.encode(torch.empty(shape, dtype=dtype, device="meta"))  # counted, too

        return count_vae(vae, encode)

    before = 0 if config.caches_no_latents else bytes_of(most)
    if not in_steps:
        return before + RESERVE
    fewer = {size: min(number, in_steps) for size, number in most.items()}
    return max(before, count.frozen + count.trained + bytes_of(fewer)) + RESERVE


def _drawing(config: RunConfig, base: Base, size: Size, count: StepBytes) -> int:
    """Bytes while a sample is drawn, beside what a step holds of weights and states: frozen text
    encoders that encode its prompt, or the VAE that decodes it; see `Prediction`.

    size: of the image. count: of a step.
    """
    dtype = vae_dtype(config)
    sides = (min(side // base.pixels_per_latent, isqrt(LARGEST_WHOLE)) for side in size)  # or tiles
    channels = base.vae_config.get("latent_channels", 4)
    x = torch.empty(1, channels, *sides, dtype=dtype, device="meta")

    def decode(vae: Any) -> object:
        return vae.decode(x)

    beside = count_vae(build_on_meta("vae", base.vae_config).to(dtype), decode)
    if not config.trains_text:
        beside = max(beside, sum(p.nbytes for e in encoders_of(base) for p in e.parameters()))
    return count.frozen + count.trained + beside + RESERVE


def _area(bucket: Size) -> int:
    return bucket[0] * bucket[1]
