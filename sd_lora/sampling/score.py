"""The score of learning: fidelity, copies, prompts followed, leak and harm, each with an interval.

- *Fidelity*: how near the LoRA's images are to real, held-out images of the subject: the mean
  cosine of their embeddings (Ruiz et al. 2023, "DreamBooth", section 4.1), 0 at the base model's
  images and 1 at real ones. The embeddings see shape, colours and arrangement.
- *Copies*: images that repeat a training image pixel by pixel, whatever was asked. They are near to
  the subject, so fidelity alone cannot tell them.
- *Prompts followed* by the subject's images: background and number.
- *Leak*: how far images of the class and of unrelated prompts have moved towards the subject.
- *Harm*: how much less images of the class and of unrelated prompts follow their prompts. A change
  that keeps to the prompt is no harm.

Every number is computed for several sets of images, each drawn from seeds of its own, and has an
interval over the sets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sd_lora.sampling.features import Features

COPY, COPY_SIDE = 0.04, 32
"""An image is a copy if, at COPY_SIDE × COPY_SIDE pixels, its mean difference from a training image
or its mirror image is below COPY, of the range 0 to 1. Measured on the drawn subjects: held-out
images are at 0.06 to 0.24, a training image after the embedded VAE's round trip at 0.02."""

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for a two-sided interval of 95 %, of 1 to 10 degrees of freedom."""

SETS = 3
"""Sets of images that a score needs at least."""

ABOUT_SUBJECT = ("background", "count")
"""Questions about the subject's images: its thing and colours are learned, not asked for."""


@dataclass(frozen=True)
class Interval:
    """A number measured on several sets of images: its mean, and the mean's 95 % interval
    (Student's t)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def half(self) -> float:
        """Half the interval's width; infinite for one value."""
        df = len(self.values) - 1
        if df < 1:
            return math.inf
        t = STUDENT[df - 1] if df <= len(STUDENT) else 1.96 + 2.6 / df
        return t * float(np.std(self.values, ddof=1)) / math.sqrt(df + 1)

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def text(self) -> str:
        """Percent: "87 % ± 4"."""
        return (
            "not told"
            if math.isnan(self.mean)
            else f"{100 * self.mean:.0f} % ± {100 * self.half:.0f}"
        )


@dataclass(frozen=True)
class PromptImages:
    """Images of one model, for three sets of prompts, drawn from one set of seeds.

    subject: prompts with the subject, or in the style.
    of_class: prompts with the subject's class, or without the style's word.
    unrelated: prompts of other things.
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


@dataclass(frozen=True)
class Taught:
    """What a LoRA was to learn, as images.

    training: the images that it was trained on.
    held_out: two or more real images that it was not trained on, on different backgrounds.
    kind: "subject" or "style".
    """

    training: Sequence[Image.Image]
    held_out: Sequence[Image.Image]
    kind: str = "subject"


@dataclass(frozen=True)
class Score:
    """Everything in parts of 1, each an interval over the sets of images.

    fidelity: 0 at the base model's images, 1 at real ones.
    copies: share of the subject's images that copy a training image.
    followed: how well the subject's images show the background and number asked for.
    class_leak, unrelated_leak: way of these images towards the subject; base_leak: the same among
        the base model's own images of the same prompts.
    harm: what the images of other prompts show less of their prompts than the base model's;
        followed_before: what the base model's show.
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
    blind: str

    def text(self) -> str:
        """Lines for a terminal."""
        sets = len(self.fidelity.values)
        copies = f"  copies: {100 * self.copies.mean:.0f} % of the images repeat a training image"
        lines = [
            f"  fidelity: {self.fidelity.text()} (0 % the base's images, 100 % real ones)",
            f"{copies}; their fidelity says nothing" if self.copies.mean > 0 else f"{copies}",
            f"  prompts: background and number as asked, {self.followed.text()}",
            f"  leak: class {self.class_leak.text()}, unrelated {self.unrelated_leak.text()} of "
            f"the way to the subject (the base's own images: {self.base_leak.text()})",
            f"  harm: other prompts followed {self.harm.text()} less than by the base "
            f"({self.followed_before.text()})",
            f"  each over {sets} sets of seeds, ± half of the 95 % interval. "
            f"Not seen: {self.blind}",
        ]
        return "\n".join(lines)

    def numbers(self) -> dict[str, dict[str, float | tuple[float, ...]]]:
        """Name → mean, low, high and the values of all sets, for a file."""
        return {
            name: {"mean": i.mean, "low": i.low, "high": i.high, "values": i.values}
            for name, i in vars(self).items()
            if isinstance(i, Interval)
        }


def copied(image: Image.Image, training: Sequence[Image.Image]) -> bool:
    """Does the image repeat a training image, or its mirror image, pixel by pixel?"""

    def small(one: Image.Image) -> np.ndarray:
        fitted = ImageOps.fit(one.convert("RGB"), image.size)
        return np.asarray(fitted.resize((COPY_SIDE,) * 2, Image.Resampling.BOX), np.float32) / 255

    mine = small(image)
    return any(
        np.abs(mine - other).mean() < COPY
        for known in training
        for other in (small(known), small(known)[:, ::-1])
    )


def way(start: Tensor, now: Tensor, end: Tensor | float) -> Tensor:
    """Part of the way from `start` to `end` at `now`, elementwise, kept within 0 and 1."""
    return ((now - start) / (end - start).clamp(min=1e-6)).clamp(0, 1)


class Scale:
    """Nearness of images to the subject, and its level at real images.

    Nearness is the mean cosine to all held-out images; a negative one counts as 0, as far as can
    be, so that a change from one foreign thing to another is no step towards the subject.
    """

    def __init__(self, features: Features, taught: Taught) -> None:
        self.embed = {"subject": features.subject, "style": features.style}[taught.kind]
        self.real = self.embed(taught.held_out)
        n = len(self.real)
        cosines = (self.real @ self.real.T).clamp(min=0)
        self.level = (cosines.sum() - cosines.trace()) / (n * (n - 1))

    def nearness(self, images: Sequence[Image.Image]) -> Tensor:
        """(N,), of N images."""
        return (self.embed(images) @ self.real.T).clamp(min=0).mean(1)


def leaks(scale: Scale, base: Tensor, images: Sequence[Image.Image]) -> float:
    """Mean way of images towards the subject; `base`: nearness of the base's images (sets, N)."""
    start = base.mean(0)
    return float(way(start, scale.nearness(images), scale.level).mean())


def base_leak(scale: Scale, base: Tensor) -> list[float]:
    """The same of each set of the base's own images, measured from its other sets."""
    sets = range(len(base))
    others = [base[[j for j in sets if j != i]].mean(0) for i in sets]
    return [float(way(o, b, scale.level).mean()) for o, b in zip(others, base, strict=True)]


def score(
    features: Features,
    taught: Taught,
    prompts: Prompts,
    before: Sequence[PromptImages],
    after: Sequence[PromptImages],
) -> Score:
    """Score of a LoRA.

    Args:
        features: of `load_features`.
        taught: training and held-out images.
        prompts: of the images, in their order.
        before, after: SETS or more sets of the base model's and of the LoRA's images, one prompt
            and seed at one place of both.
    """
    if min(len(before), len(after)) < SETS or len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} sets of images: {SETS} or more of each")
    scale = Scale(features, taught)
    start = torch.stack([scale.nearness(s.subject) for s in before]).mean()
    near_class = torch.stack([scale.nearness(s.of_class) for s in before])
    near_unrelated = torch.stack([scale.nearness(s.unrelated) for s in before])
    others = [*prompts.of_class, *prompts.unrelated]

    def others_followed(s: PromptImages) -> float:
        return float(features.follows([*s.of_class, *s.unrelated], others).mean())

    was, now = ([others_followed(s) for s in sets] for sets in (before, after))
    own = [base_leak(scale, base) for base in (near_class, near_unrelated)]

    def fidelity(s: PromptImages) -> float:
        return float(way(start, scale.nearness(s.subject), scale.level).mean())

    def followed(s: PromptImages) -> float:
        return float(features.follows(s.subject, prompts.subject, ABOUT_SUBJECT).nanmean())

    def copies(s: PromptImages) -> float:
        return sum(copied(image, taught.training) for image in s.subject) / len(s.subject)

    return Score(
        fidelity=Interval(tuple(map(fidelity, after))),
        copies=Interval(tuple(map(copies, after))),
        followed=Interval(tuple(map(followed, after))),
        class_leak=Interval(tuple(leaks(scale, near_class, s.of_class) for s in after)),
        unrelated_leak=Interval(tuple(leaks(scale, near_unrelated, s.unrelated) for s in after)),
        base_leak=Interval(tuple((a + b) / 2 for a, b in zip(*own, strict=True))),
        harm=Interval(tuple(w - n for w, n in zip(was, now, strict=True))),
        followed_before=Interval(tuple(was)),
        blind=features.blind,
    )
