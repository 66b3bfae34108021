"""Latents computed once: the mean and deviation of each picture's latent, ready for every epoch."""

from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sd_lora.data.images import Framing
from sd_lora.data.sources import Sample
from sd_lora.data.stream import Slot
from sd_lora.errors import RunError
from sd_lora.seeds import generator_for

MAX_NAMED = 20
"""How many broken pictures one error names."""


class Latents:
    """Latent distributions of pictures whose crop does not change, in memory, on the CPU.

    A picture with a random crop is decoded and encoded each time it is seen; `uncached` says
    which ones these are. Encoding is in float32: it happens once, and SDXL-like VAEs overflow.
    """

    def __init__(self, vae: AutoencoderKL, framing: Framing, device: torch.device) -> None:
        self.vae, self.framing, self.device = vae, framing, device
        self.scaling: float = vae.config.scaling_factor
        self.shift: float = getattr(vae.config, "shift_factor", None) or 0.0
        self.uncached: dict[str, set[int]] = {}
        self._table: dict[tuple[str, int, bool], tuple[Tensor, Tensor]] = {}

    def fill(
        self,
        kind: str,
        samples: list[Sample],
        progress: Callable[[list[Sample]], Iterator[Sample]],
        batch_size: int = 4,
    ) -> None:
        """Decodes every picture and encodes those whose crop is fixed, with and without flip.

        Raises:
            RunError: all pictures that could not be decoded, by name, before anything is trained;
                or a picture whose latent is not finite.
        """
        self.uncached[kind] = set()
        flips = (False, True) if self.framing.random_flip else (False,)
        broken: list[str] = []
        waiting: list[tuple[int, bool, Tensor]] = []
        for index, sample in enumerate(progress(samples)):
            try:
                image = sample.picture()
            except RunError as error:
                broken.append(str(error))
                continue
            if self.framing.is_random(image.size):
                self.uncached[kind].add(index)
                continue
            waiting += [(index, flip, self.framing.pixels(image, 0.0, flip)) for flip in flips]
            while len(waiting) >= batch_size and not broken:
                self._store(kind, samples, waiting[:batch_size])
                waiting = waiting[batch_size:]
        if broken:
            more = len(broken) - MAX_NAMED
            raise RunError(
                f"{len(broken)} of {len(samples)} pictures cannot be used; mend or remove them:\n  "
                + "\n  ".join(broken[:MAX_NAMED])
                + (f"\n  … and {more} more" if more > 0 else "")
            )
        if waiting:
            self._store(kind, samples, waiting)

    def _store(
        self, kind: str, samples: list[Sample], batch: list[tuple[int, bool, Tensor]]
    ) -> None:
        means, stds = self._encode(torch.stack([pixels for _, _, pixels in batch]))
        for (index, flip, _), mean, std in zip(batch, means, stds, strict=True):
            if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
                raise RunError(f"the VAE gave NaN or infinite latents for {samples[index].name}")
            self._table[kind, index, flip] = (mean, std)

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        distribution = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        return distribution.mean.float().cpu(), distribution.std.float().cpu()

    @property
    def needs_vae(self) -> bool:
        """Whether training must encode pictures as it goes."""
        return any(self.uncached.values())

    def latents(self, slots: list[Slot], pixels: list[Tensor | None]) -> Tensor:
        """Returns scaled latents x₀ (B, C, H, W) on the device, sampled anew for each slot."""
        fresh = [p for p in pixels if p is not None]
        encoded = iter(zip(*self._encode(torch.stack(fresh)), strict=True)) if fresh else iter(())
        pairs = [
            self._table[slot.kind, slot.index, slot.flip] if p is None else next(encoded)
            for slot, p in zip(slots, pixels, strict=True)
        ]
        mean = torch.stack([mean for mean, _ in pairs])
        std = torch.stack([std for _, std in pairs])
        generators = [generator_for(*slot.address, "latent") for slot in slots]
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        x0 = (mean + std * noise - self.shift) * self.scaling
        return x0.to(self.device)  # one copy a batch
