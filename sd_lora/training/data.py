"""What a run trains on, from its configuration: sources, shapes, looks, and class images."""

import dataclasses
import itertools
from collections.abc import Iterator

from sd_lora.config.kohya import read_dataset_config
from sd_lora.config.schema import TrainConfig
from sd_lora.config.sources import RULES, CaptionRules, SourceSpec, read_specs
from sd_lora.data.cache.latents import PixelSettings
from sd_lora.data.images.buckets import CropSettings
from sd_lora.data.images.decode import colour
from sd_lora.data.sources.open import open_source
from sd_lora.data.sources.samples import Sample, Source
from sd_lora.errors import UsageError
from sd_lora.findings import Finding
from sd_lora.models.load import Base, find_base
from sd_lora.seeds import shuffled


def base_of(config: TrainConfig) -> Base:
    """Returns the base model of a run, none of its weights read; raises what `find_base` raises."""
    return find_base(
        str(config.pretrained_model_name_or_path),
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        vae=config.pretrained_vae_model_name_or_path,
        prediction_type=config.prediction_type,
    )


def rules_of(config: TrainConfig) -> CaptionRules:
    """Returns what captions go through where their source does not say otherwise."""
    given = {name: getattr(config, name) for name in RULES}
    return CaptionRules(**{name: value for name, value in given.items() if value is not None})


def specs_of(config: TrainConfig) -> list[SourceSpec]:
    """Returns the sources that a configuration names; a folder of class images is not among them.

    Raises:
        UsageError: tables or a file of sources that cannot be read.
    """
    subject = config.mode == "dreambooth"
    defaults = SourceSpec(
        image_column=config.image_column,
        caption_column=config.caption_column,
        cache_dir=config.cache_dir,
        layout=config.data_layout,
        captions=config.captions_from,
        caption_extension=config.caption_extension,
        prompt=config.instance_prompt if subject else config.caption_default,
        repeats=config.repeats,
        random_flip=config.random_flip,
        rules=rules_of(config),
    )
    if config.sources is not None:
        column = config.caption_column or "text"  # in DreamBooth runs a folder has none by itself
        defaults = dataclasses.replace(defaults, caption_column=column)
        return read_specs(config.sources, defaults, "sources")
    if config.dataset_config:
        return read_dataset_config(config.dataset_config)[0]
    if config.dataset_name:
        name = dataclasses.replace(defaults, dataset=config.dataset_name, label="dataset_name")
        return [
            dataclasses.replace(
                name, config_name=config.dataset_config_name, streaming=config.streaming
            )
        ]
    if subject:
        prompted = dataclasses.replace(defaults, layout="plain", captions="prompt", recursive=False)
        return [
            dataclasses.replace(prompted, path=config.instance_data_dir, label="instance_data_dir")
        ]
    return [dataclasses.replace(defaults, path=config.train_data_dir, label="train_data_dir")]


def class_spec(config: TrainConfig) -> SourceSpec:
    """Returns the folder of class images as a source."""
    return SourceSpec(
        path=config.class_data_dir,
        layout="plain",
        captions="prompt",
        prompt=config.class_prompt,
        recursive=False,
        kind="class",
        random_flip=config.random_flip,
        label="class_data_dir",
    )


def find_sources(config: TrainConfig, seed: int) -> list[Source]:
    """Returns the sources of a run, at most max_train_samples of their images that are trained.

    Raises:
        UsageError: what `open_source` raises; no source of images to train.
    """
    sources = [source for spec in specs_of(config) for source in open_source(spec)]
    if config.dataset_config:
        sources[0].findings[:0] = _notes(config, config.dataset_config)
    if not any(source.spec.kind == "instance" for source in sources):
        raise UsageError("all sources are of class images: there is nothing to train")
    of_class = next((s for s in sources if s.spec.kind == "class"), None)
    if of_class and config.with_prior_preservation:
        raise UsageError(
            "with_prior_preservation takes class images from class_data_dir, and there are class "
            f"images among the sources, too ({of_class.spec.where}): keep one"
        )
    if config.max_train_samples is None:
        return sources
    trained = [source for source in sources if source.spec.kind == "instance"]
    if any(source.count is None for source in trained):
        if len(trained) > 1:
            raise UsageError("max_train_samples cannot choose among several sources that stream")
        kept = [_first(trained[0], config.max_train_samples)]
    else:
        kept = list(_chosen(trained, config.max_train_samples, seed))
    return [*kept, *(source for source in sources if source.spec.kind == "class")]


def _notes(config: TrainConfig, path: str) -> list[Finding]:
    """Returns what is to be known of kohya's dataset configuration, and of what overrules it."""
    _, settings, notes = read_dataset_config(path)
    if config.aspect_ratio_buckets and "aspect_ratio_buckets" not in settings:
        text = (
            "says nothing of enable_bucket, which kohya takes for squares: images are trained in "
            "buckets here (--no-aspect_ratio_buckets: in squares)"
        )
        notes.append(Finding("note", "buckets", path, text))
    for name, value in settings.items():
        own = getattr(config, name)
        means_something = config.aspect_ratio_buckets or not name.startswith("bucket_")
        if own != value and means_something:
            text = f"says {name} = {value}, and the run has {own}"
            notes.append(Finding("warning", "setting-overruled", path, text))
    return notes


def _first(source: Source, most: int) -> Source:
    """Returns the first rows of a stream."""
    return dataclasses.replace(source, rows=lambda: itertools.islice(source.rows(), most))


def _chosen(sources: list[Source], most: int, seed: int) -> Iterator[Source]:
    """Yields sources with the rows that were drawn from all of them."""
    total = sum(source.count or 0 for source in sources)
    drawn = set(shuffled(total, seed, "max_train_samples")[:most])
    first = 0
    for source in sources:
        here = {i - first for i in drawn if first <= i < first + (source.count or 0)}
        first += source.count or 0
        yield dataclasses.replace(source, rows=_Rows(source, here), count=len(here))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Some rows of a source, by number."""

    source: Source
    kept: set[int]

    def __call__(self) -> Iterator[Sample]:
        return (row for i, row in enumerate(self.source.rows()) if i in self.kept)


def crop_settings_of(config: TrainConfig, base: Base) -> CropSettings:
    """Returns how images get their shapes.

    Raises:
        UsageError: a resolution or step that VAE and UNet cannot halve so often, or sides of which
            there is no bucket.
    """
    vae, unet = base.pixels_per_latent, base.latent_multiple
    side, whole = config.side, vae * unet
    if side % whole:
        near = max(whole, round(side / whole) * whole)
        raise UsageError(
            f"resolution {side} is not a multiple of {whole} ({vae} pixels a latent of this "
            f"model, halved to {unet} by its UNet): take {near}"
        )
    chosen = CropSettings(
        side,
        step=(config.bucket_step or whole) if config.aspect_ratio_buckets else None,
        min_side=config.bucket_min_side,
        max_side=config.bucket_max_side,
        upscale=not config.bucket_no_upscale,
        min_images=config.bucket_min_pictures,
        random_crop=None if config.center_crop is None else not config.center_crop,
        interpolation=config.image_interpolation_mode,
    )
    if chosen.step and chosen.step % vae:
        raise UsageError(
            f"bucket_step {chosen.step} is not a multiple of {vae}, the pixels of a latent of this "
            f"model: {whole} is what its UNet halves without a rest"
        )
    if not chosen.buckets:
        raise UsageError(
            f"there is no bucket: of sides from {chosen.sides[0]} to {chosen.sides[1]} pixels in "
            f"steps of {chosen.step}, none has at most {side}² pixels. Lower bucket_min_side"
        )
    return chosen


def pixel_settings_of(config: TrainConfig, base: Base) -> PixelSettings:
    """Returns how images become pixels; raises UsageError for a colour that is none."""
    return PixelSettings(
        config.image_interpolation_mode,
        colour(config.alpha_background),
        config.alpha_mask,
        base.pixels_per_latent,
    )
