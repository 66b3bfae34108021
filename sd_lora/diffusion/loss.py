"""What the model is asked for, and how much each timestep and sample counts."""

from collections.abc import Callable

import torch
from torch import Tensor

from sd_lora.diffusion.schedule import NoiseSchedule

PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x0, noise, alpha, sigma: noise,
    "v_prediction": lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
    "edm": lambda x0, noise, alpha, sigma: sigma * x0 - alpha * noise,
}
"""Name → target(x0, noise, alpha, sigma).

epsilon: Ho et al. 2020, equation 14. v_prediction: Salimans & Ho 2022, appendix D. edm: Karras et
al. 2022, equation 8, with x0 in units of σ_data.
"""


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Returns the min-SNR-γ weights (B,) of signal-to-noise ratios (B,).

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4:
    min(SNR, γ) in terms of x₀, hence divided by SNR for epsilon and by SNR + 1 for v. At zero SNR
    the weight is its limit, 1 for epsilon and 0 for v.
    """
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return torch.where(snr > gamma, gamma / snr, 1.0)


def sample_losses(
    prediction: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    snr_gamma: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns each sample's mean squared error (B,) in float32, weighted by the schedule, and by
    min-SNR if asked.

    prediction, x0, noise: (B, C, H, W); t: (B,). mask: (B, 1, H, W), how much each place counts:
    the mean is over what counts, so that a small subject weighs as much as a large one.
    """
    alpha, sigma = schedule.at(t, x0.dim())
    target = PREDICTIONS[schedule.prediction_type](x0 / schedule.data_std, noise, alpha, sigma)
    errors = (prediction.float() - target.float()).square()
    losses = errors.flatten(1).mean(1)
    if mask is not None:
        counted = mask.expand_as(errors).flatten(1)
        losses = (errors.flatten(1) * counted).sum(1) / counted.sum(1).clamp(min=1e-6)
    losses = losses * schedule.weights[t]
    if snr_gamma is not None:
        losses = losses * min_snr_weights(schedule.snr(t), snr_gamma, schedule.prediction_type)
    return losses


def weighted_loss(losses: Tensor, weights: Tensor, share: float) -> Tensor:
    """Returns Σ wᵢ·lᵢ · share; share: 1 / number of instance samples, for what is one whole batch.

    Prior preservation (Ruiz et al. 2022, "DreamBooth", equation 2) is the weight λ of the class
    samples; instance samples weigh 1, or what their source says.
    """
    return (losses * weights).sum() * share
