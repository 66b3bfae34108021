"""Adapters with random values, as after training, on the tiny pipelines of the real classes."""

import copy
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import sd_lora
from sd_lora.adapters.deltas import Delta
from sd_lora.formats.adapter_files import Format, write_file
from sd_lora.formats.canonical import Adapter, each, read_models
from sd_lora.formats.metadata import build
from sd_lora.formats.names import naming_of
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline

MIXED = {
    "targets": "all",
    "rank": 4,
    "alpha": 3.0,
    "conv_rank": 2,
    "conv_alpha": 5.0,
    "rank_pattern": {"mid_block.*to_q": 7},
    "alpha_pattern": {"to_k": 0.5},
}


def models_of(folder: Path) -> dict[str, nn.Module]:
    """Component → model of a pipeline folder."""
    family = MetaPipeline.of_folder(str(folder)).family
    models: dict[str, nn.Module] = {
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
    }
    if "text_encoder_2" in family.components:
        cls = CLIPTextModelWithProjection
        models["text_encoder_2"] = cls.from_pretrained(folder, subfolder="text_encoder_2")
    return models


def trained(folder: Path, seed: int = 0, text: bool = True, **options: object) -> Adapter:
    """A random adapter on a pipeline folder's UNet and text encoders."""
    return copy.deepcopy(_trained(folder, seed, text, tuple(options.items())))


@lru_cache(maxsize=32)
def _trained(folder: Path, seed: int, text: bool, items: tuple[tuple[str, object], ...]) -> Adapter:
    options, models = dict(items), models_of(folder)
    sd_lora.inject(models["unet"], **(MIXED | options), seed=seed)
    method = {k: v for k, v in options.items() if k in ("method", "rule")}
    for component, model in models.items():
        if component != "unet" and text:
            targets = "text+text_projection" if component == "text_encoder_2" else "text"
            sd_lora.inject(model, targets=targets, rank=3, alpha=1.5, seed=seed, **method)
    shaken(models, seed)
    return read_models({c: m for c, m in models.items() if sd_lora.deltas_of(m)})


def shaken(models: Mapping[str, nn.Module], seed: int = 0) -> None:
    """Adds noise of 0.1 to every tensor of the models' deltas, as if they had been trained."""
    g = torch.Generator().manual_seed(seed)
    for model in models.values():
        for delta in sd_lora.deltas_of(model).values():
            for parameter in delta.parameters():
                noise = torch.randn(parameter.shape, generator=g)
                parameter.data.add_(0.1 * noise)


def weights(adapter: Adapter) -> dict[tuple[str, str], Tensor]:
    """(component, name) → ΔW in float64."""
    return {(c, n): delta.double().weight().detach() for c, n, delta in each(adapter)}


def saved(
    path: Path, kind: Format, adapter: Mapping[str, Mapping[str, Delta]], folder: Path
) -> Path:
    """Writes an adapter in one format for a pipeline folder."""
    meta_pipeline = MetaPipeline.of_folder(str(folder))
    header = build(adapter, FAMILIES[meta_pipeline.family.name], path.stem)
    write_file(path, kind, adapter, naming_of(meta_pipeline.family, meta_pipeline.layout), header)
    return path
