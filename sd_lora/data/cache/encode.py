"""Images → latents: encoded once where the cut is fixed, else each time; drawn anew each time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from sd_lora.data.batches.stream import BatchItem, ImageSet
from sd_lora.data.cache.latents import LatentTable, LoadedImage, Moments
from sd_lora.data.cache.prefetch import prefetch
from sd_lora.data.cache.store import weights_digest
from sd_lora.data.images.buckets import Crop, Size
from sd_lora.data.images.masks import draw_mask
from sd_lora.data.sources.samples import Sample, Source
from sd_lora.errors import RunError
from sd_lora.seeds import generator_for
from sd_lora.transfer import brought, sent

AREA_AT_ONCE = 4 * 512**2
"""Pixels that are encoded at once: four images of 512² take as much memory as one of 1024²."""


def at_once_on_card(size: Size) -> int:
    """Number of images of a size that a card encodes at once."""
    return max(1, AREA_AT_ONCE // (size[0] * size[1]))


@dataclass(frozen=True)
class Scaling:
    """From a VAE's latents z to the UNet's x₀ = (z - mean) · factor.

    mean, factor: (C, 1, 1).
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, vae: AutoencoderKL) -> "Scaling":
        """Read a VAE's configuration: one factor and shift, or, as Playground v2.5's has them,
        means and deviations of the channels."""
        config = vae.config
        mean = torch.full((config.latent_channels,), float(config.get("shift_factor") or 0.0))
        factor = torch.full((config.latent_channels,), float(config.scaling_factor))
        if config.get("latents_mean") and config.get("latents_std"):
            mean = torch.tensor(config.latents_mean, dtype=torch.float32).flatten()
            factor = factor / torch.tensor(config.latents_std, dtype=torch.float32).flatten()
        return cls(mean.view(-1, 1, 1), factor.view(-1, 1, 1))

    def scaled(self, z: Tensor) -> Tensor:
        """x₀ of latents z (…, C, H, W)."""
        return (z - sent(self.mean, z.device)) * sent(self.factor, z.device)

    def unscaled(self, x0: Tensor) -> Tensor:
        """The latents z of x₀ (…, C, H, W)."""
        return x0 / self.factor.to(x0.device) + self.mean.to(x0.device)


def vae_identity(vae: AutoencoderKL, device: torch.device) -> str:
    """The identity of a VAE's encoder and its arithmetic: weights, dtype, kind of device, versions
    of the libraries.
    """
    weights = weights_digest(vae, leave_out=("decoder.", "post_quant_conv."))
    libraries = " ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    return f"{weights} {vae.dtype} {device.type} {libraries}"


class Latents:
    """A run's latents, on its device.

    The VAE computes in its own dtype, float32 by default: SDXL's overflows in float16. It comes to
    the device when it is needed.

    Args:
        vae, device: the encoder, and the device that computes.
        table: known latents.
    """

    def __init__(self, vae: AutoencoderKL, device: torch.device, table: LatentTable) -> None:
        self.vae, self.device, self.table = vae, device, table
        self.scaling = Scaling.of(vae)
        self._doubted: list[tuple[str, Tensor]] = []  # names of images, and whether all is finite

    def at_once(self, size: Size) -> int:
        """Number of images of a size encoded at once.

        One on a CPU: an image's latent is then the same bits in any company, so that caching cannot
        change a run.
        """
        return 1 if self.device.type == "cpu" else at_once_on_card(size)

    @torch.no_grad()
    def encode(self, pixels: Sequence[Tensor], names: Sequence[str]) -> list[Moments]:
        """Latent distributions of images (3, H, W) of one size, on the device, for which the host
        does not wait: `check` tells whether they are finite."""
        brought(self.vae, self.device)
        height, width = pixels[0].shape[1:]
        moments: list[Moments] = []
        for part in torch.stack(list(pixels)).split(self.at_once((width, height))):
            there = sent(part, self.device).to(self.vae.dtype)
            latent = self.vae.encode(there).latent_dist
            moments += map(Moments, latent.mean, latent.std)
        for m, name in zip(moments, names, strict=True):
            finite = torch.isfinite(m.mean).all() & torch.isfinite(m.std).all()
            self._doubted.append((name, finite))
        return moments

    def check(self) -> None:
        """Raise RunError, with the image's name, if any latents encoded since the last check are
        not finite."""
        doubted, self._doubted = self._doubted, []
        if not doubted:
            return
        finite = torch.stack([flag for _, flag in doubted]).tolist()
        for (name, _), is_finite in zip(doubted, finite, strict=True):
            if not is_finite:
                raise self._not_finite(name)

    def _to_keep(self, moments: Moments, mask: Tensor | None) -> Moments:
        """A checked latent distribution on the CPU, with its mask."""
        self.check()
        return Moments(moments.mean.cpu(), moments.std.cpu(), mask)

    def _not_finite(self, name: str) -> RunError:
        precision = str(self.vae.dtype).removeprefix("torch.")
        remedy = "its weights or the image are broken"
        if self.vae.dtype != torch.float32:
            remedy = (
                "it overflows, as SDXL's does in float16: leave --vae_precision at fp32, or give "
                "--pretrained_vae_model_name_or_path a VAE mended for it, such as "
                "madebyollin/sdxl-vae-fp16-fix"
            )
        return RunError(f"the VAE gave NaN or infinite latents for {name} in {precision}: {remedy}")

    def jobs(self, images: ImageSet) -> list["EncodeJob"]:
        """The cacheable latents of a set, known or not, by bucket."""
        if self.table.mode == "no":
            return []
        jobs: dict[str, EncodeJob] = {}
        for index, sample in enumerate(images.samples):
            if images.is_random(index):
                continue
            crop = images.crop(index)
            for flip in (False, True) if sample.source.random_flip else (False,):
                key = self.table.key(sample, crop, flip)
                jobs.setdefault(key, EncodeJob(key, sample, crop, flip))
        return sorted(jobs.values(), key=lambda job: job.crop.size)

    def in_steps(self, sets: Iterable[ImageSet]) -> dict[str, nn.Module]:
        """The parts of the VAE where steps need it, for images whose latents cannot be kept."""
        cut = any(images.is_random(i) for images in sets for i in range(len(images.samples)))
        if not (cut or self.table.fresh or self.table.mode == "no"):
            return {}
        return {"VAE encoder": self.vae.encoder, "VAE decoder": self.vae.decoder}

    def fill(
        self,
        jobs: Sequence["EncodeJob"],
        sources: Iterable[Source],
        progress: Callable[[Iterator[None]], Iterable[None]],
    ) -> None:
        """Encode and keep images, in batches by bucket; each is kept as soon as it is encoded.

        Args:
            jobs: of this process.
            sources: for a second reading of streams.
            progress: shows the finished ones.

        Raises:
            RunError: an image that cannot be read any more, or whose latent is not finite.
        """
        for _ in progress(self._filled(jobs, sources)):
            pass

    def _filled(self, jobs: Sequence["EncodeJob"], sources: Iterable[Source]) -> Iterator[None]:
        waiting: dict[Size, list[tuple[EncodeJob, LoadedImage]]] = {}
        for job, loaded in prefetch(self._read, _readings(jobs, sources)):
            size = job.crop.size
            batch = waiting.setdefault(size, [])
            batch.append((job, loaded))
            if len(batch) == self.at_once(size):
                yield from self._keep(waiting.pop(size))
        for batch in waiting.values():
            yield from self._keep(batch)

    def _read(
        self, reading: "tuple[EncodeJob, Callable[[], bytes]]"
    ) -> "tuple[EncodeJob, LoadedImage]":
        job, read = reading
        return job, self.table.read(job.sample, job.crop, job.flip, read)

    def _keep(self, batch: "list[tuple[EncodeJob, LoadedImage]]") -> Iterator[None]:
        for job, loaded in batch:
            if loaded.mask is not None and not loaded.mask.any():
                raise RunError(
                    f"{job.sample.name}: nothing of its crop counts: its mask is black there, or, "
                    "with alpha_mask, it is transparent. Remove it, or crop it yourself"
                )
        pixels = [loaded.pixels for _, loaded in batch if loaded.pixels is not None]
        encoded = self.encode(pixels, [job.sample.name for job, _ in batch])
        for (job, loaded), m in zip(batch, encoded, strict=True):
            self.table.put(job.key, self._to_keep(m, loaded.mask))
            yield

    def latents(self, items: list[BatchItem], loaded: list[LoadedImage]) -> "LatentBatch":
        """Latents of items of one size, sampled anew for each; see `check`."""
        moments = self._moments(loaded)
        masks = [m.mask for m in moments]
        mask = None
        if any(m is not None for m in masks):
            whole = torch.ones(1, *moments[0].mean.shape[1:])
            mask = sent(torch.stack([whole if m is None else m for m in masks]), self.device)
        return LatentBatch(self._drawn(moments, items, "latent"), mask)

    def _moments(self, loaded: list[LoadedImage]) -> list[Moments]:
        known = [s.moments or self.table.memory.get(s.key or "") for s in loaded]
        fresh = [s for s, m in zip(loaded, known, strict=True) if m is None]
        encoded: list[Moments] = []
        if fresh:
            pixels = [s.pixels for s in fresh if s.pixels is not None]
            for s, m in zip(fresh, self.encode(pixels, [s.name for s in fresh]), strict=True):
                encoded.append(Moments(m.mean, m.std, s.mask))
                if s.key:  # it was there, and another run removed it
                    kept = self._to_keep(m, s.mask)
                    with suppress(RunError):  # a disk that is full now costs time, not the run
                        self.table.put(s.key, kept)
        rest = iter(encoded)
        return [m or next(rest) for m in known]

    def _drawn(self, moments: list[Moments], items: list[BatchItem], what: str) -> Tensor:
        # cached ones are drawn on the CPU: one copy a batch
        cached = all(m.mean.device.type == "cpu" for m in moments)
        place = torch.device("cpu") if cached else self.device
        mean = torch.stack([sent(m.mean, place) for m in moments]).float()
        std = torch.stack([sent(m.std, place) for m in moments]).float()
        generators = [generator_for(*item.address, what) for item in items]
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        return sent(self.scaling.scaled(mean + std * sent(noise, place)), self.device)

    def masked(self, items: list[BatchItem], loaded: list[LoadedImage]) -> Tensor:
        """Further input channels of an inpainting UNet, (B, 1 + C, H, W) on the device.

        The mask (1: to be painted), and the latents of the image with grey in its place.
        """
        pixels = torch.stack([s.pixels for s in loaded if s.pixels is not None])
        masks = torch.stack([draw_mask(item.crop.size, item.address) for item in items])
        moments = self.encode(list(pixels * (1 - masks)), [s.name for s in loaded])
        rest = self._drawn(moments, items, "masked latent")
        small = F.interpolate(masks, size=rest.shape[-2:])  # nearest, as diffusers' pipeline
        return torch.cat([sent(small, self.device).to(rest.dtype), rest], dim=1)


@dataclass(frozen=True)
class LatentBatch:
    """x0 (B, C, h, w), scaled, on the device. mask: (B, 1, h, w), how much each latent counts in
    the loss; None: all the same."""

    x0: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """One latent to compute: its address, sample, crop and flip."""

    key: str
    sample: Sample
    crop: Crop
    flip: bool


def _readings(
    jobs: Sequence[EncodeJob], sources: Iterable[Source]
) -> Iterator[tuple[EncodeJob, Callable[[], bytes]]]:
    """Yield jobs with their readers of bytes; jobs of streams in the stream's order."""
    streamed: dict[str, list[EncodeJob]] = {}
    for job in jobs:
        if job.sample.source.streaming:
            streamed.setdefault(job.sample.name, []).append(job)
        else:
            yield job, job.sample.read
    for source in sources:
        if not source.spec.streaming or not streamed:
            continue
        for row in source.rows():
            for job in streamed.pop(row.name, ()):
                yield job, row.read
            if not streamed:
                break
    if streamed:
        name = next(iter(streamed))
        raise RunError(f"{name} was in the stream when it was checked, and is not any more")
