"""The optimiser of a run, over exactly the trained parameters, in groups by learning rate."""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sd_lora.adapters.inject import adapted_layers
from sd_lora.adapters.targets import match_names
from sd_lora.config.optimizers import is_import_path, row_called
from sd_lora.config.schema import OPTIONS, RunConfig, TrainConfig
from sd_lora.errors import UsageError, install_line
from sd_lora.models.new_tokens import NewTokens
from sd_lora.training.optimizer_rows import Groups, OptimizerRow, arguments, imported, row_of


def optimizer_of(config: TrainConfig) -> OptimizerRow:
    """The optimiser that a configuration asks for."""
    return row_of(config.optimizer)


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
        UsageError: a pattern of `lr_pattern` or `weight_decay_pattern` that matches no module.
    """
    rates = learning_rates(config, [*models], num_samples_per_step)
    groups: Groups = []
    for (component, multiple, decay), parameters in grouped(models, config).items():
        groups.append(
            {
                "params": parameters,
                "lr": rates[component] * multiple,
                "weight_decay": config.weight_decay_of(component) * decay,
                "name": _name(component, multiple, decay),
                "multiple": multiple,  # of the rate that is logged
            }
        )
    if tokens:
        words = {"params": tokens.parameters(), "lr": rates[NEW_WORDS], "weight_decay": 0.0}
        groups.append(words | {"name": NEW_WORDS, "multiple": 1.0})
    optimizer = optimizer_of(config).build(groups, config, models)
    if averages(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _name(component: str, multiple: float, decay: float) -> str:
    """Name of a group in the log: "unet", "unet ×16", "unet ×16, decay ×0"."""
    words = f" ×{multiple:g}" * (multiple != 1)
    return f"{component}{words}" + f", decay ×{decay:g}" * (decay != 1)


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


def grouped(
    models: Mapping[str, nn.Module], config: RunConfig
) -> dict[tuple[str, float, float], list[nn.Parameter]]:
    """(Component, factor of its learning rate, factor of its decay) → parameters, in the models'
    order.

    `lr_pattern` and `weight_decay_pattern` have factors by the end of a module's name, as
    `rank_pattern`; the first match counts. `loraplus_lr_ratio` is λ of LoRA+ (Hayou et al. 2024,
    section 4): B learns λ times as fast.

    Raises:
        UsageError: a pattern that matches no adapted module of any component.
    """
    names = [name for model in models.values() for name in adapted_layers(model)]
    multiples = match_names(config.lr_pattern, names, "lr_pattern")
    decays = match_names(config.weight_decay_pattern, names, "weight_decay_pattern")
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for component, model in models.items():
        for name, layer in adapted_layers(model).items():
            for kind, parameter in layer.deltas.named_parameters():
                plus = config.loraplus_lr_ratio if kind.endswith(".lora_B") else None
                multiple = multiples.get(name, 1.0) * (plus or 1.0)
                key = (component, multiple, decays.get(name, 1.0))
                groups.setdefault(key, []).append(parameter)
    return groups


def current_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Group → its learning rate now: with an optimiser that finds its rate, of the one it found;
    with Adafactor's relative steps their size, which `scale_parameter` multiplies by each tensor's
    own."""
    return {g["name"]: _rate(g, optimizer.state) for g in optimizer.param_groups}


def _rate(group: Mapping[str, Any], state: Mapping[Any, Any]) -> float:
    """The learning rate of a group's last step; of the first one before it."""
    if group.get("relative_step"):  # ρ of Shazeer and Stern 2018, section 8
        step = state.get(group["params"][0], {}).get("step") or group.get("step") or 1
        return min(1e-6 * step if group["warmup_init"] else 1e-2, step**-0.5)
    means = group.get("split_groups") and group.get("split_groups_mean")
    shared = group.get("shared_d") if means else None  # prodigyplus: one rate from all groups
    return float(group["lr"] * (group.get("d", 1.0) if shared is None else shared))


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a saved state to the bit: torch casts its tensors to their parameters' dtype, which
    changes later steps of an optimiser that keeps bfloat16."""
    optimizer.load_state_dict(dict(state))
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's holds ours
    parameters = [p for group in inner.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        ours = inner.state[parameters[index]]
        for key, value in saved.items():
            if isinstance(value, torch.Tensor) and ours[key].dtype != value.dtype:
                ours[key] = value.detach().clone().to(ours[key].device)
    for group in inner.param_groups:  # of which torch moves none
        for key, value in group.items():
            if isinstance(value, torch.Tensor):
                group[key] = value.to(group["params"][0].device)


def use_average(optimizer: torch.optim.Optimizer) -> None:
    """Give the parameters the values that are exported: those of a schedule-free optimiser are the
    average of its steps, and it trains at another point."""
    if averages(optimizer):
        optimizer.eval()  # type: ignore[attr-defined]


def averages(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser is schedule-free, by its methods; Accelerate's wrapper has them too."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return callable(getattr(inner, "eval", None)) and callable(getattr(inner, "train", None))


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A context in which the parameters are those that are exported; the ones that are trained come
    back to the bit, so that looking at them changes no later step."""
    if not averages(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in parameters]
    use_average(optimizer)
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        for parameter, values in zip(parameters, trained, strict=True):
            parameter.data.copy_(values)


def check_optimizer(config: RunConfig, device: torch.device) -> None:
    """Refuse, before anything is loaded, packages that are not installed, and an optimiser that
    cannot be imported or built with its arguments.

    Raises:
        UsageError: one of these, with the remedy.
    """
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        needed = option.package_of(value)
        if needed and not importlib.util.find_spec(needed[0]):
            called = f"{name} {value}" if isinstance(value, str) else name
            raise UsageError(
                f"{called} needs {needed[0]}: {install_line(needed[1])}, or leave it out"
            )
    if config.optimizer_facts.on_gpu and device.type != "cuda":
        raise UsageError(
            f"optimizer {config.optimizer} keeps its state in memory that an NVIDIA GPU shares "
            f"with the CPU, and this run is on {device.type}. Take "
            f"{(row_called(config.optimizer) or '').removeprefix('paged')}"
        )
    if is_import_path(config.optimizer):
        try:
            imported(config.optimizer)
        except Exception as error:  # a foreign module may raise anything
            raise UsageError(f"optimizer {config.optimizer} cannot be imported: {error}") from None
    try:
        group = {"params": [nn.Parameter(torch.zeros(2, 2))], "name": "", "multiple": 1.0}
        rates = {
            "lr": config.learning_rate_of("unet"),
            "weight_decay": config.weight_decay_of("unet"),
        }
        optimizer_of(config).build([group | rates], config, {})
    except Exception as error:  # so may a foreign constructor
        found = re.sub(r"^\w+\.__init__\(\) ", "", str(error))
        given = f" with {args}" if (args := arguments(config)) else ""
        raise UsageError(f"optimizer {config.optimizer} cannot be built{given}: {found}") from None
