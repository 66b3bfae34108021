"""Crops by hand: the point of an image that lies in the middle of its crop. No torch."""

Centre = tuple[float, float]
"""Parts of an image's width and height, from its upper left corner, each in [0, 1]."""

MIDDLE: Centre = (0.5, 0.5)


def corner_at(centre: Centre, resized: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(left, top) of the crop whose middle is as near to a point as the image's edges allow.

    resized: (width, height) of the image after resizing. size: of the crop, not larger.
    """
    left, top = (
        min(max(round(part * whole - side / 2), 0), whole - side)
        for part, whole, side in zip(centre, resized, size, strict=True)
    )
    return left, top
