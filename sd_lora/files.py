"""Tensor files, one tensor at a time: opened without trust, written whole or not at all."""

import hashlib
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sd_lora.errors import RunError, UsageError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
HASH_KEY = "sshs_model_hash"
_POINTER = b"version https://git-lfs"

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_OF_NAME = {name: dtype for dtype, name in _DTYPES.items()}

Spec = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's dtype and shape."""


class TensorFile(Mapping[str, Tensor]):
    """A file's tensors by key, each read when it is asked for.

    header: a safetensors file's metadata. A pickled file is read whole, and only if it holds
    nothing but tensors: no code in it is ever run.

    Raises:
        UsageError: what cannot be read, and why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, str] = {}
        self._pickled: dict[str, Tensor] | None = None
        if not os.path.isfile(path):  # False, too, for a name that the system refuses
            raise UsageError(f"{path} is not a file")
        _refuse_pointer(path)
        if path.suffix in PICKLES:
            self._pickled = _unpickle(path)
            return
        try:
            self._file = safe_open(path, "pt")
            self._keys = dict.fromkeys(self._file.keys())
            self.header = self._file.metadata() or {}
        except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
            what = "it is empty" if not path.stat().st_size else str(error)
            raise UsageError(f"{path} is not a readable safetensors file: {what}") from None

    def __getitem__(self, key: str) -> Tensor:
        if self._pickled is not None:
            return self._pickled[key]
        if key not in self._keys:
            raise KeyError(key)
        try:
            return self._file.get_tensor(key)
        # shapes and dtypes that are lies, and dtypes that torch has not
        except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{self.path}: {key!r} cannot be read: {_reason(error)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys if self._pickled is None else self._pickled)

    def __len__(self) -> int:
        return len(self._keys if self._pickled is None else self._pickled)

    def spec(self, key: str) -> Spec:
        """Returns a tensor's dtype and shape without reading it."""
        if self._pickled is not None:
            tensor = self._pickled[key]
            return tensor.dtype, tuple(tensor.shape)
        view = self._file.get_slice(key)
        name = view.get_dtype()
        dtype = _OF_NAME.get(name) or self[key].dtype
        return dtype, tuple(view.get_shape())


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} was not opened: it is no pickle of tensors alone ({_reason(error)}), and any "
            "other may run code as it is read. Take a .safetensors file of it from where you trust"
        ) from None
    except MemoryError:
        raise RunError(f"{path} asks for more memory than there is") from None
    # a foreign parser over foreign bytes: whatever it stumbles over is the file's fault
    except Exception as error:
        kind = "zip" if zipfile.is_zipfile(path) else "pickle"
        raise UsageError(f"{path} is not a readable {kind} of tensors: {_reason(error)}") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        beside = [key for key, value in found.items() if isinstance(value, Tensor)]
        if beside:
            raise UsageError(f"{path} holds tensors beside its state_dict: {beside[0]!r}")
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a {type(found).__name__} and not tensors by name")
    tensors = {k: t for k, t in found.items() if isinstance(k, str) and isinstance(t, Tensor)}
    if len(tensors) < len(found):
        odd = next(k for k in found if k not in tensors)
        raise UsageError(f"{path} holds {odd!r}, a {type(found[odd]).__name__} and no tensor")
    size = path.stat().st_size
    for key, t in tensors.items():
        plain = t.layout is torch.strided and not (t.is_quantized or t.is_nested or t.is_meta)
        # one number of the file may be a tensor of any size, by strides of 0
        if not plain or t.numel() * t.element_size() > size:
            raise UsageError(
                f"{path}: {key!r} is sparse, quantised, or without values of its own in the file: "
                "it cannot be read"
            )
    return {key: t.detach() for key, t in tensors.items()}


def _reason(error: Exception) -> str:
    """Returns what an error found, without torch's advice to open the file all the same."""
    advice = ("Weights only load failed", "Please file an issue", "Check the documentation")
    lines = (line for line in str(error).splitlines() if not line.startswith(advice))
    found = " ".join(" ".join(lines).split())[:160]
    # a KeyError's text is a bare key, an EOFError's is none
    return found if " " in found else f"{type(error).__name__} {found}".strip()


def _refuse_pointer(path: Path) -> None:
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UsageError(
                f"{path} is a git-lfs pointer, which stands for the file and is not it: run "
                "`git lfs pull` in its folder, or download the file itself"
            )


def mib(num_bytes: float) -> str:
    """Returns a size for people: "3.8 MiB", "290 KiB"."""
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**19 else f"{num_bytes / 2**10:.0f} KiB"


@contextmanager
def whole_file(path: Path, size: int) -> Iterator[IO[bytes]]:
    """Yields a file to write that will be there whole or not at all: beside, fsync, rename.

    Raises:
        RunError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        mib = f"{size / 2**20:.1f} MiB"
        raise RunError(f"{path} ({mib}) could not be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Writes bytes so that the file is there whole or not at all. Raises: see `whole_file`."""
    with whole_file(path, len(data)) as file:
        file.write(data)


def write_tensors(
    path: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    header: Mapping[str, str],
) -> None:
    """Writes a safetensors file, one tensor in memory at a time.

    The layout is that of the safetensors library, whatever the order in which they come: wider
    dtypes first, then by key. A header with `sshs_model_hash` gets there the SHA-256 of what
    follows the header, by which kohya's tools and model sites know a file.

    Args:
        path: of the file.
        specs: key → dtype and shape of every tensor.
        tensors: all of them, in any order.
        header: metadata.

    Raises:
        RunError: the file could not be written; nothing is left behind.
    """
    hashed = HASH_KEY in header
    # sorted: the safetensors library gives a header's keys in another order each time
    header = dict(sorted(header.items())) | ({HASH_KEY: "0" * 64} if hashed else {})
    table: dict[str, Any] = {"__metadata__": header} if header else {}
    end, starts = 0, {}
    for key in sorted(specs, key=lambda k: (-specs[k][0].itemsize, k)):
        dtype, shape = specs[key]
        starts[key] = end
        end += math.prod(shape) * dtype.itemsize
        table[key] = {
            "dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [starts[key], end]
        }  # fmt: skip
    with whole_file(path, end) as file:
        body = _write_table(file, table)
        missing = dict(specs)
        for key, tensor in tensors:
            dtype, shape = missing.pop(key)
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, not {specs[key]}")
            file.seek(body + starts[key])
            file.write(_bytes_of(tensor))
        if missing:
            raise ValueError(f"{min(missing)} was announced and not written")
        if hashed:
            file.seek(body)
            header[HASH_KEY] = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            _write_table(file, table | {"__metadata__": header})


def _write_table(file: IO[bytes], table: Mapping[str, Any]) -> int:
    """Writes a safetensors header at the start of a file; returns where the tensors begin."""
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.seek(0)
    file.write(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def _bytes_of(tensor: Tensor) -> memoryview | bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
