"""What is known of an image: every file of the torture folder, hashes, and that nothing raises."""

import hashlib
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image

from sd_lora.data.images import facts
from sd_lora.data.images.decode import decode_with_mask, is_image, read_file
from sd_lora.data.images.facts import ODDITIES, Facts, content_digest, examine
from sd_lora.errors import RunError
from tests.data import icc
from tests.data.check.torture import encoded, make_torture, photo, tiff


@pytest.fixture(scope="module")
def torture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("torture")
    return folder, make_torture(folder)


def read(torture: tuple[Path, dict[str, str]]) -> dict[str, bytes]:
    """Returns the bytes of the torture folder's images, but of those that cannot be read."""
    folder, expected = torture
    return {n: read_file(folder / n) for n, code in expected.items() if code != "unreadable"}


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Returns the kind, size and time of change of everything in a folder, loops left alone."""
    found = {str(p): p.lstat() for p in folder.rglob("*") if "again" not in p.parts}
    return {name: (s.st_mode, s.st_size, s.st_mtime_ns) for name, s in found.items()}


def test_every_file_of_the_torture_folder(torture: tuple[Path, dict[str, str]]) -> None:
    """Each of the images, and no other file, is known for what it is; none is touched.

    What is examined without a problem decodes, to the size that was found; the others do not.
    """
    folder, expected = torture
    before = snapshot(folder)
    images = (p for p in folder.rglob("*") if is_image(p) and "again" not in p.parts)
    assert {str(p.relative_to(folder)) for p in images} == set(expected)
    assert len(set(expected.values())) >= 7
    for name, data in read(torture).items():
        known, thumbnail = examine(data)
        assert (known.problem[0] if known.problem else "") == expected[name], name
        assert known.digest == hashlib.blake2b(data, digest_size=16).hexdigest()
        if known.problem:
            assert (thumbnail, known.size, known.phash) == (None, (0, 0), None)
            assert known.problem[1]
            with pytest.raises(RunError, match="could not be decoded"):
                decode_with_mask(data, name)
        else:
            assert thumbnail is not None
            assert thumbnail.mode == "RGB"
            assert max(thumbnail.size) <= 256
            assert known.size == decode_with_mask(data, name)[0].size
    assert snapshot(folder) == before


def test_oddities_are_named(torture: tuple[Path, dict[str, str]]) -> None:
    """What was done to an image is known by codes, in one order; an ordinary one has none."""
    images = read(torture)
    for name, want in {
        "UPPER.JPG": (),
        "garbage behind.jpg": (),
        "PNG with broken exif.png": (),
        "phone.jpg": (),
        "moving.gif": ("animated", "palette"),
        "animated.webp": ("animated",),
        "apng.png": ("animated",),
        "pages.tiff": ("pages",),
        "turned/exif 2.jpg": ("exif-rotated",),
        "turned/PNG 8.png": ("exif-rotated",),
        "turned/TIFF 8.tiff": ("exif-rotated",),
        "modes/cmyk.jpg": ("cmyk",),
        "modes/cmyk profile.tif": ("cmyk", "profile"),
        "modes/p3.jpg": ("profile",),
        "modes/broken profile.jpg": (),
        "modes/palette.png": ("palette",),
        "modes/palette hole.png": ("alpha", "palette"),
        "modes/grey.png": ("grey",),
        "modes/grey alpha.png": ("grey",),
        "modes/bilevel.png": ("grey",),
        "modes/16 grey.png": ("16-bit", "grey"),
        "modes/16 rgb.png": ("16-bit",),
        "modes/noise under alpha.png": ("alpha",),
        "modes/transparent.png": ("alpha", "transparent"),
    }.items():
        known, _ = examine(images[name])
        assert known.oddities == want, name
        assert set(want) <= set(ODDITIES)
    assert examine(images["modes/cmyk.jpg"])[0].mode == "CMYK"
    assert examine(images["phone.jpg"])[0].format == "MPO"
    assert examine(images["turned/exif 8.jpg"])[0].size == (72, 96)
    assert examine(tiff(1, bytes(2), 16))[0].oddities == ("16-bit", "grey")
    assert examine(tiff(1, bytes(6), 16, 2, channels=3))[0].oddities == ("16-bit",)
    torn = encoded(photo(1), "GIF")[:-1] + b"!\xf9\1\0\0"  # a second frame's head, broken
    assert examine(torn)[0].oddities == ("palette",)


def test_equal_bytes_have_equal_facts(torture: tuple[Path, dict[str, str]]) -> None:
    """Two threads that examine everything at once, in opposite orders, find the same."""
    images = list(read(torture).values())
    alone = [examine(data)[0] for data in images]
    with ThreadPoolExecutor(2) as pool:
        forwards = pool.map(lambda data: examine(data)[0], images)
        backwards = pool.map(lambda data: examine(data)[0], images[::-1])
        assert list(forwards) == list(backwards)[::-1] == alone


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Returns bytes with some of them changed, a piece left out, or the end lost."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 30))):
        # often among the first: headers are where parsers stumble
        at = rng.randrange(rng.choice((64, len(data))))
        changed[at % len(data)] = rng.choice((0, 1, 255, rng.randrange(256)))
    start, length = rng.randrange(len(data)), rng.choice((0, 0, 1, 4, len(data)))
    return bytes(changed[:start] + changed[start + length :])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest undoes that of images.py
def test_nothing_raises(torture: tuple[Path, dict[str, str]]) -> None:
    """1,500 broken variants of 25 kinds of images: each is examined, and decodes or is named.

    What examining says of an image and what decoding does are never at odds.
    """
    good = {n: d for n, d in read(torture).items() if not torture[1][n]}
    kinds = [n for n in good if n.startswith("modes/")]
    kinds += ["moving.gif", "animated.webp", "apng.png", "pages.tiff", "phone.jpg"]
    rng, problems = random.Random(0), 0
    for number in range(1500):
        data = mutated(good[kinds[number % len(kinds)]], rng)
        known, thumbnail = examine(data)
        problems += known.problem is not None
        assert (thumbnail is None) == (known.problem is not None)
        try:
            assert decode_with_mask(data, "x")[0].size == known.size
            assert known.problem is None
        except RunError:
            assert known.problem is not None
    assert 300 < problems < 1400


def test_facts_are_kept() -> None:
    """Facts come back from their bytes as they were, the problem and the hash as well."""
    data = encoded(photo(1), "JPEG", icc_profile=icc.P3_PROFILE)
    for known in (examine(data)[0], examine(data[:200])[0], examine(b"")[0]):
        kept = known.to_json()
        assert Facts.from_json(kept) == known
        assert len(kept) < 400


def test_facts_of_another_time_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts of another version or pillow, and garbage, are as good as none.

    So is a missing plugin, which may be there by now.
    """
    known = examine(encoded(photo(1)))[0]
    kept = known.to_json()
    for garbage in (
        b"",
        b"[]",
        b"7",
        b"{}",
        b"null",
        kept[:-1],
        kept + b"}",
        b"\xff\xfe",
        b"[" * 99999,
    ):
        assert Facts.from_json(garbage) is None
    fields = json.loads(kept)
    for change in ({"size": 7}, {"size": [1]}, {"unknown": 1}, {"oddities": None}):
        assert Facts.from_json(json.dumps(fields | change).encode()) is None
    assert Facts.from_json(Facts("00", problem=("no-plugin", "…")).to_json()) is None
    assert Facts.from_json(Facts("00", problem=("broken", "…")).to_json()) is not None
    monkeypatch.setattr(facts, "VERSION", "1, pillow 1.0")
    assert Facts.from_json(kept) is None


def test_a_thumbnail_is_the_image() -> None:
    """It is upright, over white, at most 256 pixels long, and never larger than the image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    large = photo(1, (1200, 900)).transpose(Image.Transpose.ROTATE_90)
    thumbnail = examine(encoded(large, "JPEG", exif=exif, quality=95))[1]
    assert thumbnail is not None
    assert thumbnail.size == (256, 192)
    want = np.asarray(photo(1, (256, 192))).astype(int)
    assert np.abs(np.asarray(thumbnail) - want).mean() < 3
    small = examine(encoded(photo(1, (20, 10))))[1]
    assert np.array_equal(small, photo(1, (20, 10)))
    empty = photo(1, (600, 300))
    empty.putalpha(0)
    blank = examine(encoded(empty))[1]
    assert blank is not None
    assert blank.getcolors() == [(256 * 128, (255, 255, 255))]


def bits(a: Facts, b: Facts) -> int:
    """Returns in how many of 64 bits two hashes differ."""
    assert a.phash is not None
    assert b.phash is not None
    return (a.phash ^ b.phash).bit_count()


@pytest.mark.parametrize("seed", range(4))
def test_hashes_know_an_image_again(seed: int) -> None:
    """Re-encoded, resized or laid in another mode, at most 4 bits of 64 differ; else over 12.

    That a small copy is hashed instead of the whole changes at most 2.
    """
    image = photo(seed, (600, 450))
    known = examine(encoded(image))[0]
    whole = int(str(imagehash.phash(image)), 16)
    assert known.phash is not None
    assert (known.phash ^ whole).bit_count() <= 2
    for copy in (
        encoded(image, "JPEG", quality=30),
        encoded(image, "WEBP", quality=50),
        encoded(image.resize((300, 225))),
        encoded(image.convert("L")),
        encoded(image.convert("RGBA")),
        encoded(image.quantize(256)),
    ):
        assert bits(known, examine(copy)[0]) <= 4
    assert bits(known, examine(encoded(photo(seed + 100, (600, 450))))[0]) > 12


def test_flat_images_have_no_hash() -> None:
    """Of one colour, or noise around one, no hash is given: it would be chance; faint ones have."""
    noise = np.random.default_rng(0).normal(128, 8, (500, 500, 3)).clip(0, 255).astype(np.uint8)
    for flat in (Image.new("RGB", (64, 64), "red"), Image.fromarray(noise), photo(1, (1, 1))):
        known = examine(encoded(flat))[0]
        assert known.problem is None
        assert known.phash is None
    faint = Image.fromarray((np.asarray(photo(1)) * 0.15 + 100).astype(np.uint8))
    assert examine(encoded(faint))[0].phash is not None


def test_digests_are_of_the_bytes() -> None:
    """The digest is blake2b's, of 16 bytes: known beforehand, and another for another byte."""
    assert content_digest(b"") == "cae66941d9efbd404e4d88758ea67670"
    assert examine(b"a")[0].digest == content_digest(b"a") != content_digest(b"b")
