"""`sd-lora check`: the images, captions, crops and steps of a run, without a model."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from sd_lora.adapters.inject import lora_layers
from sd_lora.config.schema import RunConfig, TrainConfig
from sd_lora.data.batches.caption_rules import longest_form
from sd_lora.data.batches.stream import ImageSet
from sd_lora.data.cache.placement import latent_bytes
from sd_lora.data.check.page import (
    PageBucket,
    PageImage,
    PageReport,
    data_uri,
    findings_as_json,
    report_lines,
    write_page,
)
from sd_lora.data.images.buckets import Size
from sd_lora.data.images.facts import Facts
from sd_lora.data.sources.samples import Sample
from sd_lora.errors import counted
from sd_lora.files import mib
from sd_lora.findings import Finding
from sd_lora.models.load import Base
from sd_lora.report.events import Listener, counting, to_all
from sd_lora.report.summary import Summary
from sd_lora.training.adapt import components_of, inject_all
from sd_lora.training.budget import within_budget
from sd_lora.training.caches import open_store
from sd_lora.training.cards import Card
from sd_lora.training.class_images import check_class_images
from sd_lora.training.conditioning import (
    MAX_CAPTIONS,
    embedding_bytes,
    planned_caption_encoder,
)
from sd_lora.training.data import RunImages, base_of, crop_settings_of, pixel_settings_of
from sd_lora.training.disk import checkpoint_bytes, files_bytes, num_kept
from sd_lora.training.forecast import forecast_rows, warnings_of
from sd_lora.training.lr_schedules import factor_of
from sd_lora.training.output_folder import earlier_work
from sd_lora.training.plan import Plan
from sd_lora.training.prediction import Prediction, counted_buckets, predict
from sd_lora.training.processes import DTYPES, Device, of_card, vae_dtype
from sd_lora.training.summary import data_rows

NUM_WORST = 5
"""Images named as those that lose most to their crop."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """The result of a check.

    rows: label → text of the summary. thumbnails: name of an image → data URI. warnings: on
    settings. prediction: on the card that was named.
    """

    plan: Plan
    images: RunImages
    rows: dict[str, str]
    thumbnails: dict[str, str]
    warnings: list[Finding]
    prediction: Prediction | None = None

    @property
    def findings(self) -> list[Finding]:
        """All findings, on images and on settings."""
        return [*self.images.findings, *self.warnings]

    @property
    def verdict(self) -> str:
        """One sentence with the counts."""
        counts = findings_as_json(self.findings)["counts"]
        names = {sample.name for sample in self.images.instances.samples}
        words = [f"images that will be trained: {len(names)}"]
        if counts["left out"]:
            words.append(f"files and folders that are left out: {counts['left out']}")
        words += [f"warnings: {counts['warning']}"] if counts["warning"] else []
        return ", ".join(words)


def check(
    config: TrainConfig,
    num_processes: int = 1,
    page: bool = True,
    listeners: Sequence[Listener] = (),
    card: Card | None = None,
) -> Checked:
    """Check all images and captions of a run, without loading a model or training.

    Args:
        config: of the run.
        num_processes: number of processes that will train.
        page: whether thumbnails are made.
        listeners: functions of one event, for progress.
        card: predict memory and time of the steps on it.

    Raises:
        UsageError, RunError: the errors of the run, but for findings of a strict run:
            `refuse_problems` raises these when they have been shown.
    """
    base = base_of(config)
    config = config.resolve(base.family.name, base.resolution)
    config = config.replace(strict=False)
    crop_settings, seed = crop_settings_of(config, base), config.seed or 0
    caption_encoder = planned_caption_encoder(config, base)
    pixel_settings_of(config, base)
    thumbnails: dict[str, str] = {}

    def keep(sample: Sample, facts: Facts, thumbnail: Image.Image) -> None:
        thumbnails[sample.name] = data_uri(thumbnail)

    images = RunImages(
        config, crop_settings, seed, open_store(config), caption_encoder, to_all(listeners),
        thumbnails=keep if page else None,
    )  # fmt: skip
    images.check_sources()
    plan = Plan.of(config, images.instances, num_processes, images.has_classes)
    rows = {"model": _model(config, base)}
    rows |= data_rows(plan, images)
    if config.lacks_prompt:
        rows["prompt"] = "not given, and there are no captions: a run needs --prompt"
    if not caption_encoder.tokenizers:
        rows["tokens"] = "not counted: no tokenizer is here: give --model"
    device = Device.planned(config)
    factor_of(plan.config, plan.num_steps)  # reads a file of points
    rows |= forecast_rows(plan, components_of(config, base.family), device)
    wanted = config.class_images
    if wanted:
        there = images.num_class_images
        check_class_images(wanted, there, base.family)
        missing = max(0, wanted.count - there)
        rows["class images"] = f"{there} there, {missing} will be generated"
    if config.max_train_samples and config.seed is None:
        rows["images"] += " (others than those that a run without --seed will draw)"
    rows["cut away"] = _cut_away(images.instances)
    rows["disk"] = disk(config, base, plan, images, DTYPES[device.precision])
    warnings = [*warnings_of(plan, device, base.width), *_earlier(config)]
    prediction = None
    there_too = of_card(config, card.precision) if card else config
    recomputed = within_budget(plan, base, "cuda" if card else device.type, there_too)
    if recomputed:
        rows["memory budget"] = recomputed.text
    if card:
        emit, label = to_all(listeners), f"a step on {card.name}"
        with counting(emit, label, len(counted_buckets(plan)), "bucket") as advance:
            prediction = predict(plan, base, card, recomputed, advance)
        rows["card"] = prediction.answer
    return Checked(plan, images, rows, thumbnails, warnings, prediction)


def _model(config: RunConfig, base: Base) -> str:
    if config.published_family:
        return f"not given: {base.name} is assumed (--family: another one, --model: yours)"
    return f"{config.base_model} ({base.family.label})"


def _earlier(config: RunConfig) -> list[Finding]:
    """A warning of an output folder whose work a run would have to replace."""
    asked = config.overwrite_output_dir or config.resume_from_checkpoint
    told = "" if asked else earlier_work(config)
    return [Finding("earlier-work", "output folder", told)] if told else []


def _cut_away(images: ImageSet) -> str:
    """Mean crop loss, and the images that lose most."""
    losses = sorted(
        (
            (images.shown_crop(index).crop_loss, sample.name)
            for index, sample in enumerate(images.samples)
        ),
        reverse=True,
    )
    mean = sum(loss for loss, _ in losses) / len(losses)
    most = [
        f"{Path(name).name[-40:]} {loss:.0%}" for loss, name in losses[:NUM_WORST] if loss >= 0.05
    ]
    return f"{mean:.1%} of the images on average" + (f"; {', '.join(most)}" if most else "")


def disk(
    config: RunConfig, base: Base, plan: Plan, images: RunImages, precision: torch.dtype
) -> str:
    """Disk space of caches, checkpoints and files. precision: of the frozen base."""
    width = vae_dtype(config).itemsize
    size = (base.vae_config.get("latent_channels", 4), base.pixels_per_latent, width)
    latents = sum(latent_bytes(p.set, *size) for p in images.by_kind.values())
    plain = config.replace(init_lora_weights=None)
    adapted = inject_all(plain, base.family, base.meta_pipeline.models, 0)
    parameters = sum(p.numel() for model in adapted.values() for p in lora_layers(model))
    words = []
    if config.cache_latents in ("auto", "disk"):
        words.append(f"latents {mib(latents)}")
    if config.cache_text_embeddings in ("auto", "disk") and not config.trains_text:
        samples = [s for p in images.by_kind.values() for s in p.set.samples]
        count = len({f for s in samples for f in longest_form(s.captions, s.source.rules)})
        varies = any(s.source.rules.varies for s in samples)
        if varies:  # each sample may have another one
            count = min(MAX_CAPTIONS, plan.num_steps * plan.samples_per_step)
        configs = [base.meta_pipeline.configs[c] for c in base.family.text_encoders]
        one = embedding_bytes(configs, images.caption_encoder.max_pieces, precision)
        words.append(f"text embeddings {'up to ' * varies}{mib(count * one)}")
    number = sum(len(found.set.samples) for found in images.by_kind.values())
    words.append(f"facts of images {mib(4096 * number)}")
    one, count = checkpoint_bytes(config, parameters), num_kept(config, plan.num_steps)
    words.append(f"{counted(count, 'checkpoint')} {mib(count * one)}")
    words.append(f"LoRA files {mib(files_bytes(config, parameters))}")
    return ", ".join(words)


def lines(checked: Checked) -> str:
    """The lines for a terminal: summary, buckets, findings."""
    table = [f"  {row}" for row in _bucket_lines(checked)]
    if checked.prediction:
        table += ["", *(f"  {row}" for row in _in_columns(checked.prediction.table))]
    findings = [f"  {line}" for line in report_lines(checked.findings)]
    summary = Summary(checked.rows).text()
    return "\n".join([summary, "", *table, "", *findings, *([""] * bool(findings))])


def _bucket_lines(checked: Checked) -> list[str]:
    rows = [
        (
            f"{b.width}×{b.height}", str(b.images), str(b.samples), str(b.batches),
            str(b.left_over or ""), f"{mean:.1%}", f"{worst:.1%}",
        )
        for b, mean, worst in _buckets(checked)
    ]  # fmt: skip
    head = ("bucket", "images", "an epoch", "batches", "left over", "cut away", "at most")
    return _in_columns([head, *rows])


def _in_columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _buckets(checked: Checked) -> list[tuple[PageBucket, float, float]]:
    """Buckets, each with the mean and the largest crop loss of its images."""
    images, epochs = checked.images.instances, checked.plan.epochs
    losses: dict[Size, list[float]] = {}
    for index, bucket in enumerate(images.buckets):
        losses.setdefault(bucket, []).append(images.shown_crop(index).crop_loss)
    table = []
    for (width, height), samples in sorted(epochs.buckets.items(), key=lambda item: -item[1]):
        cut = losses[width, height]
        batches = math.ceil(samples / epochs.batch)
        bucket_row = PageBucket(width, height, len(cut), samples, batches, samples % epochs.batch)
        table.append((bucket_row, sum(cut) / len(cut), max(cut)))
    return table


def as_json(checked: Checked) -> str:
    """Everything for scripts: findings, images with their crops, buckets, arithmetic."""
    plan = checked.plan
    images = [
        {
            "name": sample.name,
            "kind": kind,
            "size": sample.size,
            "resolution": sample.resolution or checked.images.crop_settings.resolution,
            "bucket": crop.size,
            "resized": crop.resized,
            "crop": crop.corner,
            "random_crop": found.set.is_random(index),
            "hand_crop": sample.hand_crop and sample.hand_crop.numbers,
            "crop_loss": round(crop.crop_loss, 6),
            "scale": round(crop.scale, 6),
            "repeats": sample.source.repeats,
            "mask": sample.mask and sample.mask.name,
            "captions": sample.captions,
        }
        for kind, found in checked.images.by_kind.items()
        for index, sample in enumerate(found.set.samples)
        for crop in [found.set.shown_crop(index)]
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
    if checked.prediction:
        everything["prediction"] = checked.prediction.numbers()
    everything |= {"buckets": buckets, **found, "images": images}
    return json.dumps(everything, indent=2)


def write(checked: Checked, path: Path) -> None:
    """Write the page; raises RunError on a failed write."""
    of_name: dict[str, list[Finding]] = {}
    for finding in checked.findings:
        of_name.setdefault(finding.name, []).append(finding)
    shown = [
        _page_image(checked, found.set, index, of_name)
        for found in checked.images.by_kind.values()
        for index, sample in enumerate(found.set.samples)
        if sample.name in checked.thumbnails
    ]
    places = [
        str(s.spec.path or s.spec.dataset) for s in checked.images.by_kind["instance"].sources
    ]
    page_report = PageReport(
        title=", ".join(dict.fromkeys(places)),
        verdict=checked.verdict,
        rows=checked.rows,
        rates=_rates(checked.plan),
        buckets=[bucket for bucket, _, _ in _buckets(checked)],
        leftovers=checked.rows.get("left over", ""),
        images=shown,
        total=sum(len(found.set.samples) for found in checked.images.by_kind.values()),
        findings=checked.findings,
    )
    write_page(path, page_report)


CURVE_POINTS = 101
"""Points of the learning rate's curve: one a hundredth of the run."""


def _rates(plan: Plan) -> list[float]:
    """Factors of the learning rate, at equal distances over the run."""
    factor, last = factor_of(plan.config, plan.num_steps), plan.num_steps - 1
    return [factor(round(last * i / (CURVE_POINTS - 1))) for i in range(CURVE_POINTS)]


def _page_image(
    checked: Checked, images: ImageSet, index: int, of_name: dict[str, list[Finding]]
) -> PageImage:
    sample, crop = images.samples[index], images.shown_crop(index)
    (width, height), (left, top) = crop.resized, crop.corner
    caption = max(longest_form(sample.captions, sample.source.rules), key=len)
    return PageImage(
        name=sample.name,
        thumbnail=checked.thumbnails[sample.name],
        size=sample.size,
        crop=(
            left / width,
            top / height,
            (left + crop.size[0]) / width,
            (top + crop.size[1]) / height,
        ),
        bucket=f"{crop.size[0]}×{crop.size[1]}",
        crop_loss=crop.crop_loss,
        scale=crop.scale,
        random_crop=images.is_random(index),
        caption=caption,
        tokens=checked.images.caption_encoder.count_tokens([caption]).get(caption),
        findings=tuple(of_name.get(sample.name, ())),
        of_class=images.kind == "class",
    )
