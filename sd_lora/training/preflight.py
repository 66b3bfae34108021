"""Before anything is loaded: every picture looked at, in its shape, and the arithmetic of a run."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sd_lora.data.buckets import Framing, Size
from sd_lora.data.captions import is_odd, longest_form
from sd_lora.data.check import Scanned, Thumbnails, in_both_sets, scan
from sd_lora.data.epochs import Epochs
from sd_lora.data.facts import Facts
from sd_lora.data.findings import Finding, refuse
from sd_lora.data.page import report_lines
from sd_lora.data.samples import Sample, Source
from sd_lora.data.spec import Kind
from sd_lora.data.store import Store, digest_of
from sd_lora.data.stream import Set
from sd_lora.errors import RunError
from sd_lora.models.prompts import PIECE, Reader
from sd_lora.training import checkpoint, report
from sd_lora.training.config import TrainConfig


class NothingLeft(RunError):
    """No picture can be trained; findings: why."""

    findings: list[Finding] = []


@dataclass
class Pictures:
    """The pictures of one kind of a run.

    sources: where they are from. set: those that can be trained, in their shapes. findings: what
    the user should know of them. facts: digest → what is known of a picture.
    """

    sources: list[Source]
    set: Set
    findings: list[Finding]
    facts: dict[str, Facts]


def look_at(
    config: TrainConfig,
    sources: list[Source],
    kind: Kind,
    framing: Framing,
    seed: int,
    store: Store | None,
    reader: Reader,
    beside: Sequence[Sample] = (),
    once: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    thumbnails: Thumbnails | None = None,
    may_be_none: bool = False,
) -> Pictures | None:
    """Returns the pictures of some sources that can be trained, and what was found of all.

    Args:
        sources: those of this kind.
        store: where what is known of pictures is kept.
        reader: counts the tokens of captions.
        beside: the samples of the other kind, which should not be the same pictures.
        once: runs work on one of several processes, and gives all of them what it returns.
        thumbnails: as `scan` has it.
        may_be_none: more will be made: None is returned if none of them can be trained.

    Raises:
        RunError: none can be trained; findings, where the configuration is strict.
    """

    def look() -> tuple[list[tuple[Sample, Size]], list[Finding], dict[str, Facts]]:
        scanned = scan(sources, store, progress=report.checking, thumbnails=thumbnails)
        scanned.findings += in_both_sets([*beside, *scanned.samples])
        kept, findings = _kept(config, scanned, framing)
        findings += _cut([sample for sample, _ in kept], reader)
        findings += _odd_wildcards([sample for sample, _ in kept])
        if kept or not may_be_none or config.strict:
            _refuse(config, kind, kept, findings)
        return kept, findings, scanned.facts

    kept, findings, facts = once(look)
    if not kept:
        return None
    pictures = Set([s for s, _ in kept], [b for _, b in kept], framing, kind, seed)
    return Pictures(sources, pictures, findings, facts)


def _kept(
    config: TrainConfig, scanned: Scanned, framing: Framing
) -> tuple[list[tuple[Sample, Size]], list[Finding]]:
    """Returns the samples that can be trained in these shapes, and all findings."""
    findings, samples = list(scanned.findings), scanned.samples
    if config.alpha_mask:
        samples = _with_something_opaque(samples, scanned.facts, findings)
    buckets = framing.assign([s.size for s in samples], [s.source.repeats for s in samples])
    kept: list[tuple[Sample, Size]] = []
    for sample, bucket in zip(samples, buckets, strict=True):
        if bucket is None:
            findings.append(_too_small(sample, framing))
            continue
        kept.append((sample, bucket))
        scale = framing.frame(sample.size, bucket, None).scale
        if scale > 1:
            findings.append(_upscaled(sample, scale, bucket, framing))
    # what a picture is left out for says all that is to be said of it
    gone = {f.name for f in findings if f.level == "left out"}
    return kept, [f for f in findings if f.level == "left out" or f.name not in gone]


def refuse_any(findings: list[Finding]) -> None:
    """Raises RunError if anything is left out, or a warning."""
    wrong = [f for f in findings if f.level != "note"]
    refuse(wrong, f"{len(wrong)} problems in the data, and this run is strict:")


def _refuse(
    config: TrainConfig, kind: Kind, kept: Sequence[object], findings: list[Finding]
) -> None:
    """Raises RunError for findings in strict runs, and if no picture is kept."""
    if config.strict:
        refuse_any(findings)
    if not kept:
        lines = "\n  ".join(report_lines(findings))
        error = NothingLeft(f"none of the {kind} pictures can be trained:\n  {lines}")
        error.findings = findings
        raise error


LONG = 300
"""Tokens of a caption that are worth to be read; beyond, the text is no caption."""


def _cut(samples: list[Sample], reader: Reader) -> list[Finding]:
    """Returns findings on captions that are longer than what is read of them."""
    forms = [longest_form(sample.captions, sample.source.rules) for sample in samples]
    counts = reader.too_long([form for of_sample in forms for form in of_sample])
    findings = []
    for sample, of_sample in zip(samples, forms, strict=True):
        count = max(counts.get(form, 0) for form in of_sample)
        if count:
            enough = math.ceil(count / PIECE) * PIECE
            remedy = f"--max_token_length {enough} reads it whole"
            text = f"its caption of {count} tokens is cut at {reader.limit}; " + (
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


def _too_small(sample: Sample, framing: Framing) -> Finding:
    width, height = sample.size
    return Finding(
        "left out",
        "too-small",
        sample.name,
        f"{width}×{height} pixels: a side is shorter than {framing.step}, the least of a bucket, "
        "and bucket_no_upscale forbids to enlarge it",
    )


def _upscaled(sample: Sample, scale: float, bucket: Size, framing: Framing) -> Finding:
    width, height = sample.size
    return Finding(
        "warning",
        "upscaled",
        sample.name,
        f"{width}×{height} pixels, enlarged {scale:.2f} times for {bucket[0]}×{bucket[1]}: it "
        "teaches blur. Take a larger one, or a lower resolution"
        + (", or --bucket_no_upscale" if framing.step else ""),
    )


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run.

    pictures: what is trained. epochs: which samples make which batch. num_steps: optimiser steps in
    all.
    """

    config: TrainConfig
    pictures: Set
    epochs: Epochs
    num_processes: int
    num_steps: int

    @classmethod
    def of(cls, config: TrainConfig, pictures: Set, num_processes: int) -> "Plan":
        epochs = Epochs(
            [pictures.buckets[index] for index in pictures.entries],
            config.train_batch_size * num_processes,
            config.gradient_accumulation_steps,
            config.bucket_leftovers,
            pictures.seed,
            pictures.kind,
        )
        num_steps = config.max_train_steps or config.num_train_epochs * epochs.num_steps
        return cls(config, pictures, epochs, num_processes, num_steps)

    @property
    def seed(self) -> int:
        return self.pictures.seed

    @property
    def samples_per_step(self) -> int:
        return self.epochs.batch * self.epochs.accumulation

    @property
    def num_samples(self) -> int:
        """Samples that count in an epoch."""
        return self.epochs.num_samples

    @property
    def num_micro_batches(self) -> int:
        """Of the whole run."""
        return self.epochs.first_of_step(self.num_steps)

    @cached_property
    def order(self) -> str:
        """The digest of what the positions in the data mean: which entries make which step, and
        what is drawn for them."""
        steps: list[list[int]] = [[]]
        for micro in self.epochs.epoch(0):
            steps[-1] += [place.entry for place in micro.places if place.counted]
            if micro.last:
                steps.append([])
        drawn = (
            repr((s.source.rules, s.source.random_flip, s.source.random_crop, s.source.weight))
            for s in self.pictures.samples
        )
        return digest_of(repr([sorted(step) for step in steps]), *drawn)

    def progress(self, step: int) -> checkpoint.Progress:
        return checkpoint.Progress(
            step, self.seed, self.samples_per_step, self.num_samples, self.config.as_dict(),
            self.order, self.content,
        )  # fmt: skip

    @cached_property
    def content(self) -> str:
        """The digest of the pictures and their captions, in order."""
        return digest_of(*(repr((s.digest, s.captions)) for s in self.pictures.samples))

    def rows(self) -> dict[str, str]:
        """Returns the lines of the summary that say what is trained and how often."""
        config, epochs, pictures = self.config, self.epochs, self.pictures
        rows = {"pictures": _counted(pictures)}
        rows["shapes"] = shapes(epochs.buckets)
        accumulation, processes = epochs.accumulation, self.num_processes
        rows["batch"] = (
            f"{config.train_batch_size} × {accumulation} accumulation × {processes} processes "
            f"= {self.samples_per_step}"
        )
        number = self.num_steps / epochs.num_steps
        rows["steps"] = (
            f"{epochs.num_steps} an epoch, {self.num_steps} in all ({number:.1f} epochs)"
        )
        plain = math.ceil(len(pictures.entries) / self.samples_per_step)
        if epochs.num_steps > plain:
            rows["steps"] += f"; {plain} would do if all had one shape"
        fill = {
            "smaller": "the last batch of a bucket is smaller",
            "pad-batch": f"{epochs.empty} places are filled with pictures that do not count",
            "repeat": f"{epochs.extra} pictures an epoch are seen once more",
        }
        if any(count % epochs.batch for count in epochs.buckets.values()):
            rows["left over"] = fill[config.bucket_leftovers]
        return rows


def _counted(pictures: Set) -> str:
    """Returns "12 × 10 repeats + 30 = 150 an epoch"."""
    repeats = Counter(sample.source.repeats for sample in pictures.samples)
    terms = [f"{n} × {r} repeats" if r > 1 else f"{n}" for r, n in sorted(repeats.items())]
    total = len(pictures.entries)
    return terms[0] if [*repeats] == [1] else f"{' + '.join(terms)} = {total} an epoch"


MOST_SHAPES = 6
"""How many buckets the summary names."""


def shapes(buckets: dict[Size, int]) -> str:
    """Returns "512×512: 20, 448×576: 7, and 3 in 2 others"."""
    most = sorted(buckets.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{w}×{h}" + (f": {n}" if len(most) > 1 else "") for (w, h), n in most[:MOST_SHAPES]]
    rest = most[MOST_SHAPES:]
    if rest:
        words.append(f"and {sum(n for _, n in rest)} in {len(rest)} others")
    return ", ".join(words)
