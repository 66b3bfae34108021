"""Images → pixels: decode, upright, 8-bit sRGB over a background; files are only read."""

import importlib
import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageColor

from sd_lora.data.images.file_types import (
    image_format,
    is_cut_short,
    jxl_size,
    light_png,
    looks_like,
)
from sd_lora.errors import RunError, UsageError, install_line

EXTENSIONS = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .heic .heics .heif .heifs .hif .jfif .jp2 .jpe .jpeg .jpg "
    ".jxl .mpo .pbm .pgm .png .pnm .ppm .qoi .tga .tif .tiff .webp".split()
)

FORMATS = (
    *("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "DIB", "TIFF", "MPO", "JPEG2000"),
    *("JXL", "PPM", "QOI", "TGA"),
)
"""Formats that pillow may take a file for. It knows more; for PostScript it starts Ghostscript, and
a foreign data set must not be able to ask for this."""

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}

Colour = tuple[int, int, int]

BACKGROUND: Colour = (255, 255, 255)
"""Colour under transparent pixels, white: their own hidden colour is often garbage."""

MAX_PIXELS = 178_956_970
"""Pillow's own bound for decompression bombs: half a GiB of RGB. Checked here as well, since other
libraries switch pillow's check off."""

BOMB = (
    f"it claims more than {MAX_PIXELS / 1e6:.0f} million pixels, which is taken for a "
    "decompression bomb; if it is none, scale it down"
)
TRUNCATED = "the file is truncated: its end is missing"

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → transposition to upright."""

SRGB = ImageCms.createProfile("sRGB")
CLOSE = 2
"""Levels of 255. A profile that moves no colour by more is sRGB itself: makers write its curve as
tables or formulas with different rounding, and these images keep their pixels bit for bit."""

# pillow warns of large images, odd metadata and the like, in every worker again; what matters of
# it is a finding of the check. A filter for good, as warnings.catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Undecodable(ValueError):
    """Bytes that do not become an image: `code`, a word for scripts, and why, for people."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def is_image(path: Path) -> bool:
    """Whether a path is a file with an image's extension, not hidden; no folder, no pipe."""
    return (
        path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and os.path.isfile(path)
    )


def read_file(path: Path) -> bytes:
    """The bytes of a regular file, without waiting for another process to send some.

    Raises:
        OSError: a file that cannot be read; a folder, pipe, socket or device.
    """

    def at_once(name: str, flags: int) -> int:  # else opening a pipe waits for its writer
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is not a regular file")
        return file.read()


def colour(text: str) -> Colour:
    """(r, g, b) of a CSS colour: white, grey, #rrggbb, rgb(0, 128, 0).

    Raises:
        UsageError: an unknown colour, or a partly transparent one.
    """
    with suppress(ValueError):
        found = ImageColor.getrgb(text)
        if len(found) == 3:
            return found
    raise UsageError(
        f"{text!r} is not the colour of a background: give one like white, grey or #80ff00"
    )


def _formats() -> list[str]:
    """The `FORMATS` that this pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


PLUGINS = {"HEIF": ("pillow_heif", "heif"), "JXL": ("pillow_jxl", "jxl")}
"""Format → the package that makes pillow read it, and the extra that installs the package. HEIF:
iPhones' format. JXL: JPEG XL."""


@cache
def _has_plugin(kind: str) -> bool:
    """Make pillow read a format of `PLUGINS`, if its package is installed."""
    try:
        plugin = importlib.import_module(PLUGINS[kind][0])
    except ImportError:
        return False
    if kind == "HEIF":  # the other registers itself
        plugin.register_heif_opener()
    return True


@contextmanager
def reasons(data: bytes) -> Iterator[None]:
    """Turns whatever pillow and its plugins raise over an image's bytes into Undecodable."""
    try:
        yield
    except Undecodable:
        raise
    except Exception as error:  # plugins raise what their parsing stumbles over: KeyError, …
        raise _undecodable(data, error) from None


def _undecodable(data: bytes, error: Exception) -> Undecodable:
    """Why an image does not decode, from pillow's error and the bytes themselves."""
    if isinstance(error, Image.DecompressionBombError):
        return Undecodable("bomb", BOMB)
    if isinstance(error, Image.UnidentifiedImageError):
        promised = image_format(data)
        if promised is None:
            kind = looks_like(data)
            return Undecodable("not-an-image", "it is not an image" + (kind and f" but {kind}"))
        reason = f"it begins as a {promised} and goes on as nonsense"
    elif image_format(data) == "JXL":  # its decoder says how to build a decoder that says more
        reason = "its pixels cannot be decoded"
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    if is_cut_short(data) or "truncated" in reason.lower():
        return Undecodable("truncated", TRUNCATED)
    return Undecodable("broken", f"it is broken: {reason}")


def open_header(data: bytes) -> Image.Image:
    """Open an image without decoding it: its format, mode, size and metadata are known.

    Raises:
        Undecodable: empty, not-an-image, no-plugin, bomb, truncated, broken.
    """
    if not data:
        raise Undecodable("empty", "the file is empty")
    kind, profile = image_format(data), None
    if kind in PLUGINS and not _has_plugin(kind):
        extra = PLUGINS[kind][1]
        raise Undecodable(
            "no-plugin", f"{kind} needs a plugin: {install_line(extra)}, or save it as PNG"
        )
    if kind == "JXL" and math.prod(jxl_size(data) or (0,)) > MAX_PIXELS:
        raise Undecodable("bomb", BOMB)
    if kind == "PNG":
        data, profile = light_png(data)
    if kind and kind not in _formats():
        raise Undecodable(
            "no-plugin", f"this pillow does not read {kind}: try a newer one, or save it as PNG"
        )
    with reasons(data):
        image = Image.open(io.BytesIO(data), formats=_formats())
    if image.width * image.height > MAX_PIXELS:
        raise Undecodable("bomb", BOMB)
    if profile:
        image.info["icc_profile"] = profile
    return image


def load(data: bytes) -> Image.Image:
    """Decode an image's bytes fully, the first frame of several, to pillow's own mode.

    Raises:
        Undecodable: the errors of `open_header`; here missing or broken pixels show.
    """
    image = open_header(data)
    with reasons(data):
        image.load()
        if image.format == "PNG":
            # load() skips the checksums
            Image.open(io.BytesIO(light_png(data)[0]), formats=["PNG"]).verify()
            key = image.info.get("transparency")
            if isinstance(key, tuple) and data[24] == 16:  # bits; pillow keeps the key's low bytes
                image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.format in ("JPEG", "MPO") and is_cut_short(data):
        raise Undecodable("truncated", TRUNCATED)
    if image.mode == "F":
        raise Undecodable(
            "float", "32-bit float pixels have no known range; save it with 8 or 16 bits"
        )
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where metadata are missing or broken.

    For a loaded image: a PNG may have it after its pixels.
    """
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # libjxl turns it, whatever its EXIF says; not a JPEG that was packed without loss
    try:
        found = image.getexif().get(0x0112)
    except Exception:  # broken metadata harm no pixel
        return 1
    return found if found in TURNS else 1


def colours_of(mode: str) -> str:
    """The 8-bit mode of a mode's colours without their alpha: "L", "CMYK" or "RGB"."""
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        return "L"
    return "CMYK" if mode == "CMYK" else "RGB"


@lru_cache(maxsize=64)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of a mode's pixels (RGB, L or CMYK) through an embedded profile to sRGB.

    None where the pixels stay unchanged: the profile is sRGB, is broken, or is for another mode.
    Colorimetric with black-point compensation, as Photoshop converts: black stays black.
    """
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            SRGB,
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == "CMYK":
            return transform
        levels = np.arange(0, 256, 17, dtype=np.uint8)  # 16 of each channel: every hue
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)
        colours = Image.fromarray(cube) if mode == "RGB" else Image.linear_gradient("L")
        moved = np.asarray(transform.apply(colours)).astype(int)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return transform if np.abs(moved - np.asarray(colours.convert("RGB"))).max() > CLOSE else None


def _grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey as 8-bit grey, and alpha if one value of it means transparent.

    Pillow's own conversion would clip: 255 and everything above it white.

    Raises:
        Undecodable: integers beyond 16 bits, whose white is unknown.
    """
    values = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    white = 4095 if tags.get(258) == (12,) else 65535  # bits of a sample
    if values.min() < 0 or values.max() > white:
        raise Undecodable(
            "integers", "32-bit or signed integers have no known range; save it with 8 or 16 bits"
        )
    key, alpha = image.info.get("transparency"), None
    if isinstance(key, int):
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    if tags.get(262) == 0:  # 0 is white; pillow inverts up to 8 bits only
        values = white - values
    return Image.fromarray((values * 255 / white).round().astype(np.uint8)), alpha


def split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A loaded image as (8-bit sRGB, "L" alpha or None), both upright.

    The colours under the alpha stay as stored, and may be garbage. Pillow cuts 16-bit colour to its
    high bytes, at most one level darker than rounded.

    Raises:
        Undecodable: integers beyond 16 bits.
    """
    turn, profile, alpha = TURNS.get(orientation(image)), image.info.get("icc_profile"), None
    colours = colours_of(image.mode)
    if image.mode.startswith("I"):
        image, alpha = _grey(image)
    elif image.has_transparency_data:
        image = image.convert(colours + "A")
        alpha = image.getchannel("A")
    image = image.convert(colours)
    transform = to_srgb(profile, colours) if profile else None
    image = transform.apply(image) if transform else image.convert("RGB")
    if turn is not None:
        image, alpha = image.transpose(turn), alpha and alpha.transpose(turn)
    return image, alpha


def lay(image: Image.Image, alpha: Image.Image | None, background: Colour) -> Image.Image:
    """An RGB image over a colour; exactly the colour where alpha is 0."""
    if alpha is None:
        return image
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=alpha)
    return canvas


def decode_with_mask(
    data: bytes, name: str, background: Colour = BACKGROUND
) -> tuple[Image.Image, Image.Image | None]:
    """Decode an image's bytes to (upright 8-bit sRGB over the background, its alpha or None).

    The alpha is an "L" image of the same size: 255 is opaque; None where the file has none.

    Raises:
        RunError: a file that is empty, truncated, not an image, or too large, by name.
    """
    try:
        with reasons(data):
            image, alpha = split(load(data))
    except Undecodable as error:
        raise RunError(f"{name} could not be decoded: {error}") from None
    return lay(image, alpha, background), alpha
