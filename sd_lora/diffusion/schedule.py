"""The forward process: x_t = α_t x₀ + σ_t ε, from a model's own scheduler configuration.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equation 4, with α_t = √ᾱ_t and
σ_t = √(1 − ᾱ_t); signal-to-noise ratio α²/σ² as in Kingma et al. 2021. EDM (Karras et al. 2022,
"Elucidating the Design Space of Diffusion-Based Generative Models") is the same process: its
scaled input c_in·(x₀ + σε) is α x₀/σ_data + σ ε for some angle, and its network's target is the
velocity of x₀/σ_data, up to the sign.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from torch import Tensor

from sd_lora.errors import UsageError
from sd_lora.seeds import generator_for, seed_for


@dataclass(frozen=True)
class NoiseSchedule:
    """α_t and σ_t for t = 0 … T-1, each (T,) float32, and what the model is told and asked.

    timesteps: (T,), what the UNet is told of t. prediction_type: what it is asked for. weights:
    (T,), of the losses. data_std: σ_data, by which latents are divided first. EDM's alone is not 1.
    """

    alpha: Tensor
    sigma: Tensor
    prediction_type: str
    timesteps: Tensor
    weights: Tensor
    data_std: float = 1.0

    @classmethod
    def of(
        cls, scheduler: DDPMScheduler | EDMEulerScheduler, edm_style: bool = False
    ) -> "NoiseSchedule":
        """Reads a scheduler's betas or sigmas.

        Args:
            scheduler: the model's own.
            edm_style: weigh losses as EDM does, by the error of x₀ over σ², for a model that is
                not EDM's: no change for epsilon, α² for velocities.

        Raises:
            UsageError: a model that predicts neither noise nor velocity, or noise at the last step
                of a schedule that ends in pure noise, where nothing can be learned from it.
        """
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise UsageError(
                f"the model's scheduler says prediction_type {kind!r}; epsilon and v_prediction "
                "can be trained (--prediction_type overrules it)"
            )
        if isinstance(scheduler, EDMEulerScheduler):
            return cls._of_edm(scheduler, kind)
        alphas_cumprod = scheduler.alphas_cumprod.double()
        if kind == "epsilon" and alphas_cumprod[-1] <= 0:
            raise UsageError(
                "the schedule ends in pure noise (rescale_betas_zero_snr) and the model predicts "
                "epsilon: at its last step that tells nothing of the image. Zero terminal SNR is "
                "for v_prediction models"
            )
        alpha = alphas_cumprod.sqrt().float()
        weights = alpha**2 if edm_style and kind == "v_prediction" else torch.ones_like(alpha)
        sigma = (1 - alphas_cumprod).sqrt().float()
        return cls(alpha, sigma, kind, torch.arange(len(alpha)), weights)

    @classmethod
    def _of_edm(cls, scheduler: EDMEulerScheduler, kind: str) -> "NoiseSchedule":
        data_std = float(scheduler.config.sigma_data)
        num = scheduler.config.num_train_timesteps
        sigmas = scheduler.sigmas[:num].double().flip(0)  # from little noise to much, as t does
        length = (sigmas**2 + data_std**2).sqrt()
        alpha, sigma = (data_std / length).float(), (sigmas / length).float()
        timesteps = scheduler.precondition_noise(sigmas).float()
        weights = (sigma * data_std) ** 2  # c_out²: the error of x₀ from that of the network
        asked = "edm" if kind == "epsilon" else "v_prediction"
        return cls(alpha, sigma, asked, timesteps, weights, data_std)

    def to(self, device: torch.device) -> "NoiseSchedule":
        names = ("alpha", "sigma", "timesteps", "weights")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha)

    def at(self, t: Tensor, dims: int = 4) -> tuple[Tensor, Tensor]:
        """Returns α_t and σ_t for timesteps t: (B,), shaped (B, 1, …) with `dims` dimensions."""
        shape = (-1, *(1,) * (dims - 1))
        return self.alpha[t].view(shape), self.sigma[t].view(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns x_t, the UNet's input, for x0 and noise (B, C, H, W) and timesteps (B,)."""
        alpha, sigma = self.at(t, x0.dim())
        return alpha * (x0 / self.data_std) + sigma * noise

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


def draw_timesteps(addresses: Sequence[Address], last: int, first: int = 0) -> Tensor:
    """Returns uniform timesteps (B,) in [first, last), each a function of its address."""
    draws = [seed_for(*address, "timestep") % (last - first) for address in addresses]
    return torch.tensor(draws) + first
