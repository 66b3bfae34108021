"""The arithmetic of a run: epochs, batches and steps."""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from sd_lora.config.schema import RunConfig
from sd_lora.data.batches.epochs import Epochs
from sd_lora.data.batches.stream import ImageSet
from sd_lora.data.cache.store import digest_of
from sd_lora.data.images.buckets import Size
from sd_lora.errors import counted
from sd_lora.training import checkpoint


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run.

    images: the instances. epochs: the samples of each batch. num_steps: optimiser steps of the
    whole run. has_classes: whether an image of the class goes through the model beside each.
    """

    config: RunConfig
    images: ImageSet
    epochs: Epochs
    num_processes: int
    num_steps: int
    has_classes: bool = False

    @classmethod
    def of(
        cls, config: RunConfig, images: ImageSet, num_processes: int, has_classes: bool = False
    ) -> "Plan":
        epochs = Epochs(
            [images.buckets[index] for index in images.entries],
            config.train_batch_size * num_processes,
            config.gradient_accumulation_steps,
            config.bucket_leftovers,
            images.seed,
            images.kind,
        )
        num_steps = config.max_train_steps
        if config.num_train_epochs and not num_steps:
            num_steps = config.num_train_epochs * epochs.num_steps
        if not num_steps:
            _, length = config.default_length
            num_steps = length.num_steps(len(images.samples), epochs.batch * epochs.accumulation)
        return cls(config, images, epochs, num_processes, num_steps, has_classes)

    @property
    def seed(self) -> int:
        return self.images.seed

    @property
    def samples_per_step(self) -> int:
        return self.epochs.batch * self.epochs.accumulation

    @property
    def beside(self) -> int:
        """Images that go through the UNet beside each one: of the class, and itself once more."""
        return self.has_classes + self.config.preserves

    @property
    def encodes_images(self) -> bool:
        """Whether steps encode images: all, or those that are cut at random."""
        numbers = range(len(self.images.samples))
        return self.config.caches_no_latents or any(map(self.images.is_random, numbers))

    @property
    def num_samples(self) -> int:
        """Samples of an epoch that count in the loss."""
        return self.epochs.num_samples

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the whole run."""
        return self.epochs.first_of_step(self.num_steps)

    @cached_property
    def order(self) -> str:
        """Digest of the meaning of positions in the data: the entries of each step, and the rules
        by which captions, crops and flips are drawn for them."""
        steps: list[list[int]] = [[]]
        for micro in self.epochs.epoch(0):
            steps[-1] += [e.entry for e in micro.entries if e.counted]
            if micro.last:
                steps.append([])
        drawn = (
            repr(
                (s.source.rules, s.source.random_flip, s.source.random_crop, s.source.weight)
                + ((s.resolution,) if s.resolution else ())
            )
            for s in self.images.samples
        )
        return digest_of(repr([sorted(step) for step in steps]), *drawn)

    def progress(self, step: int) -> checkpoint.Progress:
        return checkpoint.Progress(
            step, self.seed, self.samples_per_step, self.num_samples, self.config.as_dict(),
            self.order, self.content,
        )  # fmt: skip

    @cached_property
    def content(self) -> str:
        """Digest of the images, their captions, masks and crops by hand, in order."""
        samples = self.images.samples
        masks = [repr((s.digest, s.mask.digest)) for s in samples if s.mask]
        crops = [repr((s.digest, s.hand_crop.numbers)) for s in samples if s.hand_crop]
        return digest_of(*(repr((s.digest, s.captions)) for s in samples), *masks, *crops)

    def data_hash(self, redrawn: list[tuple[int, int]]) -> str:
        """Hash of the samples of each step: of seed, order, images, captions, and parts whose noise
        was drawn anew."""
        of = f"{self.seed} {self.samples_per_step} {self.num_samples} {self.order} {self.content}"
        of += f" {redrawn}" * bool(redrawn)
        return hashlib.sha256(of.encode()).hexdigest()

    def rows(self) -> dict[str, str]:
        """Rows of the summary: images, shapes, batch, steps."""
        config, epochs, images = self.config, self.epochs, self.images
        rows = {"images": _counted(images)}
        names = len({sample.name for sample in images.samples})
        if names < len(images.samples):
            rows["images"] += f" ({names} files, some at several resolutions or in several sources)"
        rows["shapes"] = shapes(epochs.buckets)
        side = images.crop_settings.resolution
        sides = Counter(sample.resolution or side for sample in images.samples)
        if len(sides) > 1:
            rows["resolutions"] = ", ".join(f"{side}: {sides[side]}" for side in sorted(sides))
        masks = sum(sample.mask is not None for sample in images.samples)
        if masks:
            rows["masks"] = f"on {masks} of {counted(len(images.samples), 'image')}"
        accumulation, processes = epochs.accumulation, self.num_processes
        factors = [str(config.train_batch_size)]
        factors += [f"{accumulation} accumulation"] if accumulation > 1 else []
        factors += [f"{processes} processes"] if processes > 1 else []
        rows["batch"] = " × ".join(factors)
        rows["batch"] += f" = {self.samples_per_step}" if len(factors) > 1 else ""
        number = self.num_steps / epochs.num_steps
        rows["steps"] = (
            f"{epochs.num_steps} an epoch, {self.num_steps} in all ({number:.1f} epochs)"
        )
        if not (config.max_train_steps or config.num_train_epochs):
            purpose, _ = config.default_length
            seen = self.num_steps * self.samples_per_step
            rows["steps"] += (
                f"; the length for a {purpose}, {counted(seen, 'image')} seen (--steps: another)"
            )
        plain = math.ceil(len(images.entries) / self.samples_per_step)
        if epochs.num_steps > plain:
            rows["steps"] += f"; {plain} if all had one shape"
        fill = {
            "smaller": "the last batch of a bucket is smaller",
            "pad-batch": f"places filled with images without weight in the loss: {epochs.empty}",
            "repeat": f"images repeated in an epoch: {epochs.extra}",
        }
        if any(count % epochs.batch for count in epochs.buckets.values()):
            rows["left over"] = fill[config.bucket_leftovers]
        return rows


def _counted(images: ImageSet) -> str:
    """Number of images and repeats: "12 × 10 repeats + 30 = 150 an epoch"."""
    repeats = Counter(sample.source.repeats for sample in images.samples)
    terms = [f"{n} × {r} repeats" if r > 1 else f"{n}" for r, n in sorted(repeats.items())]
    total = len(images.entries)
    return terms[0] if [*repeats] == [1] else f"{' + '.join(terms)} = {total} an epoch"


MOST_SHAPES = 6
"""Most buckets that the summary names."""


def shapes(buckets: dict[Size, int]) -> str:
    """Buckets and their entries: "512×512: 20, 448×576: 7, and 3 in 2 others"."""
    most = sorted(buckets.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{w}×{h}" + (f": {n}" if len(most) > 1 else "") for (w, h), n in most[:MOST_SHAPES]]
    rest = most[MOST_SHAPES:]
    if rest:
        words.append(f"and {sum(n for _, n in rest)} in {counted(len(rest), 'other')}")
    return ", ".join(words)
