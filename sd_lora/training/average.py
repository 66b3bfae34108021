"""Moving averages of the trained parameters over the steps, which a run samples and exports.

θ̂_t = β_t θ̂_{t−1} + (1 − β_t) θ_t. A constant β forgets after 1 / (1 − β) steps, however long the
run is. The power function of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models" (EDM2), section 3.1, has a width that grows with the run: its relative length
σ_rel is the deviation of the weights' steps as a share of all steps. Averages of two lengths at
several steps give that of any length afterwards (section 3.2 and appendix C.2).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sd_lora.config.schema import RunConfig

LENGTHS = (0.05, 0.1)
"""Relative lengths that are kept in each checkpoint beside the run's own: those of the paper."""

CONSTANT = "constant"
"""Name of the average of a constant decay; those of a relative length are named by it."""

WORDS = "words/"
"""Beginning of the names of new words' embeddings; deltas have a checkpoint's names of factors."""


@dataclass(frozen=True)
class Constant:
    """A constant β, smaller in the first steps, so that the start is forgotten: as diffusers'
    EMAModel, (1 + t) / (10 + t)."""

    decay: float

    def beta(self, step: int) -> float:
        """β of a step, from 1."""
        return min(self.decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Power:
    """The power function β_t = (1 − 1/t)^(γ + 1) of a relative length σ_rel; β₁ = 0."""

    length: float

    @cached_property
    def gamma(self) -> float:
        """γ of the length: σ_rel = √((γ + 1) / ((γ + 2)² (γ + 3))), equation 5 of the paper."""
        t = self.length**-2
        return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())

    def beta(self, step: int) -> float:
        """β of a step, from 1."""
        return (1 - 1 / step) ** (self.gamma + 1)


def profiles_of(config: RunConfig) -> dict[str, Constant | Power]:
    """Name → course of β of a configuration's averages, the exported one last: a constant decay, or
    `LENGTHS` and the run's own length; none without averages."""
    if not config.use_ema:
        return {}
    if config.ema_decay is not None:
        return {CONSTANT: Constant(config.ema_decay)}
    own = config.ema_length or LENGTHS[-1]
    return {f"{length:g}": Power(length) for length in (*(n for n in LENGTHS if n != own), own)}


class Average:
    """Averages of parameters, one a profile.

    Args:
        parameters: name → trained parameter; the averages begin at their present values.
        profiles: name → course of β.
        exported: name of the profile that is sampled and exported.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        profiles: Mapping[str, Constant | Power],
        exported: str,
    ) -> None:
        self.parameters, self.profiles, self.exported = parameters, profiles, exported
        self.values = {
            name: {key: p.detach().clone() for key, p in parameters.items()} for name in profiles
        }

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], config: RunConfig) -> "Average":
        """The averages that a configuration asks for."""
        profiles = profiles_of(config)
        return cls(parameters, profiles, [*profiles][-1])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after a step, from 1."""
        trained = [*self.parameters.values()]
        for name, profile in self.profiles.items():
            mine = [*self.values[name].values()]
            torch._foreach_lerp_(mine, trained, 1 - profile.beta(step))

    @torch.no_grad()
    def use(self) -> None:
        """Give the parameters the exported average's values."""
        for key, values in self.values[self.exported].items():
            self.parameters[key].copy_(values)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """A context in which the parameters have the exported average's values; the trained ones
        come back to the bit."""
        trained = {key: p.detach().clone() for key, p in self.parameters.items()}
        self.use()
        try:
            yield
        finally:
            with torch.no_grad():
                for key, values in trained.items():
                    self.parameters[key].copy_(values)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Profile → name → value."""
        return self.values

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the values of `state_dict`."""
        for name, values in self.values.items():
            for key, value in values.items():
                value.copy_(state[name][key])


def overlap(t_a: float, gamma_a: float, t_b: float, gamma_b: float) -> float:
    """Inner product ∫ p_a p_b dτ of two power-function profiles p(τ) = (γ + 1) τ^γ / t^(γ + 1) on
    (0, t), which end at the steps t (appendix C.2)."""
    log = math.log(t_a / t_b) * (gamma_b if t_a < t_b else -gamma_a)
    product = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * max(t_a, t_b))
    return product * math.exp(log)


def weights_of(snapshots: Sequence[tuple[int, float]], step: int, length: float) -> list[float]:
    """Weights of averages whose sum is nearest to that of another relative length.

    Least squares over the profiles (algorithm 3 of the paper, appendix C.3).

    Args:
        snapshots: step and relative length of each average.
        step: at which the wanted average ends.
        length: its relative length.
    """
    profiles = [(float(at), Power(sigma).gamma) for at, sigma in snapshots]
    gamma = Power(length).gamma
    a = np.array([[overlap(*mine, *other) for other in profiles] for mine in profiles])
    b = np.array([overlap(*mine, float(step), gamma) for mine in profiles])
    return [float(x) for x in np.linalg.lstsq(a, b, rcond=None)[0]]


def reconstructed(
    snapshots: Mapping[int, Mapping[str, Mapping[str, Tensor]]], length: float
) -> dict[str, Tensor]:
    """The average of another relative length at the last step.

    Args:
        snapshots: step → a state of `Average`, of runs with relative lengths.
        length: the wanted one.
    """
    rows = [(step, name) for step, state in snapshots.items() for name in state]
    weights = weights_of([(step, float(name)) for step, name in rows], max(snapshots), length)
    keys = snapshots[max(snapshots)][rows[-1][1]]
    return {
        key: torch.stack(
            [w * snapshots[s][n][key].double() for w, (s, n) in zip(weights, rows, strict=True)]
        )
        .sum(0)
        .to(keys[key].dtype)
        for key in keys
    }
