"""The forward process: x_t = α_t x₀ + σ_t ε, from a model's own scheduler configuration.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equation 4, with α_t = √ᾱ_t and
σ_t = √(1 − ᾱ_t); signal-to-noise ratio α²/σ² as in Kingma et al. 2021.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sd_lora.errors import UsageError
from sd_lora.seeds import generator_for, seed_for


@dataclass(frozen=True)
class NoiseSchedule:
    """α_t and σ_t for t = 0 … T-1, each (T,) float32, and what the model predicts."""

    alpha: Tensor
    sigma: Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler: DDPMScheduler, prediction_type: str | None = None) -> "NoiseSchedule":
        """Reads a scheduler's betas; `prediction_type` overrules what its configuration says.

        Raises:
            UsageError: a model that predicts neither noise nor velocity.
        """
        alphas_cumprod = scheduler.alphas_cumprod.double()
        kind = prediction_type or scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise UsageError(
                f"the model's scheduler says prediction_type {kind!r}; epsilon and v_prediction "
                "can be trained (--prediction_type overrules it)"
            )
        return cls(alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float(), kind)

    def to(self, device: torch.device) -> "NoiseSchedule":
        return NoiseSchedule(self.alpha.to(device), self.sigma.to(device), self.prediction_type)

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha)

    def at(self, t: Tensor, dims: int = 4) -> tuple[Tensor, Tensor]:
        """Returns α_t and σ_t for timesteps t: (B,), shaped (B, 1, …) with `dims` dimensions."""
        shape = (-1, *(1,) * (dims - 1))
        return self.alpha[t].view(shape), self.sigma[t].view(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns x_t for x0 and noise (B, C, H, W) and timesteps (B,)."""
        alpha, sigma = self.at(t, x0.dim())
        return alpha * x0 + sigma * noise

    def snr(self, t: Tensor) -> Tensor:
        """Returns the signal-to-noise ratio α²/σ² (B,) of timesteps (B,)."""
        return (self.alpha[t] / self.sigma[t]).square()


Address = tuple[int | str, ...]


def draw_noise(shape: Sequence[int], addresses: Sequence[Address], offset: float = 0.0) -> Tensor:
    """Returns Gaussian noise (B, C, H, W) on the CPU, each sample a function of its address.

    Args:
        shape: of one sample, (C, H, W).
        addresses: one a sample.
        offset: strength of an added constant per channel ("offset noise", Guttenberg 2023).
    """
    samples = []
    for address in addresses:
        generator = generator_for(*address, "noise")
        noise = torch.randn(*shape, generator=generator)
        if offset:
            noise = noise + offset * torch.randn(shape[0], 1, 1, generator=generator)
        samples.append(noise)
    return torch.stack(samples)


def draw_timesteps(addresses: Sequence[Address], num_timesteps: int) -> Tensor:
    """Returns uniform timesteps (B,) in [0, num_timesteps), each a function of its address."""
    return torch.tensor([seed_for(*address, "timestep") % num_timesteps for address in addresses])
