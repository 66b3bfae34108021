"""The judge of a LoRA's images, and the score that it makes of them.

A `Judge` embeds each image once: real ones and the base model's, which all LoRAs share, when it is
made, the others when they are judged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sd_lora.sampling.features import Features, Looks, Seen, Vectors
from sd_lora.sampling.interval import Interval
from sd_lora.sampling.score import PromptImages, Prompts, Score, Taught

COPY, COPY_SIDE = 0.04, 32
"""An image is a copy if, at COPY_SIDE × COPY_SIDE pixels, its mean difference from a training image
or its mirror image is below COPY, of the range 0 to 1. Measured on the drawn subjects: held-out
images are at 0.06 to 0.24, a training image after the embedded VAE's round trip at 0.02."""

MERIT = {
    "subject": {"fidelity": 1, "unrelated_leak": -1, "harm": -1},
    "style": {"fidelity": 1, "harm": -1},
}
"""Kind → measure → its sign in the merit of a LoRA: its gain less its cost. The class's leak is no
part: without class images every run has it at once, and some want it; the loss of the class's
prompts by it is harm. A style is meant to reach other prompts."""

ABOUT_SUBJECT = ("background", "count")
"""Questions about the subject's images: its thing and colours are learned, not asked for."""


def copied(image: Image.Image, training: Sequence[Image.Image]) -> bool:
    """Does the image repeat a training image, or its mirror image, pixel by pixel?"""
    return _repeats(image, [_small(known, image.size) for known in training])


def _small(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """(COPY_SIDE, COPY_SIDE, 3) from 0 to 1, of an image cut to the form of others."""
    fitted = ImageOps.fit(image.convert("RGB"), size)
    return np.asarray(fitted.resize((COPY_SIDE,) * 2, Image.Resampling.BOX), np.float32) / 255


def _repeats(image: Image.Image, small: Sequence[np.ndarray]) -> bool:
    mine = _small(image, image.size)
    return any(
        np.abs(mine - other).mean() < COPY for known in small for other in (known, known[:, ::-1])
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
        self.features, self.kind = features, taught.kind
        self.seen = features.look(taught.real)
        self.real = self._looks(self.seen)
        n = len(taught.real)
        like = self.real.likeness(self.real).clamp(min=0)
        # a single image's level is its likeness to itself
        self.level = (like.sum() - like.trace()) / (n * (n - 1)) if n > 1 else like[0, 0]

    def _looks(self, seen: Seen) -> Looks:
        return {"subject": seen.subject, "style": seen.style}[self.kind]

    @property
    def has_cosines(self) -> bool:
        """Whether likeness is a cosine of embeddings, as in published measures."""
        return isinstance(self.real, Vectors) and self.kind == "subject"

    def likeness_of(self, one: Seen, other: Seen) -> Tensor:
        """(N, M), of N images and M others, below 0 as well."""
        return self._looks(one).likeness(self._looks(other))

    def likeness(self, seen: Seen) -> Tensor:
        """(N, real ones), of N images."""
        return self._looks(seen).likeness(self.real).clamp(min=0)

    def nearness(self, images: Sequence[Image.Image]) -> Tensor:
        """(N,), of N images."""
        return self.likeness(self.features.look(images)).mean(1) if images else torch.empty(0)


def towards(near: Tensor, base: Tensor, level: Tensor | float) -> Tensor:
    """Way of each of N images towards the subject (N,): their nearness from the base's (sets, N).
    An image that moved away counts against the others, so that noise does not add up to a leak."""
    return moved(base.mean(0), near, level).clamp(max=1)


def base_leak(base: Tensor, level: Tensor | float) -> list[float]:
    """The mean way of each set of the base's own images (sets, N), measured from its other sets;
    NaN of one set."""
    sets = range(len(base))
    others = [base[[j for j in sets if j != i]] for i in sets]
    return [
        float(towards(mine, rest, level).mean()) for mine, rest in zip(base, others, strict=True)
    ]


@dataclass(frozen=True)
class SeenSet:
    """What is seen of a set of images, each embedded once.

    own, others: the subject's images, and those of all other prompts; None without these. subject,
    of_class, unrelated: nearness of these images. shown: how well the subject's show
    background and number; followed: how well those of other prompts follow them. repeats: whether
    the subject's, whose prompts are no captions, repeat a training image.
    """

    own: Seen
    others: Seen | None
    subject: Tensor
    of_class: Tensor
    unrelated: Tensor
    shown: Tensor
    followed: Tensor
    repeats: Sequence[bool]


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
        self.scale = Scale(features, taught)
        self._shrunk: dict[tuple[int, int], list[np.ndarray]] = {}
        self.before = seen = [self._seen(s) for s in before]
        self.start = torch.stack([s.subject for s in seen]).mean()
        self.near_class = torch.stack([s.of_class for s in seen])
        self.near_unrelated = torch.stack([s.unrelated for s in seen])
        self.followed = torch.stack([s.followed for s in seen])

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

    def _seen(self, s: PromptImages) -> SeenSet:
        own = self.features.look(s.subject)
        near = self.scale.likeness(own).mean(1)
        prompts = [*self.prompts.of_class, *self.prompts.unrelated]
        near_others, followed, others = torch.empty(0), torch.empty(0), None
        if prompts:
            others = self.features.look([*s.of_class, *s.unrelated])
            near_others, followed = self.scale.likeness(others).mean(1), others.follows(prompts)
        count = len(s.of_class)
        return SeenSet(
            own,
            others,
            near,
            near_others[:count],
            near_others[count:],
            own.follows(self.prompts.subject, ABOUT_SUBJECT),
            followed,
            [self._repeats(i, p) for i, p in zip(s.subject, self.prompts.subject, strict=True)],
        )

    def _repeats(self, image: Image.Image, prompt: str) -> bool:
        if prompt in self.taught.captions:
            return False
        if image.size not in self._shrunk:
            self._shrunk[image.size] = [_small(one, image.size) for one in self.taught.training]
        return _repeats(image, self._shrunk[image.size])

    def fidelity(self, images: Sequence[Image.Image]) -> Tensor:
        """(N,): fidelity of each of N images of the subject."""
        return way(self.start, self.scale.nearness(images), self.scale.level)

    def reachable(self, real: Sequence[Image.Image]) -> float:
        """Mean fidelity of the real images, in their order, behind the VAE, each to the others."""
        like, others = self.scale.likeness(self.features.look(real)), len(real) - 1
        near = (like.sum(1) - like.diagonal()) / others if others else like[:, 0]
        return float(way(self.start, near, self.scale.level).mean())

    def _copies(self, s: SeenSet) -> float:
        free = sum(prompt not in self.taught.captions for prompt in self.prompts.subject)
        return sum(s.repeats) / free if free and self.taught.training else math.nan

    def judge(self, after: Sequence[PromptImages]) -> tuple[dict[str, list[float]], Score]:
        """Judge a LoRA's images, one prompt and seed at one place of `before` and `after`.

        Returns:
            Measure of `MERIT` → its value at each image of all sets; a copy's fidelity is 0. Of two
            LoRAs the values stand in pairs, of the same prompts and seeds.
            The score.
        """
        self._check(after, self.sets)
        seen, level = [self._seen(s) for s in after], self.scale.level
        fidelity = [way(self.start, s.subject, level) for s in seen]
        unrelated = [towards(s.unrelated, self.near_unrelated, level) for s in seen]
        of_class = [towards(s.of_class, self.near_class, level) for s in seen]
        now = torch.stack([s.followed for s in seen])
        lost = self.followed - now
        values = {
            "fidelity": [
                0.0 if repeats else value
                for one, s in zip(fidelity, seen, strict=True)
                for value, repeats in zip(one.tolist(), s.repeats, strict=True)
            ],
            "unrelated_leak": torch.cat(unrelated).tolist(),
            "harm": lost[~lost.isnan()].tolist(),
        }
        own = [base_leak(base, level) for base in (self.near_class, self.near_unrelated)]
        was = tuple(self.followed.nanmean(1).tolist())
        whole = Score(
            fidelity=_means(fidelity),
            copies=Interval(tuple(map(self._copies, seen))),
            followed=Interval(tuple(float(s.shown.nanmean()) for s in seen)),
            class_leak=_means(of_class),
            unrelated_leak=_means(unrelated),
            base_leak=Interval(tuple(torch.tensor(own).nanmean(0).tolist())),
            harm=Interval(tuple(w - n for w, n in zip(was, now.nanmean(1).tolist(), strict=True))),
            followed_before=Interval(was),
            redrawn=_means([self._redrawn(s, b) for s, b in zip(seen, self.before, strict=True)]),
            similarity=_means([self._similarity(s) for s in seen]),
            drift=_means([self._drift(s, b) for s, b in zip(seen, self.before, strict=True)]),
            blind=self.features.blind,
        )
        return {name: values[name] for name in MERIT[self.taught.kind]}, whole

    def _similarity(self, now: SeenSet) -> Tensor:
        """(N, real ones): cosines of the subject's images and real ones, all pairs."""
        if not self.scale.has_cosines:
            return torch.empty(0)
        return self.scale.likeness_of(now.own, self.scale.seen)

    def _redrawn(self, now: SeenSet, before: SeenSet) -> Tensor:
        """(N,): unlikeness of each image of an unrelated prompt to the base's, from 0 to 1."""
        if now.others is None or before.others is None:
            return torch.empty(0)
        was = before.others.subject
        like = now.others.subject.likeness(was).diagonal() / was.likeness(was).diagonal()
        return (1 - like[len(now.of_class) :]).clamp(0, 1)

    def _drift(self, now: SeenSet, before: SeenSet) -> Tensor:
        """(N,): of each image of an unrelated prompt from the base's, from 0 to 1."""
        if now.others is None or before.others is None or not self.scale.has_cosines:
            return torch.empty(0)
        like = self.scale.likeness_of(now.others, before.others).diagonal()
        return (1 - like[len(now.of_class) :]) / 2


def _means(sets: Sequence[Tensor]) -> Interval:
    """The interval of the means of each set's images."""
    return Interval(tuple(float(one.mean()) for one in sets))


def score(
    features: Features,
    taught: Taught,
    prompts: Prompts,
    before: Sequence[PromptImages],
    after: Sequence[PromptImages],
) -> Score:
    """Score of one LoRA: see `Judge`."""
    return Judge(features, taught, prompts, before).judge(after)[1]
