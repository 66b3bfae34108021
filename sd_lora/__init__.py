"""sd_lora: train Stable Diffusion LoRAs that load everywhere, exactly.

Importing this package is cheap: a name is loaded when it is first used.
"""

import importlib
import warnings
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "AdaptedLayer": "adapters.layers",
    "Delta": "adapters.deltas",
    "RunError": "errors",
    "Terminal": "terminal",
    "TrainConfig": "config.schema",
    "UsageError": "errors",
    "Variant": "adapters.variants",
    "combine": "adapters.state",
    "deltas_of": "adapters.inject",
    "eject": "adapters.inject",
    "inject": "adapters.inject",
    "limit_norms": "adapters.merging",
    "load_adapter": "formats.adapter_files",
    "load_lora_state_dict": "adapters.state",
    "lora_layers": "adapters.inject",
    "lora_state_dict": "adapters.state",
    "merge": "adapters.merging",
    "merged": "adapters.merging",
    "register_method": "adapters.deltas",
    "save_adapter": "formats.adapter_files",
    "set_strength": "adapters.merging",
    "train": "training.loop",
    "unmerge": "adapters.merging",
    "wrap": "adapters.layer_classes",
}

__all__ = [
    "AdaptedLayer",
    "Delta",
    "RunError",
    "Terminal",
    "TrainConfig",
    "UsageError",
    "Variant",
    "combine",
    "deltas_of",
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
    "wrap",
]

if TYPE_CHECKING:
    from sd_lora.adapters.deltas import Delta, register_method
    from sd_lora.adapters.inject import deltas_of, eject, inject, lora_layers
    from sd_lora.adapters.layer_classes import wrap
    from sd_lora.adapters.layers import AdaptedLayer
    from sd_lora.adapters.merging import limit_norms, merge, merged, set_strength, unmerge
    from sd_lora.adapters.state import combine, load_lora_state_dict, lora_state_dict
    from sd_lora.adapters.variants import Variant
    from sd_lora.config.schema import TrainConfig
    from sd_lora.errors import RunError, UsageError
    from sd_lora.formats.adapter_files import load_adapter, save_adapter
    from sd_lora.terminal import Terminal
    from sd_lora.training.loop import train


_FORMER = {"updates": "deltas_of"}
"""Former public name → present name."""


def __getattr__(name: str) -> object:
    if name in _FORMER:
        message = f"sd_lora.{name} is called sd_lora.{_FORMER[name]} now"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        name = _FORMER[name]
    if name not in _HOME:
        raise AttributeError(f"module 'sd_lora' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sd_lora.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
