"""AdamW over exactly the trained parameters, and its learning-rate schedule."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from sd_lora.adapters.inject import adapted_layers
from sd_lora.adapters.targets import match_names
from sd_lora.config.schema import TrainConfig
from sd_lora.errors import UsageError
from sd_lora.models.new_tokens import NewTokens


def build_optimizer(
    models: Mapping[str, nn.Module],
    config: TrainConfig,
    num_samples_per_step: int,
    tokens: NewTokens | None = None,
) -> torch.optim.Optimizer:
    """Returns AdamW with a parameter group per component and learning rate; its parameters are
    `lora_layers`, and the embeddings of new words, whose weights do not decay.

    Args:
        models: component → injected model.
        config: learning rates, betas, weight decays.
        num_samples_per_step: batch × accumulation × processes, for `scale_lr`.

    Raises:
        UsageError: a pattern of `lr_pattern` that matches no adapted module.
    """
    factor = num_samples_per_step if config.scale_lr else 1
    te_decay = config.adam_weight_decay_text_encoder
    decays = {"text_encoder": te_decay, "text_encoder_2": te_decay}

    def chosen(value: float | None, default: float) -> float:
        return default if value is None else value

    factors = learning_rate_factors(models, config.lr_pattern, config.loraplus_lr_ratio)
    groups: list[dict[str, Any]] = []
    for component in models:
        rate = learning_rate(config, component) * factor
        decay = chosen(decays.get(component), config.adam_weight_decay)
        for multiple, parameters in factors[component].items():
            group = {"params": parameters, "lr": rate * multiple, "weight_decay": decay}
            groups.append(group | {"multiple": multiple})  # of the rate that is logged
    if tokens:
        rate = chosen(config.embedding_lr, learning_rate(config, "text_encoder")) * factor
        group = {"params": tokens.parameters(), "lr": rate, "weight_decay": 0.0}
        groups.append(group | {"multiple": 1.0})
    betas = (config.adam_beta1, config.adam_beta2)
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit  # an extra: `check_installed` has looked for it

        return AdamW8bit(groups, betas=betas, eps=config.adam_epsilon)
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, betas=betas, eps=config.adam_epsilon, fused=fused)


def learning_rate(config: TrainConfig, component: str) -> float:
    """Returns a component's learning rate: its own, or else the more general one."""
    rates: list[float | None] = [config.learning_rate]
    rates += [config.text_encoder_lr] if component != "unet" else []
    rates += [config.text_encoder_2_lr] if component == "text_encoder_2" else []
    return next(rate for rate in reversed(rates) if rate is not None)


def learning_rate_factors(
    models: Mapping[str, nn.Module],
    lr_pattern: Mapping[str, float] | None,
    loraplus_lr_ratio: float | None,
) -> dict[str, dict[float, list[nn.Parameter]]]:
    """Returns component → factor of its learning rate → parameters, in the models' order.

    Args:
        models: component → injected model.
        lr_pattern: pattern → factor, at the end of a module's name as `rank_pattern`; the first
            that matches wins.
        loraplus_lr_ratio: λ of LoRA+ (Hayou et al. 2024, section 4): B learns λ times as fast.

    Raises:
        UsageError: a pattern that matches no adapted module of any component.
    """
    names = [name for model in models.values() for name in adapted_layers(model)]
    multiples = match_names(lr_pattern, names, "lr_pattern")
    grouped: dict[str, dict[float, list[nn.Parameter]]] = {}
    for component, model in models.items():
        groups: dict[float, list[nn.Parameter]] = {}
        for name, layer in adapted_layers(model).items():
            for kind, parameter in layer.deltas.named_parameters():
                plus = loraplus_lr_ratio if kind.endswith(".lora_B") else None
                multiple = multiples.get(name, 1.0) * (plus or 1.0)
                groups.setdefault(multiple, []).append(parameter)
        grouped[component] = groups
    return grouped


def check_installed(config: TrainConfig) -> None:
    """Raises UsageError if a run needs a package that is not installed."""
    if config.weighted_prompts and not importlib.util.find_spec("compel"):
        raise UsageError("weighted_prompts needs compel: pip install 'sd_lora[compel]'")
    if config.use_8bit_adam and not importlib.util.find_spec("bitsandbytes"):
        raise UsageError(
            "use_8bit_adam needs bitsandbytes: pip install 'sd_lora[8bit]', or leave it out"
        )


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Returns a schedule counted in optimiser steps.

    It is stepped once per optimiser step and not handed to Accelerate, which would step it once
    per process; so neither accumulation nor the number of processes changes it.
    """
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
