"""A score of learning: how much of the subject is there, and at what price to everything else.

Images are compared patch by patch in the latents of the base's own VAE: every Stable Diffusion
model brings its measure, nothing is downloaded, and the same images give the same number. What
is particular to the subject are the patches of its held-out images that are far from everything
the base draws and near to the subject's other images (novelty as the distance to the nearest
patch of a memory bank: Roth et al. 2022, "Towards Total Recall in Industrial Anomaly Detection",
section 3); backgrounds, known or not, do not count. The score asks how near a LoRA's images come
to those patches, wherever in the image they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sd_lora.models.load import Parts

GRID, PATCH = 16, 2
"""An image's latents are pooled to GRID × GRID; a patch is PATCH × PATCH of them, an eighth of a
side. Measured on drawn subjects: 1 sees colours alone, 3 no more than 2."""

DISTINCTIVE = 0.2
"""The share of a held-out image's patches that counts."""


@torch.no_grad()
def patches(base: Parts, images: Sequence[Image.Image], device: torch.device) -> Tensor:
    """Returns each image's latent patches (N, P, D): P = (GRID - PATCH + 1)², D = C·PATCH².

    Images of one size, whose sides the VAE can encode.
    """
    pixels = [torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) for p in images]
    x = (torch.stack(pixels).float() / 127.5 - 1).to(device)
    vae = base.vae.to(device)
    x0 = vae.encode(x.to(vae.dtype)).latent_dist.mean.float() * vae.config.scaling_factor
    x0 = F.adaptive_avg_pool2d(x0, min(GRID, *x0.shape[2:])).cpu()
    return F.unfold(x0, PATCH).transpose(1, 2)


def nearest(a: Tensor, b: Tensor) -> Tensor:
    """Returns the distance (P,) of each patch in a (P, D) to the nearest one in b (Q, D)."""
    # the matrix-product shortcut loses digits where patches are alike, which is what matters
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").min(1).values


def distinctive(image: Tensor, others: Tensor, known: Tensor) -> Tensor:
    """Returns the patches of an image (P, D) that are particular to its subject.

    Those for which the nearest of the `known` patches (Q, D), which are not the subject's, is
    farther than the nearest one in the subject's `others` (R, D) by most.
    """
    contrast = nearest(image, known) - nearest(image, others)
    return image[contrast.argsort(descending=True)[: max(1, round(DISTINCTIVE * len(image)))]]


def distance(particular: Sequence[Tensor], drawn: Tensor, *, same: bool = False) -> float:
    """Returns how far images are from a subject: the mean distance of its particular patches
    to the nearest patch of an image, over all pairs.

    particular: the distinctive patches of each held-out image. drawn: (N, P, D). same: `drawn`
    are the held-out images themselves; none is then compared with itself.
    """
    distances = [
        nearest(subject, image).mean()
        for i, subject in enumerate(particular)
        for j, image in enumerate(drawn)
        if not (same and i == j)
    ]
    return float(torch.stack(distances).mean())


def drift(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """Returns the mean absolute change of a pixel, in [0, 1], between images of equal seeds."""
    changes = [
        np.abs(np.asarray(b, dtype=np.float32) - np.asarray(a, dtype=np.float32)).mean() / 255
        for b, a in zip(before, after, strict=True)
    ]
    return float(np.mean(changes))


@dataclass(frozen=True)
class Score:
    """What was learned, and what it cost.

    before, after: distance of the base's and of the LoRA's images to the subject. held_out:
        distance of the subject's held-out images to each other, what a perfect LoRA reaches.
    class_drift, unrelated_drift: mean change of pixels for prompts that should not change.
    """

    before: float
    after: float
    held_out: float
    class_drift: float
    unrelated_drift: float

    @property
    def margin(self) -> float:
        """How much nearer to the subject the LoRA's images are than the base's."""
        return self.before - self.after

    @property
    def learned(self) -> float:
        """The part of the way from the base to real images of the subject: 0 none, 1 all."""
        return self.margin / (self.before - self.held_out)

    def text(self) -> str:
        return (
            f"  subject: {self.learned:.0%} of the way from the base's images to real ones "
            f"(distance {self.before:.2f} → {self.after:.2f}, a margin of {self.margin:.2f}; "
            f"real to real {self.held_out:.2f})\n"
            f"  drift: class {self.class_drift:.3f}, unrelated prompts {self.unrelated_drift:.3f} "
            "(mean change of a pixel, 0 to 1)"
        )


@dataclass(frozen=True)
class PromptImages:
    """What one model draws, with the same prompts and seeds as the other."""

    subject: Sequence[Image.Image]
    of_class: Sequence[Image.Image]
    unrelated: Sequence[Image.Image]


def score(
    base: Parts,
    before: PromptImages,
    after: PromptImages,
    held_out: Sequence[Image.Image],
    device: torch.device,
) -> Score:
    """Returns the score of a LoRA.

    Args:
        base: the base model; its VAE is used.
        before, after: images of the base and of the LoRA.
        held_out: two or more real images of the subject that training never saw, of the same
            size, on different backgrounds.
        device: where to compute.
    """
    known = patches(base, [*before.subject, *before.of_class, *before.unrelated], device)
    real, drawn_before, drawn_after = (
        patches(base, p, device) for p in (held_out, before.subject, after.subject)
    )
    others = [torch.cat([r for j, r in enumerate(real) if j != i]) for i in range(len(real))]
    particular = [
        distinctive(image, rest, known.flatten(0, 1))
        for image, rest in zip(real, others, strict=True)
    ]
    return Score(
        before=distance(particular, drawn_before),
        after=distance(particular, drawn_after),
        held_out=distance(particular, real, same=True),
        class_drift=drift(before.of_class, after.of_class),
        unrelated_drift=drift(before.unrelated, after.unrelated),
    )
