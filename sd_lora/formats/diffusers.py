"""peft's keys, for `pipeline.load_lora_weights`: `unet.<module>.lora_A.weight`, `…lora_B.weight`.

The file has no alpha: a loader takes alpha = rank. So the scale α/r is folded into B, and every
module loads at its trained strength whatever its rank and alpha. A magnitude (DoRA) is
`….lora_magnitude_vector.weight`: without the `.weight` diffusers loses a text encoder's.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sd_lora.adapters.state import make_delta
from sd_lora.errors import UsageError
from sd_lora.formats.canonical import Adapter, canonical_name, is_plain, plain
from sd_lora.formats.peft import group, scale_of

FILE_NAME = "pytorch_lora_weights.safetensors"
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def detect(keys: list[str]) -> bool:
    prefixes = tuple(f"{component}." for component in _COMPONENTS)
    return any(key.startswith(prefixes) and ("lora_" in key or "lokr_" in key) for key in keys)


def configs(header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns component → peft configuration, as `save_lora_weights` may put into the header.

    Raises:
        UsageError: a configuration that is no table.
    """
    if "lora_adapter_metadata" not in header:
        return {}
    try:
        found: dict[str, dict[str, Any]] = {}
        for key, value in json.loads(header["lora_adapter_metadata"]).items():
            component, _, name = key.partition(".")
            found.setdefault(component, {})[name] = value
        return found
    except (ValueError, AttributeError) as error:
        raise UsageError(f"lora_adapter_metadata in the header is no table: {error}") from None


def can_write(adapter: Adapter) -> bool:
    """Whether diffusers' loader has a form for every update: B·A, with or without a magnitude."""
    return is_plain(adapter, decomposed=True) and "" not in adapter


def write(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the file's tensors, of an adapter that `can_write` allows."""
    tensors = {}
    for component, modules in adapter.items():
        for name, delta in modules.items():
            factors = plain(delta)
            assert factors is not None, name
            A, B, alpha = factors
            tensors[f"{component}.{name}.lora_A.weight"] = A
            tensors[f"{component}.{name}.lora_B.weight"] = B * (alpha / len(A))
            if delta.magnitude is not None:
                m = delta.magnitude.detach().flatten()
                if len(delta.shape) > 2:
                    m = m.view(1, -1, *(1,) * (len(delta.shape) - 2))
                tensors[f"{component}.{name}.lora_magnitude_vector.weight"] = m.contiguous()
    return tensors


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Adapter:
    """Returns the adapter of a file in this format: alpha = rank, unless the header has a
    configuration, which diffusers' loader obeys.

    Raises:
        UsageError: a key that is not of this format, or tensors that do not fit together.
    """
    grouped, rest = group(tensors)
    if rest:
        raise UsageError(f"key {min(rest)!r} is not of the diffusers format")
    adapter: Adapter = {}
    by_component = configs(header or {})
    for full_name, parts in grouped.items():
        component, _, name = full_name.partition(".")
        if component not in _COMPONENTS:
            raise UsageError(f"key {full_name!r} is not of the diffusers format")
        modules = adapter.setdefault(component, {})
        delta = modules[canonical_name(component, name)] = make_delta(full_name, parts)
        if component in by_component and delta.rank is not None:
            delta.alpha = scale_of(by_component[component], name) * delta.rank
    return adapter
