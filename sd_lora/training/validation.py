"""A score of learning: how like the subject, and at what price to everything else.

Pictures are compared in the features of the base model's own UNet ("DIFT", Tang et al. 2023,
"Emergent Correspondence from Image Diffusion", section 4): every Stable Diffusion model brings
its own measure, nothing is downloaded, and the measure is deterministic. As in DreamBooth (Ruiz
et al. 2022, section 4.2) the similarity is the mean cosine between generated and held-out pictures.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sd_lora.adapters.inject import adapted_layers
from sd_lora.errors import UsageError
from sd_lora.models.load import Parts
from sd_lora.models.prompts import encode_captions
from sd_lora.seeds import generator_for

TIMESTEP = 100
"""How noisy the pictures are when their features are read, of 1000 (DIFT uses 51 to 261)."""

DRAWS = 4
"""Noise draws that are averaged; each is a function of its number, so the score repeats exactly."""


@contextmanager
def _listening(blocks: Sequence[nn.Module], heard: list[Tensor]) -> Iterator[None]:
    """Collects the blocks' outputs (B, C, H, W) within a `with` block."""
    handles = [
        block.register_forward_hook(lambda _m, _i, output: heard.append(output)) for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def features(base: Parts, pictures: Sequence[Image.Image], device: torch.device) -> Tensor:
    """Returns one feature vector per picture (N, D), from the bare base model.

    Mean and deviation over the picture of what the UNet's up blocks compute at `TIMESTEP` for an
    empty prompt: what is there and how varied, not where.

    Raises:
        UsageError: a base with adapters, which would judge itself.
    """
    if adapted_layers(base.unet):
        raise UsageError("features need the bare base model: eject its adapters first")
    pixels = torch.stack(
        [torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) for p in pictures]
    )
    x = (pixels.float() / 127.5 - 1).to(device)
    vae, unet = base.vae.to(device), base.unet.to(device)
    x0 = vae.encode(x.to(vae.dtype)).latent_dist.mean.float() * vae.config.scaling_factor
    empty = encode_captions(base.tokenizer, base.text_encoder, [""])[""].to(device, unet.dtype)
    alpha = base.scheduler.alphas_cumprod[TIMESTEP].to(device)
    total: Tensor | None = None
    for draw in range(DRAWS):
        noise = torch.randn(x0.shape[1:], generator=generator_for("features", draw)).to(device)
        x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        heard: list[Tensor] = []
        with _listening(list(unet.up_blocks), heard):
            unet(x_t.to(unet.dtype), TIMESTEP, empty.expand(len(x0), -1, -1))
        pooled = [_pool(h.float()) for h in heard]
        total = torch.cat(pooled, 1) if total is None else total + torch.cat(pooled, 1)
    assert total is not None
    return (total / DRAWS).cpu()


def _pool(h: Tensor) -> Tensor:
    """Returns mean and deviation over positions (N, 2·C) of a feature map (N, C, H, W)."""
    return torch.cat([h.mean((2, 3)), h.std((2, 3))], 1)


def similarity(a: Tensor, b: Tensor, *, same: bool = False) -> float:
    """Returns the mean cosine between all rows of a (N, D) and b (M, D).

    same: a and b are the same pictures; none is then compared with itself.
    """
    cosines = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    if same:
        n = len(a)
        return float((cosines.sum() - cosines.trace()) / (n * (n - 1)))
    return float(cosines.mean())


def drift(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """Returns the mean absolute change of a pixel, in [0, 1], between pictures of equal seeds."""
    changes = [
        np.abs(np.asarray(b, dtype=np.float32) - np.asarray(a, dtype=np.float32)).mean() / 255
        for b, a in zip(before, after, strict=True)
    ]
    return float(np.mean(changes))


@dataclass(frozen=True)
class Score:
    """What was learned, and what it cost.

    before, after: similarity of the base's and the LoRA's pictures of the subject to the held-out
        ones. held_out: similarity of held-out pictures to each other, what a perfect LoRA reaches.
    class_drift, unrelated_drift: mean change of pixels for prompts that should not change.
    """

    before: float
    after: float
    held_out: float
    class_drift: float
    unrelated_drift: float

    @property
    def margin(self) -> float:
        return self.after - self.before

    @property
    def learned(self) -> float:
        """The part of the way from the base to real pictures of the subject: 0 none, 1 all."""
        return self.margin / (self.held_out - self.before)

    def text(self) -> str:
        return (
            f"  subject: {self.learned:.0%} of the way from the base's pictures to real ones "
            f"(similarity {self.before:.3f} → {self.after:.3f}; real to real {self.held_out:.3f})\n"
            f"  drift: class {self.class_drift:.3f}, unrelated prompts {self.unrelated_drift:.3f} "
            "(mean change of a pixel, 0 to 1)"
        )


@dataclass(frozen=True)
class Pictures:
    """What one model draws, with the same prompts and seeds as the other."""

    subject: Sequence[Image.Image]
    of_class: Sequence[Image.Image]
    unrelated: Sequence[Image.Image]


def score(
    base: Parts,
    before: Pictures,
    after: Pictures,
    held_out: Sequence[Image.Image],
    device: torch.device,
) -> Score:
    """Returns the score of a LoRA.

    Args:
        base: the bare base model.
        before, after: pictures of the base and of the LoRA.
        held_out: real pictures of the subject that training never saw, of the same size.
        device: where to compute.
    """
    # what all pictures have in common says nothing about any: cosines are taken around its mean
    common = features(base, [*before.of_class, *before.unrelated], device).mean(0)
    real, drawn_before, drawn_after = (
        features(base, p, device) - common for p in (held_out, before.subject, after.subject)
    )
    return Score(
        before=similarity(drawn_before, real),
        after=similarity(drawn_after, real),
        held_out=similarity(real, real, same=True),
        class_drift=drift(before.of_class, after.of_class),
        unrelated_drift=drift(before.unrelated, after.unrelated),
    )
