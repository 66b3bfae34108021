"""Latents computed once: the mean and deviation of each picture's latent, ready for every epoch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from sd_lora.data.images import Framing
from sd_lora.data.masks import draw_mask
from sd_lora.data.sources import Sample
from sd_lora.data.stream import Slot
from sd_lora.errors import RunError
from sd_lora.seeds import generator_for

MAX_NAMED = 20
"""How many broken pictures one error names."""


@dataclass(frozen=True)
class Scaling:
    """How a VAE's latents z become what its UNet works on: x₀ = (z - mean) · factor.

    mean, factor: (C, 1, 1).
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, vae: AutoencoderKL) -> "Scaling":
        """Reads a VAE's configuration: one factor and shift, or, as Playground v2.5's has them,
        means and deviations of the channels."""
        config = vae.config
        mean = torch.full((config.latent_channels,), float(config.get("shift_factor") or 0.0))
        factor = torch.full((config.latent_channels,), float(config.scaling_factor))
        if config.get("latents_mean") and config.get("latents_std"):
            mean = torch.tensor(config.latents_mean, dtype=torch.float32).flatten()
            factor = factor / torch.tensor(config.latents_std, dtype=torch.float32).flatten()
        return cls(mean.view(-1, 1, 1), factor.view(-1, 1, 1))

    def scaled(self, z: Tensor) -> Tensor:
        """Returns x₀ of latents z (…, C, H, W)."""
        return (z - self.mean.to(z.device)) * self.factor.to(z.device)

    def unscaled(self, x0: Tensor) -> Tensor:
        """Returns the latents z of x₀ (…, C, H, W)."""
        return x0 / self.factor.to(x0.device) + self.mean.to(x0.device)


class Latents:
    """Latent distributions of pictures whose crop does not change, in memory, on the CPU.

    A picture with a random crop is decoded and encoded each time it is seen, and one for inpainting
    decoded: `read_each_time` says which. Encoding is in the VAE's own dtype, float32 unless the
    user wants it otherwise: SDXL's VAE overflows in float16. sizes: (kind, index) → (width, height)
    in pixels.

    Args:
        vae, framing, device: the encoder, how pictures become pixels, and where that is computed.
        fresh: the pixels are needed each time, too (inpainting).
    """

    def __init__(
        self, vae: AutoencoderKL, framing: Framing, device: torch.device, fresh: bool = False
    ) -> None:
        self.vae, self.framing, self.device, self.fresh = vae, framing, device, fresh
        self.scaling = Scaling.of(vae)
        self.read_each_time: dict[str, set[int]] = {}
        self.sizes: dict[tuple[str, int], tuple[int, int]] = {}
        self._names: dict[tuple[str, int], str] = {}
        self._table: dict[tuple[str, int, bool], tuple[Tensor, Tensor]] = {}

    def fill(
        self,
        kind: str,
        samples: list[Sample],
        progress: Callable[[list[Sample]], Iterator[Sample]],
    ) -> None:
        """Decodes every picture and encodes those whose crop is fixed, with and without flip.

        Raises:
            RunError: all pictures that could not be decoded, by name, before anything is trained;
                or a picture whose latent is not finite.
        """
        self.read_each_time[kind] = set()
        flips = (False, True) if self.framing.random_flip else (False,)
        broken: list[str] = []
        waiting: list[tuple[int, bool, Tensor]] = []
        for index, sample in enumerate(progress(samples)):
            try:
                image = sample.picture()
            except RunError as error:
                broken.append(str(error))
                continue
            self.sizes[kind, index] = image.size
            self._names[kind, index] = sample.name
            drawn = self.framing.is_random(image.size)
            if self.fresh or drawn:
                self.read_each_time[kind].add(index)
            if drawn or broken:  # which are broken is all that is left to learn
                continue
            waiting += [(index, flip, self.framing.pixels(image, 0.0, flip)) for flip in flips]
            while len(waiting) >= self.at_once:
                self._store(kind, waiting[: self.at_once])
                waiting = waiting[self.at_once :]
        if broken:
            more = len(broken) - MAX_NAMED
            raise RunError(
                f"{len(broken)} of {len(samples)} pictures cannot be used; mend or remove them:\n  "
                + "\n  ".join(broken[:MAX_NAMED])
                + (f"\n  … and {more} more" if more > 0 else "")
            )
        if waiting:
            self._store(kind, waiting)

    def _store(self, kind: str, batch: list[tuple[int, bool, Tensor]]) -> None:
        means, stds = self._encode(torch.stack([pixels for _, _, pixels in batch]))
        for (index, flip, _), mean, std in zip(batch, means, stds, strict=True):
            self._check(mean, std, kind, index)
            self._table[kind, index, flip] = (mean, std)

    def _check(self, mean: Tensor, std: Tensor, kind: str, index: int) -> None:
        if torch.isfinite(mean).all() and torch.isfinite(std).all():
            return
        name = self._names[kind, index]
        precision = str(self.vae.dtype).removeprefix("torch.")
        remedy = "its weights or the picture are broken"
        if self.vae.dtype != torch.float32:
            remedy = (
                "it overflows, as SDXL's does in float16: leave --vae_precision at fp32, or give "
                "--pretrained_vae_model_name_or_path a VAE mended for it, such as "
                "madebyollin/sdxl-vae-fp16-fix"
            )
        raise RunError(f"the VAE gave NaN or infinite latents for {name} in {precision}: {remedy}")

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        means, stds = [], []
        for part in pixels.split(self.at_once):
            distribution = self.vae.encode(part.to(self.device, self.vae.dtype)).latent_dist
            means.append(distribution.mean.float().cpu())
            stds.append(distribution.std.float().cpu())
        return torch.cat(means), torch.cat(stds)

    @property
    def at_once(self) -> int:
        """How many pictures are encoded at once: four of 512 pixels take as much memory as one of
        1024."""
        return min(4, max(1, 4 * 512**2 // self.framing.resolution**2))

    @property
    def needs_vae(self) -> bool:
        """Whether training must encode pictures as it goes."""
        return any(self.read_each_time.values())

    def latents(self, slots: list[Slot], pixels: list[Tensor | None]) -> Tensor:
        """Returns scaled latents x₀ (B, C, H, W) on the device, sampled anew for each slot.

        Raises:
            RunError: a picture whose latent is not finite.
        """
        keys = [(slot.kind, slot.index, slot.flip) for slot in slots]
        fresh = [
            (slot, p)
            for slot, key, p in zip(slots, keys, pixels, strict=True)
            if p is not None and key not in self._table
        ]
        encoded: Iterator[tuple[Tensor, Tensor]] = iter(())
        if fresh:
            means, stds = self._encode(torch.stack([p for _, p in fresh]))
            for (slot, _), m, s in zip(fresh, means, stds, strict=True):
                self._check(m, s, slot.kind, slot.index)
            encoded = iter(zip(means, stds, strict=True))
        pairs = [self._table[key] if key in self._table else next(encoded) for key in keys]
        mean = torch.stack([mean for mean, _ in pairs])
        std = torch.stack([std for _, std in pairs])
        return self._drawn(mean, std, slots, "latent")

    def _drawn(self, mean: Tensor, std: Tensor, slots: list[Slot], what: str) -> Tensor:
        generators = [generator_for(*slot.address, what) for slot in slots]
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        return self.scaling.scaled(mean + std * noise).to(self.device)  # one copy a batch

    def masked(self, slots: list[Slot], pixels: list[Tensor | None]) -> Tensor:
        """Returns what an inpainting UNet sees besides x_t, (B, 1 + C, H, W) on the device.

        The mask (1: to be painted), and the latents of the picture with grey in its place.
        """
        whole = torch.stack([p for p in pixels if p is not None])
        masks = torch.stack([draw_mask(whole.shape[-1], slot.address) for slot in slots])
        mean, std = self._encode(whole * (1 - masks))
        for slot, m, s in zip(slots, mean, std, strict=True):
            self._check(m, s, slot.kind, slot.index)
        seen = self._drawn(mean, std, slots, "masked latent")
        small = F.interpolate(masks, size=seen.shape[-2:])  # nearest, as diffusers' pipeline
        return torch.cat([small.to(seen), seen], dim=1)
