"""A folder of bad and odd files, each of a kind found in real folders."""

import io
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, features

from tests.data.icc import CMYK_PROFILE, P3_PROFILE

try:
    import pillow_heif
except ImportError:
    pillow_heif = None

try:
    import pillow_jxl
except ImportError:
    pillow_jxl = None

SIZE = (96, 72)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A smooth image; two seeds give images that look different."""
    blots = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(blots).resize(size, Image.Resampling.BICUBIC)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], bits: int, colours: int, rows: bytes, extra: bytes = b"") -> bytes:
    """Returns a PNG of rows that each begin with their filter's byte.

    colours: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA. extra: chunks before the pixels.
    """
    head = struct.pack(">IIBBBBB", *size, bits, colours, 0, 0, 0)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def tiff(
    width: int, data: bytes, bits: int, colours: int = 1, channels: int = 1, kind: int = 1
) -> bytes:
    """Returns a TIFF of one row.

    colours: 0 grey where 0 is white, 1 where it is black, 2 RGB. kind: 1 whole numbers, 2 signed
    ones.
    """
    end = 8 + 2 + 12 * 10 + 4  # of the tags; then the channels' bits, then the pixels
    tags = [(256, 1, width), (257, 1, 1), (258, channels, bits), (259, 1, 1), (262, 1, colours)]
    tags += [(273, 1, end + 8), (277, 1, channels), (278, 1, 1), (279, 1, len(data))]
    tags += [(338, 1, 2)] if channels == 4 else [(339, 1, kind)]
    entries = struct.pack("<H", len(tags))
    for tag, count, value in tags:
        width_of_value = 3 if tag == 258 else 4  # 2 bytes, or 4
        entries += struct.pack("<HHII", tag, width_of_value, count, value if count == 1 else end)
    entries += bytes(4)  # no further page
    return b"II*\0" + struct.pack("<I", 8) + entries + struct.pack("<4H", *[bits] * 4) + data


def bomb(side: int = 20_000) -> bytes:
    """50 kB of PNG that would take 400 MB when decoded."""
    return png((side, side), 1, 0, bytes((side + 7) // 8 + 1) * side)


class Maker:
    """Write images with captions, and keep the findings expected of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seed, self.expected = folder, 0, dict[str, str]()

    def photo(self) -> Image.Image:
        """An image unlike all before."""
        self.seed += 1
        return photo(self.seed)

    def put(
        self, name: str, data: bytes, code: str = "", caption: bytes | None = b"a photo of sks"
    ) -> None:
        """Write an image and, unless None, a caption; code: the expected problem."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption)
        self.expected[name] = code


def make_torture(folder: Path) -> dict[str, str]:
    """Fills a folder and returns relative path → the code of its problem, "" for good images.

    Every file that `is_image` takes for one is in it; a file without read permission is
    "unreadable", unless it can be read all the same, as by root. Takes half a second. No two
    images look alike but the three twins and a link; no two share a stem but captions/clash.*.
    """
    make = Maker(folder)
    for room in (_broken, _several, _shapes, _modes, _names, _captions, _places):
        room(make)
    return make.expected


def _broken(make: Maker) -> None:
    jpeg, whole = encoded(make.photo(), "JPEG"), encoded(make.photo())
    make.put("zero bytes.jpg", b"", "empty")
    make.put("only zeros.jpg", bytes(5000), "not-an-image")
    make.put("text.png", b"hello, I am text\n", "not-an-image")
    make.put("page.jpg", b"<!DOCTYPE html><html><title>404</title></html>", "not-an-image")
    make.put("document.png", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "not-an-image")
    make.put("archive.webp", b"PK\x03\x04" + bytes(40), "not-an-image")
    make.put("video.gif", b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + bytes(40), "not-an-image")
    make.put("noise.bmp", bytes(range(255, 100, -1)) * 9, "not-an-image")
    make.put("pointer.png", b"version https://git-lfs.github.com/spec/v1\n", "not-an-image")
    make.put("postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n", "not-an-image")
    make.put("half a jpeg.jpg", jpeg[: len(jpeg) // 2], "truncated")
    make.put("half then zeros.jpg", jpeg[:-600] + bytes(600), "truncated")
    make.put("half a png.png", whole[: len(whole) // 2], "truncated")
    make.put("head.png", whole[:20], "truncated")
    webp = encoded(make.photo(), "WEBP")
    make.put("half a webp.webp", webp[: len(webp) // 2], "truncated")
    gif = encoded(make.photo(), "GIF")
    make.put("half a gif.gif", gif[: len(gif) // 2], "truncated")
    at = whole.index(b"IDAT")
    end = at + 4 + struct.unpack(">I", whole[at - 4 : at])[0]
    make.put("checksum.png", whole[:end] + bytes([whole[end] ^ 1]) + whole[end + 1 :], "broken")
    make.put("flipped bit.png", whole[:at] + b"IDAT\0" + whole[at + 5 :], "broken")
    make.put("garbage behind.jpg", encoded(make.photo(), "JPEG") + b"\xff\xdaGARBAGE" * 50)
    for format in ("JPEG", "PNG"):
        data = encoded(make.photo(), format, exif=b"Exif\0\0XX*\0nonsense")
        make.put(f"{format} with broken exif.{format.lower()}", data)
    make.put("bomb.png", bomb(), "bomb")
    make.put("float.tif", encoded(Image.new("F", SIZE, 0.5), "TIFF"), "float")
    make.put("integers.tif", encoded(Image.new("I", SIZE, 1_000_000), "TIFF"), "integers")


def _several(make: Maker) -> None:
    for name, format in (("moving.gif", "GIF"), ("animated.webp", "WEBP"), ("apng.png", "PNG")):
        later = [make.photo(), make.photo()]
        data = encoded(make.photo(), format, save_all=True, append_images=later, duration=100)
        make.put(name, data)
    data = encoded(make.photo(), "TIFF", save_all=True, append_images=[make.photo()])
    make.put("pages.tiff", data)
    data = encoded(make.photo(), "MPO", save_all=True, append_images=[make.photo()])
    make.put("phone.jpg", data)


def _shapes(make: Maker) -> None:
    for side in (1, 8):
        make.put(f"tiny {side}.png", encoded(make.photo().resize((side, side))))
    make.put("wide.png", encoded(make.photo().resize((2000, 20))))
    make.put("tall.jpg", encoded(make.photo().resize((20, 2000)), "JPEG"))
    make.put("flat.png", encoded(Image.new("RGB", SIZE, (120, 130, 140))))
    exif = Image.Exif()
    for turn in range(2, 9):
        exif[0x0112] = turn
        make.put(f"turned/exif {turn}.jpg", encoded(make.photo(), "JPEG", exif=exif))
    for format in ("PNG", "TIFF", "WEBP"):
        make.put(f"turned/{format} 8.{format.lower()}", encoded(make.photo(), format, exif=exif))


def _modes(make: Maker) -> None:
    def put(name: str, image: Image.Image, format: str, **options: object) -> None:
        make.put(f"modes/{name}", encoded(image, format, **options))

    put("cmyk.jpg", make.photo().convert("CMYK"), "JPEG")
    put("cmyk profile.tif", make.photo().convert("CMYK"), "TIFF", icc_profile=CMYK_PROFILE)
    put("p3.jpg", make.photo(), "JPEG", icc_profile=P3_PROFILE)
    put("broken profile.jpg", make.photo(), "JPEG", icc_profile=b"nonsense")
    put("palette.png", make.photo().quantize(64), "PNG")
    put("palette hole.png", make.photo().quantize(64), "PNG", transparency=3)
    put("grey.png", make.photo().convert("L"), "PNG")
    put("grey jpeg.jpg", make.photo().convert("L"), "JPEG")
    put("grey alpha.png", make.photo().convert("LA"), "PNG")
    put("bilevel.png", make.photo().convert("1"), "PNG")
    put("lab.tif", make.photo().convert("LAB"), "TIFF")
    for suffix, format in (("bmp", "BMP"), ("jp2", "JPEG2000"), ("tga", "TGA"), ("ppm", "PPM")):
        put(f"plain {format}.{suffix}", make.photo(), format)
    put("16 grey.png", Image.fromarray(np.asarray(make.photo())[..., 0] * np.uint16(257)), "PNG")
    deep = np.asarray(make.photo()).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in deep.astype(">u2"))
    make.put("modes/16 rgb.png", png(SIZE, 16, 2, rows))

    hidden, alpha = make.photo(), Image.new("L", SIZE, 255)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    hidden.paste(Image.fromarray(noise), (20, 20))
    alpha.paste(0, (20, 20, 60, 60))
    hidden.putalpha(alpha)
    put("noise under alpha.png", hidden, "PNG")
    nothing = make.photo()
    nothing.putalpha(0)
    put("transparent.png", nothing, "PNG")

    if features.check("avif"):
        put("plain.avif", make.photo(), "AVIF")
        data = encoded(make.photo(), "AVIF")
        make.put("half an avif.avif", data[: len(data) * 2 // 3], "truncated")
    make.put(
        "modes/new.jxl", b"\xff\x0a" + bytes(40), "no-plugin" if pillow_jxl is None else "broken"
    )
    if pillow_heif is None:
        make.put("modes/phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "no-plugin")
    else:
        pillow_heif.register_heif_opener()
        put("phone.HEIC", make.photo(), "HEIF")


def _names(make: Maker) -> None:
    names = (
        *("UPPER.JPG", "Mixed.PnG", "with spaces.jpeg", 'it\'s "quoted".png', "100%.png", "#1.jpg"),
        *("a&b<c>.png", "back\\slash.png", "猫の写真.jpg", "🐈.png", "-rf.png", "x" * 220 + ".png"),
        *("two.dots.png", "deep/er/and/deeper/still.jpg", "$HOME.jpg", "[a-z]*?.png"),
        *(unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD")),
    )
    for name in names:
        format = "JPEG" if name.lower().endswith(("jpg", "jpeg")) else "PNG"
        make.put(name, encoded(make.photo(), format))
    for name in (".hidden.png", "._resource.jpg", ".DS_Store", "Thumbs.db", "notes.md"):
        (make.folder / name).write_bytes(b"\0\x05\x16\x07not an image")


def _captions(make: Maker) -> None:
    twin = make.photo().resize((192, 144))
    data = encoded(twin, "JPEG", quality=95)
    for name in ("twin.jpg", "exact twin.jpg"):
        make.put(name, data)
    make.put("near twin.jpg", encoded(twin, "JPEG", quality=60))

    def put(name: str, caption: bytes | None) -> None:
        make.put(f"captions/{name}", encoded(make.photo()), caption=caption)

    put("clash.png", b"one caption for two images")
    make.put("captions/clash.jpg", encoded(make.photo(), "JPEG"), caption=None)
    put("missing.png", None)
    put("empty.png", b"")
    put("latin-1.png", "un café".encode("latin-1"))
    put("long.png", b"word " * 200)
    put("bom.png", "\ufeffa photo of sks".encode())
    put("crlf.png", b"a photo of sks\r\nanother line\r\n")
    (make.folder / "captions/orphan.txt").write_text("a caption without an image")


def _places(make: Maker) -> None:
    folder = make.folder
    (folder / "folder.png").mkdir()
    make.put("pointed at/image.png", encoded(make.photo()))
    make.expected["link.png"] = ""
    (folder / "link.png").symlink_to(folder / "pointed at/image.png")
    (folder / "broken link.png").symlink_to(folder / "nowhere.png")
    (folder / "own tail.png").symlink_to(folder / "own tail.png")
    (folder / "loop").mkdir()
    (folder / "loop/again").symlink_to("..")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
    make.put("locked.png", encoded(make.photo()))
    (folder / "locked.png").chmod(0)
    if not os.access(folder / "locked.png", os.R_OK):
        make.expected["locked.png"] = "unreadable"
