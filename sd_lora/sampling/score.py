"""The score of learning: fidelity, copies, prompts followed, leak and harm, each with an interval.

- *Fidelity*: how near the LoRA's images are to real, held-out images of the subject: their mean
  likeness, for a model from disk the cosine of embeddings (Ruiz et al. 2023, "DreamBooth", section
  4.1), 0 at the base model's images and 1 at real ones. It sees shape, colours and arrangement.
- *Copies*: images that repeat a training image pixel by pixel, whatever was asked. They are near to
  the subject, so fidelity alone cannot tell them.
- *Prompts followed* by the subject's images: background and number.
- *Leak*: how far images of the class and of unrelated prompts have moved towards the subject.
- *Harm*: how much less images of the class and of unrelated prompts follow their prompts. A change
  that keeps to the prompt is no harm.
- *Redrawn*: how unlike an image of an unrelated prompt is to the base model's from the same seed.
  It sees what is neither leak nor harm: patterns and colours of the subject on other things, and
  images that fall apart.
- *Similarity*: the mean cosine of the subject's images and real ones over all pairs, for DINO the
  score of Ruiz et al. 2023, section 4.1. (peft's image benchmark pairs each image with the test
  image of its prompt.)
- *Drift*, that of peft's image benchmark: (1 − cosine) / 2 of an image of an unrelated prompt and
  the base's from the same seed, in the mean.

Every number has an interval over sets of images, each drawn from seeds of its own. A `Judge`
embeds real images and the base model's once, for they stay from one LoRA to the next.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from sd_lora.sampling.interval import Interval

SETS = 3
"""Sets of images whose interval is narrow enough to tell anything; one set has no interval."""

SET_SEEDS, KIND_SEEDS = 1000, 100
"""From a prompt's seed in one set of images to its seed in the next; from the first prompt of one
kind to the first of the next kind."""


@dataclass(frozen=True)
class PromptImages:
    """Images of one model, for three sets of prompts, drawn from one set of seeds.

    subject: prompts with the subject, or in the style.
    of_class: prompts with the subject's class, or without the style's word; there may be none.
    unrelated: prompts of other things; there may be none.
    """

    subject: Sequence[Image.Image]
    of_class: Sequence[Image.Image]
    unrelated: Sequence[Image.Image]


@dataclass(frozen=True)
class Prompts:
    """The prompts of PromptImages, one an image."""

    subject: Sequence[str]
    of_class: Sequence[str]
    unrelated: Sequence[str]

    @property
    def kinds(self) -> tuple[Sequence[str], ...]:
        """All three, in this order."""
        return self.subject, self.of_class, self.unrelated


def sets_of(
    prompts: Prompts, draw: Callable[[Sequence[str], int], Iterable[Image.Image]], sets: int = SETS
) -> list[PromptImages]:
    """Sets of images of all prompts, each image with a seed of its own.

    draw: images of some prompts, from their texts and the seed of the first; others follow it.
    """
    return [
        PromptImages(*(
            list(draw(texts, SET_SEEDS * number + KIND_SEEDS * kind))
            for kind, texts in enumerate(prompts.kinds)
        ))
        for number in range(sets)
    ]  # fmt: skip


@dataclass(frozen=True)
class Taught:
    """What a LoRA was to learn, as images.

    training: the images that it was trained on.
    held_out: real images that it was not trained on, on different backgrounds.
    kind: "subject" or "style".
    captions: of training images; by one of these its image is rightly repeated, and is no copy.
    """

    training: Sequence[Image.Image]
    held_out: Sequence[Image.Image] = ()
    kind: str = "subject"
    captions: Collection[str] = ()

    @property
    def real(self) -> Sequence[Image.Image]:
        """The held-out images; the training images where there are none."""
        return self.held_out or self.training


@dataclass(frozen=True)
class Score:
    """Everything in parts of 1, each an interval over the sets of images.

    fidelity: 0 at the base model's images, 1 at real ones.
    copies: share of the subject's images that copy a training image, of those whose prompt is no
        caption of one; NaN where there are none.
    followed: how well the subject's images show the background and number asked for.
    class_leak, unrelated_leak: way of these images towards the subject, below 0 where they moved
        away; base_leak: the same among the base model's own images of the same prompts.
    harm: how much less the images of other prompts follow them than the base model's;
        followed_before: how well the base model's do.
    redrawn: unlikeness of unrelated images to the base model's from the same seeds, 0 to 1.
    similarity: mean cosine of the subject's images and real ones, over all pairs. drift: of
        unrelated images from the base model's, half of one less their cosine. NaN where features
        have no cosine.
    blind: differences that the features do not see.
    """

    fidelity: Interval
    copies: Interval
    followed: Interval
    class_leak: Interval
    unrelated_leak: Interval
    base_leak: Interval
    harm: Interval
    followed_before: Interval
    redrawn: Interval
    similarity: Interval
    drift: Interval
    blind: str

    def text(self) -> str:
        """Lines for a terminal."""
        sets = len(self.fidelity.values)
        over = f"each over {sets} sets of seeds, ± half of the 95 % interval"
        if sets == 1:
            over = "one set of seeds: no interval"
        copies = f"{100 * self.copies.mean:.0f} % of the images repeat a training image"
        if math.isnan(self.copies.mean):
            copies = "not looked for: each prompt is the caption of an image, which it may repeat"
        elif self.copies.mean > 0:
            copies += "; their fidelity says nothing"
        lines = [
            f"  fidelity: {self.fidelity.text()} (0 % the base's images, 100 % real ones)",
            f"  copies: {copies}",
            f"  prompts: background and number as asked, {self.followed.text()}",
            f"  leak: class {self.class_leak.text()}, unrelated {self.unrelated_leak.text()} of "
            f"the way to the subject (the base's own images: {self.base_leak.text()})",
            f"  harm: other prompts followed {self.harm.text()} less than by the base "
            f"({self.followed_before.text()})",
            f"  redrawn: other things are {self.redrawn.text()} unlike the base's of the same seed",
            f"  {over}. Not seen: {self.blind}",
        ]
        if not math.isnan(self.similarity.mean):
            drift = f", drift of unrelated ones {self.drift.text()}"
            lines.append(f"  cosines: similarity to real images {self.similarity.text()}{drift}")
        return "\n".join(lines)

    def line(self) -> str:
        """All of it in a line."""
        leak = f"leak class {self.class_leak.text()}, unrelated {self.unrelated_leak.text()}"
        after = f"harm {self.harm.text()}, redrawn {self.redrawn.text()}"
        return (
            f"fidelity {self.fidelity.text()}, copies {self.copies.text()}, prompts followed "
            f"{self.followed.text()}, {leak}, {after}"
        )

    def numbers(self) -> dict[str, dict[str, float | None | tuple[float | None, ...]]]:
        """Name → mean, low, high and the values of all sets, for a file; None where not known."""

        def known(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            name: {
                "mean": known(i.mean),
                "low": known(i.low),
                "high": known(i.high),
                "values": tuple(map(known, i.values)),
            }
            for name, i in self.intervals.items()
        }

    @property
    def intervals(self) -> dict[str, Interval]:
        """Name → each number of the score."""
        return {name: i for name, i in vars(self).items() if isinstance(i, Interval)}
