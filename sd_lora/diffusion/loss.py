"""Training targets and losses of a batch's items."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sd_lora.diffusion.schedule import NoiseSchedule

TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x0, noise, alpha, sigma: noise,
    "v_prediction": lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
    "sample": lambda x0, noise, alpha, sigma: x0,
    "flow_prediction": lambda x0, noise, alpha, sigma: noise - x0,
    "edm": lambda x0, noise, alpha, sigma: sigma * x0 - alpha * noise,
}
"""Prediction type → target(x0, noise, alpha, sigma).

epsilon: Ho et al. 2020, equation 14. v_prediction: Salimans & Ho 2022, appendix D. sample: x0
itself, by diffusers' name. flow_prediction: Esser et al. 2024, section 2, x_t's derivative by σ.
edm: Karras et al. 2022, equation 8, with x0 in units of σ_data.
"""


def _pseudo_huber(error: Tensor, c: Tensor) -> Tensor:
    """√(error² + c²) − c without its cancellation: near 0 in float32, the difference of the two
    would be their rounding."""
    squared = error.square()
    return squared / ((squared + c.square()).sqrt() + c)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda error, c: error.square(),
    "l1": lambda error, c: error.abs(),
    "huber": lambda error, c: 2 * c * _pseudo_huber(error, c),
    "smooth_l1": lambda error, c: 2 * _pseudo_huber(error, c),
}
"""Name → loss(error, c) of each element: prediction − target (B, C, H, W) and the threshold c
(B, 1, 1, 1), float32.

l2: Ho et al. 2020, equation 14. huber: pseudo-Huber, squared for errors far below c, 2c times their
size far above; smooth_l1: the same over c, so that a small c tends to 2·l1 (Khrapov et al. 2024,
"Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss"; the
scales are sd-scripts').
"""

HUBER_SCHEDULES: dict[str, Callable[[NoiseSchedule, float, float], Tensor]] = {
    "constant": lambda schedule, c, scale: torch.full_like(schedule.alpha, c * scale),
    "exponential": lambda schedule, c, scale: (
        scale
        * torch.exp(math.log(c) * torch.arange(schedule.num_timesteps) / schedule.num_timesteps)
    ),
    # (1 + σ/α)⁻² is α² / (α + σ)², also at zero SNR
    "snr": lambda schedule, c, scale: (
        (1 - c) * (schedule.alpha / (schedule.alpha + schedule.sigma)).square() + c
    ),
}
"""Name → thresholds(schedule, c, scale) of all timesteps, (T,): from near 1 at little noise down to
c at pure noise, but for "constant" (Khrapov et al. 2024; sd-scripts' formulas).
"""


@dataclass(frozen=True)
class Loss:
    """The loss of each item, before the weight of its timestep.

    name: a row of `LOSSES`. thresholds: its c by timestep, (T,), of a row of `HUBER_SCHEDULES`;
    None for the rows without. unmasked_weight: least weight of a place in a mask.
    """

    name: str = "l2"
    thresholds: Tensor | None = None
    unmasked_weight: float = 0.0

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        name: str,
        huber_schedule: str,
        huber_c: float,
        huber_scale: float,
        unmasked_weight: float,
    ) -> "Loss":
        """The loss with its thresholds for a schedule's timesteps."""
        thresholds = HUBER_SCHEDULES[huber_schedule](schedule, huber_c, huber_scale)
        return cls(name, thresholds, unmasked_weight)

    def to(self, device: torch.device) -> "Loss":
        """The same loss on a device."""
        moved = None if self.thresholds is None else self.thresholds.to(device)
        return replace(self, thresholds=moved)

    def losses(
        self, prediction: Tensor, target: Tensor, t: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Loss of each batch item (B,), float32: the mean over its elements.

        Args:
            prediction, target: (B, C, H, W).
            t: timesteps (B,).
            mask: weight of each place (B, 1, H, W). The mean is over the weights, so that a small
                subject counts as much as a large one.
        """
        c = torch.ones_like(t) if self.thresholds is None else self.thresholds[t]
        error = prediction.float() - target.float()
        elements = LOSSES[self.name](error, c.view(-1, *(1,) * (error.dim() - 1)))
        if mask is None:
            return elements.flatten(1).mean(1)
        weights = mask.clamp(min=self.unmasked_weight).expand_as(elements).flatten(1)
        return (elements.flatten(1) * weights).sum(1) / weights.sum(1).clamp(min=1e-6)


L2 = Loss()
"""The squared error."""


def target_of(x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The right output of the UNet, (B, C, H, W).

    x0, noise: latents and noise (B, C, H, W). t: timesteps (B,).
    """
    alpha, sigma = schedule.coefficients(t, x0.dim())
    return TARGETS[schedule.prediction_type](x0 / schedule.data_std, noise, alpha, sigma)


def denoised(
    answer: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor]:
    """x0 / data_std and noise, (B, C, H, W) float32, that an output of the UNet stands for.

    answer, x_t: the UNet's output and input (B, C, H, W). t: timesteps (B,).

    Each target is a·x0 + b·ε, and x_t is α·x0 + σ·ε: two equations for two unknowns.
    """
    alpha, sigma = schedule.coefficients(t, x_t.dim())
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    target = TARGETS[schedule.prediction_type]
    a, b = target(one, zero, alpha, sigma), target(zero, one, alpha, sigma)
    answer, x_t = answer.float(), x_t.float()
    determinant = alpha * b - sigma * a
    return (b * x_t - sigma * answer) / determinant, (alpha * answer - a * x_t) / determinant


def sample_losses(
    prediction: Tensor,
    target: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    mask: Tensor | None = None,
    loss: Loss = L2,
) -> Tensor:
    """Loss of each batch item (B,), float32, weighted by its timestep.

    Args:
        prediction, target: the UNet's output, and its right value, (B, C, H, W).
        t: timesteps (B,).
        schedule: its loss weights.
        mask: weight of each place (B, 1, H, W), see `Loss.losses`.
        loss: of each element.
    """
    return loss.losses(prediction, target, t, mask) * schedule.weights[t]


def weighted_loss(losses: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Loss of a batch: scale · Σ wᵢ·lᵢ.

    Args:
        losses: of the batch items (B,).
        weights: of the batch items (B,): 1, or the source's weight, for instance items; λ for
            class items (prior preservation, Ruiz et al. 2022, "DreamBooth", equation 2).
        scale: 1 / number of instance items, if this is one whole batch.
    """
    return (losses * weights).sum() * scale
