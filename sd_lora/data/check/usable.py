"""Before anything is loaded: every image looked at, in its shape, and the arithmetic of a run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sd_lora.config.schema import TrainConfig
from sd_lora.config.sources import Kind
from sd_lora.data.batches.caption_rules import is_odd, longest_form
from sd_lora.data.batches.stream import ImageSet
from sd_lora.data.cache.store import Store
from sd_lora.data.check.page import report_lines
from sd_lora.data.check.scan import Progress, ScanResult, Thumbnails, in_both_sets, scan
from sd_lora.data.images.buckets import CropSettings, Size
from sd_lora.data.images.facts import Facts
from sd_lora.data.sources.samples import Sample, Source
from sd_lora.errors import RunError
from sd_lora.findings import Finding, refuse
from sd_lora.models.caption_encoder import PIECE, CaptionEncoder


class NoUsableImages(RunError):
    """No image can be trained; findings: why."""

    findings: list[Finding] = []


@dataclass
class UsableImages:
    """The images of one kind of a run.

    sources: where they are from. set: those that can be trained, in their shapes. findings: what
    the user should know of them. facts: digest → what is known of an image.
    """

    sources: list[Source]
    set: ImageSet
    findings: list[Finding]
    facts: dict[str, Facts]


def usable_images(
    config: TrainConfig,
    sources: list[Source],
    kind: Kind,
    crop_settings: CropSettings,
    seed: int,
    store: Store | None,
    caption_encoder: CaptionEncoder,
    progress: Progress,
    beside: Sequence[Sample] = (),
    once: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    thumbnails: Thumbnails | None = None,
    may_be_none: bool = False,
) -> UsableImages | None:
    """Returns the images of some sources that can be trained, and what was found of all.

    Args:
        sources: those of this kind.
        store: where what is known of images is kept.
        reader: counts the tokens of captions.
        progress: as `scan` has it.
        beside: the samples of the other kind, which should not be the same images.
        once: runs work on one of several processes, and gives all of them what it returns.
        thumbnails: as `scan` has it.
        may_be_none: more will be made: None is returned if none of them can be trained.

    Raises:
        RunError: none can be trained; findings, where the configuration is strict.
    """

    def look() -> tuple[list[tuple[Sample, Size]], list[Finding], dict[str, Facts]]:
        scanned = scan(sources, store, progress=progress, thumbnails=thumbnails)
        scanned.findings += in_both_sets([*beside, *scanned.samples])
        kept, findings = _kept(config, scanned, crop_settings)
        findings += _cut([sample for sample, _ in kept], caption_encoder)
        findings += _odd_wildcards([sample for sample, _ in kept])
        if kept or not may_be_none or config.strict:
            _refuse(config, kind, kept, findings)
        return kept, findings, scanned.facts

    kept, findings, facts = once(look)
    if not kept:
        return None
    images = ImageSet([s for s, _ in kept], [b for _, b in kept], crop_settings, kind, seed)
    return UsableImages(sources, images, findings, facts)


def _kept(
    config: TrainConfig, scanned: ScanResult, crop_settings: CropSettings
) -> tuple[list[tuple[Sample, Size]], list[Finding]]:
    """Returns the samples that can be trained in these shapes, and all findings."""
    findings, samples = list(scanned.findings), scanned.samples
    if config.alpha_mask:
        samples = _with_something_opaque(samples, scanned.facts, findings)
    buckets = crop_settings.assign([s.size for s in samples], [s.source.repeats for s in samples])
    kept: list[tuple[Sample, Size]] = []
    for sample, bucket in zip(samples, buckets, strict=True):
        if bucket is None:
            findings.append(_too_small(sample, crop_settings))
            continue
        kept.append((sample, bucket))
        scale = crop_settings.crop(sample.size, bucket, None).scale
        if scale > 1:
            findings.append(_upscaled(sample, scale, bucket, crop_settings))
    # what an image is left out for says all that is to be said of it
    gone = {f.name for f in findings if f.level == "left out"}
    return kept, [f for f in findings if f.level == "left out" or f.name not in gone]


def refuse_any(findings: list[Finding]) -> None:
    """Raises RunError if anything is left out, or a warning."""
    wrong = [f for f in findings if f.level != "note"]
    refuse(wrong, f"{len(wrong)} problems in the data, and this run is strict:")


def _refuse(
    config: TrainConfig, kind: Kind, kept: Sequence[object], findings: list[Finding]
) -> None:
    """Raises RunError for findings in strict runs, and if no image is kept."""
    if config.strict:
        refuse_any(findings)
    if not kept:
        lines = "\n  ".join(report_lines(findings))
        error = NoUsableImages(f"none of the {kind} images can be trained:\n  {lines}")
        error.findings = findings
        raise error


LONG = 300
"""Tokens of a caption that are worth to be read; beyond, the text is no caption."""


def _cut(samples: list[Sample], caption_encoder: CaptionEncoder) -> list[Finding]:
    """Returns findings on captions that are longer than what is read of them."""
    forms = [longest_form(sample.captions, sample.source.rules) for sample in samples]
    counts = caption_encoder.too_long([form for of_sample in forms for form in of_sample])
    findings = []
    for sample, of_sample in zip(samples, forms, strict=True):
        count = max(counts.get(form, 0) for form in of_sample)
        if count:
            enough = math.ceil(count / PIECE) * PIECE
            remedy = f"--max_token_length {enough} reads it whole"
            text = f"its caption of {count} tokens is cut at {caption_encoder.max_tokens}; " + (
                remedy if enough <= LONG else "shorten it"
            )
            findings.append(Finding("warning", "long-caption", sample.name, text))
    return findings


def _odd_wildcards(samples: list[Sample]) -> list[Finding]:
    """Returns findings on captions whose wildcards are not what they seem to be."""
    findings = []
    for sample in samples:
        odd = (
            [text for text in sample.captions if is_odd(text)]
            if sample.source.rules.wildcards
            else []
        )
        if odd:
            text = (
                f"{odd[0][:60]!r}: a brace without a partner stays as it is, and of wildcards "
                "{a|b} alone is read here, neither __name__ nor {2$$a|b}"
            )
            findings.append(Finding("warning", "wildcard", sample.name, text))
    return findings


def _with_something_opaque(
    samples: list[Sample], facts: dict[str, Facts], findings: list[Finding]
) -> list[Sample]:
    """Returns samples of which something is seen through their mask; the others are findings."""
    kept = []
    for sample in samples:
        if "transparent" in facts[sample.digest].oddities:
            text = "it is transparent everywhere, and alpha_mask trains what is opaque"
            findings.append(Finding("left out", "transparent", sample.name, text))
        else:
            kept.append(sample)
    return kept


def _too_small(sample: Sample, crop_settings: CropSettings) -> Finding:
    width, height = sample.size
    return Finding(
        "left out",
        "too-small",
        sample.name,
        f"{width}×{height} pixels: a side is shorter than {crop_settings.step}, the least of a "
        "bucket, and bucket_no_upscale forbids to enlarge it",
    )


def _upscaled(sample: Sample, scale: float, bucket: Size, crop_settings: CropSettings) -> Finding:
    width, height = sample.size
    return Finding(
        "warning",
        "upscaled",
        sample.name,
        f"{width}×{height} pixels, enlarged {scale:.2f} times for {bucket[0]}×{bucket[1]}: it "
        "teaches blur. Take a larger one, or a lower resolution"
        + (", or --bucket_no_upscale" if crop_settings.step else ""),
    )
