"""Crops by hand: the part of an image that somebody chose to train. No torch."""

from typing import NamedTuple

Size = tuple[int, int]

LEAST_PART = 0.05
"""Of the largest crop: a smaller one has too few pixels to be anything."""


class HandCrop(NamedTuple):
    """A crop as it is chosen, for each bucket and resolution.

    x, y: its middle in parts of the image's width and height, from its upper left corner, in
    [0, 1]. part: its width and height in parts of the largest crop of its shape, from LEAST_PART
    to 1.
    """

    x: float
    y: float
    part: float = 1.0

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers of its file: without the part where that is 1."""
        return self[:2] if self.part == 1 else tuple(self)


MIDDLE = HandCrop(0.5, 0.5)


def corner_at(crop: HandCrop, resized: Size, size: Size) -> tuple[int, int]:
    """(left, top) of the crop whose middle is as near to a point as the image's edges allow.

    resized: (width, height) of the image after resizing. size: of the crop, not larger.
    """
    left, top = (
        min(max(round(part * whole - side / 2), 0), whole - side)
        for part, whole, side in zip(crop[:2], resized, size, strict=True)
    )
    return left, top


def frame_of(crop: HandCrop, image: Size, bucket: Size) -> tuple[float, float, float, float]:
    """(left, top, width, height) of a crop in pixels of the image itself."""
    largest = min(whole / side for whole, side in zip(image, bucket, strict=True))
    width, height = (side * largest * crop.part for side in bucket)
    left, top = (
        min(max(part * whole - side / 2, 0), whole - side)
        for part, whole, side in zip(crop[:2], image, (width, height), strict=True)
    )
    return left, top, width, height
