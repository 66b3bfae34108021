"""Shapes of training: the table of buckets, which one an image gets, and what is seen of it."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sd_lora.data.images.buckets import CropSettings, pixels_of

sides = st.integers(1, 5000)
sizes = st.tuples(sides, sides)


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 32), (768, 64), (512, 8)])
def test_the_table(resolution: int, step: int) -> None:
    """Every bucket is of multiples of the step, of at most resolution² pixels, between half and
    twice the resolution; the square is among them; each has its transpose."""
    crop_settings = CropSettings(resolution, step)
    assert (resolution, resolution) in crop_settings.buckets
    assert set(crop_settings.buckets) == {(h, w) for w, h in crop_settings.buckets}
    for w, h in crop_settings.buckets:
        assert w % step == h % step == 0
        assert w * h <= resolution**2
        assert resolution // 2 <= min(w, h)
        assert max(w, h) <= resolution * 2


def test_the_usual_buckets_of_sd1() -> None:
    """512² in steps of 64 gives the sizes that are usual for SD1."""
    assert CropSettings(512, 64).buckets == (
        (256, 1024), (256, 960), (256, 896), (256, 832), (320, 768), (320, 704), (384, 640),
        (448, 576), (512, 512), (576, 448), (640, 384), (704, 320), (768, 320), (832, 256),
        (896, 256), (960, 256), (1024, 256),
    )  # fmt: skip


@given(size=sizes)
def test_the_nearest_aspect_ratio(size: tuple[int, int]) -> None:
    """An image's bucket is one whose aspect ratio is nearest in logarithm, so that an image and
    its transpose get transposed buckets; it covers the bucket and loses one side's edges alone."""
    crop_settings = CropSettings(512, 64)
    bucket = crop_settings.bucket(size)
    aspects = [abs(math.log(w / h) - math.log(size[0] / size[1])) for w, h in crop_settings.buckets]
    distance = abs(math.log(bucket[0] / bucket[1]) - math.log(size[0] / size[1]))
    assert distance == pytest.approx(min(aspects), abs=1e-12)
    turned = crop_settings.bucket(size[::-1])
    assert math.prod(turned) == math.prod(bucket)
    crop = crop_settings.crop(size, bucket, None)
    assert all(r >= b for r, b in zip(crop.resized, bucket, strict=True))
    assert crop.resized[0] == bucket[0] or crop.resized[1] == bucket[1]
    assert crop.scale == pytest.approx(max(bucket[0] / size[0], bucket[1] / size[1]), rel=0.51)
    assert 0 <= crop.crop_loss < 1


@given(size=sizes, u=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2), flip=st.booleans())
def test_the_cut_is_inside(size: tuple[int, int], u: tuple[float, float], flip: bool) -> None:
    """Wherever a cut is drawn, it lies in the resized image, seen from both sides."""
    for crop_settings in (CropSettings(64, 16), CropSettings(64)):
        crop = crop_settings.crop(size, crop_settings.bucket(size), u)
        left, top = crop.corner_of(flip)
        assert 0 <= left <= crop.resized[0] - crop.size[0]
        assert 0 <= top <= crop.resized[1] - crop.size[1]


@given(size=sizes)
def test_nothing_is_upscaled_where_that_is_forbidden(size: tuple[int, int]) -> None:
    """Without upscaling no image grows, whatever its size; what is smaller than the step has no
    bucket; a large image has the bucket that it has anyway."""
    plain, strict = CropSettings(512, 64), CropSettings(512, 64, upscale=False)
    bucket = strict.bucket(size)
    if bucket is None:
        assert min(size) < 64
        return
    assert math.prod(bucket) <= 512**2
    assert strict.crop(size, bucket, None).scale <= 1
    if plain.crop(size, plain.bucket(size), None).scale <= 1:
        assert bucket == plain.bucket(size)


@given(
    images=st.lists(st.tuples(sizes, st.integers(1, 5)), min_size=1, max_size=30),
    least=st.integers(1, 12),
)
def test_a_minimum_of_images(images: list, least: int) -> None:
    """No image is lost to a bucket's minimum, and each bucket has it, unless only one is left."""
    crop_settings = CropSettings(512, 64, min_images=least)
    counts = [count for _, count in images]
    buckets = crop_settings.assign([size for size, _ in images], counts)
    filled = Counter()
    for bucket, count in zip(buckets, counts, strict=True):
        assert bucket in crop_settings.buckets
        filled[bucket] += count
    assert len(filled) == 1 or min(filled.values()) >= least


def test_a_small_bucket_goes_to_the_next() -> None:
    """Three wide images beside ten square ones and four a little wide: the three go to the
    nearest bucket that has enough."""
    images = [(512, 512)] * 10 + [(640, 480)] * 4 + [(1024, 512)] * 3
    buckets = CropSettings(512, 64, min_images=4).assign(images, [1] * 17)
    assert Counter(buckets) == {(512, 512): 10, (576, 448): 7}


@pytest.mark.parametrize(
    ("size", "want"), [((640, 480), (85, 64)), ((480, 640), (64, 85)), ((50, 50), (64, 64))]
)
def test_squares_resize_as_torchvisions(size: tuple[int, int], want: tuple[int, int]) -> None:
    """The shorter side becomes the resolution; the longer is int(resolution · long / short)."""
    assert CropSettings(64).resized(size, (64, 64)) == want


@pytest.mark.parametrize("step", [None, 16])
def test_cuts_and_flips(step: int | None) -> None:
    """Middle cuts are in the middle, random ones reach both ends, a flip mirrors, white is 1."""
    row = np.arange(0, 72, dtype=np.uint8)[None, :, None]
    wide = Image.fromarray(np.tile(row, (64, 1, 3)))
    crop_settings = CropSettings(64, step)
    assert crop_settings.bucket(wide.size) == (64, 64)

    def columns(u: tuple[float, float] | None, flip: bool = False) -> torch.Tensor:
        pixels = pixels_of(crop_settings.crop(wide.size, (64, 64), u).cut(wide, "lanczos"), flip)
        assert pixels.shape == (3, 64, 64)
        return ((pixels[0, 0] + 1) * 127.5).round()

    assert columns(None).tolist() == list(range(4, 68))
    assert columns((0, 0)).tolist() == list(range(64))
    assert columns((0.999, 0)).tolist() == list(range(8, 72))
    assert columns(None, True).tolist() == list(range(67, 3, -1))
    assert pixels_of(Image.new("RGB", (2, 2), "white"), False).eq(1).all()
    assert pixels_of(Image.new("RGB", (2, 2), "black"), True).eq(-1).all()


def test_when_a_cut_is_drawn() -> None:
    """Squares are cut at random by default, as diffusers' scripts do, and buckets in the middle;
    a source may want it otherwise; nothing is drawn where nothing is cut away."""
    wide, square = (96, 64), (64, 64)
    assert CropSettings(64).is_random(wide, square)
    assert not CropSettings(64).is_random(square, square)
    assert not CropSettings(64, 16).is_random(wide, square)
    assert CropSettings(64, 16, random_crop=True).is_random(wide, square)
    assert not CropSettings(64, random_crop=False).is_random(wide, square)
    assert CropSettings(64, random_crop=False).is_random(wide, square, random_crop=True)
