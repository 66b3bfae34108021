"""PromptImages from the model that is being trained, without a second copy of any part of it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
)
from PIL import Image
from torch import Tensor, nn

from sd_lora.data.cache.encode import Scaling
from sd_lora.errors import RunError
from sd_lora.models.caption_encoder import (
    CaptionEncoder,
    Embedding,
    Geometry,
    collate,
    encode_in_batches,
)
from sd_lora.models.families import INPAINTING, Family
from sd_lora.models.load import Parts


@contextmanager
def _on(device: torch.device, models: Iterable[nn.Module]) -> Iterator[None]:
    """Puts models on a device, in evaluation mode, and back as they were."""
    models = list(models)
    places = [next(model.parameters()).device for model in models]
    modes = [model.training for model in models]
    for model in models:
        model.to(device).eval()
    try:
        yield
    finally:
        for model, place, mode in zip(models, places, modes, strict=True):
            model.to(place).train(mode)


def draws(family: Family) -> bool:
    """Whether a model draws images from noise: SDXL's refiner finishes those of another one."""
    return family.max_timestep is None


def sample(
    parts: Parts,
    caption_encoder: CaptionEncoder,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    resolution: int,
    device: torch.device,
    steps: int = 25,
    guidance_scale: float = 7.5,
    batch_size: int = 4,
) -> Iterator[Image.Image]:
    """Yields one image per prompt and seed, by DPM-Solver++ (2M) with classifier-free guidance.

    An image is a function of its prompt, its seed and the model: neither of the batch it is in,
    nor of any generator's state. Lu et al. 2022, "DPM-Solver++", algorithm 2. The text encoders are
    on the device while they read, UNet and VAE until the last image is taken.

    Args:
        parts: the model, with or without adapters, of any base precision. An inpainting model
            paints the whole image.
        reader: how it reads prompts.
        prompts, seeds: one each per image.
        resolution: side in pixels.
        device: where to compute; the parts are put back where they were.
        steps, guidance_scale: of the sampler.
        batch_size: images at once.
    """
    if not prompts:
        return
    with _on(device, parts.text_encoders.values()):
        known = dict(encode_in_batches(caption_encoder, parts.text_encoders, [None, *prompts]))
    sampler = Sampler(parts, resolution, steps, guidance_scale, device)
    with _on(device, (parts.unet, parts.vae)):
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            texts = [known[None]] * len(prompts[chunk]) + [known[p] for p in prompts[chunk]]
            yield from _decode(parts, sampler.latents(texts, seeds[chunk]))


@dataclass(frozen=True)
class Sampler:
    """DPM-Solver++ for a model whose parts are where they are to compute."""

    parts: Parts
    resolution: int
    steps: int
    guidance_scale: float
    device: torch.device

    @torch.no_grad()
    def latents(self, texts: Sequence[Embedding], seeds: Sequence[int]) -> Tensor:
        """Returns x₀ (B, C, h, w) of B seeds; texts: 2·B, those to be subtracted first."""
        parts, unet, r = self.parts, self.parts.unet, self.resolution
        side = r // parts.pixels_per_latent
        dtype = unet.conv_in.weight.dtype  # the base's: LoRA parameters are float32 in any case
        whole = Geometry((r, r), (0, 0), (r, r))
        conditions = collate(texts, [whole] * len(texts), parts.family).to(self.device, dtype)
        scheduler = _scheduler(parts)
        scheduler.set_timesteps(self.steps, device=self.device)
        shape = (unet.config.out_channels, side, side)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        x = torch.stack(noise).to(self.device) * scheduler.init_noise_sigma
        beside = _all_to_be_painted(parts, r, self.device).expand(len(texts), -1, side, side)
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(torch.cat([x, x]), t)
            x_in = torch.cat([x_in, beside], dim=1).to(dtype)
            out = unet(x_in, t, **conditions.arguments()).sample
            unconditional, conditional = out.float().chunk(2)
            prediction = unconditional + self.guidance_scale * (conditional - unconditional)
            x = scheduler.step(prediction, t, x).prev_sample
        return x


def _scheduler(parts: Parts) -> DPMSolverMultistepScheduler | EDMDPMSolverMultistepScheduler:
    """Returns DPM-Solver++ (2M) for a model's own schedule."""
    edm = isinstance(parts.scheduler, EDMEulerScheduler)
    cls = EDMDPMSolverMultistepScheduler if edm else DPMSolverMultistepScheduler
    return cls.from_config(parts.scheduler.config)


def _all_to_be_painted(parts: Parts, resolution: int, device: torch.device) -> Tensor:
    """Returns what an inpainting UNet sees besides the noisy latents where nothing is given,
    (1, 1 + C, h, w); no channels for other UNets."""
    side = resolution // parts.pixels_per_latent
    if parts.task is not INPAINTING:
        return torch.zeros(1, 0, side, side, device=device)
    grey = torch.zeros(1, 3, resolution, resolution, device=device, dtype=parts.vae.dtype)
    with torch.autocast(device.type, enabled=False):
        z = parts.vae.encode(grey).latent_dist.mean.float()
    seen = Scaling.of(parts.vae).scaled(z)
    return torch.cat([torch.ones_like(seen[:, :1]), seen], dim=1)


@torch.no_grad()
def _decode(parts: Parts, latents: Tensor) -> list[Image.Image]:
    vae = parts.vae
    x0 = Scaling.of(vae).unscaled(latents).to(vae.dtype)
    # autocast is for the UNet: SDXL's decoder overflows in float16 whatever its weights are
    # one by one: at 1024 pixels each activation of a float32 decoder is up to 1 GiB an image
    with torch.autocast(x0.device.type, enabled=False):
        pixels = torch.cat([vae.decode(z).sample.float() for z in x0.split(1)])
    if not torch.isfinite(pixels).all():
        raise RunError(
            "the model drew NaN or infinite pixels: its precision is too low for it (try bf16 or "
            "no mixed precision), or its weights are broken"
        )
    array = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(a.permute(1, 2, 0).cpu().numpy()) for a in array]
