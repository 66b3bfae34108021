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
        if not path.is_file():
            raise UsageError(f"{path} is not a file")
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
        return self._file.get_tensor(key)

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
        dtype = _OF_NAME.get(name) or self._file.get_tensor(key).dtype
        return dtype, tuple(view.get_shape())


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise UsageError(
            f"{path} was not opened: it holds more than tensors, and a pickle may run code as it "
            f"is read ({reason[:160]}). Take a .safetensors file of it from where you trust"
        ) from None
    # a foreign parser over foreign bytes: whatever it stumbles over is the file's fault
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        kind = "zip" if zipfile.is_zipfile(path) else "pickle"
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UsageError(f"{path} is not a readable {kind} of tensors: {reason}") from None
    while isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a {type(found).__name__} and not tensors by name")
    tensors = {k: t for k, t in found.items() if isinstance(k, str) and isinstance(t, Tensor)}
    if len(tensors) < len(found):
        odd = next(k for k in found if k not in tensors)
        raise UsageError(f"{path} holds {odd!r}, a {type(found[odd]).__name__} and no tensor")
    dense = {k: t.detach() for k, t in tensors.items() if t.layout is torch.strided}
    if len(dense) < len(tensors):
        raise UsageError(f"{path} holds sparse or quantised tensors, which cannot be read")
    return dense


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
    header = dict(header) | ({HASH_KEY: "0" * 64} if hashed else {})
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
