"""kohya's keys, for A1111, Forge, ComfyUI and sd-scripts: `lora_unet_….lora_down.weight`.

Readers scale by alpha/rank, and take alpha = rank where it is missing; but diffusers' reader
honours only one alpha a component. So one alpha is written for every layer of the file and the
rest of each layer's scale is folded into its `lora_up`: exact in all of them.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from sd_lora.errors import UsageError
from sd_lora.formats.canonical import Adapter, Factors
from sd_lora.formats.names import PREFIXES, kohya_name


def detect(keys: list[str]) -> bool:
    prefixes = tuple(f"{p}_" for p in PREFIXES.values())
    return any(key.startswith(prefixes) for key in keys)


def common_alpha(adapter: Adapter) -> float:
    """Returns the alpha that `write` gives to every layer: the most common rank."""
    ranks = Counter(f.rank for modules in adapter.values() for f in modules.values())
    return float(max(ranks, key=lambda rank: (ranks[rank], rank)))


def write(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the file's tensors, SD1/SD2 names."""
    alpha = common_alpha(adapter)
    tensors = {}
    for component, modules in adapter.items():
        for name, f in modules.items():
            key = kohya_name(component, name)
            tensors[f"{key}.lora_down.weight"] = f.A.contiguous()
            tensors[f"{key}.lora_up.weight"] = (f.B * (f.scale * f.rank / alpha)).contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def read(tensors: Mapping[str, Tensor], names: Mapping[str, tuple[str, str]]) -> Adapter:
    """Returns the adapter of a file in this format.

    Args:
        tensors: the file's tensors.
        names: kohya name → (component, canonical name), see `names.from_kohya`.

    Raises:
        UsageError: a module that `names` lacks, an unknown kind of key, or a missing partner.
    """
    adapter: Adapter = {}
    for key in tensors:
        stem, _, kind = key.partition(".")
        if kind not in ("lora_down.weight", "lora_up.weight", "alpha"):
            raise UsageError(f"key {key!r} is of a method that cannot be read yet ({kind})")
        if stem not in names:
            raise UsageError(f"key {key!r} names a module that the model has not")
        down, up = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
        if down not in tensors or up not in tensors:
            raise UsageError(f"key {key!r} has no partner: lora_down and lora_up come in pairs")
        component, name = names[stem]
        A, B = tensors[down], tensors[up]
        alpha = float(tensors[f"{stem}.alpha"]) if f"{stem}.alpha" in tensors else A.shape[0]
        adapter.setdefault(component, {})[name] = Factors(A, B, float(alpha))
    return adapter
