"""Noise of batch items by address, with changes of it, one row each.

A new change is a function and a row of `CHANGES`, its parameters fields of `Noise`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from sd_lora.seeds import Address, generator_for, uniform
from sd_lora.transfer import sent


@dataclass(frozen=True)
class Noise:
    """The parameters of the noise; all off: standard normal.

    candidates: noises drawn for each item, of which the nearest to its latents is taken; 0: one.
    offset: strength of a constant added to each channel. offset_random: whether it is drawn between
    0 and `offset` for each item. offset_adaptive: added to it, times the size of a channel's mean.
    pyramid: coarser noises added, at most. pyramid_discount: strength of each by that before.
    perturbation: strength of a second noise in the UNet's input alone. perturbation_random: whether
    it is drawn between 0 and `perturbation` for each item.
    """

    candidates: int = 0
    offset: float = 0.0
    offset_random: bool = False
    offset_adaptive: float = 0.0
    pyramid: int = 0
    pyramid_discount: float = 0.3
    perturbation: float = 0.0
    perturbation_random: bool = False

    @property
    def needs_latents(self) -> bool:
        """Whether the noise depends on the latents."""
        return bool(self.candidates or self.offset_adaptive)

    def draw(self, x0: Tensor, addresses: Sequence[Address]) -> Tensor:
        """Noise (B, C, H, W) on the latents' device, each item a function of its address and
        latents alone. The host, which draws it, does not wait for the device.

        Args:
            x0: latents (B, C, H, W), in units of their standard deviation.
            addresses: one an item.
        """
        device = x0.device
        latents = x0 if self.needs_latents else torch.empty(x0.shape)
        items = zip(latents, addresses, strict=True)
        return sent(torch.stack([self._of_item(item, address) for item, address in items]), device)

    def _of_item(self, x0: Tensor, address: Address) -> Tensor:
        generator = generator_for(*address, "noise")
        noise = torch.randn(x0.shape, generator=generator)
        for name, change in CHANGES.items():
            if getattr(self, name):
                noise = change(self, noise, x0, address, generator)
        return noise

    def in_input(self, noise: Tensor, addresses: Sequence[Address]) -> Tensor:
        """The noise of the UNet's input, (B, C, H, W): with the perturbation, which the target does
        not have.

        Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models", algorithm
        1; diffusers' `--input_perturbation`, sd-scripts' `--ip_noise_gamma`.
        """
        if not self.perturbation:
            return noise
        second = []
        for address in addresses:
            drawn = torch.randn(noise.shape[1:], generator=generator_for(*address, "perturbation"))
            share = uniform(*address, "perturbation strength") if self.perturbation_random else 1.0
            second.append(self.perturbation * share * drawn)
        return noise + sent(torch.stack(second), noise.device).to(noise.dtype)


Change = Callable[[Noise, Tensor, Tensor, Address, Generator], Tensor]


def nearest(settings: Noise, noise: Tensor, x0: Tensor, address: Address, _: Generator) -> Tensor:
    """The one of several noises that is nearest to the latents.

    Li et al. 2025, "Improved Immiscible Diffusion" (KNN noise selection); OneTrainer's
    `k_noise_sampling`. The assignment of Li et al. 2024 within a batch would depend on how the
    batch is split.
    """
    more = [
        torch.randn(noise.shape, generator=generator_for(*address, "noise", number))
        for number in range(1, settings.candidates)
    ]
    drawn = sent(torch.stack([noise, *more]), x0.device)
    index = (drawn - x0).flatten(1).norm(dim=1).argmin(dim=0, keepdim=True)
    return drawn.index_select(0, index)[0]  # `drawn[index]` would have the host wait


def with_offset(
    settings: Noise, noise: Tensor, x0: Tensor, address: Address, generator: Generator
) -> Tensor:
    """The noise with a constant added to each channel.

    Guttenberg 2023, "Diffusion with Offset Noise". Adaptive: sd-scripts' `--adaptive_noise_scale`.
    """
    strength: float | Tensor = settings.offset
    if settings.offset_random:
        strength *= uniform(*address, "offset strength")
    constants = sent(torch.randn(noise.shape[0], 1, 1, generator=generator), x0.device)
    if settings.offset_adaptive:
        size = x0.mean(dim=(1, 2), keepdim=True).abs()
        strength = (strength + settings.offset_adaptive * size).clamp(min=0)
    return sent(noise, x0.device) + strength * constants


def pyramid(settings: Noise, noise: Tensor, x0: Tensor, address: Address, _: Generator) -> Tensor:
    """The noise with others added, scaled to standard deviation 1: the n-th, from 0, is rⁿ times as
    coarse and dⁿ times as strong as the noise itself, with an r of its own drawn from 2 to 4, until
    one has a side of 1. The 0th is as fine, so that one alone changes nothing.

    Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training"; sd-scripts'
    `--multires_noise_iterations`, where the deviation is that of the whole batch.
    """
    channels, height, width = noise.shape
    total = noise
    for number in range(settings.pyramid):
        ratio = (2 + 2 * uniform(*address, "pyramid", number, "ratio")) ** number
        h, w = max(1, int(height / ratio)), max(1, int(width / ratio))
        generator = generator_for(*address, "pyramid", number)
        coarse = torch.randn(1, channels, h, w, generator=generator)
        fine = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        total = total + sent(fine[0] * settings.pyramid_discount**number, noise.device)
        if h == 1 or w == 1:
            break
    return total / total.std()


CHANGES: dict[str, Change] = {
    "candidates": nearest,
    "offset": with_offset,
    "pyramid": pyramid,
}
"""Field of `Noise` that switches a change on → function(settings, noise (C, H, W), latents
(C, H, W), address, generator of the first noise), in the order in which they are made."""
