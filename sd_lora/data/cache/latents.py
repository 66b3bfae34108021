"""Cached latent distributions by content: mean and deviation of each image's latent.

An entry's address contains everything that made it: the bytes of the image, its crop, its flip, and
the VAE. So a replaced image is another entry, and so is another resolution or another VAE;
everything else is never computed again, by any run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import PIL
import torch
import torch.nn.functional as F
from torch import Tensor

from sd_lora.data.cache.store import Store, digest_of
from sd_lora.data.images.buckets import Crop, pixels_of
from sd_lora.data.images.decode import INTERPOLATIONS, decode_with_mask
from sd_lora.data.images.facts import content_digest
from sd_lora.data.sources.samples import Sample
from sd_lora.errors import RunError

VERSION = "1"
"""Version of the way from images to pixels: another one makes all kept entries unknown."""


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
    """An image as loaded for a batch.

    name: for messages. key: the address of its latent, None for a random crop. moments: its latent
    distribution where the disk has it. pixels: (3, H, W) in [-1, 1], with mask (1, h, w), where no
    cache has the latent, or where the pixels are needed, too.
    """

    name: str
    key: str | None = None
    moments: Moments | None = None
    pixels: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class PixelSettings:
    """From images to pixels: resizing filter, background of transparent images, whether opacity is
    a mask of the loss, and pixels a latent.
    """

    interpolation: str = "lanczos"
    background: tuple[int, int, int] = (255, 255, 255)
    alpha_mask: bool = False
    pixels_per_latent: int = 8

    def pixels(
        self, data: bytes, name: str, crop: Crop, flip: bool, mask_data: bytes | None = None
    ) -> LoadedImage:
        """The pixels of an image's crop, with its mask: that of its file, or its opacity, or the
        product of both.

        Raises:
            RunError: bytes of no image.
        """
        image, alpha = decode_with_mask(data, name, self.background)
        found = [alpha] if self.alpha_mask and alpha is not None else []
        if mask_data is not None:  # what is transparent in a mask is black
            drawn, _ = decode_with_mask(mask_data, f"the mask of {name}", (0, 0, 0))
            found.append(drawn.convert("L").resize(image.size, INTERPOLATIONS["box"]))
        mask = None
        if found:
            white = [pixels_of(crop.cut(m, "box").convert("RGB"), flip)[:1] for m in found]
            weights = torch.stack(white).div(2).add(0.5).prod(0)
            mask = F.avg_pool2d(weights, self.pixels_per_latent)
        return LoadedImage(
            name, None, None, pixels_of(crop.cut(image, self.interpolation), flip), mask
        )


def _named(crop: Crop) -> str:
    """A crop in the text of cache keys: as the class was called when the first entries were made,
    since another text would make every user's cached latents unknown."""
    return (
        f"Frame(original={crop.original!r}, resized={crop.resized!r}, corner={crop.corner!r}, "
        f"size={crop.size!r})"
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
        """The address of a crop's latent."""
        pixel_settings = self.pixel_settings
        # what an image without transparency is laid on, or its mask, is no part of it; but only
        # decoding tells, and entries that are computed twice do no harm
        return "latents/" + digest_of(
            VERSION, PIL.__version__, sample.digest, _named(crop), str(flip),
            pixel_settings.interpolation, repr(pixel_settings.background),
            str(pixel_settings.alpha_mask), self.identity,
            *([sample.mask.digest] if sample.mask else []),
        )  # fmt: skip

    def __contains__(self, key: str) -> bool:
        return key in self.memory or (self.store is not None and key in self.store)

    def get(self, key: str) -> Moments | None:
        """The moments of an address; None where they are not known, or no more."""
        if self.store is None:
            return self.memory.get(key)
        tensors = self.store.tensors(key)
        if tensors is None or not {"mean", "std"} <= tensors.keys():
            return None
        return Moments(tensors["mean"], tensors["std"], tensors.get("mask"))

    def put(self, key: str, moments: Moments) -> None:
        """Keep moments; raises RunError if the disk does not take them."""
        if self.store is None:
            self.memory[key] = moments
            return
        tensors = {"mean": moments.mean, "std": moments.std}
        if moments.mask is not None:
            tensors["mask"] = moments.mask
        self.store.put_tensors(key, tensors)

    def loaded(self, sample: Sample, crop: Crop, flip: bool, random: bool) -> LoadedImage:
        """Load an image: its latent distribution if it is known, else its pixels.

        Args:
            random: whether the crop is random, so that nothing can be known.

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
        """Pixels of an image, from the very bytes that were checked.

        read_bytes: reads the bytes of a stream's sample; the sample's own `read` when None.

        Raises:
            RunError: by name, an image that cannot be read, or has changed since the check.
        """
        data = _checked_bytes(read_bytes or sample.read, sample.name, sample.digest)
        mask_data = None
        if sample.mask:
            mask_data = _checked_bytes(sample.mask.read, sample.mask.name, sample.mask.digest)
        return self.pixel_settings.pixels(data, sample.name, crop, flip, mask_data)


def _checked_bytes(read: Callable[[], bytes], name: str, digest: str) -> bytes:
    """The bytes of a file, if they are those of the digest."""
    try:
        data = read()
    except OSError as error:
        raise RunError(f"{name} could not be read: {error.strerror or error}") from None
    if content_digest(data) != digest:
        raise RunError(f"{name} was changed after it was checked")
    return data
