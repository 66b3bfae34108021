"""Timesteps of batch items: a distribution, one row each, and draws from it by address.

A new distribution is a function of u, uniform in [0, 1), and a row of `DISTRIBUTIONS`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from sd_lora.seeds import Address, seed_for


@dataclass(frozen=True)
class Distribution:
    """A row of `DISTRIBUTIONS`.

    quantile: function of u in [0, 1), (B,) float64, and the distribution's parameters → a share of
    the trained timesteps in [0, 1], from the cleanest to the noisiest.
    label: its words in the run's summary, with the parameters in braces.
    """

    quantile: Callable[..., Tensor]
    label: str


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """sigmoid(m + s·z) of a normal z: the middle timesteps most often.

    Esser et al. 2024, "Scaling Rectified Flow Transformers", equation 19.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, scale: float) -> Tensor:
    """Mode sampling with heavy tails: the middle more often for a scale above 0, both ends for one
    below.

    Esser et al. 2024, equation 20, of 1 − u, so that it grows with u.
    """
    return u - scale * (torch.sin(math.pi / 2 * u).square() - u)


def cosmap(u: Tensor) -> Tensor:
    """The timesteps of a cosine schedule: the middle twice as often as the ends.

    Esser et al. 2024, equation 21.
    """
    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


BETA_POINTS = 1 << 16
"""Steps of the numerical integral of a beta density: 1e-7 near the truth."""


def beta(u: Tensor, alpha: float, beta: float) -> Tensor:
    """Quantiles of the beta distribution, density ∝ x^(α−1)·(1−x)^(β−1).

    Lee et al. 2024, "Beta Sampling is All You Need", place a sampler's steps so.
    """
    theta = np.interp(u.numpy(), *_beta_integral(alpha, beta))
    return torch.from_numpy(np.sin(theta) ** 2)


@cache
def _beta_integral(alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The share of a beta distribution below sin²θ, and θ.

    Over θ the density is sin^(2α−1)θ · cos^(2β−1)θ, without poles from α = β = 1/2 on.
    """
    edges = np.linspace(0, math.pi / 2, BETA_POINTS + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    density = np.exp(
        (2 * alpha - 1) * np.log(np.sin(middle)) + (2 * beta - 1) * np.log(np.cos(middle))
    )
    cumulative = np.concatenate([[0.0], np.cumsum(density)])
    return cumulative / cumulative[-1], edges


DISTRIBUTIONS: dict[str, Distribution] = {
    # Ho et al. 2020, algorithm 1
    "uniform": Distribution(lambda u: u, ""),
    "logit_normal": Distribution(logit_normal, "logit-normal {mean:g} ± {std:g}"),
    "mode": Distribution(mode, "mode {scale:g}"),
    "cosmap": Distribution(cosmap, "cosmap"),
    # much noise most often (Mou et al. 2023, "T2I-Adapter", section 3.4), and its mirror
    "cubic": Distribution(lambda u: 1 - (1 - u) ** 3, "cubic"),
    "cubic_reversed": Distribution(lambda u: u**3, "cubic, reversed"),
    "beta": Distribution(beta, "beta {alpha:g}, {beta:g}"),
}
"""Name → distribution."""


def shifted(x: Tensor, shift: float | Tensor) -> Tensor:
    """Shares moved to more noise by a factor above 1, to less by one below: s·x / (1 + (s − 1)·x).

    Esser et al. 2024, equation 23, for higher resolutions. Of two shifts the factors multiply.
    """
    return shift * x / (1 + (shift - 1) * x)


SizeShift = Callable[[int], float]
"""Pixels of an image → the shift of its timesteps beside that of the others."""


def root_shift(pixels: int, reference: int) -> float:
    """The shift that gives an image the noise that one of `reference` pixels has: √(m / n).

    Esser et al. 2024, section 5.3.2: the mean of an area's pixels keeps its noise.
    """
    return math.sqrt(pixels / reference)


Stratum = tuple[int, int]
"""The index of a sample among those of its optimiser step, and their number."""


def _independent(address: Address, count: int) -> float:
    """A number in [0, 1) of an address; `count` times it, rounded down, is the seed modulo `count`,
    as timesteps have been drawn from the first version on."""
    rest, whole = divmod(seed_for(*address, "timestep"), count)
    return (whole + rest * count / 2**63) / count


def _stratified(address: Address, stratum: Stratum) -> float:
    """A number in [0, 1) of an address and its stratum: the n samples of a step fall into the n
    equal parts of [0, 1), one in each, and anywhere in it.

    Stratified sampling (Owen 2013, "Monte Carlo Theory, Methods and Examples", section 8.4), as
    Kingma et al. 2021, "Variational Diffusion Models", appendix I.1, spread the timesteps of a
    batch. The part of the first sample is drawn; each number alone is uniform.
    """
    *place, position = address
    index, count = stratum
    first = seed_for(*place, int(position) - index, "stratum") % count
    within = seed_for(*address, "timestep") / 2**63
    return ((first + index) % count + within) / count


@dataclass(frozen=True)
class Timesteps:
    """The trained timesteps, and how often each is drawn.

    first, last: the first trained timestep, and the one after the last.
    distribution: a name of `DISTRIBUTIONS`. parameters: of it. shift: see `shifted`.
    stratified: whether the samples of a step share the timesteps evenly, see `_stratified`.
    size_shift: the shift of each image's size beside `shift`; None for 1.
    """

    first: int
    last: int
    distribution: str = "uniform"
    parameters: Mapping[str, float] = field(default_factory=dict)
    shift: float = 1.0
    stratified: bool = False
    size_shift: SizeShift | None = None

    @property
    def label(self) -> str:
        """The distribution in words, for the summary; empty if uniform."""
        words = [DISTRIBUTIONS[self.distribution].label.format(**self.parameters)]
        words += [f"shift {self.shift:g}"] if self.shift != 1 else []
        words += ["shifted by size"] if self.size_shift else []
        words += ["stratified"] if self.stratified else []
        words = [word for word in words if word]
        return f"timesteps {', '.join(words)}" if words else ""

    def draw(
        self,
        addresses: Sequence[Address],
        strata: Sequence[Stratum | None] | None = None,
        pixels: Sequence[int] = (),
    ) -> Tensor:
        """Timesteps (B,), each a function of its address, stratum and number of pixels alone;
        without a stratum, as for fillings, it is drawn independently."""
        count, draws = self.last - self.first, []
        for address, stratum in zip(addresses, strata or [None] * len(addresses), strict=True):
            spread = self.stratified and stratum
            draws.append(_stratified(address, spread) if spread else _independent(address, count))
        shifts = [self.size_shift(n) for n in pixels] if self.size_shift else [1.0] * len(draws)
        u, by_size = torch.tensor([draws, shifts], dtype=torch.float64)
        return self.of(u, by_size)

    def of(self, u: Tensor, by_size: Tensor | float = 1.0) -> Tensor:
        """Timesteps (B,) of numbers u in [0, 1), (B,) float64: the distribution's quantiles.

        by_size: shifts beside `shift`, (B,).
        """
        share = DISTRIBUTIONS[self.distribution].quantile(u, **self.parameters)
        count = self.last - self.first
        within = (shifted(share, self.shift * by_size) * count).floor().clamp(0, count - 1)
        return within.long() + self.first
