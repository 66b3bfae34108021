"""Decoding of every odd mode, and framing against torchvision's documented arithmetic."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from sd_lora.data.images import Framing, decode, is_picture
from sd_lora.errors import RunError


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width: int = 8, height: int = 6) -> Image.Image:
    values = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return Image.fromarray(values.astype(np.uint8))


def test_plain_rgb_is_untouched() -> None:
    """An ordinary PNG decodes to its own pixels."""
    assert np.array_equal(decode(encoded(gradient()), "x"), gradient())


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "CMYK"])
def test_colour_modes_become_rgb(mode: str) -> None:
    """Grey, palette, bilevel, YCbCr and CMYK pictures decode to pillow's own RGB conversion."""
    image = gradient().convert(mode)
    data = encoded(image, "TIFF")
    assert np.array_equal(decode(data, "x"), image.convert("RGB"))


def test_transparency_is_laid_on_white() -> None:
    """Garbage under transparent pixels is not trained: white is; half opacity mixes."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    assert [decode(encoded(image), "x").getpixel((i, 0)) for i in (0, 1)] == [
        (255, 255, 255),
        (127, 127, 127),
    ]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([255, 0, 0])
    assert decode(encoded(palette, transparency=0), "x").getpixel((0, 0)) == (255, 255, 255)
    grey = Image.new("LA", (1, 1), (0, 0))
    assert decode(encoded(grey), "x").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    """16-bit grey 0, 32896, 65535 is 8-bit 0, 128, 255; pillow's own conversion would clip."""
    image = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    row = np.asarray(decode(encoded(image), "x"))[0, :, 0]
    assert row.tolist() == [0, 128, 255]


def test_exif_orientation_is_applied() -> None:
    """A picture that EXIF says lies on its side is turned upright before cropping."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode(encoded(gradient(8, 6), "JPEG", exif=exif), "x")
    assert image.size == (6, 8)


def test_cmyk_goes_through_its_profile() -> None:
    """A CMYK picture whose embedded profile cannot be used still decodes, by the plain formula."""
    image = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(image, "TIFF", icc_profile=profile)
    assert decode(data, "x").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a.png could not be decoded: the file is empty"),
        (b"hello, I am text", "a.png could not be decoded: it is not a picture"),
        (encoded(gradient(64, 64), "JPEG")[:500], "a.png could not be decoded: (?i:.*truncated)"),
        (encoded(gradient(64, 64))[:100], "a.png could not be decoded"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "no known range"),
    ],
)
def test_broken_pictures_are_named(data: bytes, message: str) -> None:
    """Empty, truncated and foreign files give an error that names the file and the reason."""
    with pytest.raises(RunError, match=message):
        decode(data, "a.png")


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture whose header claims far too many pixels is refused before it is decoded."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(RunError, match="decompression bomb"):
        decode(encoded(gradient(64, 64)), "bomb.png")


@pytest.mark.parametrize(
    ("size", "want"), [((640, 480), (85, 64)), ((480, 640), (64, 85)), ((50, 50), (64, 64))]
)
def test_resize_is_torchvisions(size: tuple[int, int], want: tuple[int, int]) -> None:
    """The shorter side becomes the resolution; the longer is int(resolution · long / short)."""
    assert Framing(64).resized(size) == want


def test_crops_and_flips() -> None:
    """Centre crops are centred, random ones reach both ends, a flip mirrors, white is 1."""
    wide = Image.fromarray(np.tile(np.arange(0, 96, dtype=np.uint8)[None, :, None], (64, 1, 3)))

    def columns(framing: Framing, u: float, flip: bool = False) -> torch.Tensor:
        pixels = framing.pixels(wide, u, flip)
        assert pixels.shape == (3, 64, 64)
        return ((pixels[0, 0] + 1) * 127.5).round()

    assert columns(Framing(64, center_crop=True), 0.9)[0] == 16
    assert columns(Framing(64), 0.0)[0] == 0
    assert columns(Framing(64), 0.9999)[-1] == 95
    mirrored = columns(Framing(64), 0.0, flip=True)
    assert mirrored.tolist() == columns(Framing(64), 0.0).flip(0).tolist()
    assert Framing(64).is_random((96, 64))
    assert not Framing(64).is_random((128, 128))
    assert not Framing(64, center_crop=True).is_random((96, 64))
    white = Framing(64).pixels(Image.new("RGB", (64, 64), "white"), 0.0, False)
    assert white.max() == 1


def test_what_counts_as_a_picture(tmp_path: Path) -> None:
    """Extensions in any case; not hidden files, folders or text."""
    for name in ("a.PNG", "b.jpg", ".DS_Store", "._c.jpg", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.png").mkdir()
    assert sorted(p.name for p in tmp_path.iterdir() if is_picture(p)) == ["a.PNG", "b.jpg"]
