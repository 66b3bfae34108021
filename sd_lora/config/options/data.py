"""Options of the data: sources, captions, crops and caches."""

from sd_lora.config.options.dreambooth import DreamBoothOptions
from sd_lora.config.options.encoding import EncodingOptions
from sd_lora.config.options.images import ImageOptions
from sd_lora.config.options.per_source import PerSourceOptions
from sd_lora.config.options.sources import SourceOptions


class DataOptions(
    EncodingOptions, ImageOptions, DreamBoothOptions, SourceOptions, PerSourceOptions
):
    """Options of the section data."""
