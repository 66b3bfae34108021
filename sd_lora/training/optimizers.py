"""Optimisers and learning-rate schedules of a run, over exactly the trained parameters."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from sd_lora.adapters.inject import adapted_layers
from sd_lora.adapters.targets import match_names
from sd_lora.config.schema import OPTIONS, RunConfig, TrainConfig
from sd_lora.errors import UsageError, install_line
from sd_lora.models.new_tokens import NewTokens

Groups = list[dict[str, Any]]
"""Parameter groups, each with its learning rate and weight decay."""


@dataclass(frozen=True)
class OptimizerRow:
    """An optimiser.

    build: makes it from parameter groups and the configuration. state_bytes: bytes of its state a
    parameter. header: its name in `ss_optimizer`. names: peer → its name there.
    """

    build: Callable[[Groups, RunConfig], torch.optim.Optimizer]
    state_bytes: int
    header: str
    names: Mapping[str, str]


def _adamw(groups: Groups, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), fused where all parameters are on a GPU."""
    betas = (config.adam_beta1, config.adam_beta2)
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, betas=betas, eps=config.adam_epsilon, fused=fused)


def _adamw8bit(groups: Groups, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments (Dettmers et al. 2022), of bitsandbytes."""
    from bitsandbytes.optim import AdamW8bit  # an extra: `check_installed` has looked for it

    betas = (config.adam_beta1, config.adam_beta2)
    return AdamW8bit(groups, betas=betas, eps=config.adam_epsilon)


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw": OptimizerRow(
        _adamw, 8, "torch.optim.adamw.AdamW",
        {"diffusers": "AdamW", "kohya": "AdamW", "onetrainer": "ADAMW"},
    ),
    "adamw8bit": OptimizerRow(
        _adamw8bit, 2, "AdamW8bit", {"kohya": "AdamW8bit", "onetrainer": "ADAMW_8BIT"}
    ),
}  # fmt: skip
"""Name → optimiser."""


def optimizer_of(config: TrainConfig) -> OptimizerRow:
    """The optimiser that a configuration asks for."""
    return OPTIMIZERS["adamw8bit" if config.use_8bit_adam else "adamw"]


def build_optimizer(
    models: Mapping[str, nn.Module],
    config: RunConfig,
    num_samples_per_step: int,
    tokens: NewTokens | None = None,
) -> torch.optim.Optimizer:
    """The optimiser of a run, with a parameter group per component and learning rate.

    Its parameters are `lora_layers`, and the embeddings of new words, which do not decay.

    Args:
        models: component → injected model.
        config: learning rates, betas, weight decays.
        num_samples_per_step: batch × accumulation × processes, for `scale_lr`.

    Raises:
        UsageError: a pattern of `lr_pattern` that matches no adapted module.
    """
    rates = learning_rates(config, [*models], num_samples_per_step)
    factors = learning_rate_factors(models, config.lr_pattern, config.loraplus_lr_ratio)
    groups: Groups = []
    for component in models:
        rate = rates[component]
        decay = config.weight_decay_of(component)
        for multiple, parameters in factors[component].items():
            group = {"params": parameters, "lr": rate * multiple, "weight_decay": decay}
            groups.append(group | {"multiple": multiple})  # of the rate that is logged
    if tokens:
        rate = rates[NEW_WORDS]
        group = {"params": tokens.parameters(), "lr": rate, "weight_decay": 0.0}
        groups.append(group | {"multiple": 1.0})
    return optimizer_of(config).build(groups, config)


NEW_WORDS = "new words"
"""Name of the embeddings of new words beside those of components."""


def learning_rates(
    config: RunConfig, components: Sequence[str], num_samples_per_step: int
) -> dict[str, float]:
    """Component, and `NEW_WORDS` where there are some → learning rate after warm-up.

    num_samples_per_step: batch × accumulation × processes, for `scale_lr`.
    """
    factor = num_samples_per_step if config.scale_lr else 1
    rates = {component: config.learning_rate_of(component) * factor for component in components}
    if config.token_abstraction:
        rates[NEW_WORDS] = config.new_words_learning_rate * factor
    return rates


def learning_rate_factors(
    models: Mapping[str, nn.Module],
    lr_pattern: Mapping[str, float] | None,
    loraplus_lr_ratio: float | None,
) -> dict[str, dict[float, list[nn.Parameter]]]:
    """Component → factor of its learning rate → parameters, in the models' order.

    Args:
        models: component → injected model.
        lr_pattern: pattern → factor, at the end of a module's name as `rank_pattern`; the first
            match counts.
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
    """Raise UsageError if an option needs a package that is not installed."""
    for name, option in OPTIONS.items():
        if not option.package or not option.is_given(getattr(config, name)):
            continue
        package, extra = option.package
        if not importlib.util.find_spec(package):
            raise UsageError(f"{name} needs {package}: {install_line(extra)}, or leave it out")


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: RunConfig, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A learning-rate schedule counted in optimiser steps; `config.rows.SCHEDULES` has the names.

    The loop steps it once per optimiser step. Accelerate would step it once per process; so neither
    accumulation nor the number of processes changes it.
    """
    warmup = config.num_warmup_steps(num_steps)
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=warmup,
        # polynomial divides by the steps after the warm-up, in its call after the last step too
        num_training_steps=max(num_steps, warmup + 1),
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
