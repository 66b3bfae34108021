"""Scores of the images that a run draws after some steps, and the best step by them.

The prompts and seeds are always the same, so that two steps differ by the model alone: the
difference of their merits, image by image, has an interval.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from PIL import Image

from sd_lora.report.intervals import interval
from sd_lora.sampling.features import Features
from sd_lora.sampling.judge import MERIT, Judge
from sd_lora.sampling.score import PromptImages, Prompts

SIGNS = MERIT["subject"]
"""Measure → its sign; those of a style are among them."""

Values = Mapping[str, Sequence[float]]
"""Measure → its value at each image."""


def merit(values: Values) -> float:
    """Sum of the measures' means with their signs; a measure without images counts 0."""
    return sum(SIGNS[name] * fmean(found) for name, found in values.items() if found)


def difference(now: Values, before: Values) -> tuple[float, float]:
    """Difference of two merits, of the same prompts and seeds, and half its 95 % interval."""
    total, variance = 0.0, 0.0
    for name, found in now.items():
        if len(found) > 1:
            mean, half = interval(found, before[name])
            total, variance = total + SIGNS[name] * mean, variance + half**2
    return total, math.sqrt(variance)


@dataclass
class Scores:
    """The scores of a run.

    every: steps between two. sets: images of each prompt, each from its own seed. identity: digest
    of all that makes two scores comparable: features, kind, prompts, images that are taught and the
    way in which others are drawn. a_image: forward passes of the UNet for one. patience: scores in
    a row without a better one that end the run;
    None: any number. judge: compares images with the base's. base: these. taught: the sheets' row
    of images that are trained. The three are None or empty on processes that draw nothing, and
    before the base is drawn. rows: step → values of each image. told: step → numbers of its score.
    on_cpu: whether images are looked at there, since the device cannot.
    """

    features: Features
    prompts: Prompts
    every: int
    sets: int
    identity: str
    a_image: int
    patience: int | None = None
    judge: Judge | None = None
    base: Sequence[PromptImages] = field(default=(), repr=False)
    taught: Sequence[Image.Image | None] = field(default=(), repr=False)
    rows: dict[int, Values] = field(default_factory=dict)
    told: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    on_cpu: bool = False

    @property
    def num_images(self) -> int:
        """Images of each score."""
        return self.sets * sum(map(len, self.prompts.kinds))

    @property
    def forwards(self) -> int:
        """Forward passes of the UNet for each score."""
        return self.num_images * self.a_image

    def text(self, share: float) -> str:
        """The scores to come in words. share: of the run's time."""
        return (
            f"before, each {self.every} steps and after, by {self.features.name}: "
            f"{self.num_images} images each time, about {max(1, round(100 * share))} % of the time"
        )

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether images are still to be scored after a step; always after the last one."""
        return step not in self.rows and (step % self.every == 0 or step == num_steps)

    @property
    def best(self) -> int | None:
        """The step with the most merit, the first of equal ones; None before the first score."""
        return max(self.rows, key=lambda step: merit(self.rows[step]), default=None)

    def ended_after(self, step: int) -> bool:
        """Whether the run ends with the score of a step: as many as the patience says have passed
        since the best one. Other steps end nothing."""
        if self.patience is None or step not in self.rows:
            return False
        return sum(row > (self.best or 0) for row in self.rows) >= self.patience

    def facts(self, step: int) -> dict[str, Any]:
        """The numbers of a step for `best.json`."""
        return {"merit": merit(self.rows[step]), **_means(self.rows[step])}

    def state(self) -> dict[str, Any]:
        """The scores, as a checkpoint holds them."""
        return {
            "identity": self.identity,
            "rows": [[step, dict(values)] for step, values in self.rows.items()],
            "told": [[step, dict(numbers)] for step, numbers in self.told.items()],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the scores of a checkpoint; none where those are of another kind."""
        same = state.get("identity") == self.identity
        self.rows = dict(state["rows"]) if same else {}
        self.told = dict(state["told"]) if same else {}

    def record(self) -> dict[str, Any]:
        """The scores for report.json."""
        if not self.rows:
            return {}
        last, best = max(self.rows), self.best or 0
        late = max((step for step in self.rows if step <= 0.75 * last), default=min(self.rows))
        return {
            "features": self.features.name,
            "blind": self.features.blind,
            "images": self.num_images,
            "measures": [*self.rows[best]],
            "best": best,
            "since_best": list(difference(self.rows[last], self.rows[best])),
            "since_three_quarters": list(difference(self.rows[last], self.rows[late])),
            "rows": [
                {"step": step, "merit": merit(values), "score": self.told[step]}
                for step, values in self.rows.items()
            ],
        }


def _means(values: Values) -> dict[str, float]:
    return {name: fmean(of) for name, of in values.items() if of}
