"""kohya's keys, for A1111, Forge, ComfyUI and sd-scripts: `lora_unet_….lora_down.weight`.

Readers scale by alpha/rank, and take alpha = rank where it is missing; but diffusers' reader
honours only one alpha a component. So one alpha is written for every layer of the file and the
rest of each layer's scale is folded into its `lora_up`: exact in all of them. Reading is
`lycoris.read`: the same keys, of which these are the plain ones.
"""

from collections import Counter

import torch
from torch import Tensor

from sd_lora.errors import UsageError
from sd_lora.formats.canonical import Adapter, file_rank, is_plain, plain
from sd_lora.formats.names import kohya_name


def can_write(adapter: Adapter) -> bool:
    """Whether every reader of this format has a form for every update: B·A alone (LoRA)."""
    return is_plain(adapter) and "" not in adapter


def common_alpha(adapter: Adapter) -> float:
    """Returns the alpha that `write` gives to every layer: the most common rank."""
    deltas = [delta for modules in adapter.values() for delta in modules.values()]
    ranks = Counter(rank for delta in deltas if (rank := file_rank(delta)))
    return float(max(ranks, key=lambda rank: (ranks[rank], rank), default=1))


def write(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the file's tensors, SD1/SD2 names, of an adapter that `can_write` allows."""
    common = common_alpha(adapter)
    tensors = {}
    for component, modules in adapter.items():
        for name, delta in modules.items():
            factors = plain(delta)
            assert factors is not None, name
            A, B, alpha = factors
            key = kohya_name(component, name)
            if f"{key}.alpha" in tensors:
                raise UsageError(f"{name} and another module are both {key} in kohya's names")
            tensors[f"{key}.lora_down.weight"] = A
            tensors[f"{key}.lora_up.weight"] = B * (alpha / common)
            tensors[f"{key}.alpha"] = torch.tensor(common)
    return tensors
