"""Decoding of every odd mode, and framing against torchvision's documented arithmetic."""

import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from sd_lora.data.images import decode as images
from sd_lora.data.images.decode import colour, decode_with_mask, is_image, read_file
from sd_lora.data.images.file_types import JXL_RATIOS, jxl_size, light_png
from sd_lora.errors import RunError, UsageError
from tests.data import icc
from tests.data.check.torture import bomb, chunk, encoded, photo, png, tiff

JPEG, PNG, WEBP = (encoded(photo(1), format) for format in ("JPEG", "PNG", "WEBP"))


def gradient(width: int = 8, height: int = 6) -> Image.Image:
    values = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return Image.fromarray(values.astype(np.uint8))


def row_of(data: bytes) -> list[int]:
    """Returns the first channel of the first row of a decoded image."""
    return np.asarray(decode_with_mask(data, "x")[0])[0, :, 0].tolist()


def test_plain_rgb_is_untouched() -> None:
    """An ordinary PNG decodes to its own pixels, also where a profile says that it is sRGB."""
    made_by_pillow = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (None, icc.SRGB_PROFILE, made_by_pillow):
        assert np.array_equal(
            decode_with_mask(encoded(gradient(), icc_profile=profile), "x")[0], gradient()
        )
    grey = gradient().convert("L")
    data = encoded(grey, icc_profile=icc.grey_profile(icc.srgb_to_linear))
    assert np.array_equal(decode_with_mask(data, "x")[0], grey.convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "CMYK", "LAB"])
def test_colour_modes_become_rgb(mode: str) -> None:
    """Grey, palette, bilevel, YCbCr, Lab and CMYK decode to pillow's own RGB conversion."""
    image = gradient().convert(mode)
    data = encoded(image, "TIFF")
    assert np.array_equal(decode_with_mask(data, "x")[0], image.convert("RGB"))


def test_transparency_is_laid_on_white() -> None:
    """Garbage under transparent pixels is not trained: white is; half opacity mixes."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    assert [decode_with_mask(encoded(image), "x")[0].getpixel((i, 0)) for i in (0, 1)] == [
        (255, 255, 255),
        (127, 127, 127),
    ]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([255, 0, 0])
    assert decode_with_mask(encoded(palette, transparency=0), "x")[0].getpixel((0, 0)) == (
        255,
        255,
        255,
    )
    grey = Image.new("LA", (1, 1), (0, 0))
    assert decode_with_mask(encoded(grey), "x")[0].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 128, 200)])
def test_alpha_mixes_with_the_background(background: tuple[int, int, int]) -> None:
    """Each of the 65,536 pairs of colour and alpha is α·c + (1 - α)·background, rounded."""
    alpha, value = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    image = np.stack([value, value, value, alpha], -1).astype(np.uint8)
    got = np.asarray(decode_with_mask(encoded(Image.fromarray(image)), "x", background)[0]).astype(
        float
    )
    want = (alpha * value)[..., None] + (255 - alpha)[..., None] * np.array(background)
    assert np.abs(got - want / 255).max() <= 0.5


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_a_mask(mode: str) -> None:
    """The alpha comes back as it was stored, upright and as large as its image."""
    alpha = gradient(12, 6).getchannel("G")
    stored = gradient(12, 6).convert(mode)
    stored.putalpha(alpha)
    exif = Image.Exif()
    exif[0x0112] = 6
    image, mask = decode_with_mask(encoded(stored, exif=exif), "x")
    assert mask is not None
    assert image.size == mask.size == (6, 12)
    assert mask.mode == "L"
    assert np.array_equal(mask, alpha.transpose(Image.Transpose.ROTATE_270))
    assert decode_with_mask(encoded(gradient()), "x")[1] is None


def test_a_colour_may_mean_transparent() -> None:
    """A PNG's transparent colour, in 8 and 16 bits, grey, RGB and palette, is masked, no other."""

    def mask_of(data: bytes) -> list[int]:
        mask = decode_with_mask(data, "x")[1]
        assert mask is not None
        return np.asarray(mask)[0].tolist()

    def grey_png(bits: int, colours: int, values: list[int], key: int) -> bytes:
        kind, channels = {8: ">u1", 16: ">u2"}[bits], 3 if colours == 2 else 1
        row = np.repeat(np.array(values, dtype=kind), channels).tobytes()
        transparent = chunk(b"tRNS", np.full(channels, key, ">u2").tobytes())
        return png((len(values), 1), bits, colours, b"\0" + row, transparent)

    for colours in (0, 2):
        assert mask_of(grey_png(8, colours, [7, 8, 200], 8)) == [255, 0, 255]
        assert mask_of(grey_png(16, colours, [0x0123, 0x8007, 0xFFFF], 0x8007)) == [255, 0, 255]
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    assert mask_of(encoded(palette, transparency=1)) == [255, 0, 255]
    assert mask_of(encoded(palette, transparency=bytes([9, 0, 77]))) == [9, 0, 77]
    assert mask_of(encoded(palette, "GIF", transparency=2)) == [255, 255, 0]


def test_colours_are_read() -> None:
    """Names and hexadecimal colours are read; what is none, or not opaque, is a usage error."""
    assert colour("white") == images.BACKGROUND
    assert colour("grey") == colour("#808080") == (128, 128, 128)
    assert colour("#0af") == (0, 170, 255)
    for nonsense in ("", "whitish", "#12345", "128", "#ff000080", "rgba(0, 0, 0, 0)"):
        with pytest.raises(UsageError, match="is not the colour of a background"):
            colour(nonsense)


SIXTEEN = [0, 257, 32896, 65278, 65535]
EIGHT = [0, 1, 128, 254, 255]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    """16-bit 0, 32896, 65535 is 8-bit 0, 128, 255 in PNGs, TIFFs of both byte orders and PNMs.

    Pillow's own conversion of grey would clip it to white from 255 on.
    """
    grey = np.array([SIXTEEN], dtype=np.uint16)
    big_endian = Image.fromarray(grey.astype(">u2"))
    assert big_endian.mode == "I;16B"
    for data in (
        encoded(Image.fromarray(grey)),
        encoded(Image.fromarray(grey), "TIFF"),
        encoded(Image.fromarray(grey), "TIFF", compression="tiff_lzw"),
        encoded(big_endian, "TIFF"),
        b"P5 5 1 65535\n" + grey.astype(">u2").tobytes(),
    ):
        assert row_of(data) == EIGHT
    for colours, channels in ((2, 3), (4, 2), (6, 4)):
        row = np.repeat(np.array(SIXTEEN, dtype=">u2"), channels).reshape(-1, channels)
        if channels in (2, 4):
            row[:, -1] = 65535
        assert row_of(png((5, 1), 16, colours, b"\0" + row.tobytes())) == EIGHT
    for channels in (3, 4):
        row = np.repeat(np.array(SIXTEEN, dtype="<u2"), channels).reshape(-1, channels)
        row[:, 3:] = 65535
        assert row_of(tiff(5, row.tobytes(), 16, 2, channels=channels)) == EIGHT


def test_sixteen_bits_are_off_by_less_than_one_level() -> None:
    """Of all 16-bit values, grey is rounded to the nearest of 256 and colour cut to its high byte.

    So the step of 1/257 of a level leaves grey at most half, colour less than one level off.
    """
    values = np.arange(65536, dtype=">u2").reshape(256, 256)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    grey = np.asarray(decode_with_mask(png((256, 256), 16, 0, rows), "x")[0])[..., 0]
    assert np.abs(grey - values / 257).max() <= 0.5
    rows = b"".join(b"\0" + np.repeat(row, 3).tobytes() for row in values)
    rgb = np.asarray(decode_with_mask(png((256, 256), 16, 2, rows), "x")[0])[..., 1]
    assert np.abs(rgb - values / 257).max() < 1


def test_odd_depths_of_tiffs() -> None:
    """12 bits are scaled to their own white; where 0 is white, also of 16 bits, it is."""
    assert row_of(tiff(2, bytes([0xFF, 0xF8, 0x00]), 12)) == [255, 128]
    assert row_of(tiff(3, struct.pack("<3H", 0, 65535, 257), 16, 0)) == [255, 0, 254]
    assert row_of(tiff(2, bytes([0, 255]), 8, 0)) == [255, 0]


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(turn: int, format: str) -> None:
    """An image that is stored lying or mirrored in any of the eight ways is set upright."""
    upright = np.asarray(gradient(8, 6))
    # how EXIF says where the stored rows and columns begin, undone
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)
    assert np.array_equal(decode_with_mask(data, "x")[0], upright)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("exif", [b"Exif\0\0XX*\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"?"])
def test_broken_metadata_harm_no_pixel(exif: bytes) -> None:
    """An image with EXIF that cannot be read is taken as it lies."""
    for format in ("JPEG", "PNG", "WEBP"):
        plain, odd = encoded(gradient(), format), encoded(gradient(), format, exif=exif)
        assert np.array_equal(decode_with_mask(odd, "x")[0], decode_with_mask(plain, "x")[0])


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_images_the_first_is_taken(format: str) -> None:
    """An animation is its first frame, a multi-page TIFF its first page."""
    options = {"lossless": True} if format == "WEBP" else {}
    crops = [Image.new("RGB", (8, 8), name) for name in ("red", "blue", "lime")]
    data = encoded(crops[0], format, save_all=True, append_images=crops[1:], **options)
    got = decode_with_mask(data, "x")[0].getpixel((4, 4))
    assert np.abs(np.subtract(got, (255, 0, 0))).max() <= 2


def test_heif_is_read_with_its_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """iPhones' images decode where pillow-heif is installed; where it is not, it is named.

    Which way is up, HEIF says in its own way, which the plugin follows: EXIF is not asked again.
    """
    heif = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    images._has_plugin.cache_clear()
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(RunError, match='pip install "pillow-heif>='):
            decode_with_mask(heif, "x")
    images._has_plugin.cache_clear()
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({}, {"exif": exif}):
        got = np.asarray(
            decode_with_mask(encoded(photo(1), "HEIF", quality=95, chroma=444, **options), "x")[0]
        )
        assert np.abs(got.astype(int) - photo(1)).mean() < 4


def test_jpeg_xl_is_read_with_its_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """JPEG XL decodes to its own pixels where pillow-jxl-plugin is installed; where it is not, the
    extra is named. Its decoder turns images by itself, so EXIF is asked only of a JPEG in it. A
    damaged file is broken, and one that claims too many pixels is refused before it is decoded."""
    images._has_plugin.cache_clear()
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "pillow_jxl", None)
        with pytest.raises(RunError, match="JXL needs a plugin: pip install"):
            decode_with_mask(b"\xff\x0a" + bytes(20), "x")
    images._has_plugin.cache_clear()
    pytest.importorskip("pillow_jxl")
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({}, {"exif": exif.tobytes()}, {"use_container": True}):
        data = encoded(photo(1), "JXL", lossless=True, **options)
        assert np.array_equal(decode_with_mask(data, "x")[0], photo(1))
    clear = photo(1)
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    assert decode_with_mask(encoded(clear, "JXL", lossless=True), "x")[1] is not None
    jpeg = encoded(photo(1), "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(jpeg)
    packed = encoded(Image.open(tmp_path / "a.jpg"), "JXL", lossless_jpeg=True)
    assert np.array_equal(decode_with_mask(packed, "x")[0], decode_with_mask(jpeg, "x")[0])
    for broken in (data[: len(data) // 2], b"\xff\x0a" + bytes(400)):
        with pytest.raises(RunError, match="it is broken: its pixels cannot be decoded"):
            decode_with_mask(broken, "x")
    monkeypatch.setattr(images, "MAX_PIXELS", 96 * 72 - 1)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(RunError, match="decompression bomb"):
        decode_with_mask(data, "x")


def test_the_size_in_a_jpeg_xl_header() -> None:
    """Sides up to 256 in steps of 8, others up to 2¹³ and more, and all seven ratios, with and
    without boxes, are those that libjxl reads; nothing is read beyond a header's end."""
    pytest.importorskip("pillow_jxl")
    sizes = [(8, 8), (256, 8), (7, 300), (600, 500), (1, 9000), (9000, 1)]
    sizes += [(height * w // h, height) for w, h in JXL_RATIOS for height in (120, 360, 361)]
    for i, size in enumerate(sizes):
        data = encoded(Image.new("L", size), "JXL", effort=1, use_container=i % 2 == 0)
        assert jxl_size(data) == size
    for length in range(40):
        jxl_size(data[:length])
    assert jxl_size(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40)) is None


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
WORKFLOW = b"{" + b'"node": {"inputs": {"seed": 7}}, ' * 60_000 + b"}"


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"tEXt", b"workflow\0" + WORKFLOW),
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(WORKFLOW)),
        chunk(b"iTXt", b"workflow\0\1\0en\0\0" + zlib.compress(WORKFLOW)),
        chunk(b"iTXt", b"workflow\0\0\0\0\0" + WORKFLOW) * 3,
        chunk(b"iCCP", b"x\0\0" + zlib.compress(SRGB + bytes(17 << 20))),
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(WORKFLOW))
        + chunk(b"zTXt", b"broken\0\0xyz"),
    ],
    ids=["plain", "compressed", "international", "many", "huge profile", "broken text"],
)
def test_pngs_with_large_texts_are_sound(extra: bytes) -> None:
    """Text of more than 1 MB, as node-graph programs write it before the pixels or behind them, and
    profiles of more than 16 MB are left out, and the image has its own pixels; text that pillow
    reads itself is passed on as it is."""
    for data in (PNG[:33] + extra + PNG[33:], PNG[:-12] + extra + PNG[-12:]):
        if b"iCCP" in data and data.index(b"iCCP") > 33 + 8:
            continue  # a profile stands before the pixels
        assert np.array_equal(decode_with_mask(data, "x")[0], photo(1))
    small = PNG[:33] + chunk(b"tEXt", b"prompt\0a dog") + PNG[33:]
    assert light_png(small) == (small, None)


def test_a_large_profile_of_a_png_is_used() -> None:
    """A profile of 1.5 MB, as printers have, moves the colours as the same one in 3 kB does."""
    large = bytearray(icc.P3_PROFILE + bytes(1_500_000))
    large[:4] = struct.pack(">I", len(large))
    extra = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(large)))
    got = np.asarray(decode_with_mask(PNG[:33] + extra + PNG[33:], "x")[0])
    want = np.asarray(decode_with_mask(encoded(photo(1), icc_profile=icc.P3_PROFILE), "x")[0])
    assert np.array_equal(got, want)
    assert not np.array_equal(got, photo(1))


def test_avif_is_read() -> None:
    """AVIF images decode in pillow's own plugin, upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = photo(1).transpose(Image.Transpose.ROTATE_90)
    got = np.asarray(decode_with_mask(encoded(lying, "AVIF", quality=95, exif=exif), "x")[0])
    assert np.abs(got.astype(int) - photo(1)).mean() < 4


THUMBNAILED = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(JPEG) + 2) + JPEG + JPEG[2:]
"""A JPEG with a whole JPEG among its metadata, as cameras write it."""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a.png could not be decoded: the file is empty"),
        (b"hello, I am text", "a.png could not be decoded: it is not an image but text"),
        (JPEG[:500], "a.png could not be decoded: the file is truncated"),
        (JPEG[:-2], "the file is truncated"),
        (JPEG[: len(JPEG) // 2] + bytes(5000), "the file is truncated"),
        (THUMBNAILED[: -len(JPEG) // 2] + bytes(5000), "the file is truncated"),
        (PNG[:100], "a.png could not be decoded: the file is truncated"),
        (PNG[:-12], "the file is truncated"),
        (WEBP[:-20], "the file is truncated"),
        (PNG[:-20] + b"\0" + PNG[-19:], "a.png could not be decoded: it is broken"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "no known range"),
        (encoded(Image.new("I", (2, 2), 1 << 20), "TIFF"), "no known range"),
        (tiff(2, struct.pack("<2h", -5, 5), 16, kind=2), "no known range"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"\n<!doctype HTML><title>404</title>", "an HTML page"),
        (b"a" + "été, ".encode() * 999, "text, which begins with “aété, été"),  # cut in an é
        (b"text\x1b[2Jthat clears the screen", "it is not an image$"),
        (b"%PDF-1.4", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "a PostScript"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"RIFF\0\0\0\0AVI LIST", "a video"),
        (b"\0\0\0\x1cftypmp42\0\0\0\0isommp42", "a video"),
        (PNG[:8] + b"nonsense", "a.png could not be decoded: the file is truncated"),
        (b"GIF89a", "it begins as a GIF and goes on as nonsense"),
    ],
)
def test_broken_images_are_named(data: bytes, message: str) -> None:
    """Empty, truncated and foreign files give an error that names the file and the reason."""
    with pytest.raises(RunError, match=message):
        decode_with_mask(data, "a.png")


def test_whole_images_are_not_taken_for_truncated() -> None:
    """What lies behind a JPEG's end, or a thumbnail within, is no sign of a missing end."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for data in (JPEG + b"\xff\xda\0" * 99, THUMBNAILED, PNG + b"garbage", WEBP + b"garbage"):
        assert decode_with_mask(data, "x")[0].size == photo(1).size


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG of 20,000 × 20,000 pixels is refused without the 400 MB that it would take.

    The limit is our own as well, for programs that switch pillow's off.
    """
    data = bomb()
    assert len(data) < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for limit in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(RunError, match=r"bomb.png .* 179 million pixels.* decompression bomb"):
            decode_with_mask(data, "bomb.png")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < 100e6


def test_pillows_warnings_do_not_leak(tmp_path: Path) -> None:
    """Images of which pillow warns decode without a word on the terminal."""
    large = tmp_path / "large.png"
    large.write_bytes(bomb(10_000))
    odd = tmp_path / "odd.tif"
    odd.write_bytes(
        encoded(gradient(), "TIFF").replace(b"\x05\x01\x03\0\x01", b"\x05\x01\x03\0\x09")
    )
    program = (
        "import sys; from pathlib import Path; from sd_lora.data.images.decode import open_header\n"
        "for path in sys.argv[1:]: open_header(Path(path).read_bytes())\n"
    )
    command = [sys.executable, "-c", program, str(large), str(odd)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_counts_as_an_image(tmp_path: Path) -> None:
    """Extensions in any case; not hidden files, folders, pipes, broken links or text."""
    images = ["a.PNG", "b.jpg", "c.JFIF", "d.Heic", "e.tIf"]
    for name in (*images, ".DS_Store", "._c.jpg", "notes.txt", "png", ".png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "tail.png").symlink_to("tail.png")
    (tmp_path / "link.png").symlink_to("a.PNG")
    found = sorted(p.name for p in tmp_path.iterdir() if is_image(p))
    assert found == sorted([*images, "link.png"])


def test_reading_waits_for_nothing(tmp_path: Path) -> None:
    """A file is read; a pipe, which would wait for a writer for ever, and a folder are errors."""
    (tmp_path / "a.png").write_bytes(b"bytes")
    assert read_file(tmp_path / "a.png") == b"bytes"
    os.mkfifo(tmp_path / "pipe.png")
    for odd in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero"), tmp_path / "nothing"):
        with pytest.raises(OSError, match="regular file|directory"):
            read_file(odd)
