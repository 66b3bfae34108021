"""Masks for inpainting, what a UNet sees through them, and latents: against diffusers and by
property."""

import itertools
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from sd_lora.config.sources import SourceSpec
from sd_lora.data.batches.stream import BatchItem, ImageSet
from sd_lora.data.cache.encode import Latents, Scaling
from sd_lora.data.cache.latents import LatentTable, LoadedImage, PixelSettings
from sd_lora.data.images.buckets import Crop, CropSettings
from sd_lora.data.images.facts import content_digest
from sd_lora.data.images.masks import WHOLE, draw_mask
from sd_lora.data.sources.samples import Sample
from sd_lora.errors import RunError
from sd_lora.seeds import generator_for, seed_for
from tests.tiny import build_pipeline

MANY = [(0, "instance", "position", i) for i in range(2000)]


SQUARE = Crop((64, 64), (64, 64), (0, 0), (64, 64))


def item(i: int, index: int = 0) -> BatchItem:
    return BatchItem((0, "instance", "position", i), "instance", index, "", False, SQUARE, 1.0)


def latents_of(vae: AutoencoderKL, mode: str = "memory") -> Latents:
    return Latents(
        vae, torch.device("cpu"), LatentTable(PixelSettings(), "a VAE", mode, fresh=True)
    )


def test_masks_are_functions_of_their_address() -> None:
    """A mask is zeros and ones, the same for the same address whatever was drawn before or from a
    global generator, and another for another address."""
    first = draw_mask((64, 64), MANY[5])
    torch.manual_seed(1)
    masks = [draw_mask((64, 64), address) for address in MANY[:40]]
    assert torch.equal(masks[5], first)
    assert all(mask.shape == (1, 64, 64) for mask in masks)
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for mask in masks)
    partly = [mask for mask in masks if not mask.all()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(partly, 2))


def test_masks_cover_what_they_should() -> None:
    """A quarter of the masks cover everything (to three standard deviations), the others a part: by
    rectangles, ellipses and strokes, a third of them each. A rectangle covers every place of its
    own bounding box, an ellipse π/4 of it; places are as often covered left as right, above as
    below, and in the middle most."""
    masks = torch.cat([draw_mask((64, 64), address) for address in MANY])
    whole = masks.flatten(1).all(1)
    assert abs(float(whole.float().mean()) - WHOLE) < 3 * (0.25 * 0.75 / 2000) ** 0.5
    part = masks[~whole].mean((1, 2))
    assert part.min() > 0.01
    assert part.max() < 0.95
    kinds = torch.tensor([seed_for(*address, "mask", "kind") % 3 for address in MANY])[~whole]
    assert (kinds.bincount() / len(kinds) - 1 / 3).abs().max() < 0.04
    boxes = torch.tensor([box_share(mask) for mask in masks[~whole]])
    assert (boxes[kinds == 0] == 1).all()
    assert (boxes[kinds == 1] - torch.pi / 4).abs().max() < 0.06
    assert boxes[kinds == 2].std() > 0.1
    often = masks[~whole].mean(0)
    for axis in (0, 1):
        assert (often - often.flip(axis)).abs().mean() < 0.03
    assert often[24:40, 24:40].mean() > 1.5 * often[:8].mean()


def box_share(mask: Tensor) -> float:
    """How much of its bounding box a mask covers."""
    ys, xs = mask.nonzero(as_tuple=True)
    return float(mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].mean())


@pytest.mark.parametrize("side", [32, 64, 512])
def test_masks_are_the_same_at_every_side(side: int) -> None:
    """Masks scale with the image: at another resolution they cover the same share of it."""
    for address in MANY[:20]:
        small, large = (float(draw_mask((s, s), address).mean()) for s in (side, 256))
        assert abs(small - large) < 0.08


@pytest.mark.parametrize("kind", ["sd1-inpainting", "sdxl-inpainting"])
def test_what_is_seen_is_the_pipelines(kind: str) -> None:
    """The mask and the masked image's latents are those of diffusers' inpainting pipelines'
    prepare_mask_latents, fed our masks, images and generators: in a batch of four with whole and
    partial masks."""
    torch.manual_seed(0)
    pipeline = build_pipeline(kind)
    # tiny's VAE norms each channel by itself, which makes noise of a constant image's rounding
    pipeline.vae = AutoencoderKL.from_config(pipeline.vae.config, norm_num_groups=2).eval()
    items = [item(i) for i in range(4)]
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    masks = torch.stack([draw_mask((64, 64), s.address) for s in items])
    assert len({bool(mask.all()) for mask in masks}) == 2
    generators = [generator_for(*s.address, "masked latent") for s in items]
    with torch.no_grad():
        want = pipeline.prepare_mask_latents(
            masks, pixels * (masks < 0.5), 4, 64, 64, torch.float32, "cpu", generators, False
        )
    loaded = [LoadedImage("an image", pixels=p) for p in pixels]
    ours = latents_of(pipeline.vae).masked(items, loaded)
    torch.testing.assert_close(ours, torch.cat(want[:2], 1), rtol=0, atol=1e-5)
    alone = latents_of(pipeline.vae).masked(items[2:3], loaded[2:3])
    torch.testing.assert_close(ours[2:3], alone, rtol=0, atol=1e-5)


def test_latents_are_scaled_as_the_model_says() -> None:
    """One factor for Stable Diffusion; for Playground v2.5 (z - mean) · factor / deviation of each
    channel, as example script D of diffusers has it (line 1694); `unscaled` is the inverse."""
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    vae = build_pipeline("sdxl").vae
    vae.register_to_config(scaling_factor=0.13025)
    torch.testing.assert_close(Scaling.of(vae).scaled(z), z * 0.13025)
    mean, std = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
    vae.register_to_config(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    of_channels = [torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std)]
    want = (z - of_channels[0]) * 0.5 / of_channels[1]
    scaling = Scaling.of(vae)
    torch.testing.assert_close(scaling.scaled(z), want)
    torch.testing.assert_close(scaling.unscaled(want), z)
    torch.testing.assert_close(scaling.scaled(z[0]), want[0])


def overflowing() -> AutoencoderKL:
    """A VAE with activations beyond 65504, as SDXL's: float32 holds them and float16 does not."""
    vae = build_pipeline("sdxl").vae
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 1e6
    return vae


@pytest.mark.parametrize("cached", [False, True])
def test_an_overflow_in_float16_is_named_with_its_remedy(cached: bool, tmp_path: Path) -> None:
    """Latents that are not finite end the run by the image's name and with what to do: before they
    are kept, or where those that training has encoded are checked; in float32 the same VAE is
    fine."""
    path = tmp_path / "lake.png"
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(path)
    digest = content_digest(path.read_bytes())
    sample = Sample(str(path), path.read_bytes, ("",), SourceSpec(), digest, (64, 64))
    images = ImageSet([sample], [(64, 64)], CropSettings(64), "instance", 0)

    def x0(vae: AutoencoderKL) -> Tensor:
        latents = latents_of(vae, "memory" if cached else "no")
        latents.fill(latents.jobs(images), [], iter)
        loaded = latents.table.loaded(sample, SQUARE, False, random=False)
        assert (loaded.key in latents.table) == cached
        found = latents.latents([item(0)], [loaded]).x0
        latents.check()
        return found

    assert torch.isfinite(x0(overflowing())).all()
    assert torch.isfinite(x0(build_pipeline("sdxl").vae.half())).all()
    message = r"infinite latents for .*lake.png in float16: it overflows.* leave --vae_precision at"
    with pytest.raises(RunError, match=message):
        x0(overflowing().half())
    # what a mask leaves is encoded by itself
    latents = latents_of(overflowing().half())
    loaded = latents.table.read(sample, SQUARE, False)
    latents.masked([item(0)], [loaded])
    with pytest.raises(RunError, match=message):
        latents.check()
    latents.check()  # it is told once
