"""Small ICC profiles (version 2), written by hand: pillow can make sRGB's alone."""

import struct
from collections.abc import Callable

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
"""The white of the space in which profiles meet, CIE XYZ."""

DISPLAY_P3 = (
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
)
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
"""XYZ of red, green and blue under D50, as the published profiles have them."""

Curve = Callable[[np.ndarray], np.ndarray]


def srgb_to_linear(v: np.ndarray) -> np.ndarray:
    """Returns light in [0, 1] of sRGB's values in [0, 1]: IEC 61966-2-1."""
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(v: np.ndarray) -> np.ndarray:
    """The inverse of `srgb_to_linear`, of light clipped to [0, 1]."""
    v = np.clip(v, 0, 1)
    return np.where(v <= 0.0031308, v * 12.92, 1.055 * v ** (1 / 2.4) - 0.055)


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _curve(curve: Curve) -> bytes:
    table = np.round(curve(np.linspace(0, 1, 1024)) * 65535).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(table)) + table.tobytes()


def _profile(kind: bytes, space: bytes, between: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"made by a test\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {b"desc": described, b"cprt": b"text\0\0\0\0" + text, b"wtpt": _xyz(D50), **tags}
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4xI", at + len(body), 0x02400000) + kind + space + between
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(*D50)
    return header + bytes(128 - len(header)) + table + body


def rgb_profile(primaries: tuple[tuple[float, ...], ...], curve: Curve) -> bytes:
    """Returns the profile of a display with these primaries (XYZ, D50) and curve to light."""
    red, green, blue = map(_xyz, primaries)
    tags = {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(curve))
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(curve: Curve) -> bytes:
    """Returns the profile of grey with a curve to light."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(curve)})


def cmyk_profile(cyan: tuple[int, int, int]) -> bytes:
    """Returns the profile of a press whose full cyan ink is this CIE Lab, on yellowish paper.

    Full magenta is (50, 70, 0), yellow (90, 0, 90), a mix of them (30, 0, 0), black (0, 0, 0), all
    of them relative to the paper.
    """
    inks = {(0, 0, 0): (100, 0, 0), (1, 0, 0): cyan, (0, 1, 0): (50, 70, 0), (0, 0, 1): (90, 0, 90)}
    corners = b""
    for node in np.ndindex(2, 2, 2, 2):
        lightness, a, b = (0, 0, 0) if node[3] else inks.get(node[:3], (30, 0, 0))
        corners += bytes([round(lightness * 2.55), a + 128, b + 128])
    identity = _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + corners + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut, b"wtpt": _xyz((0.85, 0.88, 0.6))})


P3_PROFILE = rgb_profile(DISPLAY_P3, srgb_to_linear)
ADOBE_PROFILE = rgb_profile(ADOBE_RGB, lambda v: v ** (563 / 256))
SRGB_PROFILE = rgb_profile(SRGB, srgb_to_linear)
CYAN = (60, -30, -40)
CMYK_PROFILE = cmyk_profile(CYAN)
