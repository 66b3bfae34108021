"""The kind of a file by its bytes, before any decoder, and whether the file is complete."""

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
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
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
