"""The kind of a file by its bytes, before any decoder, and whether the file is complete."""

import zlib

BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis"), "HEIF"),
    **dict.fromkeys((b"hevc", b"hevx", b"hevm", b"hevs"), "HEIF"),
    **dict.fromkeys((b"mif1", b"mif2", b"msf1"), "HEIF"),
}
"""ISO media files with images: AVIF (AV1 inside), HEIF (HEVC inside, iPhones' format)."""

SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\xff\x0a", "JXL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
)

OTHERS = (
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x1aE\xdf\xa3", "a video"),  # Matroska, WebM
    (b"OggS", "a video"),
    (b"FLV\x01", "a video"),
    (b"\0\0\x01\xba", "a video"),  # MPEG
    (b"\0\0\x01\xb3", "a video"),
    (b"8BPS", "a Photoshop document"),
    (b"%!PS", "a PostScript document"),
    (b"\0\x05\x16\x07", "what macOS keeps beside a file, not the file"),  # AppleDouble
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with: git lfs pull"),
)

HEAD = 1024
"""Bytes that are looked at to tell text from other things."""

PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
MAX_CHUNK = 1 << 20
"""Pillow's bound for an inflated text or profile of a PNG, beyond which it refuses the image."""

MAX_PROFILE = 16 << 20
"""Bytes of the largest colour profile that is used; those of printers have 1 to 3 MB."""


def image_format(data: bytes) -> str | None:
    """Pillow's name of the format that the first bytes announce, for example "JPEG"."""
    if data[4:8] == b"ftyp":
        compatible = [data[i : i + 4] for i in range(16, min(_box(data, 0)[1], 128), 4)]
        found = [BRANDS[b] for b in (data[8:12], *compatible) if b in BRANDS]
        # mif1 is the container's own brand: an AVIF may lead with it and name itself later
        return ("AVIF" if "AVIF" in found else found[0]) if found else None
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in SIGNATURES if data.startswith(magic)), None)


def looks_like(data: bytes) -> str:
    """The kind of a file that is not an image; empty if unknown."""
    for magic, name in OTHERS:
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp" or (data[:4] == b"RIFF" and data[8:12] == b"AVI "):
        return "a video"
    if not data.strip(b"\0"):
        return "zero bytes alone, as a crash or a broken copy leaves them"
    try:
        text = data[:HEAD].decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        if error.start < min(len(data), HEAD) - 3:  # else a character that the cut went through
            return ""
        text = data[: error.start].decode("utf-8-sig").strip()
    if not all(c.isprintable() or c.isspace() for c in text):
        return ""
    start = text[:256].lower()
    if "<svg" in start:
        return "an SVG drawing; save it as a PNG"
    if start.startswith(("<!doctype html", "<html", "<head")):
        return "an HTML page"
    begin = " ".join(text[:40].split())
    return f"text, which begins with “{begin}”"


def is_cut_short(data: bytes) -> bool:
    """Whether the end of an image is missing, by the length in its format.

    JPEG: no end marker after the start of its pixels; pillow accepts a file whose second half is
    zeros, the result of a broken copy. WebP, AVIF and HEIF: a length beyond the file, for which
    pillow's error is misleading. For the others pillow itself reports truncation.
    """
    kind = image_format(data)
    if kind == "JPEG":
        return data.find(b"\xff\xd9", _jpeg_scan(data)) < 0
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if kind in ("AVIF", "HEIF"):
        at = 0
        while at + 8 <= len(data):
            start, at = at, _box(data, at)[1]
            if at <= start:
                return False  # not a length: broken, not cut
        return at > len(data)
    return False


def _box(data: bytes, at: int) -> tuple[bytes, int]:
    """(type, end) of the ISO media box that starts at a byte."""
    size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
    if size == 1:  # a 64-bit length follows
        size = int.from_bytes(data[at + 8 : at + 16], "big")
    return kind, at + size if size else len(data)  # 0: to the end of the file


def _jpeg_scan(data: bytes) -> int:
    """The start of a JPEG's pixels: after the segments, one of which holds a thumbnail."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xFF:  # fill bytes
            at += 1
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def light_png(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG without chunks that are too large for pillow, and its profile if it is one of them.

    Programs write whole node graphs as text into their images, which nobody reads here: after 1 MiB
    in all, text is left out. So is a profile of more than that; None for one beyond `MAX_PROFILE`,
    and for one that pillow reads by itself.
    """
    kept, start, at, text, profile = list[bytes](), 0, 8, 0, None
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        heavy = False
        if kind in PNG_TEXT:
            text += len(_inflated(kind, data[at + 8 : end - 4], MAX_CHUNK + 1))
            heavy = text > MAX_CHUNK
        elif kind == b"iCCP":
            found = _inflated(kind, data[at + 8 : end - 4], MAX_PROFILE + 1)
            heavy = len(found) > MAX_CHUNK
            profile = found if heavy and len(found) <= MAX_PROFILE else None
        if heavy:
            kept.append(data[start:at])
            start = end
        at = end
    return (b"".join([*kept, data[start:]]) if kept else data), profile


def _inflated(kind: bytes, chunk: bytes, most: int) -> bytes:
    """The text or profile in a PNG's chunk, at most so many bytes; nothing of a broken one."""
    body = chunk.partition(b"\0")[2]  # after the keyword
    if kind == b"iTXt":
        compressed, body = body[:1] == b"\1", body[2:].partition(b"\0")[2].partition(b"\0")[2]
    else:
        compressed, body = kind != b"tEXt", body[kind != b"tEXt" :]
    try:
        return zlib.decompressobj().decompress(body, most) if compressed else body
    except zlib.error:
        return b""


JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
"""Width to height, where a JPEG XL image's header says no width (ISO/IEC 18181-1, SizeHeader)."""


def jxl_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in the header of a JPEG XL image, as stored; None if it has none.

    Its decoder decodes all pixels before it tells their number.
    """
    start = 0
    while data[:2] != b"\xff\x0a" and start + 8 < len(data):  # boxes around the image
        kind, end = _box(data, start)
        if kind in (b"jxlc", b"jxlp"):
            data = data[start + 8 + 4 * (kind == b"jxlp") :]  # the number of a part
            break
        if end <= start:
            return None
        start = end
    if data[:2] != b"\xff\x0a" or len(data) < 16:
        return None
    bits = int.from_bytes(data[2:16], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (1 + take(5)) if small else 1 + take((9, 13, 18, 30)[take(2)])

    height, ratio = side(), take(3)
    if not ratio:
        return side(), height
    wide, high = JXL_RATIOS[ratio - 1]
    return height * wide // high, height
