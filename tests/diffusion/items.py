"""Losses of batch items from their latents, as the loop puts them together."""

from torch import Tensor

from sd_lora.diffusion.loss import L2, Loss, sample_losses, target_of
from sd_lora.diffusion.schedule import NoiseSchedule


def losses_of(
    out: Tensor, x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule, loss: Loss = L2
) -> Tensor:
    """Loss of each item (B,) for a network's output."""
    return sample_losses(out, target_of(x0, noise, t, schedule), t, schedule, loss=loss)
