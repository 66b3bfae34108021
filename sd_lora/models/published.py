"""The shapes of a published model, for checks that need a model and have none."""

import inspect
from functools import cached_property
from typing import Any

from diffusers import UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache

from sd_lora.errors import UsageError
from sd_lora.models.caption_encoder import CaptionEncoder
from sd_lora.models.families import detect_task, family_named
from sd_lora.models.load import CLIP_TOKENIZER, Base, Parts
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.published_configs import CONFIGS
from sd_lora.models.vae import standard_config


class PublishedBase(Base):
    """A published model of a family: its configurations are known, its weights are nowhere."""

    @classmethod
    def of_family(cls, name: str) -> "PublishedBase":
        """The published model of a family; raises UsageError for an unknown name."""
        family = family_named(name)
        parameters = inspect.signature(UNet2DConditionModel).parameters
        unet = {p.name: p.default for p in parameters.values()} | CONFIGS[name][family.denoiser]
        vae = standard_config(family)
        label = f"the published {family.label}"
        options = {"revision": None, "cache_dir": None, "variant": None}
        return cls(label, family, detect_task(unet), unet, vae, vae, None, {}, None, options)

    @cached_property
    def meta_pipeline(self) -> MetaPipeline:
        """The components of this base without weights: its own, for a LoRA is put into them."""
        return MetaPipeline(self.family, CONFIGS[self.family.name], self.name)

    def caption_encoder(self, tokenizer_name: str | None = None, **options: Any) -> CaptionEncoder:
        """Return a caption encoder for counting tokens; without tokenizers, where none is given or
        cached."""
        cached = isinstance(try_to_load_from_cache(CLIP_TOKENIZER, "vocab.json"), str)
        name = tokenizer_name or (CLIP_TOKENIZER if cached else None)
        if name is None:
            return CaptionEncoder(self.family, {}, **options)
        return super().caption_encoder(name, **options)

    def load(self, **_: Any) -> Parts:
        """Raise UsageError."""
        raise UsageError(f"{self.name} has no weights here, for checks alone: give --model")
