"""A number measured several times: its mean, and the mean's interval."""

import math
from dataclasses import dataclass

import numpy as np

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for a two-sided interval of 95 %, of 1 to 10 degrees of freedom."""


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
        return f"{100 * self.mean:z.0f} %{around}"
