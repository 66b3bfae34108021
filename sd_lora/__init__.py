"""sd_lora: train Stable Diffusion LoRAs that load everywhere, exactly.

Importing this package is cheap: a name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "AdaptedLayer": "adapters.layers",
    "Delta": "adapters.deltas",
    "RunError": "errors",
    "TrainConfig": "training.config",
    "UsageError": "errors",
    "Variant": "adapters.variants",
    "combine": "adapters.state",
    "eject": "adapters.inject",
    "inject": "adapters.inject",
    "limit_norms": "adapters.inject",
    "load_adapter": "formats.files",
    "load_lora_state_dict": "adapters.state",
    "lora_layers": "adapters.inject",
    "lora_state_dict": "adapters.state",
    "merge": "adapters.inject",
    "merged": "adapters.inject",
    "register_method": "adapters.deltas",
    "save_adapter": "formats.files",
    "set_strength": "adapters.inject",
    "train": "training.loop",
    "unmerge": "adapters.inject",
    "updates": "adapters.inject",
    "wrap": "adapters.kinds",
}

__all__ = [
    "AdaptedLayer",
    "Delta",
    "RunError",
    "TrainConfig",
    "UsageError",
    "Variant",
    "combine",
    "eject",
    "inject",
    "limit_norms",
    "load_adapter",
    "load_lora_state_dict",
    "lora_layers",
    "lora_state_dict",
    "merge",
    "merged",
    "register_method",
    "save_adapter",
    "set_strength",
    "train",
    "unmerge",
    "updates",
    "wrap",
]

if TYPE_CHECKING:
    from sd_lora.adapters.deltas import Delta, register_method
    from sd_lora.adapters.inject import (
        eject,
        inject,
        limit_norms,
        lora_layers,
        merge,
        merged,
        set_strength,
        unmerge,
        updates,
    )
    from sd_lora.adapters.kinds import wrap
    from sd_lora.adapters.layers import AdaptedLayer
    from sd_lora.adapters.state import combine, load_lora_state_dict, lora_state_dict
    from sd_lora.adapters.variants import Variant
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
