"""The forward process x_t = α_t x₀ + σ_t ε of a model's own scheduler.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equation 4, with α_t = √ᾱ_t and
σ_t = √(1 − ᾱ_t); signal-to-noise ratio α²/σ² as in Kingma et al. 2021. EDM (Karras et al. 2022,
"Elucidating the Design Space of Diffusion-Based Generative Models") is the same process: its
scaled input c_in·(x₀ + σε) is α x₀/σ_data + σ ε for some angle, and its network's target is the
velocity of x₀/σ_data, up to the sign.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from torch import Tensor

from sd_lora.diffusion.weightings import WEIGHTINGS
from sd_lora.errors import UsageError


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels t = 0 … T-1 of a model, its prediction type, and the losses' weights.

    alpha, sigma: α_t and σ_t, (T,) float32.
    prediction_type: a name of `TARGETS`.
    timesteps: the UNet's timestep input for each t, (T,).
    weights: loss weights, (T,) float32.
    weighting: the weights in words, for the run's summary; empty if all are 1.
    data_std: σ_data, the divisor of the latents. 1 for every model but EDM's.
    """

    alpha: Tensor
    sigma: Tensor
    prediction_type: str
    timesteps: Tensor
    weights: Tensor
    weighting: str = ""
    data_std: float = 1.0

    @classmethod
    def of(
        cls,
        scheduler: DDPMScheduler | EDMEulerScheduler,
        weighting: str = "uniform",
        **parameters: Any,
    ) -> "NoiseSchedule":
        """Read a scheduler's betas or sigmas.

        Args:
            scheduler: the model's own.
            weighting: a name of `WEIGHTINGS`. Models of EDM's formulation have their own.
            parameters: of the weighting, e.g. gamma.

        Raises:
            UsageError: a prediction type other than epsilon and v_prediction; epsilon with a
                schedule that ends in pure noise, where the last step teaches nothing; a weighting
                that EDM's formulation excludes.
        """
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise UsageError(
                f"the base model's scheduler has prediction_type {kind!r}; only epsilon and "
                "v_prediction can be trained. If the scheduler is wrong, give the run the "
                "right prediction type"
            )
        if isinstance(scheduler, EDMEulerScheduler):
            schedule = cls._of_edm(scheduler, kind)
            if weighting not in ("uniform", "edm_style"):
                raise UsageError(
                    "the base model has EDM's formulation (EDMEulerScheduler), with loss weights "
                    f"of its own: leave out {WEIGHTINGS[weighting].flag}"
                )
            return schedule._weighted("edm")
        schedule = cls._of_alphas(scheduler, kind)
        if weighting == "edm_style" and kind == "epsilon":
            weighting = "uniform"  # its weights are 1 there
        return schedule._weighted(weighting, **parameters)

    @classmethod
    def _of_alphas(cls, scheduler: DDPMScheduler, kind: str) -> "NoiseSchedule":
        alphas_cumprod = scheduler.alphas_cumprod.double()
        if kind == "epsilon" and alphas_cumprod[-1] <= 0:
            raise UsageError(
                "the noise schedule ends in pure noise (rescale_betas_zero_snr) and the base model "
                "predicts epsilon: its last timestep teaches nothing about the image. Use zero "
                "terminal SNR with v_prediction models only"
            )
        alpha = alphas_cumprod.sqrt().float()
        sigma = (1 - alphas_cumprod).sqrt().float()
        return cls(alpha, sigma, kind, torch.arange(len(alpha)), torch.ones_like(alpha))

    @classmethod
    def _of_edm(cls, scheduler: EDMEulerScheduler, kind: str) -> "NoiseSchedule":
        data_std = float(scheduler.config.sigma_data)
        num = scheduler.config.num_train_timesteps
        sigmas = scheduler.sigmas[:num].double().flip(0)  # from little noise to much, as t
        length = (sigmas**2 + data_std**2).sqrt()
        alpha, sigma = (data_std / length).float(), (sigmas / length).float()
        timesteps = scheduler.precondition_noise(sigmas).float()
        target = "edm" if kind == "epsilon" else "v_prediction"
        return cls(alpha, sigma, target, timesteps, torch.ones_like(alpha), data_std=data_std)

    def _weighted(self, weighting: str, **parameters: Any) -> "NoiseSchedule":
        row = WEIGHTINGS[weighting]
        label = row.label.format(**parameters)
        return replace(self, weights=row.weights(self, **parameters), weighting=label)

    def to(self, device: torch.device) -> "NoiseSchedule":
        """The same schedule on a device."""
        names = ("alpha", "sigma", "timesteps", "weights")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alpha)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratios α²/σ², (T,)."""
        return (self.alpha / self.sigma).square()

    def coefficients(self, t: Tensor, dims: int = 4) -> tuple[Tensor, Tensor]:
        """α_t and σ_t of timesteps t (B,), each (B, 1, …) with `dims` dimensions."""
        shape = (-1, *(1,) * (dims - 1))
        return self.alpha[t].view(shape), self.sigma[t].view(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, the UNet's input, of x0 and noise (B, C, H, W) and timesteps (B,)."""
        alpha, sigma = self.coefficients(t, x0.dim())
        return alpha * (x0 / self.data_std) + sigma * noise
