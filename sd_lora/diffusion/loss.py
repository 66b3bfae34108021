"""Training targets and losses of a batch's items."""

from collections.abc import Callable

from torch import Tensor

from sd_lora.diffusion.schedule import NoiseSchedule

TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x0, noise, alpha, sigma: noise,
    "v_prediction": lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
    "edm": lambda x0, noise, alpha, sigma: sigma * x0 - alpha * noise,
}
"""Prediction type → target(x0, noise, alpha, sigma).

epsilon: Ho et al. 2020, equation 14. v_prediction: Salimans & Ho 2022, appendix D. edm: Karras et
al. 2022, equation 8, with x0 in units of σ_data.
"""

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda prediction, target: (prediction - target).square(),
}
"""Name → loss(prediction, target) of each element, both float32 (B, C, H, W).

l2: Ho et al. 2020, equation 14.
"""


def sample_losses(
    prediction: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    mask: Tensor | None = None,
    loss: str = "l2",
) -> Tensor:
    """Loss of each batch item (B,), float32, weighted by its timestep.

    Args:
        prediction: the UNet's output (B, C, H, W).
        x0, noise: latents and noise (B, C, H, W).
        t: timesteps (B,).
        schedule: noise levels, prediction type and loss weights.
        mask: weight of each place (B, 1, H, W). The mean is over the weights, so that a small
            subject counts as much as a large one.
        loss: a name of `LOSSES`.
    """
    alpha, sigma = schedule.coefficients(t, x0.dim())
    target = TARGETS[schedule.prediction_type](x0 / schedule.data_std, noise, alpha, sigma)
    errors = LOSSES[loss](prediction.float(), target.float())
    losses = errors.flatten(1).mean(1)
    if mask is not None:
        weights = mask.expand_as(errors).flatten(1)
        losses = (errors.flatten(1) * weights).sum(1) / weights.sum(1).clamp(min=1e-6)
    return losses * schedule.weights[t]


def weighted_loss(losses: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Loss of a batch: scale · Σ wᵢ·lᵢ.

    Args:
        losses: of the batch items (B,).
        weights: of the batch items (B,): 1, or the source's weight, for instance items; λ for
            class items (prior preservation, Ruiz et al. 2022, "DreamBooth", equation 2).
        scale: 1 / number of instance items, if this is one whole batch.
    """
    return (losses * weights).sum() * scale
