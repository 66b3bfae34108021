"""Latent distributions by content: the mean and deviation of each image's latent, kept.

An entry is addressed by all that it is made of: the bytes of the image, what is seen of it, its
flip, and the VAE. So an image that is replaced is another entry, and so is another resolution or
another VAE; what did not change is never computed again, by any run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import PIL
import torch.nn.functional as F
from torch import Tensor

from sd_lora.data.cache.store import Store, digest_of
from sd_lora.data.images.buckets import Crop, pixels_of
from sd_lora.data.images.decode import decode_with_mask
from sd_lora.data.images.facts import content_digest
from sd_lora.data.sources.samples import Sample
from sd_lora.errors import RunError

VERSION = "1"
"""Of how images become pixels: with another one, what was kept is forgotten."""

MODES = ("auto", "memory", "disk", "no")
"""Where caches are: "no" computes each time."""


@dataclass(frozen=True, slots=True)
class Moments:
    """An image's latent distribution.

    mean, std: (C, h, w) in the VAE's dtype. mask: (1, h, w) float32, how much each latent counts in
    the loss; None: all the same.
    """

    mean: Tensor
    std: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """What was read of an image.

    name: for messages. key: the address of its moments, None where its cut is drawn anew each time.
    moments: where they are on the disk. pixels: (3, H, W) in [-1, 1], with mask (1, h, w), where
    the moments are nowhere, or where the pixels are needed, too.
    """

    name: str
    key: str | None = None
    moments: Moments | None = None
    pixels: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class PixelSettings:
    """How images become pixels: the filter that resizes them, the colour that transparent ones
    are laid on, whether their opacity is the mask of the loss, and how many pixels a latent has."""

    interpolation: str = "lanczos"
    background: tuple[int, int, int] = (255, 255, 255)
    alpha_mask: bool = False
    pixels_per_latent: int = 8

    def pixels(self, data: bytes, name: str, crop: Crop, flip: bool) -> LoadedImage:
        """Returns what is seen of an image.

        Raises:
            RunError: bytes that are no image.
        """
        image, alpha = decode_with_mask(data, name, self.background)
        mask = None
        if self.alpha_mask and alpha is not None:
            opacity = pixels_of(crop.cut(alpha, "box").convert("RGB"), flip)[:1] / 2 + 0.5
            mask = F.avg_pool2d(opacity, self.pixels_per_latent)
        return LoadedImage(
            name, None, None, pixels_of(crop.cut(image, self.interpolation), flip), mask
        )


class LatentTable:
    """The moments of images whose cut does not change, in memory or in a store.

    Has no VAE, so that loader workers can hold one.

    Args:
        look: how images become pixels.
        identity: of the VAE: its weights, dtype and kind of device, and the libraries' versions.
        mode: "memory", "disk" or "no".
        store: of "disk".
        fresh: the pixels are needed each time, too (inpainting).
    """

    def __init__(
        self,
        pixel_settings: PixelSettings,
        identity: str,
        mode: str,
        store: Store | None = None,
        fresh: bool = False,
    ) -> None:
        self.pixel_settings, self.identity, self.mode, self.fresh = (
            pixel_settings,
            identity,
            mode,
            fresh,
        )
        self.store = store if mode == "disk" else None
        self.memory: dict[str, Moments] = {}

    def key(self, sample: Sample, crop: Crop, flip: bool) -> str:
        """Returns the address of what is seen of an image."""
        pixel_settings = self.pixel_settings
        # what an image without transparency is laid on, or its mask, is no part of it; but only
        # decoding tells, and entries that are computed twice do no harm
        return "latents/" + digest_of(
            VERSION, PIL.__version__, sample.digest, repr(crop), str(flip),
            pixel_settings.interpolation, repr(pixel_settings.background),
            str(pixel_settings.alpha_mask), self.identity,
        )  # fmt: skip

    def __contains__(self, key: str) -> bool:
        return key in self.memory or (self.store is not None and key in self.store)

    def get(self, key: str) -> Moments | None:
        """Returns the moments of an address; None where they are not known, or no more."""
        if self.store is None:
            return self.memory.get(key)
        tensors = self.store.tensors(key)
        if tensors is None or not {"mean", "std"} <= tensors.keys():
            return None
        return Moments(tensors["mean"], tensors["std"], tensors.get("mask"))

    def put(self, key: str, moments: Moments) -> None:
        """Keeps moments; raises RunError if the disk does not take them."""
        if self.store is None:
            self.memory[key] = moments
            return
        tensors = {"mean": moments.mean, "std": moments.std}
        if moments.mask is not None:
            tensors["mask"] = moments.mask
        self.store.put_tensors(key, tensors)

    def loaded(self, sample: Sample, crop: Crop, flip: bool, random: bool) -> LoadedImage:
        """Reads what is seen of an image: its moments if they are known, else its pixels.

        Args:
            random: the cut is drawn anew each time, so that nothing can be known.

        Raises:
            RunError: an image that cannot be read any more.
        """
        key = None if self.mode == "no" or random else self.key(sample, crop, flip)
        # what is in memory stays there: a loader's worker would open two files for each to send it
        moments = self.get(key) if key and self.store else None
        known = moments is not None or key in self.memory
        if known and not self.fresh:
            return LoadedImage(sample.name, key, moments)
        if sample.source.streaming and self.store:
            raise RunError(
                f"the latent of {sample.name} is no longer in the cache {self.store.folder}, and a "
                "stream is read in order only: did another run make room there? A larger "
                "--data_cache_limit of that run leaves it"
            )
        fresh = self.read(sample, crop, flip)
        return LoadedImage(sample.name, key, moments, fresh.pixels, fresh.mask)

    def read(
        self,
        sample: Sample,
        crop: Crop,
        flip: bool,
        read_bytes: Callable[[], bytes] | None = None,
    ) -> LoadedImage:
        """Returns an image's pixels, of the very bytes that were checked.

        read_bytes: reads the bytes of a stream's sample; the sample's own `read` when None.

        Raises:
            RunError: by name, an image that cannot be read, or was changed since it was checked.
        """
        try:
            data = (read_bytes or sample.read)()
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{sample.name} could not be read: {reason}") from None
        if content_digest(data) != sample.digest:
            raise RunError(f"{sample.name} was changed after it was checked")
        return self.pixel_settings.pixels(data, sample.name, crop, flip)
