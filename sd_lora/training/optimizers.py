"""AdamW over exactly the LoRA parameters, and its learning-rate schedule."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from sd_lora.adapters.inject import lora_layers
from sd_lora.errors import UsageError
from sd_lora.training.config import TrainConfig


def build_optimizer(
    models: Mapping[str, nn.Module], config: TrainConfig, num_samples_per_step: int
) -> torch.optim.Optimizer:
    """Returns AdamW with one parameter group per component; its parameters are `lora_layers`.

    Args:
        models: component → injected model.
        config: learning rates, betas, weight decays.
        num_samples_per_step: batch × accumulation × processes, for `scale_lr`.
    """
    factor = num_samples_per_step if config.scale_lr else 1
    lrs = {"unet": config.learning_rate, "text_encoder": config.text_encoder_lr}
    decays = {"text_encoder": config.adam_weight_decay_text_encoder}

    def chosen(value: float | None, default: float) -> float:
        return default if value is None else value

    groups: list[dict[str, Any]] = [
        {
            "params": lora_layers(model),
            "lr": chosen(lrs[component], config.learning_rate) * factor,
            "weight_decay": chosen(decays.get(component), config.adam_weight_decay),
        }
        for component, model in models.items()
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit  # an extra: `check_installed` has looked for it

        return AdamW8bit(groups, betas=betas, eps=config.adam_epsilon)
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, betas=betas, eps=config.adam_epsilon, fused=fused)


def check_installed(config: TrainConfig) -> None:
    """Raises UsageError if the optimiser needs a package that is not installed."""
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
