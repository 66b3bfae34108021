"""Pictures from the model that is being trained, without a second copy of any part of it."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from sd_lora.errors import RunError
from sd_lora.formats.tensors import write_whole
from sd_lora.models.load import Parts
from sd_lora.models.prompts import encode, token_ids


@contextmanager
def _ready(parts: Parts, device: torch.device) -> Iterator[None]:
    """Puts all parts on the device, in evaluation mode, and back as they were."""
    models: list[nn.Module] = [parts.unet, parts.text_encoder, parts.vae]
    places = [next(model.parameters()).device for model in models]
    modes = [model.training for model in models]
    for model in models:
        model.to(device).eval()
    try:
        yield
    finally:
        for model, place, mode in zip(models, places, modes, strict=True):
            model.to(place).train(mode)


@torch.no_grad()
def sample(
    parts: Parts,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    resolution: int,
    device: torch.device,
    steps: int = 25,
    guidance_scale: float = 7.5,
    prediction_type: str | None = None,
    batch_size: int = 4,
) -> list[Image.Image]:
    """Returns one picture per prompt and seed, by DPM-Solver++ (2M) with classifier-free guidance.

    A picture is a function of its prompt, its seed and the model: neither of the batch it is in,
    nor of any generator's state. Lu et al. 2022, "DPM-Solver++", algorithm 2.

    Args:
        parts: the model, with or without adapters, of any base precision.
        prompts, seeds: one each per picture.
        resolution: side in pixels.
        device: where to compute; the parts are put back where they were.
        steps, guidance_scale: of the sampler.
        prediction_type: if it differs from what the model's scheduler says.
        batch_size: pictures at once.
    """
    images: list[Image.Image] = []
    with _ready(parts, device):
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            latents = _denoise(
                parts, prompts[chunk], seeds[chunk], resolution, steps, guidance_scale,
                prediction_type, device,
            )  # fmt: skip
            images += _decode(parts, latents)
    return images


def _denoise(
    parts: Parts,
    prompts: Sequence[str],
    seeds: Sequence[int],
    resolution: int,
    steps: int,
    guidance_scale: float,
    prediction_type: str | None,
    device: torch.device,
) -> Tensor:
    unet, side = parts.unet, resolution // parts.pixels_per_latent
    dtype = unet.conv_in.weight.dtype  # the base's: LoRA parameters are float32 in any case
    ids = token_ids(parts.tokenizer, [*[""] * len(prompts), *prompts])
    conditioning = encode(parts.text_encoder, ids).to(dtype)
    changes = {"prediction_type": prediction_type} if prediction_type else {}
    scheduler = DPMSolverMultistepScheduler.from_config(parts.scheduler.config, **changes)
    scheduler.set_timesteps(steps, device=device)
    shape = (unet.config.in_channels, side, side)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    x = torch.stack(noise).to(device) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(torch.cat([x, x]), t).to(dtype)
        unconditional, conditional = unet(x_in, t, conditioning).sample.float().chunk(2)
        prediction = unconditional + guidance_scale * (conditional - unconditional)
        x = scheduler.step(prediction, t, x).prev_sample
    return x


def _decode(parts: Parts, latents: Tensor) -> list[Image.Image]:
    config, vae = parts.vae.config, parts.vae
    x0 = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    pixels = vae.decode(x0.to(vae.dtype)).sample.float()
    if not torch.isfinite(pixels).all():
        raise RunError(
            "the model drew NaN or infinite pixels: its precision is too low for it (try bf16 or "
            "no mixed precision), or its weights are broken"
        )
    array = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(a.permute(1, 2, 0).cpu().numpy()) for a in array]


def grid(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    captions: Sequence[str] = (),
    side: int = 256,
) -> Image.Image:
    """Returns rows of pictures, each under its label, with a caption under each column.

    Pictures smaller than `side` are enlarged without smoothing, larger ones reduced.
    """
    gap, line = 8, 22
    columns = max(len(row) for row in rows)
    font = ImageFont.load_default(14)
    height = len(rows) * (line + side + gap) + (2 * line if captions else 0) + gap
    sheet = Image.new("RGB", (gap + columns * (side + gap), height), "white")
    draw = ImageDraw.Draw(sheet)
    y = gap
    for row, label in zip(rows, labels, strict=True):
        draw.text((gap, y), label, fill="black", font=font)
        for column, picture in enumerate(row):
            filter = Image.Resampling.NEAREST if picture.width <= side else Image.Resampling.LANCZOS
            sheet.paste(
                picture.resize((side, side), filter), (gap + column * (side + gap), y + line)
            )
        y += line + side + gap
    for column, caption in enumerate(captions):
        for n, text in enumerate(_wrapped(caption, side, font)):
            draw.text((gap + column * (side + gap), y + n * 18), text, fill="#444444", font=font)
    return sheet


def _wrapped(
    text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, lines: int = 2
) -> list[str]:
    """Returns at most `lines` lines of text that fit the width, ending in … if more is left."""
    rows: list[str] = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width or not rows[-1]:
            rows[-1] = longer
        elif len(rows) < lines:
            rows.append(word)
        else:
            rows[-1] += " …"
            break
    return rows


def write_picture(path: Path, picture: Image.Image) -> None:
    """Writes a PNG whole or not at all; raises RunError if it cannot be written."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())
