"""sd_lora: train Stable Diffusion LoRAs that load everywhere, exactly.

Importing this package is cheap: a name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "AdaptedLayer": "adapters.layers",
    "LoRAConv1d": "adapters.layers",
    "LoRAConv2d": "adapters.layers",
    "LoRAConv3d": "adapters.layers",
    "LoRALinear": "adapters.layers",
    "RunError": "errors",
    "TrainConfig": "training.config",
    "UsageError": "errors",
    "eject": "adapters.inject",
    "inject": "adapters.inject",
    "load_adapter": "formats.files",
    "load_lora_state_dict": "adapters.inject",
    "lora_layers": "adapters.inject",
    "lora_state_dict": "adapters.inject",
    "merge": "adapters.inject",
    "merged": "adapters.inject",
    "save_adapter": "formats.files",
    "train": "training.loop",
    "unmerge": "adapters.inject",
}

__all__ = [
    "AdaptedLayer",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRALinear",
    "RunError",
    "TrainConfig",
    "UsageError",
    "eject",
    "inject",
    "load_adapter",
    "load_lora_state_dict",
    "lora_layers",
    "lora_state_dict",
    "merge",
    "merged",
    "save_adapter",
    "train",
    "unmerge",
]

if TYPE_CHECKING:
    from sd_lora.adapters.inject import (
        eject,
        inject,
        load_lora_state_dict,
        lora_layers,
        lora_state_dict,
        merge,
        merged,
        unmerge,
    )
    from sd_lora.adapters.layers import (
        AdaptedLayer,
        LoRAConv1d,
        LoRAConv2d,
        LoRAConv3d,
        LoRALinear,
    )
    from sd_lora.errors import RunError, UsageError
    from sd_lora.formats.files import load_adapter, save_adapter
    from sd_lora.training.config import TrainConfig
    from sd_lora.training.loop import train


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sd_lora' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sd_lora.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
