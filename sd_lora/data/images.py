"""Pictures → pixels: decode, orient, to RGB, resize, crop, flip; files are only read."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from sd_lora.errors import RunError

EXTENSIONS = frozenset((".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}

BACKGROUND = (255, 255, 255)
"""Transparent pixels are laid on white: what lies hidden under them is often garbage."""


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()


def _from_profile(image: Image.Image) -> Image.Image:
    """Converts CMYK through its embedded profile where it has one, else by the plain formula."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            rgb = ImageCms.profileToProfile(
                image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if rgb is not None:
                return rgb
        except ImageCms.PyCMSError:
            pass  # a broken profile is as good as none: the plain formula below
    return image.convert("RGB")


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an upright 8-bit RGB picture of any mode.

    EXIF orientation is applied, transparency is composited on white, 16-bit grey is scaled to 8,
    CMYK goes through its profile.

    Raises:
        ValueError: a mode whose range of values is not known (32-bit float).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        values = np.asarray(image.convert("I") if image.mode != "I" else image, dtype=np.float64)
        image = Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no known range; save it with 8 or 16 bits")
    if image.mode == "CMYK":
        return _from_profile(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def decode(data: bytes, name: str) -> Image.Image:
    """Decodes a picture's bytes fully; see `to_rgb`.

    Raises:
        RunError: what is empty, truncated, not a picture, or too large to be one, by name.
    """
    try:
        if not data:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it is not a picture" if "cannot identify" in str(error) else str(error)
        raise RunError(f"{name} could not be decoded: {reason}") from None


@dataclass(frozen=True)
class Framing:
    """How a picture becomes a square: its shorter side resized to `resolution`, then cropped.

    center_crop: cut from the middle, else at a random place; random_flip: mirror half of the time.
    """

    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns (width, height) after resizing, rounded as torchvision's Resize does."""
        width, height = size
        short, r = min(size), self.resolution
        return (
            r if width == short else r * width // short,
            r if height == short else r * height // short,
        )

    def is_random(self, size: tuple[int, int]) -> bool:
        """Whether the place of the crop is drawn: not for centre crops, nor for square pictures."""
        width, height = self.resized(size)
        return not self.center_crop and width != height

    def corner(self, size: tuple[int, int], u: float, flip: bool = False) -> tuple[int, int]:
        """Returns (left, top) of the crop in the resized picture, of a picture of this size.

        With `flip`, in the mirrored picture: what is seen starts as far from its left as it ended
        from the right.
        """
        width, height = self.resized(size)
        r = self.resolution
        if self.center_crop:  # rounding as torchvision's CenterCrop
            left, top = round((width - r) / 2), round((height - r) / 2)
        else:
            left, top = int(u * (width - r + 1)), int(u * (height - r + 1))
        return (width - r - left if flip else left), top

    def pixels(self, image: Image.Image, u: float, flip: bool) -> Tensor:
        """Returns (3, resolution, resolution) in [-1, 1]; u in [0, 1) places a random crop."""
        (left, top), r = self.corner(image.size, u), self.resolution
        width, height = self.resized(image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        image = image.crop((left, top, left + r, top + r))
        array = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return (array.flip(-1) if flip else array).float() / 127.5 - 1
