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

Every number has an interval over sets of images, each drawn from seeds of its own. A `Judge`
embeds what stays the same from one LoRA to the next: real images and the base model's.
"""

import math
from collections.abc import Callable, Iterable, Sequence
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
"""Sets of images whose interval is narrow enough to tell anything; one set has no interval."""

SET_SEEDS, KIND_SEEDS = 1000, 100
"""From a prompt's seed in one set of images to its seed in the next; from the first prompt of one
kind to the first of the next kind."""

MERIT = {
    "subject": {"fidelity": 1, "unrelated_leak": -1, "harm": -1},
    "style": {"fidelity": 1, "harm": -1},
}
"""Kind → measure → its sign in the merit of a LoRA: what is learned less what it cost. The class's
leak is no part: without class images every run has it at once, and some want it; what the class's
prompts lose by it is harm. A style is meant to reach other prompts."""

ABOUT_SUBJECT = ("background", "count")
"""Questions about the subject's images: its thing and colours are learned, not asked for."""


def student(df: int) -> float:
    """Student's t for a two-sided interval of 95 %."""
    return STUDENT[df - 1] if df <= len(STUDENT) else 1.96 + 2.6 / df


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
        return student(df) * float(np.std(self.values, ddof=1)) / math.sqrt(df + 1)

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def text(self) -> str:
        """Percent: "87 % ± 4"; "87 %" of one value."""
        if math.isnan(self.mean):
            return "not told"
        around = f" ± {100 * self.half:.0f}" if math.isfinite(self.half) else ""
        return f"{100 * self.mean:.0f} %{around}"


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
    """

    training: Sequence[Image.Image]
    held_out: Sequence[Image.Image] = ()
    kind: str = "subject"

    @property
    def real(self) -> Sequence[Image.Image]:
        """The held-out images; the training images where there are none."""
        return self.held_out or self.training


@dataclass(frozen=True)
class Score:
    """Everything in parts of 1, each an interval over the sets of images.

    fidelity: 0 at the base model's images, 1 at real ones.
    copies: share of the subject's images that copy a training image.
    followed: how well the subject's images show the background and number asked for.
    class_leak, unrelated_leak: way of these images towards the subject, below 0 where they moved
        away; base_leak: the same among the base model's own images of the same prompts.
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
        over = f"each over {sets} sets of seeds, ± half of the 95 % interval"
        if sets == 1:
            over = "one set of seeds: no interval"
        copies = f"  copies: {100 * self.copies.mean:.0f} % of the images repeat a training image"
        lines = [
            f"  fidelity: {self.fidelity.text()} (0 % the base's images, 100 % real ones)",
            f"{copies}; their fidelity says nothing" if self.copies.mean > 0 else f"{copies}",
            f"  prompts: background and number as asked, {self.followed.text()}",
            f"  leak: class {self.class_leak.text()}, unrelated {self.unrelated_leak.text()} of "
            f"the way to the subject (the base's own images: {self.base_leak.text()})",
            f"  harm: other prompts followed {self.harm.text()} less than by the base "
            f"({self.followed_before.text()})",
            f"  {over}. Not seen: {self.blind}",
        ]
        return "\n".join(lines)

    def line(self) -> str:
        """All of it in a line."""
        leak = f"leak class {self.class_leak.text()}, unrelated {self.unrelated_leak.text()}"
        return (
            f"fidelity {self.fidelity.text()}, copies {self.copies.text()}, prompts followed "
            f"{self.followed.text()}, {leak}, harm {self.harm.text()}"
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


def moved(start: Tensor, now: Tensor, end: Tensor | float) -> Tensor:
    """Part of the way from `start` to `end` at `now`, elementwise; below 0 if it moved away."""
    return (now - start) / (end - start).clamp(min=1e-6)


def way(start: Tensor, now: Tensor, end: Tensor | float) -> Tensor:
    """The same, kept within 0 and 1."""
    return moved(start, now, end).clamp(0, 1)


class Scale:
    """Nearness of images to the subject, and its level at real images.

    Nearness is the mean likeness to all real images; a negative one counts as 0, so that a change
    from one foreign thing to another is no step towards the subject.
    """

    def __init__(self, features: Features, taught: Taught) -> None:
        self.embed = {"subject": features.subject, "style": features.style}[taught.kind]
        self.real = self.embed(taught.real)
        n = len(taught.real)
        like = self.real.likeness(self.real).clamp(min=0)
        # a single image's level is its likeness to itself
        self.level = (like.sum() - like.trace()) / (n * (n - 1)) if n > 1 else like[0, 0]

    def likeness(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, real ones), of N images."""
        return self.embed(images).likeness(self.real).clamp(min=0)

    def nearness(self, images: Sequence[Image.Image]) -> Tensor:
        """(N,), of N images."""
        return self.likeness(images).mean(1) if images else torch.empty(0)


def leaks(scale: Scale, base: Tensor, images: Sequence[Image.Image]) -> float:
    """Mean way of images towards the subject; `base`: nearness of the base's images (sets, N). An
    image that moved away counts against the others, so that noise does not add up to a leak."""
    return float(towards(scale, base, images).mean())


def towards(scale: Scale, base: Tensor, images: Sequence[Image.Image]) -> Tensor:
    """Way of each of N images towards the subject (N,), from the base's (sets, N)."""
    return moved(base.mean(0), scale.nearness(images), scale.level).clamp(max=1)


def base_leak(scale: Scale, base: Tensor) -> list[float]:
    """The same of each set of the base's own images, measured from its other sets; NaN of one
    set."""
    sets = range(len(base))
    others = [base[[j for j in sets if j != i]].mean(0) for i in sets]
    return [
        float(moved(o, b, scale.level).clamp(max=1).mean())
        for o, b in zip(others, base, strict=True)
    ]


class Judge:
    """Scores LoRAs, or checkpoints of one, by the same prompts and seeds.

    Args:
        features: of `load_features`.
        taught: training and held-out images.
        prompts: of the images, in their order.
        before: sets of the base model's images, SETS or more for a useful interval.

    Raises:
        ValueError: no set of images, no real image, no prompt with the subject, or a set that has
            not one image a prompt.
    """

    def __init__(
        self, features: Features, taught: Taught, prompts: Prompts, before: Sequence[PromptImages]
    ) -> None:
        self.features, self.taught, self.prompts = features, taught, prompts
        if not taught.real:
            raise ValueError("no image of what was taught: give training or held-out images")
        if not prompts.subject:
            raise ValueError("no prompt with the subject: fidelity is measured by their images")
        self._check(before)
        self.sets = len(before)
        self.scale = scale = Scale(features, taught)
        self.start = torch.stack([scale.nearness(s.subject) for s in before]).mean()
        self.near_class = torch.stack([scale.nearness(s.of_class) for s in before])
        self.near_unrelated = torch.stack([scale.nearness(s.unrelated) for s in before])
        self.followed = torch.stack([self._follow(s) for s in before])

    def _check(self, sets: Sequence[PromptImages], wanted: int = 0) -> None:
        if wanted and len(sets) != wanted:
            raise ValueError(f"{wanted} sets of images before and {len(sets)} after: as many")
        if not sets:
            raise ValueError("no set of images: one or more is needed, each from its own seeds")
        for i, one in enumerate(sets):
            for kind, asked in vars(self.prompts).items():
                found = len(getattr(one, kind))
                if found != len(asked):
                    raise ValueError(
                        f"set {i + 1} has {found} images for {len(asked)} prompts of "
                        f"`{kind}`: one a prompt is needed"
                    )

    def _follow(self, s: PromptImages) -> Tensor:
        """(N,): how well each image of another prompt follows it."""
        others = [*self.prompts.of_class, *self.prompts.unrelated]
        images = [*s.of_class, *s.unrelated]
        return self.features.follows(images, others) if others else torch.empty(0)

    def fidelity(self, images: Sequence[Image.Image]) -> Tensor:
        """(N,): fidelity of each of N images of the subject."""
        return way(self.start, self.scale.nearness(images), self.scale.level)

    def reachable(self, real: Sequence[Image.Image]) -> float:
        """Mean fidelity of the real images, in their order, behind the VAE, each to the others."""
        like, others = self.scale.likeness(real), len(real) - 1
        near = (like.sum(1) - like.diagonal()) / others if others else like[:, 0]
        return float(way(self.start, near, self.scale.level).mean())

    def _followed(self, s: PromptImages) -> float:
        asked = self.features.follows(s.subject, self.prompts.subject, ABOUT_SUBJECT)
        return float(asked.nanmean())

    def _copies(self, s: PromptImages) -> float:
        return sum(copied(image, self.taught.training) for image in s.subject) / len(s.subject)

    def _all(self, after: Sequence[PromptImages]) -> Tensor:
        return torch.stack([self._follow(s) for s in after])

    def by_image(self, after: Sequence[PromptImages]) -> dict[str, list[float]]:
        """Measure of `MERIT` → its value at each image of all sets; a copy's fidelity is 0.

        Of two LoRAs the values stand in pairs, of the same prompts and seeds.
        """
        self._check(after, self.sets)
        found: dict[str, list[float]] = {"fidelity": [], "unrelated_leak": []}
        for s in after:
            training, near = self.taught.training, self.fidelity(s.subject).tolist()
            found["fidelity"] += [
                0.0 if copied(image, training) else value
                for image, value in zip(s.subject, near, strict=True)
            ]
            leak = towards(self.scale, self.near_unrelated, s.unrelated)
            found["unrelated_leak"] += leak.tolist()
        lost = self.followed - self._all(after)
        found["harm"] = lost[~lost.isnan()].tolist()
        return {name: found[name] for name in MERIT[self.taught.kind]}

    def score(self, after: Sequence[PromptImages]) -> Score:
        """Score of a LoRA's images, one prompt and seed at one place of `before` and `after`."""
        self._check(after, self.sets)
        scale = self.scale
        was, now = (sets.nanmean(1).tolist() for sets in (self.followed, self._all(after)))
        own = [base_leak(scale, base) for base in (self.near_class, self.near_unrelated)]
        return Score(
            fidelity=Interval(tuple(float(self.fidelity(s.subject).mean()) for s in after)),
            copies=Interval(tuple(map(self._copies, after))),
            followed=Interval(tuple(map(self._followed, after))),
            class_leak=Interval(tuple(leaks(scale, self.near_class, s.of_class) for s in after)),
            unrelated_leak=Interval(
                tuple(leaks(scale, self.near_unrelated, s.unrelated) for s in after)
            ),
            base_leak=Interval(tuple(torch.tensor(own).nanmean(0).tolist())),
            harm=Interval(tuple(w - n for w, n in zip(was, now, strict=True))),
            followed_before=Interval(tuple(was)),
            blind=self.features.blind,
        )


def score(
    features: Features,
    taught: Taught,
    prompts: Prompts,
    before: Sequence[PromptImages],
    after: Sequence[PromptImages],
) -> Score:
    """Score of one LoRA: see `Judge`."""
    return Judge(features, taught, prompts, before).score(after)
