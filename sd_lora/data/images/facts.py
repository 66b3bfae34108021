"""Facts about a decoded image; a function of its bytes alone."""

import dataclasses
import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass

import imagehash
import PIL
from PIL import Image, ImageStat

from sd_lora.data.images.decode import (
    BACKGROUND,
    Undecodable,
    colours_of,
    lay,
    load,
    open_header,
    orientation,
    reasons,
    split,
    to_srgb,
)

VERSION = f"2, pillow {PIL.__version__}"
"""Version of the facts: another pillow may fail to read an image, or read it otherwise."""

THUMBNAIL = 256
"""The longest side of a thumbnail, in pixels."""

FLAT = 3.0
"""Standard deviation of grey in a thumbnail, in levels of 255; below it there is no hash.
Re-encoded as a JPEG of quality 30 to 95, images of 4 levels keep all but 4 of the 64 bits, images
of 2 lose up to 8; noise of 8 levels over one colour comes to 1.4, and its bits are chance."""

OPAQUE = 128
"""Alpha from which on a pixel is more image than background."""

ODDITIES = (
    *("animated", "pages", "exif-rotated", "alpha", "transparent", "16-bit", "cmyk", "palette"),
    *("grey", "profile"),
)
"""Codes of `Facts.oddities`: findings on images that can be decoded."""


def content_digest(data: bytes) -> str:
    """The name of a file's bytes everywhere: blake2b, 16 bytes, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about an image.

    digest: of its bytes. size: upright (width, height), (0, 0) if undecodable. format, mode:
    pillow's names, before any conversion; empty if unknown. phash: 64 bits, shared but for a few by
    images that look alike; None if undecodable, or too flat for a meaningful hash. oddities: codes
    of `ODDITIES`. problem: (code, text), the reason if undecodable.
    """

    digest: str
    size: tuple[int, int] = (0, 0)
    format: str = ""
    mode: str = ""
    phash: int | None = None
    oddities: tuple[str, ...] = ()
    problem: tuple[str, str] | None = None

    def to_json(self) -> bytes:
        fields = dataclasses.asdict(self)
        return json.dumps({"version": VERSION, **fields}, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Facts | None":
        """The facts of `to_json`; None for garbage, or of another version.

        None also for an image that lacked a plugin, which may have been installed since.
        """
        try:
            fields = json.loads(data)
            if fields.pop("version") != VERSION:
                return None
            width, height = fields.pop("size")
            problem = fields.pop("problem")
            facts = cls(
                size=(width, height),
                oddities=tuple(fields.pop("oddities")),
                problem=problem and (problem[0], problem[1]),
                **fields,
            )
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
        return None if facts.problem and facts.problem[0] == "no-plugin" else facts


def examine(data: bytes) -> tuple[Facts, Image.Image | None]:
    """Decode an image fully; returns its facts and a thumbnail.

    The thumbnail is upright RGB over white, its longest side at most 256 pixels; None for an
    undecodable image, whose problem is among the facts and raises nothing.
    """
    facts = Facts(content_digest(data))
    try:
        header = open_header(data)
        facts = dataclasses.replace(facts, format=header.format or "", mode=header.mode)
        with reasons(data):
            return _seen(data, header, facts)
    except Undecodable as error:
        return dataclasses.replace(facts, problem=(error.code, str(error))), None


def _seen(data: bytes, header: Image.Image, facts: Facts) -> tuple[Facts, Image.Image]:
    odd = _oddities(data, header)
    image = load(data)
    turn = orientation(image)
    size = image.size if turn < 5 else image.size[::-1]
    if turn > 1:
        odd.add("exif-rotated")
    if image.mode in ("RGB", "L", "CMYK") and not image.has_transparency_data:
        _shrink(image)  # these can be mixed as they are, and turning and profiles cost less so
    rgb, alpha = split(image)
    if alpha is not None:
        lowest, highest = ImageStat.Stat(alpha).extrema[0]
        if lowest < 255:
            odd.add("alpha")
        if highest < OPAQUE:
            odd.add("transparent")
    thumbnail = lay(rgb, alpha, BACKGROUND)
    _shrink(thumbnail)
    known = tuple(code for code in ODDITIES if code in odd)
    return dataclasses.replace(facts, size=size, phash=_phash(thumbnail), oddities=known), thumbnail


def _oddities(data: bytes, header: Image.Image) -> set[str]:
    """Oddities shown by the header alone."""
    odd, mode, colours = set(), header.mode, colours_of(header.mode)
    if colours != "RGB":
        odd.add("cmyk" if colours == "CMYK" else "grey")
    if mode in ("P", "PA"):
        odd.add("palette")
    bits = max(getattr(header, "tag_v2", {}).get(258, (8,)))  # of a TIFF
    if mode.startswith("I") or bits > 8 or (header.format == "PNG" and data[24] > 8):
        odd.add("16-bit")
    profile = header.info.get("icc_profile")
    if profile and to_srgb(profile, colours):
        odd.add("profile")
    if header.format == "TIFF" and orientation(header) > 1:  # pillow turns it in loading
        odd.add("exif-rotated")
    with suppress(Exception):  # of later frames, which nobody trains; a phone's MPO has a depth map
        if getattr(header, "is_animated", False) and header.format != "MPO":
            odd.add("pages" if header.format in ("TIFF", "HEIF") else "animated")
    return odd


def _shrink(image: Image.Image) -> None:
    """Shrink an image in place to a thumbnail; a third of the time of Lanczos on the whole."""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _phash(thumbnail: Image.Image) -> int | None:
    grey = thumbnail.convert("L")
    if ImageStat.Stat(grey).stddev[0] < FLAT:
        return None
    return int(str(imagehash.phash(grey)), 16)
