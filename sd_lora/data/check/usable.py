"""Check the images of a run before a model is loaded: usable images, in their buckets."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sd_lora.config.sources import Kind
from sd_lora.config.wildcards import has_unread_wildcards
from sd_lora.data.batches.caption_rules import longest_form
from sd_lora.data.batches.stream import ImageSet
from sd_lora.data.cache.store import Store
from sd_lora.data.check.page import report_lines
from sd_lora.data.check.scan import Progress, ScanResult, Thumbnails, find_in_both_sets, scan
from sd_lora.data.images.buckets import CropSettings, Size
from sd_lora.data.images.facts import Facts
from sd_lora.data.sources.samples import Sample, Source
from sd_lora.errors import RunError
from sd_lora.findings import Finding
from sd_lora.models.caption_encoder import PIECE, CaptionEncoder

MAX_NAMED = 20
"""Findings that one error prints."""

LONGEST_CAPTION = 100_000
"""Characters of a caption, all of its lines together: tokens are counted at a million a second."""

MAX_USEFUL_TOKENS = 300
"""Tokens of the longest caption that is advised to be read whole; a longer text is no caption."""


FOREIGN_SYNTAX = (
    (r"\[trigger\]", "ai-toolkit puts the trigger word there; give it by --trigger_word"),
    (
        r"\[(?:filewords|name|initials)\]",
        "A1111 puts words of the file's name there; --captions_from filename reads them",
    ),
    (r"<(?:lora|lyco|hypernet):[^>]*>", "a LoRA to load, as A1111 reads prompts"),
    (r"\bNegative prompt:", "parameters of an image, pasted whole: keep the prompt alone"),
    (r"\bSteps: \d+, \w", "parameters of an image, pasted whole: keep the prompt alone"),
)
"""Pattern of a text that another program reads → its meaning there; here it is plain words."""


class NoUsableImages(RunError):
    """No image can be trained. findings: the reasons."""

    findings: list[Finding] = []


@dataclass
class ImageCheck:
    """Result of a check of images; picklable.

    usable: samples that can be trained, each with its bucket (width, height).
    findings: on all images and their sources.
    facts: digest → facts of an image, usable or not.
    """

    usable: list[tuple[Sample, Size]]
    findings: list[Finding]
    facts: dict[str, Facts]


@dataclass
class UsableImages:
    """The usable images of one kind.

    sources: of the images.
    set: images that can be trained, in their buckets.
    findings: on all images and their sources.
    facts: digest → facts of an image, usable or not.
    """

    sources: list[Source]
    set: ImageSet
    findings: list[Finding]
    facts: dict[str, Facts]


def check_images(
    sources: list[Source],
    kind: Kind,
    crop_settings: CropSettings,
    store: Store | None,
    caption_encoder: CaptionEncoder,
    progress: Progress,
    *,
    alpha_mask: bool,
    strict: bool,
    instances: Sequence[Sample] = (),
    thumbnails: Thumbnails | None = None,
    required: bool = True,
) -> ImageCheck:
    """Check all images of one kind of sources, and find their buckets.

    Args:
        store: holds facts of images; None: no store.
        caption_encoder: counts the tokens of captions.
        progress, thumbnails: see `scan`.
        alpha_mask: leave out images without an opaque pixel.
        strict: raise an error for a file that is left out, and for a warning.
        instances: samples of instance images, to find them among class images.
        required: raise an error if no image is usable.

    Raises:
        RunError: a strict run with such findings.
        NoUsableImages: no image can be trained.
    """
    scanned = scan(sources, store, progress=progress, thumbnails=thumbnails)
    scanned.findings += find_in_both_sets([*instances, *scanned.samples])
    scanned.samples = [
        replace(sample, resolution=resolution)
        for sample in scanned.samples
        for resolution in sample.source.trained_at
    ]
    usable, findings = _assign_buckets(scanned, crop_settings, alpha_mask)
    samples = [sample for sample, _ in usable]
    findings += _long_captions(samples, caption_encoder)
    findings += [*_odd_wildcards(samples), *_foreign_syntax(samples)]
    findings = list(dict.fromkeys(findings))  # two sources may have the same folder
    if strict:
        refuse_problems(findings)
    if required and not usable:
        lines = "\n  ".join(report_lines(findings))
        error = NoUsableImages(f"none of the {kind} images can be trained:\n  {lines}")
        error.findings = findings
        raise error
    return ImageCheck(usable, findings, scanned.facts)


def refuse_problems(findings: list[Finding]) -> None:
    """Raise RunError for files left out and warnings, naming the first `MAX_NAMED`."""
    problems = [f for f in findings if f.level != "note"]
    if not problems:
        return
    lines = [f.line() for f in problems[:MAX_NAMED]]
    more = len(problems) - MAX_NAMED
    raise RunError(
        f"{len(problems)} problems in the data, and this run is strict:\n  "
        + "\n  ".join(lines)
        + (f"\n  … and {more} more" if more > 0 else "")
    )


def _assign_buckets(
    scanned: ScanResult, crop_settings: CropSettings, alpha_mask: bool
) -> tuple[list[tuple[Sample, Size]], list[Finding]]:
    """Samples that fit a bucket, with it, and all findings."""
    findings = list(scanned.findings)
    samples = _with_short_captions(scanned.samples, findings)
    if alpha_mask:
        samples = _partly_opaque(samples, scanned.facts, findings)
    buckets = _buckets_of(samples, crop_settings)
    usable: list[tuple[Sample, Size]] = []
    for sample, bucket in zip(samples, buckets, strict=True):
        if bucket is None:
            findings.append(_too_small(sample, crop_settings))
            continue
        usable.append((sample, bucket))
        scale = crop_settings.crop(sample.size, bucket, None, sample.hand_crop).scale
        if scale > 1:
            findings.append(_upscaled(sample, scale, bucket))
    findings += _same_shapes(usable)
    # other findings on an image that is left out are of no use
    left_out = {f.name for f in findings if f.level == "left out"}
    return usable, [f for f in findings if f.level == "left out" or f.name not in left_out]


def _with_short_captions(samples: list[Sample], findings: list[Finding]) -> list[Sample]:
    """Samples whose captions can be looked at in a blink; adds findings on the others."""
    kept = []
    for sample in samples:
        length = max(map(len, sample.captions), default=0)
        if length <= LONGEST_CAPTION:
            kept.append(sample)
            continue
        details = f"its caption has {length} characters, and {LONGEST_CAPTION} are the most"
        findings.append(Finding("unreadable-caption", sample.name, details))
    return kept


def _buckets_of(samples: list[Sample], crop_settings: CropSettings) -> list[Size | None]:
    """The bucket of each sample, among those of its own resolution and sides."""
    groups: dict[CropSettings, list[int]] = {}
    for index, sample in enumerate(samples):
        own = crop_settings.of(sample.resolution, sample.source)
        groups.setdefault(own, []).append(index)
    buckets: list[Size | None] = [None] * len(samples)
    for own, indices in groups.items():
        sizes = [samples[i].size if own.upscale else _chosen_size(samples[i]) for i in indices]
        found = own.assign(sizes, [samples[i].source.repeats for i in indices])
        for index, bucket in zip(indices, found, strict=True):
            buckets[index] = bucket
    return buckets


def _chosen_size(sample: Sample) -> Size:
    """(width, height) of the largest part of an image of its own shape that is as small as its
    crop by hand: what is not enlarged has a bucket that this part fills.
    """
    part = sample.hand_crop.part if sample.hand_crop else 1
    width, height = sample.size
    return max(1, int(width * part)), max(1, int(height * part))


def _same_shapes(usable: list[tuple[Sample, Size]]) -> list[Finding]:
    """Findings on images too small for two of their resolutions to differ."""
    first: dict[tuple[str, Size], int | None] = {}
    findings = []
    for sample, bucket in usable:
        smaller = first.setdefault((sample.name, bucket), sample.resolution)
        if smaller != sample.resolution:
            details = (
                f"trained at {bucket[0]}×{bucket[1]} both for {smaller} and {sample.resolution}"
            )
            findings.append(Finding("same-shape", sample.name, details))
    return findings


def _long_captions(samples: list[Sample], caption_encoder: CaptionEncoder) -> list[Finding]:
    """Findings on captions longer than the text encoder reads."""
    forms = [longest_form(sample.captions, sample.source.rules) for sample in samples]
    counts = caption_encoder.too_long([form for of_sample in forms for form in of_sample])
    findings = []
    for sample, of_sample in zip(samples, forms, strict=True):
        count = max(counts.get(form, 0) for form in of_sample)
        if not count:
            continue
        enough = math.ceil(count / PIECE) * PIECE
        whole = f"--max_token_length {enough} reads it whole"
        remedy = whole if enough <= MAX_USEFUL_TOKENS else "shorten it"
        details = f"its caption of {count} tokens is cut at {caption_encoder.max_tokens}; {remedy}"
        findings.append(Finding("long-caption", sample.name, details))
    return findings


def _odd_wildcards(samples: list[Sample]) -> list[Finding]:
    """Findings on captions with wildcard syntax that is not read."""
    findings = []
    for sample in samples:
        if not sample.source.rules.wildcards:
            continue
        odd = next((text for text in sample.captions if has_unread_wildcards(text)), None)
        if odd is not None:
            findings.append(Finding("wildcard", sample.name, f"caption {odd[:60]!r}"))
    return findings


def _foreign_syntax(samples: list[Sample]) -> list[Finding]:
    """Findings on captions with text that other programs replace or read as a setting."""
    findings = []
    for sample in samples:
        rules = sample.source.rules
        texts = [*sample.captions, rules.caption_prefix, rules.caption_suffix]
        for pattern, meaning in FOREIGN_SYNTAX:
            found = next((m for text in texts if (m := re.search(pattern, text, re.I))), None)
            if found:
                details = f"its caption has {found[0][:60]!r}: {meaning}"
                findings.append(Finding("foreign-syntax", sample.name, details))
                break
    return findings


def _partly_opaque(
    samples: list[Sample], facts: dict[str, Facts], findings: list[Finding]
) -> list[Sample]:
    """Samples with opaque pixels; adds findings on the others."""
    kept = []
    for sample in samples:
        if "transparent" in facts[sample.digest].oddities:
            findings.append(Finding("nothing-opaque", sample.name))
        else:
            kept.append(sample)
    return kept


def _too_small(sample: Sample, crop_settings: CropSettings) -> Finding:
    width, height = _chosen_size(sample)
    details = (
        f"{width}×{height} pixels{_by_hand(sample)}: a side is shorter than {crop_settings.step}, "
        "the bucket step"
    )
    return Finding("too-small", sample.name, details)


def _upscaled(sample: Sample, scale: float, bucket: Size) -> Finding:
    width, height = _chosen_size(sample)
    pixels = f"{width}×{height} pixels{_by_hand(sample)}"
    details = f"{pixels}, enlarged {scale:.2f} times for {bucket[0]}×{bucket[1]}"
    return Finding("upscaled", sample.name, details)


def _by_hand(sample: Sample) -> str:
    return " by its crop by hand" if sample.hand_crop and sample.hand_crop.part < 1 else ""
