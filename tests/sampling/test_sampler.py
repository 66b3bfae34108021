"""Large images are decoded in tiles, nearly as they are whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sd_lora.data.cache.encode import Scaling
from sd_lora.models.load import Parts, find_base
from sd_lora.sampling import sampler

DATA = Path(__file__).parents[2] / "sample_data"


@pytest.fixture(scope="module")
def parts() -> Parts:
    """The embedded base, whose trained VAE has 4 pixels a latent and tiles of 16 × 16 latents."""
    return find_base(str(DATA / "tiny-sd")).load()


@pytest.fixture(scope="module")
def latents(parts: Parts) -> Tensor:
    """Those of an image of 160 × 128 pixels: 40 × 32."""
    with Image.open(DATA / "dreambooth" / "instance" / "00-white.png") as image:
        large = image.convert("RGB").resize((160, 128), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(large)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        z = parts.vae.encode(pixels).latent_dist.mean
    return Scaling.of(parts.vae).scaled(z)


def test_large_images_are_decoded_in_tiles(
    parts: Parts, latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of as many latents as the limit is decoded whole, one of more in 3 × 4 tiles of 16
    latents, of which a quarter overlaps. Measured at 2.7 levels of 255 in the mean and 34 at most,
    their difference stays below 4 and 50; the VAE itself loses 4.8 in the mean. Afterwards the VAE
    has its own setting, and one that had tiles before keeps them."""
    sizes: list[tuple[int, ...]] = []
    hook = parts.vae.decoder.register_forward_pre_hook(
        lambda _, given: sizes.append(tuple(given[0].shape[2:]))
    )
    monkeypatch.setattr(sampler, "LARGEST_WHOLE", 32 * 40)
    (whole,) = sampler._decode(parts, latents)
    assert sizes == [(32, 40)]
    sizes.clear()
    monkeypatch.setattr(sampler, "LARGEST_WHOLE", 32 * 40 - 1)
    (tiled,) = sampler._decode(parts, latents)
    assert sizes == [(h, w) for h in (16, 16, 8) for w in (16, 16, 16, 4)]
    hook.remove()
    assert tiled.size == whole.size == (160, 128)
    difference = np.abs(np.asarray(tiled, int) - np.asarray(whole, int))
    assert difference.mean() < 4
    assert difference.max() < 50
    assert parts.vae.use_tiling is False
    monkeypatch.setattr(parts.vae, "use_tiling", True)
    assert sampler._decode(parts, latents)[0].tobytes() == tiled.tobytes()
    assert parts.vae.use_tiling is True


def test_an_error_in_a_tile_leaves_the_setting(
    parts: Parts, latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the device has no memory left in the second tile, its error is passed on, and the VAE
    has its own setting. (The error is a stand-in for the device's own.)"""
    settings: list[bool] = []

    def small_card(*_: object) -> None:
        settings.append(parts.vae.use_tiling)
        if len(settings) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(sampler, "LARGEST_WHOLE", 16 * 16)
    hook = parts.vae.decoder.register_forward_pre_hook(small_card)
    with pytest.raises(torch.OutOfMemoryError):
        sampler._decode(parts, latents)
    hook.remove()
    assert settings == [True, True]
    assert parts.vae.use_tiling is False
