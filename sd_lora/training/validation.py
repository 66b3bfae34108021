"""Validation: the images, noise and timesteps by which a run is measured, and the losses so far.

The loss of one step says little, since losses differ tenfold by timestep. Here the noise and the
timesteps of each image are always the same and never trained, so that two measurements differ by
the model alone: their difference, image by image, has an interval.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sd_lora.data.batches.caption_rules import longest_form
from sd_lora.data.batches.stream import BatchItem, ImageSet
from sd_lora.data.cache.store import digest_of
from sd_lora.data.images.buckets import Size
from sd_lora.data.sources.samples import Sample
from sd_lora.diffusion.timesteps import Timesteps
from sd_lora.errors import UsageError
from sd_lora.report.intervals import interval, is_better

NUM_ITEMS = 32
"""Measured losses of a group of images: each at its own place of the timesteps' distribution."""

LEVELS = 8
"""Parts of the trained timesteps of the curve by timestep, equally often trained."""

COST = 12
"""Images that are trained for each loss that is measured: a step on an image takes 2.2 times a
measurement or more, so that one takes at most 4 % of the time since the one before."""

TRAINED, HELD_OUT = "trained", "held out"
"""Groups of images."""

Losses = Mapping[str, Sequence[float]]
"""Group → loss of each item."""


def hold_out(
    usable: Sequence[tuple[Sample, Size]], count: int
) -> tuple[list[tuple[Sample, Size]], list[tuple[Sample, Size]]]:
    """Part usable images in those to train and `count` to hold out, chosen by their content alone.

    An image that is there several times is in one part only.

    Raises:
        UsageError: no image would be left to train.
    """
    digests = {sample.digest for sample, _ in usable}
    if count and count >= len(digests):
        raise UsageError(
            f"holdout {count} leaves none of {len(digests)} different images to train: lower it"
        )
    chosen = {*sorted(digests, key=lambda digest: digest_of("holdout", digest))[:count]}
    train = [pair for pair in usable if pair[0].digest not in chosen]
    return train, [pair for pair in usable if pair[0].digest in chosen]


def items_of(images: ImageSet, group: str) -> list[BatchItem]:
    """The items of a group of images: image after image, each at several places of the timesteps'
    distribution, which is divided evenly among the items."""
    indices: Sequence[int] = range(len(images.samples))
    if len(indices) > NUM_ITEMS:
        key = starmap(digest_of, ((group, images.samples[i].digest) for i in indices))
        indices = sorted(sorted(indices, key=[*key].__getitem__)[:NUM_ITEMS])
    found = []
    for place in range(NUM_ITEMS):
        index = indices[place % len(indices)]
        sample = images.samples[index]
        address = (images.seed, images.kind, f"validation of {group}", place)
        found.append(
            BatchItem(
                address=address,
                kind=group,
                index=index,
                caption=longest_form(sample.captions, sample.source.rules)[0],
                flip=False,
                crop=images.crop(index, address),
                weight=1.0,
                stratum=(place, NUM_ITEMS),
            )
        )
    return found


@dataclass
class Validation:
    """The measurements of a run.

    groups: group → its images. every: steps between two; 0: none at all. timesteps: of the items.
    patience: validations in a row without a better loss that end the run; None: any number.
    base: losses of the base model, the adapter switched off; None: not measured yet. rows: step →
    losses of the model after it. held: latents of items measured together, on the CPU.
    """

    groups: Mapping[str, ImageSet]
    every: int
    timesteps: Sequence[int]
    patience: int | None = None
    base: Losses | None = None
    rows: dict[int, Losses] = field(default_factory=dict)
    held: dict[tuple[str, int], list[Tensor | None]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        trained: ImageSet,
        held_out: ImageSet | None,
        timesteps: Timesteps,
        asked: int | None,
        samples_per_step: int,
        num_steps: int,
        wanted: bool,
        patience: int | None,
    ) -> "Validation":
        """The measurements to come of a run. asked: steps between two, None: of small cost. wanted:
        whether something rests on them, also in a short run. patience: see the class."""
        groups = {TRAINED: trained} | ({HELD_OUT: held_out} if held_out else {})
        between = COST * NUM_ITEMS * len(groups)  # images
        every = math.ceil(between / samples_per_step)
        if number := samples_per_step * num_steps // between:  # evenly: one is at the end anyway
            every = math.ceil(num_steps / number)
        if asked is not None:
            every = asked
        elif every > num_steps and not (held_out or wanted):
            every = 0  # it would take more than a tenth of the time of so short a run
        places = (torch.arange(NUM_ITEMS, dtype=torch.float64) + 0.5) / NUM_ITEMS
        return cls(groups, every, timesteps.of(places).tolist(), patience)

    def __post_init__(self) -> None:
        shown = self.groups if self.every else {}
        self.items = {group: items_of(images, group) for group, images in shown.items()}

    @property
    def captions(self) -> list[str | None]:
        """The captions of all items."""
        return [item.caption for items in self.items.values() for item in items]

    @property
    def text(self) -> str:
        """The measurements to come in words."""
        images = ", ".join(f"{len(s.samples)} {group}" for group, s in self.groups.items())
        return f"each {self.every} steps, on noise that is not trained ({images})"

    @property
    def judged_by(self) -> str:
        """The group by which models are compared: images held out where there are any."""
        return HELD_OUT if HELD_OUT in self.groups else TRAINED

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether the model is still to be measured after a step; always after the last one, if at
        all."""
        if not self.every or step in self.rows:
            return False
        return step % self.every == 0 or step == num_steps

    @property
    def best(self) -> int | None:
        """The step with the best loss: each better one is below the one before by more than the
        interval of their difference. None before the first measurement."""
        best: int | None = None
        for step, losses in self.rows.items():
            if best is None or is_better(losses[self.judged_by], self.rows[best][self.judged_by]):
                best = step
        return best

    def ended_after(self, step: int) -> bool:
        """Whether the run ends with the validation of a step: as many as the patience says have
        passed since the best one. Other steps end nothing."""
        if self.patience is None or step not in self.rows:
            return False
        best = self.best or 0
        return sum(step > best for step in self.rows) >= self.patience

    def facts(self, step: int) -> dict[str, Any]:
        """The numbers of a step for `best.json`."""
        group, base = self.judged_by, self.base or self.rows[step]
        return {
            "images": group,
            "loss": fmean(self.rows[step][group]),
            "loss_of_base": fmean(base[group]),
        }

    def state(self) -> dict[str, Any]:
        """The measurements, as a checkpoint holds them."""
        rows = [[step, _copied(losses)] for step, losses in self.rows.items()]
        return {"base": _copied(self.base) if self.base else None, "rows": rows}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the measurements of a checkpoint; those of other images are left out."""
        kept = {
            step: losses for step, losses in state["rows"] if losses.keys() == self.items.keys()
        }
        self.rows = kept
        self.base = state["base"] if kept else None

    def _changes(self) -> dict[str, list[float | None]]:
        """Mean change of the last measurement, and its interval: of the trained images since the
        base and since three quarters of the steps, and of the judged ones since the best step."""
        if not self.rows:
            return {}
        last = max(self.rows)
        late = max((step for step in self.rows if step <= 0.75 * last), default=min(self.rows))
        before = {
            "since_base": (TRAINED, self.base or self.rows[last]),
            "since_three_quarters": (TRAINED, self.rows[late]),
            "since_best": (self.judged_by, self.rows[self.best or 0]),
        }
        found = {}
        for name, (group, losses) in before.items():
            values = interval(self.rows[last][group], losses[group])
            found[name] = [value if math.isfinite(value) else None for value in values]
        return found

    def record(self) -> dict[str, Any]:
        """The measurements for report.json: means of each group and of its timesteps' parts."""
        if self.base is None:
            return {}
        size = NUM_ITEMS // LEVELS
        return {
            "images": {group: len(images.samples) for group, images in self.groups.items()},
            "judged_by": self.judged_by,
            "timesteps": [
                [self.timesteps[i * size], self.timesteps[(i + 1) * size - 1]]
                for i in range(LEVELS)
            ],
            "base": _means(self.base),
            "best": self.best,
            **self._changes(),
            "rows": [{"step": step, **_means(losses)} for step, losses in self.rows.items()],
        }


def _copied(losses: Losses) -> dict[str, list[float]]:
    return {group: [*values] for group, values in losses.items()}


def _means(losses: Losses) -> dict[str, dict[str, Any]]:
    """Group → mean loss, and those of the timesteps' parts, for JSON."""
    size = NUM_ITEMS // LEVELS
    return {
        group: {
            "loss": _finite(values),
            "levels": [_finite(values[i : i + size]) for i in range(0, NUM_ITEMS, size)],
        }
        for group, values in losses.items()
    }


def _finite(values: Sequence[float]) -> float | None:
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None
