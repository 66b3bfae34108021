"""The scan: every image is decoded, defects are reported, files stay as they are, memory small."""

import io
import os
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from sd_lora.config.options.dreambooth import generated_name
from sd_lora.config.sources import Kind, SourceSpec
from sd_lora.data.cache.store import Store
from sd_lora.data.check.scan import NEAR_BITS, ScanResult, near_duplicates, same_shape, scan
from sd_lora.data.images.decode import decode_with_mask
from sd_lora.data.images.facts import Facts, content_digest
from sd_lora.data.sources.open import open_source
from sd_lora.data.sources.samples import Mask, Sample, Source
from sd_lora.findings import Finding
from tests.data.check.torture import make_torture


def drawing(seed: int, size: tuple[int, int] = (200, 150)) -> Image.Image:
    """An image with large and small shapes, like a photograph."""
    rng = random.Random(seed)
    image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        r = rng.uniform(0.05, 0.35) * size[1]
        draw.ellipse((x - r, y - r, x + r, y + r), tuple(rng.randrange(256) for _ in range(3)))
    return image.filter(ImageFilter.GaussianBlur(1))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def source_of(images: dict[str, bytes], kind: Kind = "instance", streaming: bool = False) -> Source:
    """A source of bytes in memory."""
    spec = SourceSpec(dataset="set", kind=kind, streaming=streaming)
    samples = [Sample(name, partial(bytes, data), ("a",), spec) for name, data in images.items()]
    return Source(spec, partial(iter, samples), [], None if streaming else len(samples))


def plain(items: Iterable, total: int | None) -> Iterable:
    return items


def scanned(*sources: Source, **options: object) -> ScanResult:
    return scan(sources, None, progress=plain, **options)  # type: ignore[arg-type]


def codes(found: ScanResult) -> dict[str, str]:
    return {finding.name: finding.code for finding in found.findings}


def contents(folder: Path) -> dict[str, tuple[int, int, bytes | str | None]]:
    """The whole content of a folder: names, modes, times of change, bytes."""
    found: dict[str, tuple[int, int, bytes | str | None]] = {}
    for root, folders, files in os.walk(folder):
        for name in [".", *folders, *files]:
            path = Path(root, name)
            about, data = path.lstat(), None
            if path.is_symlink():
                data = os.readlink(path)
            elif path.is_file() and os.access(path, os.R_OK):
                data = path.read_bytes()
            found[str(path)] = (about.st_mode, about.st_mtime_ns, data)
    return found


@pytest.fixture(scope="module")
def torture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("torture")
    return folder, make_torture(folder)


def open_torture(folder: Path) -> list[Source]:
    return open_source(SourceSpec(path=str(folder), captions="prompt", prompt="a thing"))


def test_every_bad_file_is_named(torture: tuple[Path, dict[str, str]]) -> None:
    """Each file of a folder of bad and odd files is reported with its reason, and no bad one is
    trained; nothing in the folder has changed; the scan does not wait for a pipe."""
    folder, expected = torture

    def name(path: str) -> str:
        return os.path.relpath(path, folder)

    before = contents(folder)
    start = time.monotonic()
    found = scan(open_torture(folder), None, progress=plain)
    assert time.monotonic() - start < 30
    assert contents(folder) == before
    left_out = {name(f.name): f.code for f in found.findings if f.level == "left out"}
    trained = [name(sample.name) for sample in found.samples]
    no_files = {"broken link.png", "own tail.png", "pipe.png"}
    assert left_out.keys() >= no_files
    assert {n: c for n, c in left_out.items() if n not in no_files} | dict.fromkeys(
        trained, ""
    ) == expected
    assert len({*trained, *left_out}) == len(trained) + len(left_out)
    told = {(name(f.name), f.level, f.code) for f in found.findings}
    assert told >= {
        ("apng.png", "warning", "animated"),
        ("modes/transparent.png", "warning", "transparent"),
        ("modes/16 rgb.png", "note", "16-bit"),
        ("modes/cmyk.jpg", "note", "cmyk"),
        ("near twin.jpg", "note", "near-duplicate"),
        ("pages.tiff", "warning", "pages"),
        ("tiny 8.png", "warning", "tiny"),
        ("turned/exif 6.jpg", "note", "exif-rotated"),
        ("twin.jpg", "warning", "duplicate"),
    }
    assert [f[0] for f in told if f[2] == "near-duplicate"] == ["near twin.jpg"]
    for sample in found.samples:
        assert decode_with_mask(sample.read(), sample.name)[0].size == sample.size
        assert found.facts[sample.digest].size == sample.size


def test_threads_and_store_do_not_show(
    torture: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """One thread, four, an empty store and a full one give the same samples and findings in the
    same order, and the same thumbnails."""
    folder, _ = torture
    store = Store(tmp_path / "cache", 2**30)
    thumbs: list[list[tuple[str, tuple[int, int]]]] = []

    def examiner(store: Store | None, workers: int) -> ScanResult:
        thumbs.append([])
        sources = open_torture(folder)
        return scan(
            sources,
            store,
            progress=plain,
            thumbnails=lambda s, f, image: thumbs[-1].append((s.name, image.size)),
            workers=workers,
        )

    first, *others = (examiner(None, 1), examiner(None, 4), examiner(store, 4), examiner(store, 4))
    assert len(first.samples) > 5

    def told(found: ScanResult) -> tuple[list[tuple[str, str]], list[Finding], dict[str, Facts]]:
        return [(s.name, s.digest) for s in found.samples], found.findings, found.facts

    assert all(told(other) == told(first) for other in others)
    assert all(seen == thumbs[0] for seen in thumbs)
    assert [name for name, _ in thumbs[0]] == [s.name for s in first.samples]


def test_known_images_are_not_decoded_again(tmp_path: Path) -> None:
    """Stored facts and thumbnails are used: altered ones come back, so none was computed again.
    Other bytes under the same name are examined, and so are facts with an unknown code."""
    store = Store(tmp_path, 2**30)
    thumbs: list[Image.Image] = []

    def examiner(data: bytes) -> ScanResult:
        thumbs.clear()
        source = source_of({"a.png": data})
        return scan([source], store, progress=plain, thumbnails=lambda s, f, t: thumbs.append(t))

    data = encoded(drawing(0))
    found = examiner(data)
    (sample,) = found.samples
    assert sample.size == (200, 150)
    changed = replace(found.facts[sample.digest], size=(77, 99))
    store.write(f"facts/{sample.digest}", changed.to_json())
    store.write(f"thumbnails/{sample.digest}", encoded(Image.new("RGB", (7, 9), "red"), "JPEG"))
    assert examiner(data).samples[0].size == (77, 99)
    assert thumbs[0].size == (7, 9)
    assert examiner(encoded(drawing(1))).samples[0].size == (200, 150)
    problem = replace(changed, digest=content_digest(b"no image"), problem=("empty", "told"))
    store.write(f"facts/{problem.digest}", problem.to_json())
    assert examiner(b"no image").facts[problem.digest] == problem
    for unknown in (replace(problem, problem=("new", "x")), replace(problem, oddities=("new",))):
        store.write(f"facts/{problem.digest}", unknown.to_json())
        facts = examiner(b"no image").facts[problem.digest]
        assert (facts.problem or ())[:1] == ("not-an-image",)


def test_a_store_that_cannot_be_written_harms_nothing(tmp_path: Path) -> None:
    """The images are checked all the same, and one finding gives the reason."""
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file", 2**30)
    source = source_of({f"{i}.png": encoded(drawing(i)) for i in range(3)})
    found = scan([source], store, progress=plain, workers=1)
    assert len(found.samples) == 3
    (finding,) = found.findings
    assert (finding.level, finding.code) == ("note", "not-kept")
    assert "SD_LORA_CACHE" in finding.text


def test_oddities_are_told_with_what_becomes_of_them() -> None:
    """Animated, tiny and invisible images are warnings with advice; a conversion is a note; an
    image that cannot be decoded is left out, with advice."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image, other = drawing(0), drawing(1)
    images = {
        "gif": encoded(image, "GIF", save_all=True, append_images=[other]),
        "tiny": encoded(drawing(2, (63, 400))),
        "least": encoded(drawing(3, (64, 64))),
        "clear": encoded(Image.new("RGBA", (99, 99), (255, 0, 0, 0))),
        "side": encoded(drawing(4), "JPEG", exif=exif),
        "cut": encoded(drawing(5), "JPEG")[:2000],
        "nothing": b"",
    }
    found = scanned(source_of(images))
    told = {(f.name, f.level, f.code) for f in found.findings}
    assert told >= {
        ("gif", "warning", "animated"),
        ("tiny", "warning", "tiny"),
        ("clear", "warning", "transparent"),
        ("side", "note", "exif-rotated"),
        ("cut", "left out", "truncated"),
        ("nothing", "left out", "empty"),
    }
    assert not [f for f in found.findings if f.name == "least"]
    assert {s.name: s.size for s in found.samples}["side"] == (150, 200)
    assert [s.name for s in found.samples] == ["gif", "tiny", "least", "clear", "side"]
    for finding in found.findings:
        advised = finding.level == "left out" or finding.level == "warning"
        assert ("; " in finding.text) == advised, finding


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    """A file that is gone or unreadable is reported with the system's reason."""
    spec = SourceSpec(path=str(tmp_path))
    missing = Sample("gone.png", (tmp_path / "gone.png").read_bytes, ("a",), spec)
    found = scanned(Source(spec, partial(iter, [missing]), [], 1))
    details = "cannot be read: No such file or directory"
    assert found.findings == [Finding("unreadable", "gone.png", details)]
    assert not found.samples


def test_exact_duplicates() -> None:
    """Copies are reported with the first of them, once each, over all sources of one kind; the same
    image among instance and class images is a warning of its own."""
    one, two = encoded(drawing(0)), encoded(drawing(1))
    found = scanned(
        source_of({"a": one, "b": two, "c": one}),
        source_of({"d": one, "b": two}),
        source_of({"e": one, "f": encoded(drawing(2))}, "class"),
    )
    assert [(f.name, f.code) for f in found.findings] == [
        ("c", "duplicate"),
        ("d", "duplicate"),
        ("b", "duplicate"),
        ("e", "in-both-sets"),
    ]
    assert [f.other for f in found.findings] == ["a", "a", "b", "a"]
    c, d, b, e = (f.text for f in found.findings)
    assert "the same image as a," in c
    assert "the same image as a," in d
    assert "two sources" in b
    assert "the same as a," in e
    assert {f.level for f in found.findings} == {"warning"}
    assert len(found.samples) == 7


def test_near_duplicates_are_found_and_others_not() -> None:
    """Of 40 different images, each with a re-encoded, a resized and a brightened copy, every copy
    is reported with its original, and no other image is."""
    images = {}
    for i in range(40):
        image = drawing(i)
        images[f"{i}"] = encoded(image)
        images[f"{i} jpeg"] = encoded(image, "JPEG", quality=60)
        images[f"{i} small"] = encoded(image.resize((100, 75)))
        images[f"{i} bright"] = encoded(image.point(lambda v: min(255, int(v * 1.05) + 3)))
    found = scanned(source_of(images))
    near = {f.name: f.text for f in found.findings if f.code == "near-duplicate"}
    assert len(found.findings) == len(near)
    assert all(f.other == f.name.split()[0] for f in found.findings)
    assert near.keys() == {name for name in images if " " in name}
    assert all(f"as {name.split()[0]}; " in text for name, text in near.items())


def test_class_images_of_a_run_may_be_alike() -> None:
    """Images that look the same are told among a person's class images, and not among those that a
    run has drawn."""
    image = drawing(1)
    for names, near in (
        (["a.png", "b.jpg"], 1),
        ([generated_name(0, 1), generated_name(0, 2)], 0),
        (["a.png", generated_name(7, 1)], 0),
    ):
        twins = {names[0]: encoded(image), names[1]: encoded(image, "JPEG")}
        found = scanned(source_of(twins, kind="class"))
        assert sum(f.code == "near-duplicate" for f in found.findings) == near


def test_flat_and_exact_ones_are_not_near_duplicates() -> None:
    """Images of one colour look alike to a hash and are not reported as copies; an exact copy is
    not reported again as a near one."""
    colours = {name: encoded(Image.new("RGB", (99, 99), name)) for name in ("red", "white", "navy")}
    one = encoded(drawing(0))
    found = scanned(source_of({**colours, "a": one, "b": one}))
    assert codes(found) == {"b": "duplicate"}


def test_near_duplicates_against_all_pairs() -> None:
    """Groups are the connected components of "differ in at most d bits", which networks of all
    pairs give, for hashes with neighbours at every distance from 0 to 8."""
    rng = random.Random(1)
    hashes = []
    for _ in range(120):
        base = rng.getrandbits(64)
        for flipped in rng.sample(range(9), 4):
            bits = sum(1 << bit for bit in rng.sample(range(64), flipped))
            hashes.append(base ^ bits)
    hashes += [0, 2**64 - 1, 0, 2**64 - 1, 2**63]
    rng.shuffle(hashes)
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    near = [[(a ^ b).bit_count() <= NEAR_BITS for b in hashes] for a in hashes]
    labels = connected_components(csr_array(np.array(near)))[1]
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    want = sorted(group for group in members.values() if len(group) > 1)
    assert want
    assert near_duplicates(hashes) == want
    assert near_duplicates([]) == []
    assert near_duplicates([1, 2, 2**60], distance=2) == [[0, 1, 2]]
    assert near_duplicates([0, 2**13 - 1], distance=12) == []


def test_near_duplicates_of_more_than_a_block() -> None:
    """Of 10,000 hashes the planted pairs are found at any place, and no others."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 10_000, dtype=np.uint64).tolist()
    planted = [(3, 9_999), (4_095, 4_096), (63, 64), (5_000, 5_001)]
    for first, second in planted:
        hashes[second] = hashes[first] ^ 0b1111
    assert near_duplicates(hashes) == sorted(map(list, planted))


def rows_of(count: int, size: int, spec: SourceSpec) -> Iterator[Sample]:
    """Yield images of 8×8 pixels, each followed by `size` random bytes."""
    image = encoded(Image.new("RGB", (8, 8), "red"))
    for i in range(count):
        data = image + i.to_bytes(4, "big") * (size // 4)
        yield Sample(f"row {i}", partial(bytes, data), ("a",), spec)


def test_a_stream_is_not_held() -> None:
    """5,000 rows with 100 kB each, 500 MB in all, are checked in 16 MB; a sample of a stream gives
    the reason for its missing bytes and can be pickled; the number of rows may be unknown."""
    import pickle

    spec = SourceSpec(dataset="set", streaming=True)
    totals: list[int | None] = []

    def progress(items: Iterable, total: int | None) -> Iterable:
        totals.append(total)
        return items

    source = Source(spec, partial(rows_of, 5000, 100_000, spec), [], None)
    tracemalloc.start()
    try:
        found = scan([source], None, progress=progress, workers=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.samples) == 5000
    assert totals == [None]
    assert peak < 32 * 10**6  # of 500 MB; what is under way depends on the threads
    sample = pickle.loads(pickle.dumps(found.samples[7]))
    with pytest.raises(OSError, match="a streamed row is read in order only"):
        sample.read()


def test_findings_of_a_stream_are_those_of_its_rows() -> None:
    """Findings that a stream makes while it is read come before those of the images."""
    spec = SourceSpec(dataset="set", streaming=True)
    findings: list[Finding] = []

    def rows() -> Iterator[Sample]:
        yield Sample("row 0", bytes, ("a",), spec)
        findings.append(Finding("missing-caption", "row 1"))

    found = scanned(Source(spec, rows, findings))
    assert [f.code for f in found.findings] == ["missing-caption", "empty"]


def test_only_so_many_thumbnails() -> None:
    """Small thumbnails are made of the first images, up to the wanted number."""
    seen: dict[str, Image.Image] = {}
    source = source_of({f"{i}": encoded(drawing(i, (600, 400))) for i in range(5)})
    scanned(source, thumbnails=lambda s, f, t: seen.update({s.name: t}), max_thumbnails=3)
    assert [*seen] == ["0", "1", "2"]
    assert {t.size for t in seen.values()} == {(256, 171)}


def test_it_stops_when_asked(tmp_path: Path) -> None:
    """Ctrl-C ends the scan at once: waiting images are not begun, and no thread goes on."""
    begun: Counter[str] = Counter()

    def read(name: str) -> bytes:
        begun[name] += 1
        time.sleep(0.05)
        return b"x"

    spec = SourceSpec(dataset="set")
    samples = [Sample(f"{i}", partial(read, f"{i}"), ("a",), spec) for i in range(1000)]

    def interrupted(items: Iterable, total: int | None) -> Iterator:
        for i, item in enumerate(items):
            if i == 3:
                raise KeyboardInterrupt
            yield item

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        scan([Source(spec, partial(iter, samples), [], 1000)], None, progress=interrupted)
    assert time.monotonic() - start < 2
    count = sum(begun.values())
    time.sleep(0.2)
    assert sum(begun.values()) == count < 200


def test_the_number_of_images_is_known_for_folders() -> None:
    """Progress gets the sum of the sources' counts if all are known."""
    totals: list[int | None] = []

    def progress(items: Iterable, total: int | None) -> Iterable:
        totals.append(total)
        return items

    data = {"a": encoded(drawing(0)), "b": encoded(drawing(1))}
    examiner: Callable[..., ScanResult] = partial(scan, store=None, progress=progress)
    examiner([source_of(data), source_of({})])
    examiner([source_of(data), source_of({}, streaming=True)])
    assert totals == [2, None]


def test_masks_are_examined_with_their_images() -> None:
    """An image whose mask is damaged, missing or of another shape is left out with the reason; the
    others have their masks' digests. Shapes are the same where they differ by rounding alone."""
    white = encoded(Image.new("L", (100, 75), 255))

    def gone() -> bytes:
        raise FileNotFoundError(2, "No such file")

    masks: dict[str, Callable[[], bytes]] = {
        "fine": partial(bytes, white), "text": partial(bytes, b"text"), "gone": gone,
        "turned": partial(bytes, encoded(Image.new("L", (75, 100)))),
    }  # fmt: skip
    source = source_of({name: encoded(drawing(i)) for i, name in enumerate(masks)})
    masked = [replace(s, mask=Mask(f"mask {s.name}", masks[s.name])) for s in source.rows()]
    found = scanned(replace(source, rows=partial(iter, masked)))
    assert [(s.name, s.mask and s.mask.digest) for s in found.samples] == [
        ("fine", content_digest(white))
    ]
    texts = {f.name: f.text for f in found.findings if f.code == "bad-mask"}
    assert "its mask mask text cannot be decoded: it is not an image but text" in texts["text"]
    assert "cannot be read: No such file" in texts["gone"]
    assert (
        "it has 200×150 pixels, and its mask mask turned the other shape of 75×100"
        in texts["turned"]
    )
    assert same_shape((1001, 667), (300, 200))
    assert same_shape((300, 200), (1001, 667))
    assert not same_shape((1001, 667), (300, 202))


def test_one_folder_at_two_resolutions_is_no_duplicate() -> None:
    """An image of two sources is a duplicate where both train it at one resolution, not where
    each has its own."""

    def duplicates(*resolutions: list[int] | None) -> list[str]:
        sources = []
        for sides in resolutions:
            source = source_of({"a": encoded(drawing(0))})
            spec = replace(source.spec, resolutions=sides)
            rows = [replace(sample, source=spec) for sample in source.rows()]
            sources.append(replace(source, spec=spec, rows=partial(iter, rows)))
        return [f.name for f in scanned(*sources).findings if f.code == "duplicate"]

    assert duplicates([512], [768, 1024], None) == []
    assert duplicates([512, 768], [1024, 768]) == ["a"]
    assert duplicates(None, None) == ["a"]
