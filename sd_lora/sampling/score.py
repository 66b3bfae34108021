"""The score of learning: how well a LoRA draws its subject, and how far everything else drifts.

Images are compared patch by patch in the latents of the base model's own VAE: every Stable
Diffusion model has one, nothing is downloaded, and equal images give equal numbers. A subject's
distinctive patches are those of its held-out images far from every image of the base model and near
to the subject's other images (novelty as the distance to the nearest patch of a memory bank: Roth
et al. 2022, "Towards Total Recall in Industrial Anomaly Detection", section 3); backgrounds, known
or not, do not count. The score is the distance from the LoRA's images to the distinctive patches,
anywhere in the image.
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
"""An image's latents are pooled to GRID × GRID; a patch is PATCH × PATCH of them, 1/8 of a side.
Measured on drawn subjects: with PATCH 1 only colours count, and 3 is no better than 2."""

DISTINCTIVE = 0.2
"""Distinctive patches of a held-out image, as a fraction of all."""


@torch.no_grad()
def latent_patches(base: Parts, images: Sequence[Image.Image], device: torch.device) -> Tensor:
    """Latent patches of N images, (N, P, D): P = (GRID - PATCH + 1)², D = C·PATCH².

    Args:
        base: the base model; its VAE is used.
        images: of one size, with sides that the VAE can encode.
        device: where to compute; the result is on the CPU.
    """
    pixels = [torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) for i in images]
    x = (torch.stack(pixels).float() / 127.5 - 1).to(device)
    vae = base.vae.to(device)
    x0 = vae.encode(x.to(vae.dtype)).latent_dist.mean.float() * vae.config.scaling_factor
    x0 = F.adaptive_avg_pool2d(x0, min(GRID, *x0.shape[2:])).cpu()
    return F.unfold(x0, PATCH).transpose(1, 2)


def nearest_distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances (P,) from each patch of a (P, D) to its nearest patch of b (Q, D)."""
    # the matrix-product shortcut loses digits where patches are alike, and these decide the score
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").min(1).values


def distinctive_patches(image: Tensor, others: Tensor, known: Tensor) -> Tensor:
    """Patches distinctive of an image's subject: a fraction DISTINCTIVE of them, at least one.

    They have the largest difference between the distance to `known` and the distance to `others`.

    Args:
        image: all patches of the image (P, D).
        others: patches of the subject's other images (R, D).
        known: patches of images without the subject (Q, D).
    """
    contrast = nearest_distances(image, known) - nearest_distances(image, others)
    return image[contrast.argsort(descending=True)[: max(1, round(DISTINCTIVE * len(image)))]]


def subject_distance(distinctive: Sequence[Tensor], images: Tensor, *, same: bool = False) -> float:
    """Mean distance from a subject's distinctive patches to an image's nearest patches.

    Args:
        distinctive: the distinctive patches of each held-out image.
        images: the patches of N images (N, P, D); the mean is over all pairs.
        same: `images` are the held-out images themselves, and none is compared with itself.
    """
    distances = [
        nearest_distances(subject, image).mean()
        for i, subject in enumerate(distinctive)
        for j, image in enumerate(images)
        if not (same and i == j)
    ]
    return float(torch.stack(distances).mean())


def pixel_drift(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """Mean absolute difference of pixels, in [0, 1], between images of equal prompts and seeds."""
    differences = [
        np.abs(np.asarray(b, dtype=np.float32) - np.asarray(a, dtype=np.float32)).mean() / 255
        for b, a in zip(before, after, strict=True)
    ]
    return float(np.mean(differences))


@dataclass(frozen=True)
class Score:
    """Distances to the subject before and after training, and the drift of other prompts.

    before, after: distance of the base model's and of the LoRA's images to the subject.
    held_out: distance of the subject's held-out images to each other; a perfect LoRA reaches it.
    class_drift, unrelated_drift: mean difference of pixels, in [0, 1], for prompts of the class and
        for prompts of other things. 0 is best.
    """

    before: float
    after: float
    held_out: float
    class_drift: float
    unrelated_drift: float

    @property
    def margin(self) -> float:
        """Distance to the subject gained by the LoRA."""
        return self.before - self.after

    @property
    def learned(self) -> float:
        """Fraction of the way from the base model to real images of the subject: 1 is all of it."""
        return self.margin / (self.before - self.held_out)

    def text(self) -> str:
        """Two lines for a terminal."""
        return (
            f"  subject: {self.learned:.0%} of the way from the base's images to real ones "
            f"(distance {self.before:.2f} → {self.after:.2f}, a margin of {self.margin:.2f}; "
            f"real to real {self.held_out:.2f})\n"
            f"  drift: class {self.class_drift:.3f}, unrelated prompts {self.unrelated_drift:.3f} "
            "(mean change of a pixel, 0 to 1)"
        )


@dataclass(frozen=True)
class PromptImages:
    """Images of one model, for three sets of prompts. Two models are compared at equal seeds.

    subject: prompts with the subject.
    of_class: prompts with the subject's class.
    unrelated: prompts of other things.
    """

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
    """Score of a LoRA.

    Args:
        base: the base model; its VAE is used.
        before, after: images of the base model and of the LoRA.
        held_out: two or more real images of the subject, unseen in training, of the same size, on
            different backgrounds.
        device: where to compute.
    """
    known = latent_patches(base, [*before.subject, *before.of_class, *before.unrelated], device)
    real, drawn_before, drawn_after = (
        latent_patches(base, images, device) for images in (held_out, before.subject, after.subject)
    )
    others = [torch.cat([r for j, r in enumerate(real) if j != i]) for i in range(len(real))]
    distinctive = [
        distinctive_patches(image, rest, known.flatten(0, 1))
        for image, rest in zip(real, others, strict=True)
    ]
    return Score(
        before=subject_distance(distinctive, drawn_before),
        after=subject_distance(distinctive, drawn_after),
        held_out=subject_distance(distinctive, real, same=True),
        class_drift=pixel_drift(before.of_class, after.of_class),
        unrelated_drift=pixel_drift(before.unrelated, after.unrelated),
    )
