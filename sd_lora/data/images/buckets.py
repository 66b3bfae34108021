"""Shapes of training images, and the trained part of each: aspect-ratio buckets, or squares."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sd_lora.config.sources import SourceSpec
from sd_lora.data.images.decode import INTERPOLATIONS
from sd_lora.data.images.hand_crops import MIDDLE, HandCrop, corner_at

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True, slots=True)
class Crop:
    """Resizing and crop of an image, all in pixels.

    original: the image's own (width, height), upright. resized: after resizing. corner: (left, top)
    of the crop in the resized image. size: (width, height) of the crop.
    """

    original: Size
    resized: Size
    corner: tuple[int, int]
    size: Size

    @property
    def pixels(self) -> int:
        """Pixels of the crop."""
        return math.prod(self.size)

    @property
    def crop_loss(self) -> float:
        """The part of the image that is cut away."""
        return 1 - math.prod(self.size) / math.prod(self.resized)

    @property
    def scale(self) -> float:
        """How much larger the image is made; below 1, smaller."""
        return max(new / old for new, old in zip(self.resized, self.original, strict=True))

    def corner_of(self, flip: bool) -> tuple[int, int]:
        """(left, top) of the crop; with `flip`, in the mirrored image."""
        left, top = self.corner
        return (self.resized[0] - self.size[0] - left if flip else left), top

    def cut(self, image: Image.Image, interpolation: str) -> Image.Image:
        """The crop of an image of the size `original`: resized, then cut. Of what is cut on
        all sides the rest is not resized: it may be huge, and the pixels are the same.
        """
        left, top = self.corner
        box = (left, top, left + self.size[0], top + self.size[1])
        if all(whole > side for whole, side in zip(self.resized, self.size, strict=True)):
            (width, height), (across, down) = self.original, self.resized
            x = [place * width / across for place in box[::2]]
            y = [place * height / down for place in box[1::2]]
            own = (x[0], y[0], x[1], y[1])
            return image.resize(self.size, INTERPOLATIONS[interpolation], own)
        if self.resized != image.size:
            image = image.resize(self.resized, INTERPOLATIONS[interpolation])
        return image.crop(box)


def pixels_of(image: Image.Image, flip: bool) -> Tensor:
    """An RGB image as (3, H, W) in [-1, 1]."""
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (array.flip(-1) if flip else array).float() / 127.5 - 1


@dataclass(frozen=True)
class CropSettings:
    """Rules for the shapes of images.

    With a `step`, aspect-ratio buckets: sizes whose sides are multiples of it, from min_side to
    max_side (half and twice the resolution when None), of at most resolution² pixels; an image goes
    to the bucket with the nearest aspect ratio in logarithm, is resized to cover it, and is
    cropped. Without, the squares of diffusers' scripts: the shorter side is resized to the
    resolution.

    upscale: whether images smaller than their bucket are enlarged; if not, they get a bucket of
    their own size, rounded down. min_images: of a bucket; images of a smaller one go to the next
    one. random_crop: crop at a random place, not in the middle; None: where there is no step.
    """

    resolution: int
    step: int | None = None
    min_side: int | None = None
    max_side: int | None = None
    upscale: bool = True
    min_images: int = 1
    random_crop: bool | None = None
    interpolation: str = "lanczos"

    @cached_property
    def buckets(self) -> tuple[Size, ...]:
        """The sizes that there are, from tall to wide."""
        if self.step is None:
            return ((self.resolution, self.resolution),)
        least, most = self.sides
        step, area = self.step, self.resolution**2
        tall = {(w, min(most, area // w // step * step)) for w in range(least, most + 1, step)}
        sizes = {size for w, h in tall for size in ((w, h), (h, w)) if min(w, h) >= least}
        return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))

    @property
    def sides(self) -> tuple[int, int]:
        """The shortest and the longest side of a bucket."""
        step = self.step or 1
        least = self.min_side or self.resolution / 2
        most = self.max_side or self.resolution * 2
        return max(step, math.ceil(least / step) * step), int(most // step * step)

    def bucket(self, size: Size) -> Size | None:
        """The bucket of an image of this size; None for an image smaller than the step without
        upscaling.
        """
        best = self._nearest(size, self.buckets)
        if self.step is None or self.upscale or _covering(size, best)[1] <= 1:
            return best
        step, most = self.step, self.sides[1]
        short, long = sorted(min(side, most) // step * step for side in size)
        if not short:
            return None
        long = min(long, self.resolution**2 // short // step * step)
        return (short, long) if size[0] <= size[1] else (long, short)

    def _nearest(self, size: Size, buckets: Sequence[Size]) -> Size:
        aspect = math.log(size[0] / size[1])
        # of two that are as near, the larger
        return min(buckets, key=lambda b: (abs(math.log(b[0] / b[1]) - aspect), -b[0] * b[1], b))

    def of(self, resolution: int | None, spec: SourceSpec) -> "CropSettings":
        """The rules for a source's images at one of its resolutions, None: the run's."""
        return replace(
            self,
            resolution=resolution or self.resolution,
            min_side=spec.bucket_min_side or self.min_side,
            max_side=spec.bucket_max_side or self.max_side,
        )

    def assign(self, sizes: Sequence[Size], counts: Sequence[int]) -> list[Size | None]:
        """The bucket of each image of a set, or None as `bucket` does.

        Args:
            sizes: of the images.
            counts: how often each is seen in an epoch.
        """
        buckets = [self.bucket(size) for size in sizes]
        filled: Counter[Size] = Counter()
        for bucket, count in zip(buckets, counts, strict=True):
            if bucket:
                filled[bucket] += count
        settled: set[Size] = set()
        while True:
            small = [b for b in filled if filled[b] < self.min_images and b not in settled]
            if not small:
                return buckets
            least = min(small, key=lambda b: (filled[b], b))
            settled.add(least)
            others = [b for b in filled if b != least]
            for i, size in enumerate(sizes):
                if buckets[i] != least:
                    continue
                fitting = [b for b in others if self.upscale or _covering(size, b)[1] <= 1]
                if fitting:
                    buckets[i] = self._nearest(size, fitting)
                    filled[least] -= counts[i]
                    filled[buckets[i]] += counts[i]  # type: ignore[index]
            if not filled[least]:
                del filled[least]

    def resized(self, size: Size, bucket: Size, part: float = 1.0) -> Size:
        """(width, height) after resizing; of squares, rounded as torchvision's Resize.

        part: of the largest crop that fills the bucket: the smaller, the larger the image.
        """
        if self.step is not None:
            return _covering(size, bucket, part)[0]
        width, height = size
        short, r = min(size), round(bucket[0] / part)  # a square
        return (
            r if width == short else r * width // short,
            r if height == short else r * height // short,
        )

    def is_random(self, size: Size, bucket: Size, random_crop: bool | None = None) -> bool:
        """Whether the place of the cut is drawn; random_crop: of the image's own source."""
        chosen = self.random_crop if random_crop is None else random_crop
        if chosen is None:
            chosen = self.step is None
        return chosen and self.resized(size, bucket) != bucket

    def crop(
        self,
        size: Size,
        bucket: Size,
        u: tuple[float, float] | None,
        hand_crop: HandCrop | None = None,
    ) -> Crop:
        """The crop of an image; u: two numbers in [0, 1) that place a random crop, None for the
        one by hand, which is the largest in the middle unless given.
        """
        chosen = hand_crop or MIDDLE
        width, height = resized = self.resized(size, bucket, chosen.part)
        if u is None:  # in the middle rounded as torchvision's CenterCrop
            corner = corner_at(chosen, resized, bucket)
        else:
            spare = (width - bucket[0], height - bucket[1])
            corner = (int(u[0] * (spare[0] + 1)), int(u[1] * (spare[1] + 1)))
        return Crop(size, resized, corner, bucket)


def _covering(size: Size, bucket: Size, part: float = 1.0) -> tuple[Size, float]:
    """The smallest size of the image's shape to cover a bucket, divided by a part, and its
    scale.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1]) / part
    width, height = (max(b, round(s * scale)) for s, b in zip(size, bucket, strict=True))
    return (width, height), scale
