"""Pickles of tensors, read without trust: no code in a file is ever run.

torch reads pickles of tensors alone. Checkpoints of PyTorch Lightning hold objects of its classes
beside their tensors: these are read with something inert in each object's place.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sd_lora.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_LEFT_OUT = {
    *("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics"),
    *("omegaconf", "numpy", "argparse", "pathlib", "collections", "typing", "enum", "datetime"),
    *("ldm", "sgm", "torch", "transformers", "diffusers", "accelerate"),
}
"""Packages whose objects are left out. A file that names others is refused: it may be an attack."""

_KEPT = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("_codecs", "encode"),
}
"""Classes and functions that tensors are made of, beside torch's dtypes and storages."""


class LeftOut:
    """Something inert in the place of a foreign object: it takes any arguments and state."""

    def __new__(cls, *_: Any, **__: Any) -> LeftOut:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> LeftOut:
        return LeftOut()

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)

    def append(self, item: object) -> None:
        pass

    extend = update = add = append


def load_tensors_of(path: Path) -> tuple[Any, list[str]]:
    """Return a zipped pickle's content, and the names of the classes that were left out.

    Raises:
        pickle.UnpicklingError: a name outside the known packages.
    """
    import torch

    left_out: dict[str, None] = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if (module, name) in _KEPT or is_dtype:
                return super().find_class(module, name)
            if module.partition(".")[0] not in _LEFT_OUT:
                raise pickle.UnpicklingError(f"it names {module}.{name}")
            left_out[f"{module}.{name}"] = None
            return type(name, (LeftOut,), {})

    def load(*_: Any, **__: Any) -> Any:
        raise pickle.UnpicklingError("a pickle of torch before 1.6")

    module: Any = SimpleNamespace(Unpickler=Unpickler, load=load, __name__="tensors alone")
    # torch rebuilds the tensors; every name in the file goes through `find_class` above
    options: Any = {"map_location": "cpu", "mmap": can_be_mapped(path), "pickle_module": module}
    found = torch.load(path, weights_only=False, **options)
    return found, list(left_out)


def can_be_mapped(path: Path) -> bool:
    """Whether a pickle is a zip of uncompressed records; torch maps a compressed one as noise."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


MOST_UNPACKED = 50
"""Bytes that a byte of a compressed file may become: trained weights shrink by less than a half."""


def check_unpacked(path: Path) -> None:
    """Raise UsageError for a zip whose records are far larger than the file: a bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            size, packed = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
    # no zip, or a broken one, of which the reader says more
    except Exception:
        return
    if size > MOST_UNPACKED * packed + 2**20:
        raise UsageError(
            f"{path} was not opened: its {packed} bytes unpack to {size}, which no weights do"
        )


def tensors_by_key(
    path: Path, found: Any, lists: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of an unpickled dictionary, or of the `state_dict` in it; and the numbers
    beside them, as text: a training's epoch or step. A module's number (`….alpha`) is a tensor.

    lists: take a list too, with its positions as keys.
    """
    import torch

    if lists and isinstance(found, list):
        found = {str(position): tensor for position, tensor in enumerate(found)}
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        beside = [key for key, value in found.items() if isinstance(value, torch.Tensor)]
        if beside:
            raise UsageError(f"{path} holds tensors beside its state_dict: {beside[0]!r}")
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a {type(found).__name__} and not tensors by name")
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, str] = {}
    for key, value in found.items():
        if isinstance(key, str) and isinstance(value, int | float) and value is not True:
            if "." in key:
                tensors[key] = torch.tensor(float(value), dtype=torch.float64)
            else:
                numbers[key] = str(value)
        elif isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[key] = value
        else:
            raise UsageError(f"{path} holds {key!r}, a {type(value).__name__} and no tensor")
    return tensors, numbers
