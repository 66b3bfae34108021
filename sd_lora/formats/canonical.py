"""The canonical form of an adapter: component → canonical name → delta.

Formats read into it and write from it; nothing else knows a file's key names. Canonical names are
diffusers' and transformers' own, with one rule added: names in a text encoder always start with
`text_model.`, which transformers 5 left out of CLIPTextModel and kept in
CLIPTextModelWithProjection. Files with that level load in every tool; files without do not.

Both levels are mappings, and those of files and tools are `Lazy`: a delta is made at each access
and forgotten afterwards, so that streaming through them takes the memory of one.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sd_lora.adapters.deltas import METHODS, Delta
from sd_lora.adapters.inject import adapted_layers, delta_name, deltas_of
from sd_lora.adapters.merging import unmerged
from sd_lora.errors import RunError, UsageError

Modules = Mapping[str, Delta]
"""Canonical delta name → delta. The name is the parameter's without a final ".weight", as
`sd_lora.deltas_of` has it."""

Adapter = Mapping[str, Modules]
"""Component ("unet", "text_encoder"; "" for a model by itself) → its deltas."""


def method_tensors() -> dict[str, str]:
    """Tensor name → method, of all registered methods that files write by these very names.

    LoRA's factors, OFT's blocks, whole weights, biases and magnitudes have other names in files.
    """
    return {
        tensor: name
        for name, method in METHODS.items()
        if "lora_A" not in method.tensor_names and name not in ("oft", "full")
        for tensor in method.tensor_names
    }


class Lazy(Mapping[str, Delta]):
    """Deltas by name, each made anew whenever it is asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Delta]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Delta:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def each(adapter: Adapter) -> Iterator[tuple[str, str, Delta]]:
    """Yield component, name and delta, one at a time."""
    for component, modules in adapter.items():
        for name, delta in modules.items():
            yield component, name, delta


def count(adapter: Adapter) -> int:
    """How many deltas an adapter has."""
    return sum(len(modules) for modules in adapter.values())


def canonical_name(component: str, name: str) -> str:
    """The canonical form of a live module's name."""
    if component.startswith("text_encoder") and not name.startswith(("text_model.", "text_proj")):
        return f"text_model.{name}"
    return name


def live_names(component: str, model: nn.Module) -> dict[str, str]:
    """Canonical name → live name of every module and parameter of `model`."""
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, _ in model.named_parameters() if not name.endswith(".weight")]
    return {canonical_name(component, name): name for name in names}


def adapter_of(models: Mapping[str, nn.Module]) -> dict[str, dict[str, Delta]]:
    """The deltas themselves of injected models (component → model), by canonical names."""
    return {
        component: {canonical_name(component, n): d for n, d in deltas_of(model).items()}
        for component, model in models.items()
    }


def read_models(models: Mapping[str, nn.Module]) -> dict[str, dict[str, Delta]]:
    """The adapter of injected `models` (component → model), on the CPU.

    A component with both rules gets magnitudes everywhere, see `_with_magnitudes`.

    Raises:
        UsageError: no model has an adapter.
    """
    adapter = {}
    for component, model in models.items():
        found = {name: copy.deepcopy(delta).to("cpu") for name, delta in deltas_of(model).items()}
        if found:
            _with_magnitudes(model, found)
            adapter[component] = {canonical_name(component, n): d for n, d in found.items()}
    if not adapter:
        raise UsageError(f"no adapter in {', '.join(models)}: call sd_lora.inject first")
    return adapter


def _with_magnitudes(model: nn.Module, deltas: dict[str, Delta]) -> None:
    """Decompose each delta B·A of a model where others are decomposed: with m = ‖W + ΔW‖, m an
    output, W' stays as it is.

    diffusers and peft read one rule for a whole component. Deltas of other forms, for which they
    have no form either, and those of weights without values stay as they are.
    """
    decomposed = {delta.magnitude is not None for delta in deltas.values()}
    if decomposed == {True, False} and all(
        len(delta.shape) > 1 and plain(delta) is not None and delta.quantization_residual is None
        for delta in deltas.values()
    ):
        with unmerged(model):
            for name, layer in adapted_layers(model).items():
                for path in layer.deltas_by_path():
                    W, delta = layer.weight_of(layer.base, path), deltas[delta_name(name, path)]
                    if delta.magnitude is None and not W.is_meta:
                        delta.init_magnitude(W.to("cpu"))


def plain(delta: Delta) -> tuple[Tensor, Tensor, float] | None:
    """A, B and alpha with ΔW = (alpha/r)·B·A if the delta has this form, else None."""
    with torch.no_grad():
        factors = delta.low_rank()
    if factors is None:
        return None
    A, B = (f.detach().contiguous() for f in factors)
    return A, B, delta.scale * len(A)


def file_rank(delta: Delta) -> int | None:
    """The rank of a delta in a file: a PiSSA of rank r is a LoRA of rank 2r."""
    factors = plain(delta)
    return delta.rank if factors is None else len(factors[0])


def is_plain(adapter: Adapter, decomposed: bool = False) -> bool:
    """Whether every delta is B·A (or, if asked, B·A with a magnitude an output, where all deltas
    of a component have one or none has)."""
    rules: dict[str, bool] = {}
    for component, _, delta in each(adapter):
        magnitude = delta.magnitude
        if rules.setdefault(component, magnitude is None) != (magnitude is None):
            return False
        if plain(delta) is None or not (magnitude is None or decomposed):
            return False
        if magnitude is not None and magnitude.shape[0] != delta.shape[0]:
            return False
    return True


def check_finite(adapter: Adapter) -> None:
    """Raise RunError naming the first module whose delta holds a NaN or an infinity."""
    for component, name, delta in each(adapter):
        if not all(torch.isfinite(tensor).all() for tensor in delta.tensors().values()):
            raise RunError(f"{component} {name} holds NaN or infinite values; not written")
