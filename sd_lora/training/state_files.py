"""Nested states, such as an optimiser's, as a safetensors file and JSON: nothing is pickled.

In the JSON a tensor is {"tensor": its key}, a dictionary {"items": [[key, value], …]}, since keys
may be numbers, and a tuple {"tuple": […]}; numbers are exact, being written as Python writes them.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from sd_lora.files import write_tensors, write_whole

TENSORS, STRUCTURE = "state.safetensors", "state.json"


def write_state(folder: Path, state: Any) -> None:
    """Write a state of dictionaries, lists, tuples, tensors, numbers, texts and None.

    Raises:
        RunError: a failed write.
        TypeError: an object of another kind.
    """
    tensors: dict[str, Tensor] = {}
    structure = _packed(state, tensors)
    specs = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    write_tensors(folder / TENSORS, specs, tensors.items(), {})
    write_whole(folder / STRUCTURE, json.dumps(structure).encode())


def read_state(folder: Path) -> Any:
    """The state that `write_state` wrote, on the CPU; no file stays open."""
    # whole, not mapped into memory: Windows would keep the file from being pruned
    tensors = load((folder / TENSORS).read_bytes())
    return _unpacked(json.loads((folder / STRUCTURE).read_bytes()), tensors)


def tensors_in(state: Any) -> list[Tensor]:
    """All tensors of a state."""
    tensors: dict[str, Tensor] = {}
    _packed(state, tensors)
    return list(tensors.values())


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value in JSON's types; its tensors are added to `tensors`."""
    match value:
        case Tensor():
            key = f"{len(tensors):06}"
            tensors[key] = value
            return {"tensor": key}
        case dict():
            return {"items": [[key, _packed(item, tensors)] for key, item in value.items()]}
        case tuple():
            return {"tuple": [_packed(item, tensors) for item in value]}
        case list():
            return [_packed(item, tensors) for item in value]
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"a state cannot hold a {type(value).__name__}")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `_packed` took."""
    match value:
        case {"tensor": key}:
            return tensors[key]
        case {"items": rows}:
            return {key: _unpacked(item, tensors) for key, item in rows}
        case {"tuple": items}:
            return tuple(_unpacked(item, tensors) for item in items)
        case list():
            return [_unpacked(item, tensors) for item in value]
    return value
