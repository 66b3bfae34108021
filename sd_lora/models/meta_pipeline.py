"""A pipeline without weights: the modules that a LoRA file is made for.

A file fits or not by the modules alone, so a check needs neither the base's weights nor the time
to read them. Memory that is never written is never taken: a second SD1.5 costs nothing.

diffusers and transformers are imported where a model is made, which takes seconds: the tables of
`parameter_shapes` are enough for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sd_lora.errors import UsageError
from sd_lora.models.families import (
    FAMILIES,
    TASKS,
    TEXT_TO_IMAGE,
    Family,
    detect_family,
    detect_task,
)
from sd_lora.models.original_names import Layout
from sd_lora.models.parameter_shapes import Shape, shapes_by_config
from sd_lora.models.published_configs import CONFIGS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PART_CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
"""Part of a base model → the name of its class."""


def part_class(part: str) -> Any:
    """Return the class of a part, of transformers or diffusers."""
    import diffusers
    import transformers

    library = transformers if part.startswith("text_encoder") else diffusers
    return getattr(library, PART_CLASSES[part])


@dataclass(frozen=True)
class MetaPipeline:
    """A base model's components without weights.

    family: of the model.
    configs: component ("unet", …) → arguments of its class's configuration.
    source: name of the model, for messages.
    pixels_per_latent: pixels along one side of a latent, by its VAE.
    """

    family: Family
    configs: Mapping[str, Mapping[str, Any]]
    source: str
    pixels_per_latent: int = 8

    @classmethod
    def of_family(cls, family: Family) -> MetaPipeline:
        """Return the published model of a family, the same object each time: SDXL takes seconds."""
        return _published(family.name)

    @classmethod
    def of_models(cls, models: Mapping[str, Any], family: Family) -> MetaPipeline:
        """Return the meta pipeline of live models, given as component → model."""
        configs = {c: _as_dict(m.config) for c, m in models.items() if c in family.components}
        return cls(family, configs, "the model")

    @classmethod
    def of_folder(cls, name: str) -> MetaPipeline:
        """Return the meta pipeline of a diffusers folder or of a cached hub id.

        Raises:
            UsageError: a configuration is missing or broken, or not a Stable Diffusion UNet's.
        """
        unet = _read_config(name, "unet")
        family = detect_family(unet)
        configs = {family.denoiser: unet}
        configs |= {c: _read_config(name, c) for c in family.text_encoders}
        return cls(family, configs, name)

    def with_inputs(self, channels: int) -> MetaPipeline:
        """Return the model whose UNet has so many input channels: 9 for inpainting, 8 for pix2pix.

        Others than a task's are those of no model, and leave it as it is.
        """
        unet = self.configs[self.family.denoiser]
        known = unet.get("in_channels", 4)
        extra = channels - unet.get("out_channels", 4)
        if channels == known or extra not in TASKS:
            return self
        configs = {**self.configs, self.family.denoiser: {**unet, "in_channels": channels}}
        return replace(self, configs=configs, source=f"{self.source}, with {channels} inputs")

    @property
    def layout(self) -> Layout:
        """Positions of the UNet's blocks; the published families' if there is no UNet."""
        unet = self.configs.get(self.family.denoiser)
        return Layout() if unet is None else Layout.of(unet)

    def shapes(self, component: str) -> dict[str, Shape]:
        """Return parameter name → shape of a component, from tables where its configuration is of
        the published kind.

        Raises:
            UsageError: see `models`.
        """
        known = shapes_by_config(component, self.configs[component])
        if known is not None:
            return known
        return {n: tuple(p.shape) for n, p in self.models[component].named_parameters()}

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """Component → model on the meta device, with names and shapes and no values.

        Raises:
            UsageError: a configuration that its class refuses.
        """
        return self._build()

    def _build(self) -> dict[str, nn.Module]:
        try:
            return {c: build_on_meta(c, config) for c, config in self.configs.items()}
        except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"{self.source} has a configuration that fails: {reason}") from None

    def pipeline(self) -> DiffusionPipeline:
        """Return a new pipeline on the CPU, its weights allocated and never written."""
        models = self._build()
        for model in models.values():
            model.to_empty(device="cpu")
        parts: dict[str, Any] = dict.fromkeys(("vae", "tokenizer", "scheduler"))
        parts |= dict.fromkeys(self.family.components) | models
        return build_pipeline(self.family, self.configs.get(self.family.denoiser, {}), parts)


def build_on_meta(part: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a part ("unet", "vae", "text_encoder", …) of a configuration, on the meta device."""
    cls = part_class(part)
    with torch.device("meta"):
        if part.startswith("text_encoder"):
            from transformers import CLIPTextConfig

            return cls(CLIPTextConfig(**config))
        return cls.from_config(dict(config))


def build_pipeline(
    family: Family, unet_config: Mapping[str, Any], parts: Mapping[str, Any]
) -> DiffusionPipeline:
    """Return diffusers' pipeline of a family and of its UNet's task, made of live parts.

    parts: part of the pipeline ("unet", "vae", "tokenizer", …) → object, or None to go without.
    """
    import diffusers

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
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a progress bar for each file while the block runs."""
    from transformers.utils import logging as transformers_logging

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


def _read_config(name: str, component: str) -> dict[str, Any]:
    from transformers import CLIPTextConfig

    try:
        if component == "unet":
            config = part_class("unet").load_config(name, subfolder="unet")
        else:
            config = CLIPTextConfig.from_pretrained(name, subfolder=component).to_dict()
    except (OSError, ValueError) as error:
        where = "" if Path(name).is_dir() else " (no folder here, and not cached as a hub id)"
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"the configuration of the {component} of {name}{where} cannot be read: {reason}"
        ) from None
    if not isinstance(config, dict):
        raise UsageError(
            f"the configuration of the {component} of {name} is not a table of settings"
        )
    return config
