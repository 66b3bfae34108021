"""Loss weights by timestep that are learned beside the model: the model's uncertainty.

A multi-task loss, each noise level a task (Kendall et al. 2018, "Multi-Task Learning Using
Uncertainty to Weigh Losses"): Σ l·e^(−u(t)) + u(t), in which u(t) becomes the logarithm of the mean
loss at t, so that each timestep weighs as much as any other. u is that of Karras et al. 2024
(EDM2, equations 14 to 16 and 21): one linear layer over Fourier features of the noise level.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.seeds import generator_for

CHANNELS = 128
"""Fourier features, as EDM2's."""

RATE = 0.01
"""Learning rate of u, EDM2's first one; at each step it moves by about a tenth at most."""

BETAS = (0.9, 0.99)
"""Of Adam, as EDM2's."""


def features(schedule: NoiseSchedule) -> Tensor:
    """√2·cos(2π(f·c + φ)) of c = ln(σ/α) / 4 for each timestep, (T, CHANNELS) float32; f is normal,
    φ uniform, the same in each run."""
    generator = generator_for("uncertainty")
    frequency = torch.randn(CHANNELS, generator=generator)
    phase = torch.rand(CHANNELS, generator=generator)
    ratio = (schedule.sigma / schedule.alpha).cpu().clamp(1e-3, 1e3)  # finite at zero SNR
    angle = frequency * (ratio.log() / 4)[:, None] + phase
    return math.sqrt(2) * torch.cos(2 * math.pi * angle)


def reweighted(losses: Tensor, factors: Tensor) -> Tensor:
    """Losses (B,) with the values that they have, and gradients multiplied by factors (B,): the
    values stay comparable over the steps while the weights change."""
    return losses + (factors - 1) * (losses - losses.detach())


class Uncertainty:
    """u(t), its Adam, and the weights of a step.

    Its parameters are in no LoRA file; checkpoints hold them. Several processes average `gradient`
    before `step`, and so stay alike.

    Args:
        schedule: whose timesteps have a u.
        first, last: the first trained timestep, and the one after the last.
    """

    def __init__(self, schedule: NoiseSchedule, first: int, last: int) -> None:
        self.trained = slice(first, last)
        self.features = features(schedule) / math.sqrt(CHANNELS)
        self._begin()

    def to(self, device: torch.device) -> "Uncertainty":
        """Weights by the same features that have learned nothing, on a device: where the losses
        are, so that the host does not wait for them."""
        fresh = copy.copy(self)
        fresh.features = self.features.to(device)
        fresh._begin()
        return fresh

    def _begin(self) -> None:
        self.parameter = torch.zeros(CHANNELS, device=self.features.device, requires_grad=True)
        self.parameter.grad = torch.zeros_like(self.parameter)
        self.optimizer = torch.optim.Adam([self.parameter], lr=RATE, betas=BETAS, fused=True)
        self._renew()

    @torch.no_grad()
    def _renew(self) -> None:
        self.u = self.features @ self.parameter
        weights = (-self.u).exp()
        self.weights = weights / weights[self.trained].mean()

    @property
    def gradient(self) -> Tensor:
        """The gradient summed since the last step, (CHANNELS,)."""
        assert self.parameter.grad is not None
        return self.parameter.grad

    def factors(self, t: Tensor) -> Tensor:
        """The weights of timesteps t (B,): e^(−u) divided by its mean over the trained timesteps,
        so that a rate and a limit of gradients mean the same as without them."""
        return self.weights[t]

    @torch.no_grad()
    def observe(self, losses: Tensor, t: Tensor, shares: Tensor) -> None:
        """Add the gradient of Σ share·(l·e^(−u(t)) + u(t)).

        Args:
            losses: of batch items (B,), detached.
            t: timesteps (B,).
            shares: of the step (B,); 0 leaves an item out.
        """
        of_u = shares * (1 - losses * (-self.u[t]).exp())
        self.gradient.add_(of_u @ self.features[t])

    @torch.no_grad()
    def step(self) -> None:
        """Take a step of Adam, and begin the next sum; none for a gradient that is not finite, of
        which Adam's moments would not be rid again. An infinite loss gives one, in float16 too
        where the scaler of the LoRA's gradients leaves out that step by itself."""
        finite, state = self.gradient.isfinite().all(), self.optimizer.state[self.parameter]
        u, known = self.parameter.clone(), {name: value.clone() for name, value in state.items()}
        self.optimizer.step()
        # chosen on the device: the host would wait for an answer
        self.parameter.copy_(torch.where(finite, self.parameter, u))
        for name, value in state.items():
            value.copy_(torch.where(finite, value, known.get(name, torch.zeros_like(value))))
        self.forget()
        self._renew()

    def forget(self) -> None:
        """Set the gradient to zero, without a step."""
        self.gradient.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The parameter and its Adam's state."""
        return {
            "parameter": self.parameter.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`."""
        self.parameter.copy_(state["parameter"])
        saved = state["optimizer"]  # of an earlier version its Adam is not fused
        groups = [group | {"fused": True} for group in saved["param_groups"]]
        self.optimizer.load_state_dict(saved | {"param_groups": groups})
        self.forget()
        self._renew()
