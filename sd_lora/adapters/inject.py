"""Putting adapters into a model and taking them out again; merging; the trainable parameters."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sd_lora.adapters.layers import INITS, LAYERS, AdaptedLayer
from sd_lora.adapters.targets import Target, plan
from sd_lora.errors import UsageError
from sd_lora.seeds import generator_for


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Returns module name → adapted layer, each layer once, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def inject(
    model: nn.Module,
    targets: str | Iterable[str] = "attention",
    rank: int = 4,
    alpha: float | None = None,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    dropout: float = 0.0,
    init: str = "kaiming",
    seed: int = 0,
) -> list[str]:
    """Freezes `model` and adapts the modules that `targets` selects; returns their names.

    The model's next output is the same, bit for bit. Each module's A is drawn from (seed, module
    name), so it does not depend on what else is adapted, nor on the device.

    Args:
        model: any torch module. All of its parameters are frozen.
        targets: presets and patterns, see `sd_lora.adapters.targets`.
        rank, alpha, conv_rank, conv_alpha, rank_pattern, alpha_pattern: see `plan` there.
        dropout: probability in [0, 1) of zeroing an input element of the update in training.
        init: how A is drawn, "kaiming" or "gaussian".
        seed: of the initial A.

    Raises:
        UsageError: a target or pattern that matches nothing, a rank below 1, a layer that cannot
            be adapted, or a model that has adapters already.
    """
    planned = plan(model, targets, rank, alpha, conv_rank, conv_alpha, rank_pattern, alpha_pattern)
    return adapt(model, planned, dropout, init, seed)


def adapt(
    model: nn.Module,
    planned: Iterable[Target],
    dropout: float = 0.0,
    init: str = "kaiming",
    seed: int = 0,
) -> list[str]:
    """Freezes `model` and adapts the planned modules; returns their names. See `inject`."""
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout is a probability in [0, 1), not {dropout}")
    if init not in INITS:
        raise UsageError(f"init must be one of {', '.join(INITS)}, not {init!r}")
    model.requires_grad_(False)
    wrapped: dict[nn.Module, nn.Module] = {}  # a module that a model holds twice is adapted once
    names = []
    for target in planned:
        base = model.get_submodule(target.name)
        if base not in wrapped:
            generator = generator_for(seed, "lora_A", target.name)
            layer = LAYERS[type(base)](base, target.rank, target.alpha, dropout, init, generator)
            wrapped[base] = layer.train(base.training)
        _replace(model, target.name, wrapped[base])
        names.append(target.name)
    return names


def eject(model: nn.Module) -> list[str]:
    """Takes every adapter out and gives back the original layers; returns their names.

    What is merged at that moment stays merged: `merge(model); eject(model)` bakes the update in.
    """
    names = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, AdaptedLayer):
            _replace(model, name, module.base)
            names.append(name)
    return names


def merge(model: nn.Module) -> None:
    """Adds every ΔW to its base weight, keeping the original tensor for `unmerge`."""
    for layer in adapted_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Restores every base weight, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Merges the model's adapters within a `with` block; what was merged before stays so."""
    fresh = [layer for layer in adapted_layers(model).values() if not layer.is_merged]
    for layer in fresh:
        layer.merge()
    try:
        yield model
    finally:
        for layer in fresh:
            layer.unmerge()


def lora_layers(model: nn.Module) -> list[nn.Parameter]:
    """Returns the trainable parameters, A and B of every adapted layer: a list, for the optimiser.

    A list and not an iterator: one that the optimiser has exhausted clips no gradient afterwards.
    """
    return [p for layer in adapted_layers(model).values() for p in layer.parameters(recurse=False)]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns `<module>.lora_A`, `<module>.lora_B` and `<module>.alpha`, unfolded, on the CPU."""
    state: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model).items():
        for key, parameter in layer.named_parameters(recurse=False):
            state[f"{name}.{key}"] = parameter.detach().cpu().clone()
        state[f"{name}.alpha"] = torch.tensor(float(layer.alpha))
    return state


def check_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises UsageError naming the first key or shape that `model`'s adapters do not have."""
    own = lora_state_dict(model)
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or extra:
        key = min(missing or extra)
        has, lacks = ("model", "file") if missing else ("file", "model")
        raise UsageError(
            f"the adapters differ: the {has} has {key}, the {lacks} has not "
            f"({len(missing)} missing, {len(extra)} too many); were targets or ranks changed?"
        )
    for key, value in own.items():
        if state[key].shape != value.shape:
            raise UsageError(
                f"{key} is {tuple(state[key].shape)} in the file and {tuple(value.shape)} in the "
                "model; was the rank changed?"
            )


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what `lora_state_dict` gave into a model with the same adapters.

    Raises:
        UsageError: a key or a shape that differs, naming it; nothing is changed then.
    """
    check_lora_state_dict(model, state)
    layer: Any
    for name, layer in adapted_layers(model).items():
        for key, parameter in layer.named_parameters(recurse=False):
            parameter.copy_(state[f"{name}.{key}"])
        layer.alpha = float(state[f"{name}.alpha"])
