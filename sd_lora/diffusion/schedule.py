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
            UsageError: a prediction type other than epsilon, v_prediction, sample and
                flow_prediction; sample with EDM's formulation; epsilon with a schedule that ends in
                pure noise, where the last step teaches nothing; a weighting that EDM's formulation
                or flow matching excludes.
        """
        kind = scheduler.config.prediction_type
        if kind == "flow_prediction" and not isinstance(scheduler, EDMEulerScheduler):
            return cls._of_flow(scheduler, weighting, **parameters)
        is_edm = isinstance(scheduler, EDMEulerScheduler)
        known = ("epsilon", "v_prediction") if is_edm else ("epsilon", "v_prediction", "sample")
        if kind not in known:
            raise UsageError(
                f"the base model's scheduler is {type(scheduler).__name__} with prediction_type "
                f"{kind!r}; only {', '.join(known)} and flow_prediction can be trained. If the "
                "scheduler is wrong, give the run the right prediction type"
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

    @classmethod
    def _of_flow(
        cls, scheduler: DDPMScheduler, weighting: str, **parameters: Any
    ) -> "NoiseSchedule":
        """Flow matching: x_t = (1 − σ) x₀ + σ ε, and the UNet is told 1000·σ.

        Esser et al. 2024, "Scaling Rectified Flow Transformers", section 2; the noise levels are
        those of diffusers' FlowMatchEulerDiscreteScheduler.
        """
        if weighting not in ("uniform", "table"):
            raise UsageError(
                "the base model predicts flows, whose losses are weighted by no SNR: leave out "
                f"{WEIGHTINGS[weighting].flag}"
            )
        num = scheduler.config.num_train_timesteps
        shift = float(scheduler.config.get("flow_shift", 1.0))
        u = torch.arange(1, num + 1, dtype=torch.float64) / num
        sigma = shift * u / (1 + (shift - 1) * u)  # equation 23
        alpha, timesteps = (1 - sigma).float(), (num * sigma).float()
        schedule = cls(alpha, sigma.float(), "flow_prediction", timesteps, torch.ones_like(alpha))
        return schedule._weighted(weighting, **parameters)

    def _weighted(self, weighting: str, **parameters: Any) -> "NoiseSchedule":
        row = WEIGHTINGS[weighting]
        label = row.label.format(**parameters)
        return replace(self, weights=row.weights(self, **parameters), weighting=label)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether rescaled betas end in pure noise; flows always end there."""
        return self.prediction_type != "flow_prediction" and float(self.alpha[-1]) == 0

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
