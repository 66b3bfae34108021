"""diffusers' and peft's keys, of today and of old: `unet.<module>.lora_A.weight`.

Written for `pipeline.load_lora_weights`. The file has no alpha: a loader takes alpha = rank. So the
scale α/r is folded into B, and every module loads at its trained strength whatever its rank and
alpha. A magnitude (DoRA) is `….lora_magnitude_vector.weight`: without the `.weight` diffusers loses
a text encoder's.

Read, also side by side in one file: `.lora_A/.lora_B` with or without an adapter's name and
peft's `base_model.model.`; `.lora.down/.up`, `.lora_linear_layer.`, `.processor.to_q_lora.`
of older diffusers; and dotted names of kohya's kinds of tensor, as ComfyUI and OneTrainer write
them, in diffusers' and in the original names.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sd_lora.errors import UsageError
from sd_lora.formats.canonical import (
    Adapter,
    Modules,
    canonical_name,
    each,
    file_rank,
    is_plain,
    method_tensors,
    plain,
)
from sd_lora.formats.names import Naming, canonical
from sd_lora.models.original_names import Layout

HEADER_KEY = "lora_adapter_metadata"

_PREFIXES = {
    "unet": "unet",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "diffusion_model": "unet",  # ComfyUI's word, with original names
    "model.diffusion_model": "unet",
    "text_encoders.clip_l.transformer": "text_encoder",  # ComfyUI's words
    "text_encoders.clip_h.transformer": "text_encoder",
    "text_encoders.clip_g.transformer": "text_encoder_2",
    "text_encoders.clip_l": "text_encoder",  # OneTrainer's
    "text_encoders.clip_g": "text_encoder_2",
    "clip_l.transformer": "text_encoder",
    "clip_g.transformer": "text_encoder_2",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}
_UNET = re.compile(
    r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_norm_out|conv_out"
    r"|(?:time|add|class)_embedding|input_blocks|middle_block|output_blocks|time_embed|label_emb"
    r"|out\.[02])\."
)
_TEXT = re.compile(r"(?:text_model|encoder\.layers|embeddings|text_projection)\.")
_COMPILED = "_orig_mod."
"""The level that torch.compile puts into names."""

_ADAPTER_NAME = r"(?:\.(?!weight\Z|bias\Z).+?)?"
_ENDS = {
    "lora_A": rf"\.lora_A{_ADAPTER_NAME}\.weight|\.lora_embedding_A{_ADAPTER_NAME}",
    "lora_B": rf"\.lora_B{_ADAPTER_NAME}\.weight|\.lora_embedding_B{_ADAPTER_NAME}",
    "down": r"(?:\.lora\.|_lora\.|\.lora_linear_layer\.|\.lora_)down\.weight",
    "up": r"(?:\.lora\.|_lora\.|\.lora_linear_layer\.|\.lora_)up\.weight",
    "lora_mid": r"\.lora_mid\.weight",
    "flat_magnitude": r"\.lora_magnitude_vector(?:\.(?!weight$)\w+)?(?:\.weight)?",
    "magnitude": r"\.dora_scale",
    "alpha": r"\.alpha",
    "diff": r"\.(?:diff|w_norm)",
    "bias": r"\.(?:diff_b|b_norm)",
    "other": r"\.(?P<kind>[a-z]\w+)",
}
_END = "|".join(f"(?P<{kind}>{end})" for kind, end in _ENDS.items())
_KEY = re.compile(rf"(?P<name>.+?)(?:{_END})\Z")
_OLD_UNET = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out)")
_OLD_TEXT = re.compile(r"(.+\.self_attn)\.to_(q|k|v|out)")
FLAT = "flat_magnitude"
"""Kind of a magnitude that is one number an output: (out,), or (1, out, 1, 1) for a convolution."""


def parse(key: str, layout: Layout) -> tuple[str, str, str] | None:
    """Component, canonical name and kind of tensor of a key; None for a key of another form.

    A key without a component is sorted by its name; SDXL's second text encoder cannot be told then.
    """
    match = _KEY.match(key)
    if match is None:
        return None
    end = next(end for end in _ENDS if match[end])
    kind = {"down": "lora_A", "up": "lora_B", "other": match["kind"], "bias": "diff"}.get(end, end)
    if end == "other" and kind not in method_tensors():
        return None
    component, name = _component_and_module(match["name"])
    name = name.removeprefix("base_model.model.").replace(_COMPILED, "")
    if component is not None:
        name = name.removeprefix(f"{component}.")  # `unet.unet.`, of scripts that add it twice
    else:
        component = "unet" if _UNET.match(f"{name}.") else "text_encoder"
        if component == "text_encoder" and not _TEXT.match(f"{name}."):
            return None
    found = canonical(component, _new_name(component, name), layout)
    if found is None:
        return None
    component, name = found
    return component, f"{name}.bias" if end == "bias" else name, kind


def _component_and_module(name: str) -> tuple[str | None, str]:
    """A key's component, if it names one, and the rest of the name."""
    for prefix in sorted(_PREFIXES, key=len, reverse=True):
        if name.startswith(f"{prefix}."):
            return _PREFIXES[prefix], name[len(prefix) + 1 :]
    return None, name


def _new_name(component: str, name: str) -> str:
    """A module's name of today for one of old diffusers."""
    if old := _OLD_UNET.fullmatch(name):
        name = f"{old[1]}.{old[2]}"
    elif component != "unet" and (old := _OLD_TEXT.fullmatch(name)):
        name = f"{old[1]}.{old[2]}_proj"
    return f"{name}.0" if component == "unet" and name.endswith(".to_out") else name


def stem_of(key: str) -> str:
    """A key without its ending; of a key of another form, all of it."""
    match = _KEY.match(key)
    return match["name"] if match else key


def module_in(key: str) -> str:
    """The module of a key as diffusers' loader takes it, with `text_model.` in a text encoder.

    It is not the canonical name where there is more in the key: another level, original names.
    """
    stem = stem_of(key)
    component, name = _component_and_module(stem)
    name = _new_name(component or "", name)
    if component == "unet" and stem.endswith(".to_out") and ".processor." not in stem:
        name = name.removesuffix(".0")
    return canonical_name(component or "", name)


def configs(header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Component → peft configuration, as `save_lora_weights` may put into the header.

    Raises:
        UsageError: a configuration that is not a table.
    """
    if HEADER_KEY not in header:
        return {}
    try:
        found: dict[str, dict[str, Any]] = {}
        for key, value in json.loads(header[HEADER_KEY]).items():
            component, _, name = key.partition(".")
            found.setdefault(component, {})[name] = value
        return found
    except (ValueError, AttributeError, RecursionError) as error:
        reason = str(error)[:160]
        raise UsageError(f"{HEADER_KEY} in the header is no table: {reason}") from None


_QKVO = tuple(f".self_attn.{x}_proj" for x in ("q", "k", "v", "out"))
_MLP = (".mlp.fc1", ".mlp.fc2")


def has_attention(modules: Iterable[str]) -> bool:
    """Whether any of a text encoder's modules is of its attention."""
    return any(name.endswith(_QKVO) for name in modules)


def can_write(adapter: Adapter) -> bool:
    """Whether diffusers' loader has a form for every delta: B·A, with or without a magnitude.

    Of a text encoder it must find the attention or the MLP, and magnitudes with the attention's.
    """
    if "" in adapter or not is_plain(adapter, decomposed=True):
        return False
    for component, modules in adapter.items():
        if component != "unet" and not has_attention(modules):
            decomposed = any(delta.magnitude is not None for delta in modules.values())
            if decomposed or not any(name.endswith(_MLP) for name in modules):
                return False
    return True


def padded_ranks(component: str, modules: Modules) -> dict[str, int]:
    """Name → rank to fill up with zeros, where diffusers' loader needs it.

    The loader reads the ranks of a text encoder's attention and MLP, and gives `text_projection`
    the most common of them.
    """
    projections = {name for name in modules if name.startswith("text_projection")}
    if component == "unet" or not projections:
        return {}
    ranks = {name: file_rank(delta) or 0 for name, delta in modules.items()}
    others = {rank for name, rank in ranks.items() if name not in projections}
    if not others or all(others == {ranks[name]} for name in projections):
        return {}
    largest = max(ranks.values())
    return dict.fromkeys(projections if others == {largest} else ranks, largest)


def padded(A: Tensor, B: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Factors with zeros up to a rank, None for no more than they have."""
    more = 0 if rank is None else rank - len(A)
    if more <= 0:
        return A, B
    ones = (1,) * (B.dim() - 2)
    zeros = A.new_zeros(more, *A.shape[1:]), B.new_zeros(len(B), more, *ones)
    return torch.cat((A, zeros[0])), torch.cat((B, zeros[1]), 1)


def write(adapter: Adapter, naming: Naming) -> Iterator[tuple[str, Tensor]]:
    """Yield the file's keys and tensors, of an adapter that `can_write` allows."""
    fill = {component: padded_ranks(component, modules) for component, modules in adapter.items()}
    # without attention diffusers knows a text encoder's keys by older names alone
    old = {c for c, modules in adapter.items() if c != "unet" and not has_attention(modules)}
    for component, name, delta in each(adapter):
        factors = plain(delta)
        assert factors is not None, name
        A, B, alpha = factors
        A, B = padded(A, B * (alpha / len(A)), fill[component].get(name))
        ends = ("lora_linear_layer.down", "lora_linear_layer.up")
        down, up = ends if component in old else ("lora_A", "lora_B")
        yield f"{component}.{name}.{down}.weight", A
        yield f"{component}.{name}.{up}.weight", B
        if delta.magnitude is not None:
            m = delta.magnitude.detach().flatten()
            if len(delta.shape) > 2:
                m = m.view(1, -1, *(1,) * (len(delta.shape) - 2))
            yield f"{component}.{name}.lora_magnitude_vector.weight", m.contiguous()
