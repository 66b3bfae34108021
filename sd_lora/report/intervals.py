"""Differences of losses on the same images and noise, and whether chance may have made them."""

import math
from collections.abc import Sequence

from sd_lora.sampling.interval import student


def interval(now: Sequence[float], before: Sequence[float]) -> tuple[float, float]:
    """Mean difference of numbers in pairs, such as losses on the same images and noise, and half of
    its 95 % interval (Student's t).

    Differences in pairs: the timesteps' own spread, tenfold, cancels out.
    """
    differences = [a - b for a, b in zip(now, before, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((d - mean) ** 2 for d in differences) / (count - 1)
    return mean, student(count - 1) * math.sqrt(variance / count)


def is_better(now: Sequence[float], before: Sequence[float]) -> bool:
    """Whether losses are below earlier ones by more than chance; ones that are not finite never
    are."""
    mean, half = interval(now, before)
    return mean + half < 0
