"""kohya's keys, for A1111, Forge, ComfyUI and sd-scripts: `lora_unet_….lora_down.weight`.

Readers scale by alpha/rank, and take alpha = rank where it is missing; but diffusers' reader
honours only one alpha a component. So one alpha is written for every layer of the file and the rest
of each layer's scale is folded into its `lora_up`: exact in all of them. Reading is
`lycoris.parse`, since these are the plain ones of LyCORIS' keys.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from sd_lora.formats.canonical import Adapter, each, file_rank, is_plain, plain
from sd_lora.formats.diffusers import padded, padded_ranks
from sd_lora.formats.names import Naming
from sd_lora.models.families import Family
from sd_lora.models.original_names import Layout


def can_write(adapter: Adapter) -> bool:
    """Whether every reader of this format has a form for every delta: B·A alone (LoRA)."""
    return "" not in adapter and is_plain(adapter)


def diffusers_reads(
    adapter: Adapter, layout: Layout | None = None, family: Family | None = None
) -> bool:
    """Whether diffusers' loader takes this form too.

    It knows a text encoder's projections of queries, keys and values only beside that of the
    output, and its MLP only beside these; in original names, with their `layout`, it knows no
    upsampler of a block without attention, the first one of SDXL's refiner. It takes `lora_te_` for
    a first text encoder, which the refiner has not.
    """
    prefixes = family.kohya_prefixes if family else {}
    if "text_encoder" not in prefixes and prefixes.get("text_encoder_2") == "lora_te":
        if "text_encoder_2" in adapter:
            return False
    for component, modules in adapter.items():
        if component == "unet":
            bare = (
                (i for i, attends in enumerate(layout.up_attention) if not attends)
                if layout
                else ()
            )
            if any(f"up_blocks.{i}.upsamplers.0.conv" in modules for i in bare):
                return False
            continue
        has = {x: any(n.endswith(f".self_attn.{x}_proj") for n in modules) for x in "qkv"}
        out = any(name.endswith(".self_attn.out_proj") for name in modules)
        mlp = any(name.endswith((".mlp.fc1", ".mlp.fc2")) for name in modules)
        if (any(has.values()) and not out) or not (out or mlp):
            return False
    return True


def common_alpha(adapter: Adapter) -> float:
    """The alpha of every layer in a written file: the most common rank."""
    ranks = Counter(rank for _, _, delta in each(adapter) if (rank := file_rank(delta)))
    return float(max(ranks, key=lambda rank: (ranks[rank], rank), default=1))


def write(adapter: Adapter, naming: Naming) -> Iterator[tuple[str, Tensor]]:
    """Yield the file's keys and tensors, of an adapter that `can_write` allows."""
    common = common_alpha(adapter)
    fill = {component: padded_ranks(component, modules) for component, modules in adapter.items()}
    for component, name, delta in each(adapter):
        factors = plain(delta)
        assert factors is not None, name
        A, B, alpha = factors
        rank = fill[component].get(name, len(A))
        A, B = padded(A, B * (alpha / common * (rank / len(A))), rank)
        key = naming.kohya(component, name)
        yield f"{key}.lora_down.weight", A
        yield f"{key}.lora_up.weight", B
        yield f"{key}.alpha", torch.tensor(common)
