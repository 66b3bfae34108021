"""peft's keys, for `pipeline.load_lora_weights`: `unet.<module>.lora_A.weight`, `…lora_B.weight`.

The file has no alpha: a loader takes alpha = rank. So the scale α/r is folded into B, and every
module loads at its trained strength whatever its rank and alpha.
"""

from collections.abc import Mapping

from torch import Tensor

from sd_lora.errors import UsageError
from sd_lora.formats.canonical import Adapter, Factors, canonical_name

FILE_NAME = "pytorch_lora_weights.safetensors"
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def detect(keys: list[str]) -> bool:
    return any(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


def write(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the file's tensors."""
    tensors = {}
    for component, modules in adapter.items():
        for name, f in modules.items():
            tensors[f"{component}.{name}.lora_A.weight"] = f.A.contiguous()
            tensors[f"{component}.{name}.lora_B.weight"] = (f.B * f.scale).contiguous()
    return tensors


def read(tensors: Mapping[str, Tensor]) -> Adapter:
    """Returns the adapter of a file in this format (alpha = rank).

    Raises:
        UsageError: a key that is not of this format, or a factor without its partner.
    """
    adapter: Adapter = {}
    for key in tensors:
        component, _, rest = key.partition(".")
        name, _, kind = rest.rpartition(".lora_")
        if component not in _COMPONENTS or kind not in ("A.weight", "B.weight"):
            raise UsageError(f"key {key!r} is not of the diffusers format")
        stem = f"{component}.{name}.lora_"
        if f"{stem}A.weight" not in tensors or f"{stem}B.weight" not in tensors:
            raise UsageError(f"key {key!r} has no partner: lora_A and lora_B come in pairs")
        A, B = tensors[f"{stem}A.weight"], tensors[f"{stem}B.weight"]
        modules = adapter.setdefault(component, {})
        modules[canonical_name(component, name)] = Factors(A, B, float(A.shape[0]))
    return adapter
