"""A family's pipeline without its weights: the modules that a LoRA file is made for.

What a file loads into depends on the modules alone, so checking one needs neither the base's
weights nor the time to read them; and since memory that is not touched is not taken, a second
SD1.5 costs nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from sd_lora.errors import UsageError
from sd_lora.models.families import FAMILIES, TEXT_TO_IMAGE, Family, detect, detect_task
from sd_lora.models.original import Layout
from sd_lora.models.published import CONFIGS


@dataclass(frozen=True)
class MetaPipeline:
    """A family's modules by their configurations: component ("unet", …) → arguments."""

    family: Family
    configs: Mapping[str, Mapping[str, Any]]
    source: str

    @classmethod
    def of_family(cls, family: Family) -> "MetaPipeline":
        """The published model of a family, the same object each time: SDXL's takes seconds."""
        return _published(family.name)

    @classmethod
    def of_models(cls, models: Mapping[str, Any], family: Family) -> "MetaPipeline":
        """That of live models: component → model."""
        configs = {c: _as_dict(m.config) for c, m in models.items() if c in family.components}
        return cls(family, configs, "the model")

    @classmethod
    def of_folder(cls, name: str) -> "MetaPipeline":
        """That of a diffusers folder, or of a hub id that is cached.

        Raises:
            UsageError: a configuration that is missing or broken, or no Stable Diffusion UNet.
        """
        unet = _config(name, "unet")
        family = detect(unet)
        configs = {"unet": unet}
        for component in family.text_encoders:
            configs[component] = _config(name, component)
        return cls(family, configs, name)

    @property
    def layout(self) -> Layout:
        return Layout.of(self.configs["unet"]) if "unet" in self.configs else Layout()

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """Component → model on the meta device: names and shapes.

        Raises:
            UsageError: configurations of which no model can be made.
        """
        return self._on_meta()

    def _on_meta(self) -> dict[str, nn.Module]:
        try:
            with torch.device("meta"):
                return {component: self._build(component) for component in self.configs}
        except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"{self.source} has a configuration that fails: {reason}") from None

    def pipeline(self) -> DiffusionPipeline:
        """Returns a fresh pipeline whose weights are never written."""
        models = self._on_meta()
        for model in models.values():
            model.to_empty(device="cpu")
        parts: dict[str, Any] = dict.fromkeys(("vae", "tokenizer", "scheduler"))
        parts |= dict.fromkeys(self.family.components) | models
        return build_pipeline(self.family, self.configs.get("unet", {}), parts)

    def _build(self, component: str) -> nn.Module:
        config = dict(self.configs[component])
        if component == "unet":
            return UNet2DConditionModel.from_config(config)
        cls = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
        return cls(CLIPTextConfig(**config))


def build_pipeline(
    family: Family, unet_config: Mapping[str, Any], parts: Mapping[str, Any]
) -> DiffusionPipeline:
    """Returns diffusers' pipeline of a family, for what its UNet is made for, over these parts."""
    classes = family.pipelines
    name = classes.get(detect_task(unet_config).name, classes[TEXT_TO_IMAGE.name])
    if family.is_xl:
        more: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "tokenizer_2"))
        if "aesthetic_score" in family.time_ids:
            more["requires_aesthetics_score"] = True
        more["add_watermarker"] = False
    else:
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, name)(**(more | dict(parts)))


@contextmanager
def without_bars() -> Iterator[None]:
    """Keeps transformers from drawing a bar for every file that it reads, for a while."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@cache
def _published(name: str) -> MetaPipeline:
    family = FAMILIES[name]
    return MetaPipeline(family, CONFIGS[name], f"the published {family.label}")


def _as_dict(config: Any) -> dict[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _config(name: str, component: str) -> dict[str, Any]:
    try:
        if component == "unet":
            config = UNet2DConditionModel.load_config(name, subfolder="unet")
        else:
            config = CLIPTextConfig.from_pretrained(name, subfolder=component).to_dict()
    except (OSError, ValueError) as error:
        where = "" if Path(name).is_dir() else " (no folder here, and not cached as a hub id)"
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"the configuration of the {component} of {name}{where} cannot be read: {reason}"
        ) from None
    if not isinstance(config, dict):
        raise UsageError(f"the configuration of the {component} of {name} is no table of settings")
    return config
