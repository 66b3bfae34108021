"""A model's adapter as plain tensors: save, load, and combine several."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.inject import adapted_layers, deltas_of, wrap_modules
from sd_lora.adapters.layer_classes import adapted_class_of
from sd_lora.adapters.layers import AdaptedAttention
from sd_lora.adapters.merging import unmerged
from sd_lora.adapters.methods import Full, LoRA
from sd_lora.adapters.variants import method_by_tensor_names
from sd_lora.errors import UsageError


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all deltas' tensors on the CPU, for `load_lora_state_dict`.

    Keys are `<delta>.lora_A`, `<delta>.lora_B`, `<delta>.alpha`, `<delta>.magnitude`, …, with the
    delta names of `deltas_of`. The scale is not folded into the tensors.
    """
    state: dict[str, Tensor] = {}
    for name, delta in deltas_of(model).items():
        for key, tensor in delta.tensors().items():
            state[f"{name}.{key}"] = tensor.cpu().clone()
        if delta.rank is not None:
            # rslora's α·√r is irrational: float32 would round it by 1e-8
            state[f"{name}.alpha"] = torch.tensor(delta.alpha, dtype=torch.float64)
    return state


def check_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Compare a state's keys and shapes with those of a model's adapter.

    Raises:
        UsageError: a key or a shape differs; the first one is named.
    """
    own = lora_state_dict(model)
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or extra:
        key = min(missing or extra)
        has, lacks = ("model", "file") if missing else ("file", "model")
        raise UsageError(
            f"the adapters differ: the {has} has {key}, the {lacks} has not; in the file, "
            f"{len(missing)} keys are missing and {len(extra)} too many: inject with the method, "
            "targets and ranks of the file"
        )
    for key, value in own.items():
        if state[key].shape != value.shape:
            raise UsageError(
                f"{key} is {tuple(state[key].shape)} in the file and {tuple(value.shape)} in the "
                "model: inject with the ranks of the file"
            )


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state of `lora_state_dict`.

    A model without adapters gets the state's; a model with adapters must have the same ones. Merged
    layers are merged again.

    Raises:
        UsageError: a key or a shape that differs, by name. Nothing is changed then.
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
    """Delta name → delta. Its method is recognised by the names of its tensors.

    Raises:
        UsageError: tensors of no method, or of shapes that do not fit together.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, tensor_name = key.rpartition(".")
        if tensor_name == "weight":
            raise UsageError(
                f"{key!r} is a key of a LoRA file and not of `lora_state_dict`: "
                "sd_lora.load_adapter(model, path) reads files"
            )
        grouped.setdefault(name, {})[tensor_name] = tensor
    return {name: make_delta(name, tensors) for name, tensors in grouped.items()}


def make_delta(name: str, tensors: Mapping[str, Tensor], are_checked: bool = False) -> Delta:
    """Delta of these tensors, in their shape until `Delta.fit` gives it the weight's.

    Args:
        name: of the delta, for messages.
        tensors: tensor name → tensor, with `alpha` and `magnitude` where there are any.
        are_checked: whether these values made a delta before, so that they need no second look.

    Raises:
        UsageError: see `deltas_from_state`.
    """
    name = name or "the layer itself"
    own = frozenset(k for k in tensors if k not in ("alpha", "magnitude"))
    method = method_by_tensor_names(own)
    if method is None:
        raise UsageError(f"{name}: no method has the tensors {', '.join(sorted(tensors))}")
    parts = {k: checked(f"{name}.{k}", t, are_checked) for k, t in tensors.items() if k != "alpha"}
    alpha = alpha_of(name, tensors["alpha"]) if "alpha" in tensors else None
    if any(tensor.dtype is torch.float64 for tensor in parts.values()):
        parts = {key: tensor.double() for key, tensor in parts.items()}  # they are multiplied
    magnitude = parts.pop("magnitude", None)
    try:
        delta = method(None, parts, alpha, magnitude)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None
    except (RuntimeError, IndexError):  # torch's errors for products of other shapes
        shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in parts.items())
        raise UsageError(f"{name}: {shapes} do not fit together") from None
    if not are_checked:
        refuse_overflow(name, delta)
    return delta


@torch.no_grad()
def refuse_overflow(name: str, delta: Delta) -> None:
    """Raise UsageError for a delta of finite factors whose ΔW may be infinite."""
    parts = [tensor for key, tensor in delta.tensors().items() if key != "magnitude"]
    if any(tensor.is_meta for tensor in parts):
        return
    norms = (float(torch.linalg.vector_norm(tensor.float())) for tensor in parts)
    # ΔW is a product of the tensors in every method: ‖ΔW‖ is at most s times the product of norms
    if not abs(delta.scale) * math.prod(norms) < torch.finfo(torch.float32).max:
        raise UsageError(
            f"{name}: its numbers are so large that ΔW would be infinite; the file is damaged, or "
            "its training diverged"
        )


def checked(key: str, tensor: Tensor, is_finite: bool) -> Tensor:
    """A delta's tensor, 8-bit numbers as float32; raises UsageError, with the key, for tensors of
    other types, empty ones, and, unless known as finite, NaN or infinite values."""
    if not tensor.is_floating_point():
        raise UsageError(f"{key} holds {tensor.dtype} and not floating-point numbers")
    if not tensor.numel():
        raise UsageError(f"{key} is empty: its shape is {tuple(tensor.shape)}")
    try:
        tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    except RuntimeError:  # float4, two numbers a byte
        raise UsageError(f"{key} holds {tensor.dtype}, which cannot be read") from None
    if not (is_finite or tensor.is_meta or torch.isfinite(tensor).all()):
        raise UsageError(f"{key} holds NaN or infinite values")
    return tensor


def alpha_of(name: str, tensor: Tensor) -> float:
    """α as a number; raises UsageError, with the name, for other tensors than one finite number."""
    if tensor.numel() != 1 or tensor.is_complex():
        found = f"{tensor.dtype} of the shape {tuple(tensor.shape)}"
        raise UsageError(f"{name}.alpha is {found} and not one number")
    alpha = float(tensor)
    if not math.isfinite(alpha):
        raise UsageError(f"{name}.alpha is NaN or infinite")
    return alpha


def attach_deltas(model: nn.Module, deltas: Mapping[str, Delta]) -> None:
    """Put deltas into a model without adapters.

    deltas: delta name → delta.

    Raises:
        UsageError: a name unknown to the model, or a delta that its layer cannot have. The model is
            then unchanged.
    """
    if adapted_layers(model):
        raise UsageError("the model has adapters already: eject them first")
    by_module: dict[str, dict[str, Delta]] = {}
    for name, delta in deltas.items():
        module, path = locate(model, name)
        by_module.setdefault(module, {})[path] = delta
    wrap_modules(model, by_module)


def locate(model: nn.Module, name: str) -> tuple[str, str]:
    """(Module name, parameter path in the module) of a delta name.

    Raises:
        UsageError: the model has no parameter of this name.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parent, _, last = name.rpartition(".")
    if (
        parent in modules
        and adapted_class_of(modules[parent]) is AdaptedAttention
        and last == "out_proj"
    ):
        return parent, "out_proj.weight"
    grandparent, _, middle = parent.rpartition(".")
    if f"{middle}.{last}" == "out_proj.bias" and grandparent in modules:
        if adapted_class_of(modules[grandparent]) is AdaptedAttention:
            return grandparent, "out_proj.bias"
    if name in modules:
        return name, "weight"
    if parent in modules and last in modules[parent]._parameters:
        return parent, last
    raise UsageError(f"{type(model).__name__} has no module or parameter {name!r}")


def combine(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """State of one adapter with ΔW = Σ weightᵢ·ΔWᵢ, exactly: ranks are concatenated.

    Args:
        states: several states of `lora_state_dict`.
        weights: one a state; 1 by default.

    Raises:
        UsageError: a delta of another form than B·A or a full ΔW, for it has no exact sum; two
            deltas of one name and different shapes; another number of weights than states.
    """
    weights = [1.0] * len(states) if weights is None else list(weights)
    if len(weights) != len(states):
        raise UsageError(f"{len(states)} adapters and {len(weights)} weights: give one weight each")
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
    """Delta with ΔW = Σ weightᵢ·ΔWᵢ, exactly: ranks are concatenated.

    Args:
        name: of the deltas, for messages.
        summands: (delta, weight) pairs.

    Raises:
        UsageError: see `combine`.
    """
    factors = [delta.low_rank() for delta, _ in summands]
    if any(delta.magnitude is not None for delta, _ in summands):
        raise UsageError(f"{name} is weight-decomposed (DoRA): its delta has no exact sum")
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
