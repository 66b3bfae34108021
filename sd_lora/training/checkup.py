"""`sd-lora check`: what a run would train on, without loading a model or training anything."""

import dataclasses
import json
import math
from pathlib import Path

import torch
from PIL import Image

from sd_lora.adapters.inject import lora_layers
from sd_lora.data.buckets import Frame, Size
from sd_lora.data.captions import longest_form
from sd_lora.data.facts import Facts
from sd_lora.data.findings import Finding
from sd_lora.data.page import (
    PageBucket,
    PagePicture,
    PageReport,
    data_uri,
    findings_as_json,
    report_lines,
    write_page,
)
from sd_lora.data.samples import Sample
from sd_lora.data.sources import open_source
from sd_lora.data.spec import Kind
from sd_lora.data.stream import Set
from sd_lora.formats.tensors import mib
from sd_lora.models.load import Base
from sd_lora.models.prompts import Reader
from sd_lora.training import report
from sd_lora.training.adapt import inject_all
from sd_lora.training.caches import latent_bytes, open_store
from sd_lora.training.config import TrainConfig
from sd_lora.training.dataset import (
    DTYPES,
    base_of,
    check_class_pictures,
    class_spec,
    find_sources,
    framing,
    has_class_pictures,
    look,
)
from sd_lora.training.preflight import Pictures, Plan, look_at
from sd_lora.training.texts import MOST, reader_before, text_bytes

WORST = 5
"""Pictures that are named as those that lose most."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a check found.

    rows: label → text. pictures: kind → what was found. thumbnails: name → data URI.
    """

    plan: Plan
    reader: Reader
    rows: dict[str, str]
    pictures: dict[str, Pictures]
    thumbnails: dict[str, str]

    @property
    def instances(self) -> Set:
        return self.pictures["instance"].set

    @property
    def findings(self) -> list[Finding]:
        return [finding for pictures in self.pictures.values() for finding in pictures.findings]

    @property
    def verdict(self) -> str:
        """What comes of it, in a sentence."""
        counts = findings_as_json(self.findings)["counts"]
        words = [f"pictures that will be trained: {len(self.instances.samples)}"]
        if counts["left out"]:
            words.append(f"files and folders that are left out: {counts['left out']}")
        words += [f"warnings: {counts['warning']}"] if counts["warning"] else []
        return ", ".join(words)

    def frame(self, pictures: Set, index: int) -> Frame:
        """Returns what is seen of a picture, of one that is cut at random the middle."""
        sample = pictures.samples[index]
        return pictures.framing.frame(sample.size, pictures.buckets[index], None)


def check(config: TrainConfig, num_processes: int = 1, page: bool = True) -> Checked:
    """Looks at everything that a run of this configuration would train on.

    Args:
        config: the run's.
        num_processes: that would train it.
        page: thumbnails are made.

    Raises:
        UsageError, RunError: what would stop the run, too, but for being strict: `refuse_any`
            says that of the findings when they are shown.
    """
    base = base_of(config)
    config = config.for_base(base.family.name, base.resolution)
    config = dataclasses.replace(config, strict=False)
    shapes, reader, seed = framing(config, base), reader_before(config, base), config.seed or 0
    look(config, base)
    thumbnails: dict[str, str] = {}

    def keep(sample: Sample, facts: Facts, thumbnail: Image.Image) -> None:
        thumbnails[sample.name] = data_uri(thumbnail)

    found = find_sources(config, seed)
    if config.with_prior_preservation and has_class_pictures(config):
        found += open_source(class_spec(config))
    pictures: dict[str, Pictures] = {}
    kinds: tuple[Kind, ...] = ("instance", "class")
    for kind in kinds:
        sources = [source for source in found if source.spec.kind == kind]
        if sources:
            looked = look_at(
                config, sources, kind, shapes, seed, open_store(config), reader,
                pictures["instance"].set.samples if kind == "class" else (),
                thumbnails=keep if page else None, may_be_none=kind == "class",
            )  # fmt: skip
            if looked:
                pictures[kind] = looked
    plan = Plan.of(config, pictures["instance"].set, num_processes)
    rows = {"model": f"{config.pretrained_model_name_or_path} ({base.family.label})"}
    rows |= plan.rows()
    if "class" in pictures:
        rows["pictures"] += f", and {len(pictures['class'].set.samples)} of the class"
    if "class" in pictures or config.with_prior_preservation:
        rows["batch"] += ", as many class pictures on top"
    if config.with_prior_preservation:
        there = len(pictures["class"].set.samples) if "class" in pictures else 0
        check_class_pictures(config, there, base.family)
        missing = max(0, config.num_class_images - there)
        rows["class pictures"] = f"{there} there, {missing} will be generated"
    if config.max_train_samples and config.seed is None:
        rows["pictures"] += " (others than those that a run without --seed will draw)"
    rows["cut away"] = _cut_away(pictures["instance"].set)
    rows["disk"] = disk(config, base, plan, pictures)
    return Checked(plan, reader, rows, pictures, thumbnails)


def _cut_away(pictures: Set) -> str:
    """Returns how much of the pictures is cut away, and of which most."""
    losses = sorted(
        (
            (pictures.framing.frame(s.size, bucket, None).crop_loss, s.name)
            for s, bucket in zip(pictures.samples, pictures.buckets, strict=True)
        ),
        reverse=True,
    )
    mean = sum(loss for loss, _ in losses) / len(losses)
    most = [f"{Path(name).name[-40:]} {loss:.0%}" for loss, name in losses[:WORST] if loss >= 0.05]
    return f"{mean:.1%} of the pictures on average" + (f"; {', '.join(most)}" if most else "")


def disk(config: TrainConfig, base: Base, plan: Plan, pictures: dict[str, Pictures]) -> str:
    """Returns what caches, checkpoints and files take."""
    vae = base.vae_config
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    width = torch.finfo(DTYPES[config.vae_precision]).bits // 8
    size = (vae.get("latent_channels", 4), factor, width)
    latents = sum(latent_bytes(p.set, *size) for p in pictures.values())
    adapted = inject_all(
        dataclasses.replace(config, init_lora_weights=None), base.family, base.skeleton.models, 0
    )
    parameters = sum(p.numel() for model in adapted.values() for p in lora_layers(model))
    words = []
    if config.cache_latents in ("auto", "disk"):
        words.append(f"latents {mib(latents)}")
    if config.cache_text_embeddings in ("auto", "disk") and not (
        config.train_text_encoder or config.token_abstraction
    ):
        samples = [s for p in pictures.values() for s in p.set.samples]
        count = len({f for s in samples for f in longest_form(s.captions, s.source.rules)})
        varies = any(s.source.rules.varies for s in samples)
        if varies:  # each sample may have another one
            count = min(MOST, plan.num_steps * plan.samples_per_step)
        configs = [base.skeleton.configs[c] for c in base.family.text_encoders]
        precision = DTYPES[config.mixed_precision or "no"]
        one = text_bytes(configs, config.max_token_length, precision)
        words.append(f"text embeddings {'up to ' * varies}{mib(count * one)}")
    words.append(f"what is known of pictures {mib(4096 * sum(map(_number, pictures.values())))}")
    moments = 2 if config.use_8bit_adam else 8
    count = math.ceil(plan.num_steps / config.checkpointing_steps) - (
        plan.num_steps % config.checkpointing_steps != 0
    )
    count = min(count, config.checkpoints_total_limit or count)
    if count:
        words.append(f"{count} checkpoints {mib(count * parameters * (4 + moments))}")
    saved = 4 if config.save_precision == "fp32" else 2
    words.append(f"LoRA files {mib(2 * parameters * saved)}")
    return ", ".join(words)


def _number(pictures: Pictures) -> int:
    return len(pictures.set.samples)


def lines(checked: Checked) -> str:
    """Returns what a terminal shows."""
    table = [f"  {row}" for row in _bucket_lines(checked)]
    findings = [f"  {line}" for line in report_lines(checked.findings)]
    summary = report.Summary(checked.rows).text()
    return "\n".join([summary, "", *table, "", *findings, *([""] * bool(findings))])


def _bucket_lines(checked: Checked) -> list[str]:
    rows = [
        (
            f"{b.width}×{b.height}", str(b.pictures), str(b.samples), str(b.batches),
            str(b.left_over or ""), f"{mean:.1%}", f"{worst:.1%}",
        )
        for b, mean, worst in _buckets(checked)
    ]  # fmt: skip
    head = ("bucket", "pictures", "an epoch", "batches", "left over", "cut away", "at most")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (head, *rows)
    ]


def _buckets(checked: Checked) -> list[tuple[PageBucket, float, float]]:
    """Returns the buckets, with the mean and the largest part that is cut away in each."""
    pictures, epochs = checked.instances, checked.plan.epochs
    losses: dict[Size, list[float]] = {}
    for index, bucket in enumerate(pictures.buckets):
        losses.setdefault(bucket, []).append(checked.frame(pictures, index).crop_loss)
    table = []
    for (width, height), samples in sorted(epochs.buckets.items(), key=lambda item: -item[1]):
        cut = losses[width, height]
        batches = math.ceil(samples / epochs.batch)
        bucket_row = PageBucket(width, height, len(cut), samples, batches, samples % epochs.batch)
        table.append((bucket_row, sum(cut) / len(cut), max(cut)))
    return table


def as_json(checked: Checked) -> str:
    """Returns everything, for scripts: findings, pictures with their cuts, buckets, arithmetic."""
    plan = checked.plan
    pictures = [
        {
            "name": sample.name,
            "kind": kind,
            "size": sample.size,
            "bucket": frame.size,
            "resized": frame.resized,
            "crop": frame.corner,
            "random_crop": found.set.is_random(index),
            "crop_loss": round(frame.crop_loss, 6),
            "scale": round(frame.scale, 6),
            "repeats": sample.source.repeats,
            "captions": sample.captions,
        }
        for kind, found in checked.pictures.items()
        for index, sample in enumerate(found.set.samples)
        for frame in [checked.frame(found.set, index)]
    ]
    buckets = [dataclasses.asdict(bucket) for bucket, _, _ in _buckets(checked)]
    numbers = {
        "samples_per_epoch": plan.num_samples,
        "samples_per_step": plan.samples_per_step,
        "steps_per_epoch": plan.epochs.num_steps,
        "steps": plan.num_steps,
    }
    found = findings_as_json(checked.findings)
    everything = {"verdict": checked.verdict, "summary": checked.rows, **numbers}
    everything |= {"buckets": buckets, **found, "pictures": pictures}
    return json.dumps(everything, indent=2)


def write(checked: Checked, path: Path) -> None:
    """Writes the page; raises RunError if the disk does not take it."""
    of_name: dict[str, list[Finding]] = {}
    for finding in checked.findings:
        of_name.setdefault(finding.name, []).append(finding)
    shown = [
        _page_picture(checked, found.set, index, of_name)
        for found in checked.pictures.values()
        for index, sample in enumerate(found.set.samples)
        if sample.name in checked.thumbnails
    ]
    places = [str(s.spec.path or s.spec.dataset) for s in checked.pictures["instance"].sources]
    page_report = PageReport(
        title=", ".join(dict.fromkeys(places)),
        verdict=checked.verdict,
        rows=checked.rows,
        buckets=[bucket for bucket, _, _ in _buckets(checked)],
        leftovers=checked.rows.get("left over", ""),
        pictures=shown,
        total=sum(len(found.set.samples) for found in checked.pictures.values()),
        findings=checked.findings,
    )
    write_page(path, page_report)


def _page_picture(
    checked: Checked, pictures: Set, index: int, of_name: dict[str, list[Finding]]
) -> PagePicture:
    sample, frame = pictures.samples[index], checked.frame(pictures, index)
    (width, height), (left, top) = frame.resized, frame.corner
    caption = max(longest_form(sample.captions, sample.source.rules), key=len)
    return PagePicture(
        name=sample.name,
        thumbnail=checked.thumbnails[sample.name],
        size=sample.size,
        crop=(
            left / width,
            top / height,
            (left + frame.size[0]) / width,
            (top + frame.size[1]) / height,
        ),
        bucket=f"{frame.size[0]}×{frame.size[1]}",
        crop_loss=frame.crop_loss,
        scale=frame.scale,
        random_crop=pictures.is_random(index),
        caption=caption,
        tokens=checked.reader.count([caption])[caption],
        findings=tuple(of_name.get(sample.name, ())),
    )
