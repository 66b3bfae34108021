"""Injecting deltas into the models of a run, by its configuration."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from sd_lora.adapters.inject import inject
from sd_lora.adapters.targets import select
from sd_lora.config.schema import RunConfig
from sd_lora.models.families import Family


def inject_all(
    config: RunConfig, family: Family, models: Mapping[str, nn.Module], seed: int
) -> dict[str, nn.Module]:
    """Adapt the UNet, and the text encoders if they are trained.

    Args:
        models: component → model, of the family's UNet and text encoders.
        seed: the run's.

    Returns:
        component → adapted model.
    """
    unet = models["unet"]
    shared: dict[str, Any] = {
        "dropout": config.lora_dropout,
        "init": config.init_lora_weights,
        "seed": seed,
        "method": config.method,
        "rule": "decompose" if config.use_dora else "add",
        "rslora": config.use_rslora,
        "neuron_dropout": config.neuron_dropout,
        "rank_dropout": config.rank_dropout,
        "module_dropout": config.module_dropout,
        "train_bias": config.train_bias,
    }
    options = {
        "tucker": config.use_tucker,
        "factor": config.lokr_factor,
        "full_matrix": config.lokr_full_matrix,
        "decompose_both": config.lokr_decompose_both,
    }
    shared |= {name: value for name, value in options.items() if value}
    inject(
        unet,
        config.targets,
        rank=config.rank,
        alpha=config.lora_alpha,
        conv_rank=config.conv_rank,
        conv_alpha=config.conv_alpha,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        modules_to_save=config.modules_to_save.split("+") if config.modules_to_save else (),
        **shared,
    )
    adapted: dict[str, nn.Module] = {"unet": unet}
    shared.pop("tucker", None)  # a text encoder has no kernel to give a core to
    for component in components_of(config, family)[1:]:
        rank, alpha = config.rank_and_alpha_of(component)
        encoder = models[component]
        names = read_modules(family, component, encoder, config.clip_skip)
        inject(encoder, names, rank=rank, alpha=alpha, **shared)
        adapted[component] = encoder
    return adapted


def components_of(config: RunConfig, family: Family) -> list[str]:
    """The components that get deltas: the UNet, and text encoders with a rank."""
    return ["unet", *(c for c in family.text_encoders if config.rank_and_alpha_of(c)[0])]


def read_modules(family: Family, component: str, encoder: Any, clip_skip: int) -> list[str]:
    """Patterns of a text encoder's linears whose outputs reach the UNet.

    SDXL's first encoder is read before its last layer, and clip skip leaves out more layers; only
    the pooled output, of the second encoder, goes through all. A linear that nothing reads cannot
    learn, and several processes would wait for its gradients.
    """
    num = encoder.config.num_hidden_layers
    if component != "text_encoder_2":
        num -= family.penultimate + clip_skip
    names = select(encoder, "text")
    layers = {name: int(name.partition("layers.")[2].partition(".")[0]) for name in names}
    return [re.escape(name) for name in names if layers[name] < num]
