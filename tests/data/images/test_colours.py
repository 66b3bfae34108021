"""Colours: CMYK, Lab, and what embedded profiles mean, against the standards' formulas."""

import io

import numpy as np
import pytest
from PIL import Image

from sd_lora.data.images.decode import decode_with_mask
from tests.data import icc
from tests.data.check.torture import encoded
from tests.data.images.test_decode import gradient, row_of


@pytest.mark.parametrize(("levels", "touched"), [(1.5, False), (5.0, True)])
def test_a_profile_that_rounds_otherwise_is_srgb(levels: float, touched: bool) -> None:
    """A curve up to 1.5 levels off sRGB's leaves every pixel as it is; one of 5 moves them."""

    def nearly(v: np.ndarray) -> np.ndarray:
        return icc.srgb_to_linear(v + levels / 255 * 4 * v * (1 - v))

    profile = icc.rgb_profile(icc.SRGB, nearly)
    got = decode_with_mask(encoded(gradient(), icc_profile=profile), "x")[0]
    assert np.array_equal(got, gradient()) is not touched


def test_lab_is_measured_colour() -> None:
    """CIE Lab of a saturated blue decodes to the sRGB that the standards' formulas give it."""
    image = Image.new("LAB", (1, 1), (153, 98, 88))  # L 60, a -30, b -40, as pillow stores them
    got = decode_with_mask(encoded(image, "TIFF"), "x")[0].getpixel((0, 0))
    assert np.abs(np.subtract(got, lab_to_srgb(60, -30, -40))).max() <= 2


def lab_to_srgb(lightness: float, a: float, b: float) -> list[float]:
    """CIE 1976 Lab under D50 to 8-bit sRGB, by the standards' formulas."""
    y = (lightness + 16) / 116
    f = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * icc.D50
    linear = np.linalg.solve(np.array(icc.SRGB).T, xyz)
    return (255 * icc.linear_to_srgb(linear)).tolist()


def test_cmyk_goes_through_its_profile() -> None:
    """Full cyan is the colour that the embedded profile measures for it, within 2 levels."""
    image = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
    for format in ("TIFF", "JPEG"):
        data = encoded(image, format, icc_profile=icc.CMYK_PROFILE)
        got = decode_with_mask(data, "x")[0].getpixel((0, 0))
        assert np.abs(np.subtract(got, lab_to_srgb(*icc.CYAN))).max() <= 2
    for black, want in ((255, (0, 0, 0)), (0, (255, 255, 255))):  # the paper is white
        image = Image.new("CMYK", (2, 2), (0, 0, 0, black))
        data = encoded(image, "TIFF", icc_profile=icc.CMYK_PROFILE)
        assert decode_with_mask(data, "x")[0].getpixel((0, 0)) == want


def test_cmyk_without_a_profile() -> None:
    """Without a profile that fits, a colour is (255 - ink)·(255 - black)/255."""
    image = Image.new("CMYK", (2, 2), (0, 255, 51, 102))
    for profile in (None, b"nonsense", icc.SRGB_PROFILE):
        data = encoded(image, "TIFF", icc_profile=profile)
        got = decode_with_mask(data, "x")[0].getpixel((0, 0))
        assert np.abs(np.subtract(got, (153, 0, 122.4))).max() <= 1


def test_cmyk_jpegs_are_stored_inverted() -> None:
    """Adobe's CMYK JPEGs hold 0 for full ink; such a file decodes to the ink's colour."""
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in data[:40]
    with Image.open(io.BytesIO(data)) as raw:
        raw.tile = [tile._replace(args=("CMYK", "")) for tile in raw.tile]
        assert raw.getpixel((0, 0)) == (0, 255, 255, 255)  # what is stored, not turned around
    assert decode_with_mask(data, "x")[0].getpixel((0, 0)) == (0, 255, 255)


P3_TO_SRGB = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
ADOBE_TO_SRGB = np.array([[1.3983, -0.3983, 0], [0, 1, 0], [0, -0.0429, 1.0429]])
"""Light to light between spaces of the same white, D65, as published."""


@pytest.mark.parametrize(
    ("profile", "matrix", "light"),
    [
        (icc.P3_PROFILE, P3_TO_SRGB, icc.srgb_to_linear),
        (icc.ADOBE_PROFILE, ADOBE_TO_SRGB, lambda v: v ** (563 / 256)),
    ],
)
def test_wide_colours_become_srgb(profile: bytes, matrix: np.ndarray, light: icc.Curve) -> None:
    """Display P3 and Adobe RGB, with alpha and without, are converted within 2 levels.

    Red of P3 is more than sRGB's: it is clipped to it.
    """
    colours = np.array([[200, 100, 50], [60, 180, 90], [40, 80, 160], [128, 128, 128], [255, 0, 0]])
    want = 255 * icc.linear_to_srgb(light(colours / 255) @ matrix.T)
    image = Image.fromarray(colours[None].astype(np.uint8))
    for mode in ("RGB", "RGBA"):
        got = decode_with_mask(encoded(image.convert(mode), icc_profile=profile), "x")[0]
        assert np.abs(np.asarray(got)[0] - want).max() <= 2
        assert got.getpixel((4, 0)) == (255, 0, 0)
    palette = encoded(image.quantize(5), icc_profile=profile)
    assert np.abs(np.asarray(decode_with_mask(palette, "x")[0])[0] - want).max() <= 2


def test_grey_goes_through_its_profile() -> None:
    """Grey stored as light becomes sRGB's grey, in 8 and in 16 bits, with alpha and without."""
    profile = icc.grey_profile(lambda v: v)
    values = np.array([[0, 10, 64, 128, 255]], dtype=np.uint8)
    want = 255 * icc.linear_to_srgb(values[0] / 255)
    grey, deep = Image.fromarray(values), Image.fromarray(values * np.uint16(257))
    for image in (grey, grey.convert("LA"), deep):
        assert np.abs(row_of(encoded(image, icc_profile=profile)) - want).max() <= 2


@pytest.mark.parametrize("profile", [b"nonsense", icc.P3_PROFILE[:200], icc.CMYK_PROFILE])
def test_a_profile_that_cannot_be_used_is_as_good_as_none(profile: bytes) -> None:
    """A broken profile, and one for another kind of image, leave the pixels as they are."""
    for image in (gradient(), gradient().convert("L")):
        got = decode_with_mask(encoded(image, icc_profile=profile), "x")[0]
        assert np.array_equal(got, image.convert("RGB"))
