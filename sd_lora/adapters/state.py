"""The adapters of a model as plain tensors: out, in again, and several combined into one."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.inject import adapted_layers, attach, deltas_of, unmerged
from sd_lora.adapters.kinds import kind_of
from sd_lora.adapters.layers import AdaptedAttention
from sd_lora.adapters.methods import Full, LoRA
from sd_lora.adapters.variants import method_of
from sd_lora.errors import UsageError


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns every update's tensors, unfolded, on the CPU: `<update>.lora_A`, `<update>.lora_B`,
    `<update>.alpha`, `<update>.magnitude`, …; see `updates` for the names."""
    state: dict[str, Tensor] = {}
    for name, delta in deltas_of(model).items():
        for key, tensor in delta.tensors().items():
            state[f"{name}.{key}"] = tensor.cpu().clone()
        if delta.rank is not None:
            # rslora's α·√r is irrational: in float32 it would be off by 1e-8
            state[f"{name}.alpha"] = torch.tensor(delta.alpha, dtype=torch.float64)
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
    """Loads what `lora_state_dict` gave: into the same adapters, or into a bare model, which gets
    the adapters that the state describes. Merged layers are merged anew.

    Raises:
        UsageError: a key or a shape that differs, naming it; nothing is changed then.
    """
    if not adapted_layers(model):
        attach_deltas(model, deltas_from_state(state))
        return
    check_lora_state_dict(model, state)
    with unmerged(model):
        for name, delta in deltas_of(model).items():
            for key, tensor in delta.tensors().items():
                tensor.copy_(state[f"{name}.{key}"])
            if delta.rank is not None:
                delta.alpha = float(state[f"{name}.alpha"])


def deltas_from_state(state: Mapping[str, Tensor]) -> dict[str, Delta]:
    """Returns update name → update; the method is known by the names of its tensors.

    Raises:
        UsageError: tensors that no method has, or that do not fit together.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, kind = key.rpartition(".")
        grouped.setdefault(name, {})[kind] = tensor
    return {name: make_delta(name, tensors) for name, tensors in grouped.items()}


def make_delta(name: str, tensors: Mapping[str, Tensor]) -> Delta:
    """Returns the update that these tensors (with `alpha` and `magnitude`) make up; its shape is
    that of the tensors until it is fitted to a weight.

    Raises:
        UsageError: see `deltas_from_state`.
    """
    name = name or "the layer itself"
    rest = {k: t for k, t in tensors.items() if k not in ("alpha", "magnitude")}
    method = method_of(frozenset(rest))
    if method is None:
        raise UsageError(f"{name}: no method has the tensors {', '.join(sorted(tensors))}")
    parts = {k: _checked(f"{name}.{k}", t) for k, t in tensors.items() if k != "alpha"}
    alpha = _alpha(name, tensors["alpha"]) if "alpha" in tensors else None
    if any(tensor.dtype is torch.float64 for tensor in parts.values()):
        parts = {key: tensor.double() for key, tensor in parts.items()}  # they are multiplied
    magnitude = parts.pop("magnitude", None)
    try:
        delta = method(None, parts, alpha, magnitude)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None
    except (RuntimeError, IndexError):  # torch's, on products of other shapes
        shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in parts.items())
        raise UsageError(f"{name}: {shapes} do not fit together") from None
    refuse_overflow(name, delta)
    return delta


@torch.no_grad()
def refuse_overflow(name: str, delta: Delta) -> None:
    """Raises UsageError naming an update whose finite factors may make an infinite ΔW."""
    parts = [tensor for key, tensor in delta.tensors().items() if key != "magnitude"]
    if any(tensor.is_meta for tensor in parts):
        return
    norms = (float(torch.linalg.vector_norm(tensor.float())) for tensor in parts)
    # every method is a product of its tensors in one sense or another: ‖ΔW‖ is at most this
    if not abs(delta.scale) * math.prod(norms) < torch.finfo(torch.float32).max:
        raise UsageError(f"{name}: its numbers are so large that ΔW would be infinite")


def _checked(key: str, tensor: Tensor) -> Tensor:
    """Returns one of an update's tensors, 8-bit numbers as float32; raises UsageError naming it."""
    if not tensor.is_floating_point():
        raise UsageError(f"{key} holds {tensor.dtype} and not floating-point numbers")
    if not tensor.numel():
        raise UsageError(f"{key} is empty: its shape is {tuple(tensor.shape)}")
    try:
        tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    except RuntimeError:  # float4, two numbers a byte
        raise UsageError(f"{key} holds {tensor.dtype}, which cannot be read") from None
    if not tensor.is_meta and not torch.isfinite(tensor).all():
        raise UsageError(f"{key} holds NaN or infinite values")
    return tensor


def _alpha(name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or tensor.is_complex():
        kind = f"{tensor.dtype} of the shape {tuple(tensor.shape)}"
        raise UsageError(f"{name}.alpha is {kind} and not one number")
    alpha = float(tensor)
    if not math.isfinite(alpha):
        raise UsageError(f"{name}.alpha is NaN or infinite")
    return alpha


def attach_deltas(model: nn.Module, deltas: Mapping[str, Delta]) -> None:
    """Puts updates (by update name) into a bare model.

    Raises:
        UsageError: a name that the model has not, or an update that its layer cannot have; the
            model is then as it was.
    """
    if adapted_layers(model):
        raise UsageError("the model has adapters already: eject them first")
    changes: dict[str, dict[str, Delta]] = {}
    for name, delta in deltas.items():
        module, path = locate(model, name)
        changes.setdefault(module, {})[path] = delta
    attach(model, changes)


def locate(model: nn.Module, name: str) -> tuple[str, str]:
    """Returns (module name, parameter path in it) of an update's name.

    Raises:
        UsageError: the model has no such parameter.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parent, _, last = name.rpartition(".")
    if parent in modules and kind_of(modules[parent]) is AdaptedAttention and last == "out_proj":
        return parent, "out_proj.weight"
    grandparent, _, middle = parent.rpartition(".")
    if f"{middle}.{last}" == "out_proj.bias" and grandparent in modules:
        if kind_of(modules[grandparent]) is AdaptedAttention:
            return grandparent, "out_proj.bias"
    if name in modules:
        return name, "weight"
    if parent in modules and last in modules[parent]._parameters:
        return parent, last
    raise UsageError(f"{type(model).__name__} has no module or parameter {name!r}")


def combine(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Returns one adapter whose every ΔW is Σ weightᵢ·ΔWᵢ, exactly: ranks are concatenated.

    Args:
        states: what `lora_state_dict` gave, several times.
        weights: one a state; 1 by default.

    Raises:
        UsageError: an update of another form than B·A or a full ΔW, which has no exact sum, or
            two of one name for weights of different shapes.
    """
    weights = [1.0] * len(states) if weights is None else list(weights)
    if len(weights) != len(states):
        raise UsageError(f"{len(states)} adapters and {len(weights)} weights")
    parts: dict[str, list[tuple[Delta, float]]] = {}
    for state, weight in zip(states, weights, strict=True):
        for name, delta in deltas_from_state(state).items():
            parts.setdefault(name, []).append((delta, weight))
    combined: dict[str, Tensor] = {}
    for name, summands in parts.items():
        delta = sum_of(name, summands)
        combined |= {f"{name}.{key}": t for key, t in delta.tensors().items()}
        if delta.rank is not None:
            combined[f"{name}.alpha"] = torch.tensor(delta.alpha, dtype=torch.float64)
    return combined


@torch.no_grad()
def sum_of(name: str, summands: Sequence[tuple[Delta, float]]) -> Delta:
    """Returns the update whose ΔW is Σ weightᵢ·ΔWᵢ, exactly: ranks are concatenated.

    Raises:
        UsageError: see `combine`.
    """
    factors = [delta.low_rank() for delta, _ in summands]
    if any(delta.magnitude is not None for delta, _ in summands):
        raise UsageError(f"{name} is weight-decomposed (DoRA): its change has no exact sum")
    shapes = {delta.shape for delta, _ in summands}
    if len(shapes) > 1:
        raise UsageError(f"{name} has different shapes: {', '.join(map(str, sorted(shapes)))}")
    if all(f is not None for f in factors):
        A = torch.cat([f[0] for f in factors if f is not None])
        scaled = zip(summands, factors, strict=True)
        B = torch.cat([w * d.scale * f[1] for (d, w), f in scaled if f is not None], 1)
        return LoRA(summands[0][0].shape, {"lora_A": A, "lora_B": B})
    if all(isinstance(delta, Full) for delta, _ in summands):
        total = sum(weight * delta.weight() for delta, weight in summands)
        return Full(summands[0][0].shape, {"diff": total})  # type: ignore[dict-item]
    methods = ", ".join(sorted({delta.method for delta, _ in summands}))
    raise UsageError(f"{name} ({methods}) has no exact sum: only B·A with B·A, or full with full")
