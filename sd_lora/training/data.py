"""The data of a run by its configuration: sources, crops, pixels, and the checked images."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sd_lora.config.kohya import read_dataset_config
from sd_lora.config.options.dreambooth import ClassImages
from sd_lora.config.options.sources import source_specs
from sd_lora.config.options.validation import num_held_out
from sd_lora.config.schema import OPTIONS, RunConfig, TrainConfig
from sd_lora.config.sources import Kind
from sd_lora.data.batches.stream import ImageSet
from sd_lora.data.cache.latents import PixelSettings
from sd_lora.data.cache.store import Store
from sd_lora.data.check.scan import Thumbnails
from sd_lora.data.check.usable import UsableImages, check_images
from sd_lora.data.images.buckets import CropSettings, Size
from sd_lora.data.images.decode import colour
from sd_lora.data.sources.open import open_source
from sd_lora.data.sources.samples import Sample, Source
from sd_lora.errors import UsageError, did_you_mean
from sd_lora.findings import Finding
from sd_lora.models.caption_encoder import CaptionEncoder
from sd_lora.models.load import Base, find_base
from sd_lora.models.published import PublishedBase
from sd_lora.report.events import Listener, tracked
from sd_lora.seeds import shuffled
from sd_lora.training.class_images import has_class_images
from sd_lora.training.validation import hold_out


def base_of(config: TrainConfig) -> Base:
    """The base model of a run, without its weights; raises the errors of `find_base`."""
    if config.published_family:
        return PublishedBase.of_family(config.published_family)
    return find_base(
        config.base_model,
        **config.hub_options,
        vae=config.pretrained_vae_model_name_or_path,
        prediction_type=config.prediction_type,
    )


def find_sources(config: RunConfig, seed: int) -> list[Source]:
    """Open the sources of a run, with at most max_train_samples instances.

    Raises:
        UsageError: a source that cannot be opened, no source of instances, or class images from
            two places.
    """
    sources = [source for spec in source_specs(config) for source in open_source(spec)]
    if config.dataset_config:
        sources[0].findings[:0] = _notes(config, config.dataset_config)
    if not any(source.spec.kind == "instance" for source in sources):
        raise UsageError("all sources hold class images: add one of kind instance to train on")
    of_class = next((s for s in sources if s.spec.kind == "class"), None)
    if of_class and config.class_images:
        raise UsageError(
            "prior preservation has a folder of class images, and a source has class images too "
            f"({of_class.spec.where}): keep one of the two"
        )
    if config.max_train_samples is None:
        return sources
    trained = [source for source in sources if source.spec.kind == "instance"]
    if any(source.count is None for source in trained):
        if len(trained) > 1:
            raise UsageError(
                "max_train_samples cannot choose among several streamed sources: stream one only"
            )
        kept = [_first(trained[0], config.max_train_samples)]
    else:
        kept = list(_chosen(trained, config.max_train_samples, seed))
    return [*kept, *(source for source in sources if source.spec.kind == "class")]


def _notes(config: RunConfig, path: str) -> list[Finding]:
    """Findings on kohya's dataset configuration, and on options that overrule it."""
    specs, settings, notes = read_dataset_config(path)
    if config.aspect_ratio_buckets and "aspect_ratio_buckets" not in settings:
        text = (
            "has no enable_bucket, so kohya would train squares; here images are trained in "
            "buckets (--no-aspect_ratio_buckets: in squares)"
        )
        notes.append(Finding("buckets", path, text))
    for name, value in settings.items():
        own = getattr(config, name)
        if own != value and not OPTIONS[name].missing(config):
            text = f"has {name} = {value}, and the run overrules it by {own}"
            if name == "resolution" and any(spec.resolutions for spec in specs):
                text = f"has several resolutions, which it keeps; {own} is that of sample images"
            notes.append(Finding("setting-overruled", path, text))
    return notes


def _first(source: Source, most: int) -> Source:
    """The source's first rows, for streams."""
    return dataclasses.replace(source, rows=lambda: itertools.islice(source.rows(), most))


def _chosen(sources: list[Source], most: int, seed: int) -> Iterator[Source]:
    """Yield sources with `most` rows drawn from all of them together."""
    total = sum(source.count or 0 for source in sources)
    drawn = set(shuffled(total, seed, "max_train_samples")[:most])
    first = 0
    for source in sources:
        here = {i - first for i in drawn if first <= i < first + (source.count or 0)}
        first += source.count or 0
        yield dataclasses.replace(source, rows=_Rows(source, here), count=len(here))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of a source by number, picklable."""

    source: Source
    kept: set[int]

    def __call__(self) -> Iterator[Sample]:
        return (row for i, row in enumerate(self.source.rows()) if i in self.kept)


def crop_settings_of(config: RunConfig, base: Base) -> CropSettings:
    """The buckets or squares of a run.

    Raises:
        UsageError: resolutions or a bucket step that VAE and UNet cannot halve, or side limits
            without any bucket.
    """
    vae, unet = base.pixels_per_latent, base.latent_multiple
    whole = vae * unet
    specs = source_specs(config)
    sides = {config.resolution, *(side for spec in specs for side in spec.resolutions or ())}
    odd = [side for side in sorted(sides) if side % whole]
    if odd:
        near = (str(max(whole, round(side / whole) * whole)) for side in odd)
        raise UsageError(
            f"resolution {', '.join(map(str, odd))} is not a multiple of {whole} (this model has "
            f"{vae} pixels a latent, and its UNet needs multiples of {unet} latents): take "
            f"{', '.join(near)}"
        )
    chosen = CropSettings(
        config.resolution,
        step=(config.bucket_step or whole) if config.aspect_ratio_buckets else None,
        min_side=config.bucket_min_side,
        max_side=config.bucket_max_side,
        upscale=not config.bucket_no_upscale,
        min_images=config.bucket_min_images,
        random_crop=None if config.center_crop is None else not config.center_crop,
        interpolation=config.image_interpolation_mode,
    )
    if chosen.step and chosen.step % vae:
        raise UsageError(
            f"bucket_step {chosen.step} is not a multiple of {vae}, this model's pixels a latent: "
            f"take {whole}, which its UNet halves without a rest"
        )
    own = {chosen.of(side, spec) for spec in specs for side in spec.trained_at}
    for settings in sorted({chosen, *own}, key=lambda settings: settings.resolution):
        if not settings.buckets:
            least, most = settings.sides
            raise UsageError(
                f"no bucket fits: sides from {least} to {most} pixels in steps of {settings.step} "
                f"always have more than {settings.resolution}² pixels. Lower bucket_min_side"
            )
    return chosen


def pixel_settings_of(config: RunConfig, base: Base) -> PixelSettings:
    """How images become pixels; raises UsageError for an unknown colour."""
    return PixelSettings(
        config.image_interpolation_mode,
        colour(config.alpha_background),
        config.alpha_mask,
        base.pixels_per_latent,
    )


def left_out(
    usable: Sequence[tuple[Sample, Size]], patterns: str | None, others: Collection[str] = ()
) -> tuple[list[tuple[Sample, Size]], list[str]]:
    """Usable images without those that `leave_out` names, and the names of these.

    A pattern is the end of an image's path, from a folder's name on. others: names of images with
    findings, which may be left out for their own reasons.

    Raises:
        UsageError: a pattern that names no image, or no image that stays.
    """
    asked = [text for part in (patterns or "").split(",") if (text := part.strip())]
    found: dict[str, list[str]] = {pattern: [] for pattern in asked}
    kept = []
    for sample, bucket in usable:
        path = Path(sample.name).as_posix()
        names = [p for p in asked if _is_named(path, p)]
        for pattern in names:
            found[pattern].append(sample.name)
        if not names:
            kept.append((sample, bucket))
    there = [Path(name).as_posix() for name in others]
    empty = [p for p in asked if not found[p] and not any(_is_named(path, p) for path in there)]
    if empty:
        known = {Path(sample.name).name for sample, _ in usable}
        hints = "".join(did_you_mean(Path(pattern).name, known) for pattern in empty[:1])
        raise UsageError(f"leave_out names no usable image: {', '.join(empty)}.{hints}")
    if usable and not kept:
        raise UsageError(f"leave_out {patterns} leaves no image to train: name fewer")
    return kept, list(dict.fromkeys(name for names in found.values() for name in names))


def _is_named(path: str, pattern: str) -> bool:
    """Whether a path ends with a text, or with one that the pattern is of."""
    whole = f"/{path}"
    return whole.endswith(f"/{pattern}") or fnmatchcase(whole, f"*/{pattern}")


class RunImages:
    """The images of a run, checked.

    by_kind: "instance", and "class" for prior preservation → usable images with their findings.
    held_out: instance images that are validated and not trained; None without any.

    Args:
        config, seed: of the run.
        crop_settings: how images get their shapes.
        store: caches on disk, for facts of images.
        caption_encoder: counts the tokens of captions.
        emit: takes progress events.
        once: runs work on one of several processes, and returns its result on all of them.
        thumbnails: takes thumbnails, as `scan` does.
    """

    def __init__(
        self,
        config: RunConfig,
        crop_settings: CropSettings,
        seed: int,
        store: Store,
        caption_encoder: CaptionEncoder,
        emit: Listener,
        once: Callable[[Callable[[], Any]], Any] = lambda work: work(),
        thumbnails: Thumbnails | None = None,
    ) -> None:
        self.config, self.crop_settings, self.seed = config, crop_settings, seed
        self.store, self.caption_encoder, self.emit = store, caption_encoder, emit
        self.once, self.thumbnails = once, thumbnails
        self.by_kind: dict[str, UsableImages] = {}
        self.held_out: UsableImages | None = None

    @property
    def instances(self) -> ImageSet:
        """The images to learn."""
        return self.by_kind["instance"].set

    @property
    def all(self) -> list[UsableImages]:
        """All usable images, those held out too."""
        return [*self.by_kind.values(), *([self.held_out] if self.held_out else [])]

    @property
    def classes(self) -> ImageSet | None:
        """The class images; None without any."""
        return self.by_kind["class"].set if "class" in self.by_kind else None

    @property
    def has_classes(self) -> bool:
        """Whether class images are trained, those included that the run has still to draw."""
        return bool(self.classes or self.config.class_images)

    @property
    def num_class_images(self) -> int:
        """Number of usable class images."""
        return len(self.classes.samples) if self.classes else 0

    @property
    def findings(self) -> list[Finding]:
        """All findings."""
        return [finding for found in self.by_kind.values() for finding in found.findings]

    def check_sources(self) -> None:
        """Check all images that exist at the start.

        Raises:
            UsageError, RunError: sources that cannot be read, or no usable image.
        """
        sources = find_sources(self.config, self.seed)
        of_class = [source for source in sources if source.spec.kind == "class"]
        self._check([s for s in sources if s.spec.kind == "instance"], "instance")
        if of_class:
            self._check(of_class, "class")
        wanted = self.config.class_images
        if wanted and self.once(lambda: has_class_images(wanted)):
            self.check_class_folder(wanted, required=False)

    def check_class_folder(self, wanted: ClassImages, required: bool = True) -> None:
        """Check the folder of class images: at the start, and again when it has been filled."""
        self._check(open_source(wanted.spec), "class", required)

    def _check(self, sources: list[Source], kind: Kind, required: bool = True) -> None:
        instances = self.instances.samples if kind == "class" else ()
        checked = self.once(
            lambda: check_images(
                sources, kind, self.crop_settings, self.store, self.caption_encoder,
                lambda items, total: tracked(items, self.emit, "checking", total),
                alpha_mask=self.config.alpha_mask, strict=self.config.strict, instances=instances,
                thumbnails=self.thumbnails, required=required,
            )
        )  # fmt: skip
        usable, findings = checked.usable, checked.findings
        if kind == "instance":
            known = {finding.name for finding in findings}
            usable, named = left_out(usable, self.config.leave_out, known)
            findings = [*findings, *(Finding("named-out", name) for name in named)]
            different = len({sample.digest for sample, _ in usable})
            count = num_held_out(self.config.holdout, different)
            if self.config.validate_every == 0:
                count = 0  # for nothing
            usable, held_out = hold_out(usable, count)
            if images := self._set(held_out, kind):
                self.held_out = UsableImages(sources, images, [], checked.facts)
                names = dict.fromkeys(sample.name for sample in images.samples)
                findings = [*findings, *(Finding("held-out", name) for name in names)]
        if images := self._set(usable, kind):
            self.by_kind[kind] = UsableImages(sources, images, findings, checked.facts)

    def _set(self, usable: Sequence[tuple[Sample, Size]], kind: Kind) -> ImageSet | None:
        """The set of usable images; None without any."""
        if not usable:
            return None
        samples, buckets = map(list, zip(*usable, strict=True))
        return ImageSet(samples, buckets, self.crop_settings, kind, self.seed)
