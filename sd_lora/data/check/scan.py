"""Read and decode every image before a run, and report defects, oddities and duplicates."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import chain

import numpy as np
from PIL import Image

from sd_lora.config.options.dreambooth import is_generated
from sd_lora.data.cache.prefetch import prefetch
from sd_lora.data.cache.store import Store
from sd_lora.data.images.facts import Facts, content_digest, examine
from sd_lora.data.sources.samples import Mask, Sample, Source
from sd_lora.errors import RunError
from sd_lora.findings import FINDINGS, Finding

TINY_SIDE = 64
"""Pixels: an image with a shorter side below is tiny. VAE and UNet halve it six times, so less than
64 leaves less than one position of the innermost level."""

NEAR_BITS = 4
"""Bits of 64 in which the perceptual hashes of two images that look the same may differ. Hashes of
unrelated images are as near once in 3·10¹³ pairs."""

MAX_THUMBNAILS = 2000

Progress = Callable[[Iterable, int | None], Iterable]
Thumbnails = Callable[[Sample, Facts, Image.Image], None]


@dataclass
class ScanResult:
    """Result of a scan.

    samples: images that can be decoded, in the order of their sources, with digest and size.
    findings: of the sources first.
    facts: digest → facts of an image, decodable or not.
    """

    samples: list[Sample] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Facts] = field(default_factory=dict)


def scan(
    sources: Sequence[Source],
    store: Store | None,
    *,
    progress: Progress,
    thumbnails: Thumbnails | None = None,
    max_thumbnails: int = MAX_THUMBNAILS,
    workers: int | None = None,
) -> ScanResult:
    """Read and fully decode every image of some sources.

    The result depends on the images alone, not on the number of threads or the store. Of a
    stream, the bytes of a few images at a time are held.

    Args:
        store: holds facts and thumbnails by digest, so that a known image is not decoded again;
            None: no store.
        progress: called with an iterable of images and their number (None if unknown); returns
            the iterable.
        thumbnails: called, in order, for the first `max_thumbnails` images that can be decoded,
            with an upright RGB thumbnail, its longer side at most 256 pixels.
        workers: threads; None: one a processor.

    Raises:
        UsageError, RunError: errors of a source while its rows are read.
    """
    found = ScanResult()
    examiner = _Examiner(store, found.facts, max_thumbnails if thumbnails else 0)
    rows = chain.from_iterable(source.rows() for source in sources)
    counts = [source.count for source in sources]
    total = None if None in counts else sum(count or 0 for count in counts)
    for examined in progress(prefetch(examiner, enumerate(rows), workers), total):
        found.findings += examined.findings
        if examined.facts is None:
            continue
        found.facts[examined.facts.digest] = examined.facts
        if examined.facts.problem is None:
            found.samples.append(examined.sample)
            if thumbnails and examined.thumbnail:
                thumbnails(examined.sample, examined.facts, examined.thumbnail)
    # a stream's own findings are complete after its last row
    found.findings[:0] = [finding for source in sources for finding in source.findings]
    found.findings += _duplicates(found.samples) + find_in_both_sets(found.samples)
    found.findings += _near_duplicates(found.samples, found.facts)
    found.findings += examiner.store_findings[:1]
    return found


@dataclass(slots=True)
class _Examined:
    """A sample without its bytes; facts: None if it could not be read."""

    sample: Sample
    facts: Facts | None
    thumbnail: Image.Image | None
    findings: list[Finding]


class _Examiner:
    """Read and examine one sample; called from several threads.

    known: digest → facts found in this scan.
    max_thumbnails: number of first samples to make thumbnails for.
    store_findings: on a store that cannot be written; after the first, it is written no more.
    """

    def __init__(self, store: Store | None, known: dict[str, Facts], max_thumbnails: int) -> None:
        self.store, self.known, self.max_thumbnails = store, known, max_thumbnails
        self.store_findings: list[Finding] = []

    def __call__(self, numbered: tuple[int, Sample]) -> _Examined:
        number, sample = numbered
        try:
            data = sample.read()
        except OSError as error:
            finding = Finding(
                "unreadable", sample.name, f"cannot be read: {error.strerror or error}"
            )
            return _Examined(sample, None, None, [finding])
        facts, thumbnail = self._examine(data, number < self.max_thumbnails)
        mask, fault = sample.mask, ""
        if mask and facts.problem is None:
            mask, fault = self._examine_mask(mask, facts.size)
        if fault:
            return _Examined(sample, None, None, [Finding("bad-mask", sample.name, fault)])
        sample = replace(
            sample,
            mask=mask,
            digest=facts.digest,
            size=facts.size,
            read=refuse_second_reading if sample.source.streaming else sample.read,
        )
        return _Examined(sample, facts, thumbnail, _findings_of(sample, facts))

    def _examine_mask(self, mask: Mask, size: tuple[int, int]) -> tuple[Mask, str]:
        """A mask with its digest, and its fault for an image of this size; "" without any."""
        try:
            facts, _ = self._examine(mask.read(), False)
        except OSError as error:
            return mask, f"its mask {mask.name} cannot be read: {error.strerror or error}"
        fault = ""
        if facts.problem:
            fault = f"its mask {mask.name} cannot be decoded: {facts.problem[1]}"
        elif not same_shape(facts.size, size):
            ours, theirs = ("×".join(map(str, sides)) for sides in (size, facts.size))
            fault = f"it has {ours} pixels, and its mask {mask.name} the other shape of {theirs}"
        return replace(mask, digest=facts.digest), fault

    def _examine(self, data: bytes, with_thumbnail: bool) -> tuple[Facts, Image.Image | None]:
        """Facts of an image, and its thumbnail if wanted; from the store where it has them."""
        digest = content_digest(data)
        facts = self.known.get(digest) or self._stored_facts(digest)
        stored = self._read(f"thumbnails/{digest}") if with_thumbnail and facts else None
        if facts and (stored or facts.problem or not with_thumbnail):
            return facts, Image.open(BytesIO(stored)) if stored else None
        facts, thumbnail = examine(data)
        self._write(f"facts/{digest}", facts.to_json())
        if with_thumbnail and thumbnail:
            buffer = BytesIO()
            thumbnail.save(buffer, "JPEG", quality=90)
            self._write(f"thumbnails/{digest}", buffer.getvalue())
        return facts, thumbnail if with_thumbnail else None

    def _stored_facts(self, digest: str) -> Facts | None:
        data = self._read(f"facts/{digest}")
        facts = Facts.from_json(data) if data else None
        if facts is None:
            return None
        codes = {*facts.oddities, *(facts.problem or ())[:1]}  # perhaps of another version
        return facts if codes <= FINDINGS.keys() else None

    def _read(self, key: str) -> bytes | None:
        return self.store.read(key) if self.store else None

    def _write(self, key: str, data: bytes) -> None:
        if self.store is None or self.store_findings:
            return
        try:
            self.store.write(key, data)
        except RunError as error:  # harmless: the image is decoded again next time
            details = f"facts of the images were not stored: {error}"
            self.store_findings.append(Finding("not-kept", str(self.store.folder), details))


def same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two sizes have the same ratio of sides, to a pixel of the smaller one."""
    (short, long), (width, height) = sorted((a, b))
    return abs(short * height - long * width) <= max(width, height)


def refuse_second_reading() -> bytes:
    """Stand-in for the `read` of a streamed row whose bytes are no longer held."""
    raise OSError("a streamed row is read in order only")


def _findings_of(sample: Sample, facts: Facts) -> list[Finding]:
    """Findings on one image: its problem, its oddities, and a tiny size."""
    found = []
    if facts.problem:
        code, reason = facts.problem
        found.append(Finding(code, sample.name, reason))
    found += [Finding(code, sample.name) for code in facts.oddities]
    if facts.problem is None and min(facts.size) < TINY_SIDE:
        width, height = facts.size
        details = f"{width}×{height} pixels, too few to learn anything but blur from"
        found.append(Finding("tiny", sample.name, details))
    return found


def _duplicates(samples: Sequence[Sample]) -> list[Finding]:
    """Findings on images of one kind with the same bytes as an earlier one."""
    first: dict[tuple[str, str, int | None], Sample] = {}
    findings = []
    for sample in samples:
        resolutions = sample.source.trained_at
        keys = [(sample.source.kind, sample.digest, resolution) for resolution in resolutions]
        known = [first.setdefault(key, sample) for key in keys]
        same = next((other for other in known if other is not sample), None)
        if same:
            details = (
                "read by two sources, and trained as often as both say"
                if same.name == sample.name
                else f"the same image as {same.name}, byte for byte, and trained as often again"
            )
            findings.append(Finding("duplicate", sample.name, details, same.name))
    return findings


def find_in_both_sets(samples: Sequence[Sample]) -> list[Finding]:
    """Findings on class images with the same bytes as an instance image."""
    instances = {s.digest: s for s in reversed(samples) if s.source.kind == "instance"}
    return [
        Finding(
            "in-both-sets",
            sample.name,
            f"this class image is the same as {instances[sample.digest].name}, an image to learn",
            instances[sample.digest].name,
        )
        for sample in samples
        if sample.source.kind == "class" and sample.digest in instances
    ]


def _near_duplicates(samples: Sequence[Sample], facts: dict[str, Facts]) -> list[Finding]:
    """Findings on images that look like an earlier one but have other bytes; class images that a
    run has drawn are alike by their prompt, and nobody picks among them."""
    findings = []
    for kind in ("instance", "class"):
        first: dict[str, Sample] = {}
        for sample in samples:
            drawn = kind == "class" and is_generated(sample.name)
            if sample.source.kind == kind and not drawn:
                first.setdefault(sample.digest, sample)
        hashed = [(s, h) for s in first.values() if (h := facts[s.digest].phash) is not None]
        for group in near_duplicates([h for _, h in hashed]):
            names = [hashed[i][0].name for i in group]
            details = f"looks the same as {names[0]}"
            findings += [Finding("near-duplicate", name, details, names[0]) for name in names[1:]]
    return findings


def near_duplicates(hashes: Sequence[int], distance: int = NEAR_BITS) -> list[list[int]]:
    """Group 64-bit hashes so that each is near another one of its group.

    All pairs are compared, block by block: 50,000 hashes in 2.8 s of one processor, in 14 MiB.

    Args:
        hashes: n hashes.
        distance: largest number of differing bits between near hashes.

    Returns:
        Groups of two or more indices into `hashes`: ascending in a group, groups by first index.
    """
    rows, columns = 64, 4096  # 2 MiB of differences: they stay in the processor's cache
    values, where = np.unique(np.asarray(hashes, dtype=np.uint64), return_inverse=True)
    parent = list(range(len(values)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for top in range(0, len(values), rows):
        block = values[top : top + rows, None]
        for left in range(top, len(values), columns):
            bits = np.bitwise_count(block ^ values[left : left + columns])
            for i, j in np.argwhere(bits <= distance).tolist():
                parent[root(top + i)] = root(left + j)
    groups: dict[int, list[int]] = {}
    for index, value in enumerate(where.tolist()):
        groups.setdefault(root(value), []).append(index)
    return [group for group in groups.values() if len(group) > 1]
