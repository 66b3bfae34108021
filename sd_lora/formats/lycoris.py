"""LyCORIS' keys, for ComfyUI, A1111 and LyCORIS itself: kohya's names, every method's tensors.

`lora_down/up/mid`, `hada_…`, `lokr_…`, `diff` and `diff_b`, `w_norm` and `b_norm`, `dora_scale`.
Each module has its own alpha; for a LoKr of two whole matrices it means nothing, the scale is 1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.state import make_delta
from sd_lora.errors import UsageError
from sd_lora.formats.canonical import Adapter, plain
from sd_lora.formats.names import PREFIXES, kohya_name

_WRITTEN = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_mid": "lora_mid.weight"}
_READ = {kind: name for name, kind in _WRITTEN.items()} | {
    "dora_scale": "magnitude",
    "w_norm": "diff",
    "diff_b": "diff",
    "b_norm": "diff",
}
_OF_BIAS = ("diff_b", "b_norm")


def detect(keys: list[str]) -> bool:
    prefixes = tuple(f"{p}_" for p in PREFIXES.values())
    return any(key.startswith(prefixes) for key in keys)


def write(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the file's tensors, SD1/SD2 names."""
    tensors = {}
    for component, modules in adapter.items():
        for name, delta in modules.items():
            for kind, tensor in _tensors(name, delta, modules).items():
                module = name.removesuffix(".bias") if kind in _OF_BIAS else name
                key = f"{kohya_name(component, module)}.{kind}"
                if key in tensors:
                    raise UsageError(f"{name} and another module are both {key} in kohya's names")
                tensors[key] = tensor.contiguous()
    return tensors


def _tensors(name: str, delta: Delta, modules: Mapping[str, Delta]) -> dict[str, Tensor]:
    """Returns the file's kinds of key → tensor of one update."""
    if delta.method == "full":
        is_bias = name.endswith(".bias")
        weight = modules.get(name.removesuffix(".bias")) if is_bias else delta
        of_norm = weight is not None and len(weight.shape) == 1
        kind = ("b_norm" if is_bias else "w_norm") if of_norm else ("diff_b" if is_bias else "diff")
        return {kind: delta.weight().detach()}
    kinds = {_WRITTEN.get(kind, kind): t for kind, t in delta.tensors().items()}
    alpha = delta.alpha
    if any(kind.startswith(("start_", "lost_")) for kind in kinds):  # a LoRA of rank 2r
        factors = plain(delta)
        assert factors is not None
        A, B, alpha = factors
        kinds = {"lora_down.weight": A, "lora_up.weight": B}
    if delta.magnitude is not None:
        kinds["dora_scale"] = delta.magnitude.detach()
        kinds.pop("magnitude", None)
    # LyCORIS' reader fails without an alpha, also where it has no use for it
    kinds["alpha"] = torch.tensor(alpha)
    return kinds


def read(tensors: Mapping[str, Tensor], names: Mapping[str, tuple[str, str]]) -> Adapter:
    """Returns the adapter of a file in this format or in kohya's.

    Args:
        tensors: the file's tensors.
        names: kohya name → (component, canonical name), see `names.from_kohya`.

    Raises:
        UsageError: a module that `names` lacks, a kind of key that no method has, or tensors that
            do not fit together.
    """
    grouped: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        stem, _, kind = key.partition(".")
        if stem not in names:
            raise UsageError(f"key {key!r} names a module that the model has not")
        component, name = names[stem]
        name = f"{name}.bias" if kind in _OF_BIAS else name
        grouped.setdefault(component, {}).setdefault(name, {})[_READ.get(kind, kind)] = tensor
    return {
        component: {name: make_delta(name, parts) for name, parts in modules.items()}
        for component, modules in grouped.items()
    }
