"""Images from a model in training, without a second copy of any of its parts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
)
from PIL import Image
from torch import Tensor, nn

from sd_lora.adapters.fast.layers import lay_out
from sd_lora.data.cache.encode import Scaling
from sd_lora.errors import RunError
from sd_lora.models.caption_encoder import (
    Caption,
    CaptionEncoder,
    Embedding,
    Geometry,
    collate,
    encode_in_batches,
)
from sd_lora.models.families import INPAINTING, Family
from sd_lora.models.load import Parts
from sd_lora.models.noise_scheduler import dynamic_shift, usual_rescale
from sd_lora.transfer import brought, places_of, put_back


@contextmanager
def _evaluating_on(device: torch.device, models: Iterable[nn.Module]) -> Iterator[None]:
    """Move models to a device in evaluation mode; at the end, undo both.

    Weights that wait elsewhere stay there (`offload`).
    """
    models = list(models)
    there, places = torch.empty(0, device=device).device, [places_of(model) for model in models]
    modes = [model.training for model in models]
    moved = [next(model.parameters()).device != there for model in models]
    for model, moves in zip(models, moved, strict=True):
        (brought(model, device) if moves else model).eval()
    try:
        yield
    finally:
        for model, before, moves, mode in zip(models, places, moved, modes, strict=True):
            if moves:
                put_back(model, before)
            model.train(mode)


def can_generate_images(family: Family) -> bool:
    """True unless a model only finishes images of other models, as SDXL's refiner does."""
    return family.max_timestep is None


def sample(
    parts: Parts,
    caption_encoder: CaptionEncoder,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: tuple[int, int],
    device: torch.device,
    negative: Caption = None,
    steps: int = 25,
    guidance_scale: float = 7.5,
    guidance_rescale: float | None = None,
    batch_size: int = 4,
    apart: bool = False,
    on_step: Callable[[], object] = lambda: None,
) -> Iterator[Image.Image]:
    """Generate one image per prompt and seed by DPM-Solver++ (2M), with classifier-free guidance.

    Lu et al. 2022, "DPM-Solver++", algorithm 2. An image is a function of its prompt, its seed and
    the model alone; neither the batch nor the state of a generator changes it, but for last bits on
    a card, which adds in another order in another batch. The text encoders are on the device while
    they encode the prompts, UNet and VAE until the last image is taken.

    Args:
        parts: the model, with or without adapters, of any base precision. An inpainting model
            paints the whole image.
        caption_encoder: makes embeddings of the prompts.
        prompts, seeds: one each per image.
        size: width and height in pixels.
        device: where to compute; afterwards all parts are back on their devices.
        negative: the prompt that guidance leads away from; None: no prompt.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        guidance_rescale: φ of `rescaled`; None: the model's own, `usual_rescale`.
        batch_size: images at once.
        apart: UNet and VAE are on the device one after the other, and images come at the end.
        on_step: called after each denoising step of each batch; `num_denoising_steps` says how
            often.

    Yields:
        RGB images in the order of the prompts.

    Raises:
        RunError: NaN or infinite pixels.
    """
    if not prompts:
        return
    with _evaluating_on(device, parts.text_encoders.values()):
        embeddings = dict(
            encode_in_batches(caption_encoder, parts.text_encoders, [negative, *prompts])
        )
    lay_out(parts.unet, device)
    phi = usual_rescale(parts.scheduler) if guidance_rescale is None else guidance_rescale
    sampler = Sampler(parts, size, steps, guidance_scale, phi, device)
    chunks = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]

    def drawn(chunk: slice) -> Tensor:
        conditional = [embeddings[prompt] for prompt in prompts[chunk]]
        unconditional = [embeddings[negative]] * len(conditional)
        return sampler.latents([*unconditional, *conditional], seeds[chunk], on_step)

    if apart:
        with _evaluating_on(device, (parts.unet,)):
            latents = [drawn(chunk).cpu() for chunk in chunks]
        with _evaluating_on(device, (parts.vae,)):
            for x0 in latents:
                yield from _decode(parts, x0.to(device))
        return
    with _evaluating_on(device, (parts.unet, parts.vae)):
        for chunk in chunks:
            yield from _decode(parts, drawn(chunk))


def num_denoising_steps(images: int, batch_size: int, steps: int) -> int:
    """Denoising steps of `sample` for all images."""
    return -(-images // batch_size) * steps


@dataclass(frozen=True)
class Sampler:
    """DPM-Solver++ for a model whose UNet and VAE are on `device` already.

    parts: the model.
    size: width and height in pixels.
    steps: denoising steps.
    guidance_scale: of classifier-free guidance.
    guidance_rescale: φ of `rescaled`.
    device: where to compute.
    """

    parts: Parts
    size: tuple[int, int]
    steps: int
    guidance_scale: float
    guidance_rescale: float
    device: torch.device

    @torch.no_grad()
    def latents(
        self,
        texts: Sequence[Embedding],
        seeds: Sequence[int],
        on_step: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """Latents x₀ (B, C, h, w) of B seeds.

        texts: 2·B embeddings, the B unconditional ones first. on_step: called after each step.
        """
        parts, unet, (width, height) = self.parts, self.parts.unet, self.size
        w, h = (side // parts.pixels_per_latent for side in self.size)
        dtype = unet.conv_in.weight.dtype  # the base's: LoRA parameters are always float32
        uncropped = Geometry((height, width), (0, 0), (height, width))
        conditions = collate(texts, [uncropped] * len(texts), parts.family).to(self.device, dtype)
        scheduler = _scheduler(parts, self.size)
        scheduler.set_timesteps(self.steps, device=self.device)
        shape = (unet.config.out_channels, h, w)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        x = torch.stack(noise).to(self.device) * scheduler.init_noise_sigma
        extra = _inpainting_channels(parts, self.size, self.device).expand(len(texts), -1, h, w)
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(torch.cat([x, x]), t)
            x_in = torch.cat([x_in, extra], dim=1).to(dtype)
            out = unet(x_in, t, **conditions.arguments()).sample
            unconditional, conditional = out.float().chunk(2)
            prediction = unconditional + self.guidance_scale * (conditional - unconditional)
            prediction = rescaled(prediction, conditional, self.guidance_rescale)
            x = scheduler.step(prediction, t, x).prev_sample
            on_step()
        return x


def rescaled(guided: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """A guided prediction (B, …) with φ of its way to the standard deviation of the conditional
    one, each item by itself.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4,
    equations 15 and 16. Guidance enlarges the prediction; where the first step starts from pure
    noise, that overexposes images.
    """
    if not phi:
        return guided
    dims = tuple(range(1, guided.dim()))
    ratio = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (phi * ratio + 1 - phi)


def _scheduler(
    parts: Parts, size: tuple[int, int]
) -> DPMSolverMultistepScheduler | EDMDPMSolverMultistepScheduler:
    """DPM-Solver++ (2M) with the model's own noise schedule, for images of a size in pixels, by
    which some flow-matching models shift their noise levels."""
    config = parts.scheduler.config
    of_size = {"flow_shift": dynamic_shift(config, size[0] * size[1])}
    changes = of_size if config.get("use_dynamic_shifting") else {}
    edm = isinstance(parts.scheduler, EDMEulerScheduler)
    cls = EDMDPMSolverMultistepScheduler if edm else DPMSolverMultistepScheduler
    return cls.from_config({**config, **changes})


def _inpainting_channels(parts: Parts, size: tuple[int, int], device: torch.device) -> Tensor:
    """Mask and masked-image latents (1, 1 + C, h, w) of an inpainting UNet, all to be painted;
    (1, 0, h, w) for other UNets."""
    w, h = (side // parts.pixels_per_latent for side in size)
    if parts.task is not INPAINTING:
        return torch.zeros(1, 0, h, w, device=device)
    grey = torch.zeros(1, 3, size[1], size[0], device=device, dtype=parts.vae.dtype)
    with torch.autocast(device.type, enabled=False):
        z = parts.vae.encode(grey).latent_dist.mean.float()
    masked = Scaling.of(parts.vae).scaled(z)
    return torch.cat([torch.ones_like(masked[:, :1]), masked], dim=1)


LARGEST_WHOLE = 160 * 160
"""Latents of an image that is decoded in one piece: 1280 × 1280 pixels of the published models.
SDXL's own sizes are below; tiles lose a little where they meet."""


@contextmanager
def _tiling(vae: Any, latents: Tensor) -> Iterator[None]:
    """Decode large latents (B, C, h, w) in tiles in a block, where the VAE can."""
    before = getattr(vae, "use_tiling", None)
    large = latents.shape[2] * latents.shape[3] > LARGEST_WHOLE
    if large and before is False:
        vae.use_tiling = True
    try:
        yield
    finally:
        if before is not None:
            vae.use_tiling = before


@torch.no_grad()
def round_trip(parts: Parts, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Images that the model's VAE has encoded and decoded, one by one: as near to them as anything
    that the model draws can be."""
    vae, drawn = parts.vae, []
    for image in images:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
        x = (pixels / 127.5 - 1).to(vae.device, vae.dtype)
        z = vae.encode(x).latent_dist.mean.float()
        drawn += _decode(parts, Scaling.of(vae).scaled(z))
    return drawn


@torch.no_grad()
def _decode(parts: Parts, latents: Tensor) -> list[Image.Image]:
    """RGB images of latents (B, C, h, w)."""
    vae = parts.vae
    x0 = Scaling.of(vae).unscaled(latents).to(vae.dtype)
    # no autocast: SDXL's decoder overflows in float16, also with float32 weights
    # one by one: at 1024 pixels an activation of a float32 decoder is up to 1 GiB an image
    with torch.autocast(x0.device.type, enabled=False), _tiling(vae, x0):
        pixels = torch.cat([vae.decode(z).sample.float() for z in x0.split(1)])
    if not torch.isfinite(pixels).all():
        raise RunError(
            "the model generated NaN or infinite pixels: its precision is too low (take bf16 or "
            "float32: --mixed_precision of a run, --dtype of sd-lora sample), the strength of a "
            "LoRA is too high, or its weights are broken"
        )
    array = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(a.permute(1, 2, 0).cpu().numpy()) for a in array]
