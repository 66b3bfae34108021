"""Files: tensors read one at a time and without trust, and whole files written or none.

torch is imported where a tensor is touched: code without tensors can use the writers cheaply.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import re
import secrets
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from sd_lora.errors import RunError, UsageError, near_path
from sd_lora.folders import free_bytes
from sd_lora.pickles import can_be_mapped, check_unpacked, load_tensors_of, tensors_by_key

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Ends of names under which torch writes pickles."""

HASH_KEY = "sshs_model_hash"
"""Header key of the SHA-256 by which kohya's tools and model sites know a file."""

PARSER_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
"""Errors of diffusers, torch and safetensors over a file's bytes: the file is at fault."""

_LFS_POINTER = b"version https://git-lfs"

_SAFETENSORS_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""torch's name of a dtype → the name in a safetensors file."""

_TORCH_NAMES = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}

Shape = tuple[int, ...]

Spec = tuple["torch.dtype", Shape]
"""A tensor's dtype and shape."""


class TensorFile(Mapping[str, "Tensor"]):
    """A file's tensors by key, each read when it is asked for.

    The name tells pickles (`PICKLES`) from safetensors files. A pickle must hold tensors alone: no
    code in a file is ever run. Pickles are mapped into memory, except for compressed ones and
    torch's format before 1.6, which are read whole.

    path: of the file.
    lists: whether a pickled list of tensors is taken, with its positions as keys.
    header: a safetensors file's metadata; for a pickle, the numbers beside its tensors.
    left_out: classes of a pickle's other objects, which were not read.

    Raises:
        UsageError: not a file, cut off, a git-lfs pointer, a pickle of other objects, or a tensor
            without values in the file.
        RunError: a pickle asks for more memory than there is.
    """

    def __init__(self, path: Path, lists: bool = False) -> None:
        self.path = path
        self.header: dict[str, str] = {}
        self.left_out: list[str] = []
        self._pickled: dict[str, Tensor] | None = None
        if not os.path.isfile(path):  # False, too, for a name that the system refuses
            raise UsageError(f"{path} is not a file{near_path(path)}")
        _refuse_pointer(path)
        if path.suffix in PICKLES:
            self._pickled, self.header, self.left_out = _unpickle(path, lists)
            return
        try:
            self._file = safe_open(path, "pt")
            self._keys = dict.fromkeys(self._file.keys())
            self.header = self._file.metadata() or {}
        # a foreign parser over foreign bytes: any error is the file's fault
        except Exception as error:
            found = _missing_bytes(path) or f"not a safetensors file ({reason_of(error)})"
            raise UsageError(f"{path} cannot be read: {found}") from None

    def __getitem__(self, key: str) -> Tensor:
        if self._pickled is not None:
            return self._pickled[key]
        if key not in self._keys:
            raise KeyError(key)
        try:
            return self._file.get_tensor(key)
        # wrong shapes and dtypes in the header, and dtypes unknown to torch
        except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{self.path}: {key!r} cannot be read: {reason_of(error)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys if self._pickled is None else self._pickled)

    def __len__(self) -> int:
        return len(self._keys if self._pickled is None else self._pickled)

    def shape(self, key: str) -> Shape:
        """Return a tensor's shape without reading the tensor."""
        if self._pickled is not None:
            return tuple(self._pickled[key].shape)
        return tuple(self._file.get_slice(key).get_shape())

    def spec(self, key: str) -> Spec:
        """Return a tensor's dtype and shape, read from the header where torch knows the dtype."""
        import torch

        if self._pickled is not None:
            return self._pickled[key].dtype, self.shape(key)
        name = _TORCH_NAMES.get(self._file.get_slice(key).get_dtype())
        return (getattr(torch, name) if name else self[key].dtype), self.shape(key)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Key → shape of every tensor, none of them read."""
        return {key: self.shape(key) for key in self}


def _unpickle(path: Path, lists: bool) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Return a pickle's tensors by key, mapped into memory where the file allows it; the numbers
    beside them; and the foreign classes that were left out.
    """
    import torch

    left_out: list[str] = []
    check_unpacked(path)
    try:
        try:
            mapped = can_be_mapped(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError:
            if not zipfile.is_zipfile(path):
                raise
            found, left_out = load_tensors_of(path)
    except MemoryError:
        raise RunError(f"{path} asks for more memory than there is") from None
    # a foreign parser over foreign bytes: any error is the file's fault
    except Exception as error:
        if missing := _missing_bytes(path):
            raise UsageError(f"{path} cannot be read: {missing}") from None
        if isinstance(error, pickle.UnpicklingError):
            raise UsageError(
                f"{path} was not opened: it is cut off, or it is not a pickle of tensors alone "
                f"({reason_of(error)}), and reading any other may run code. Take a .safetensors "
                "file of the model from a source that you trust"
            ) from None
        kind = "zip" if zipfile.is_zipfile(path) else "pickle"
        raise UsageError(
            f"{path} cannot be read: not a {kind} of tensors ({reason_of(error)})"
        ) from None
    tensors, numbers = tensors_by_key(path, found, lists)
    size = path.stat().st_size
    for key, t in tensors.items():
        plain = t.layout is torch.strided and not (t.is_quantized or t.is_nested or t.is_meta)
        # one number of the file may be a tensor of any size, by strides of 0
        if not plain or t.numel() * t.element_size() > size:
            raise UsageError(
                f"{path}: {key!r} is sparse, quantised, or without values of its own in the file: "
                "it cannot be read"
            )
    return {key: t.detach() for key, t in tensors.items()}, numbers, left_out


def _missing_bytes(path: Path) -> str | None:
    """Return how a file is cut off; None if it is whole, or broken in another way."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(9)
            if size < 9:
                return f"it is cut off: it has {size} bytes"
            if start.startswith(b"PK") and not zipfile.is_zipfile(path):
                return "it is cut off or damaged: the table of contents at a zip's end is not there"
            length = int.from_bytes(start[:8], "little")
            if path.suffix in PICKLES or start[8:] != b"{":
                return None
            if 8 + length > size:
                return f"it is cut off: its header has {length} bytes, and the whole file {size}"
            file.seek(8)
            table = json.loads(file.read(length))
        end = max(t["data_offsets"][1] for name, t in table.items() if name != "__metadata__")
        lost = 8 + length + end - size
    except PARSER_ERRORS:
        return None
    return f"it is cut off: {lost} of {lost + size} bytes are missing" if lost > 0 else None


def reason_of(error: Exception) -> str:
    """Return an error's text on one line, without torch's advice to open the file all the same."""
    advice = ("Weights only load failed", "Please file an issue", "Check the documentation")
    lines = (line for line in str(error).splitlines() if not line.startswith(advice))
    found = " ".join(" ".join(lines).split())[:200]
    # a KeyError's text is a bare key, an EOFError's is none
    return found if " " in found else f"{type(error).__name__} {found}".strip()


def _refuse_pointer(path: Path) -> None:
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UsageError(
                f"{path} is a git-lfs pointer, a text that stands for the file: run `git lfs pull` "
                "in its folder, or download the file itself"
            )


LARGEST_TEXT = 2**20
"""Bytes of a text that people write: a configuration, a caption."""


def utf8_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """Read a UTF-8 text without its byte order mark.

    largest: bytes that are read.

    Raises:
        UsageError: a larger file, another encoding, NUL bytes, or a file that cannot be read; the
            text begins with a verb, for the caller to put the file's name before it.
    """
    try:
        # a pipe would wait for its writer, and /dev/zero has no end
        if path.exists() and not path.is_file():
            raise UsageError("cannot be read: it is not a file")
        with open(path, "rb") as file:
            data = file.read(largest + 1)
        if len(data) > largest:
            size = mib(path.stat().st_size)
            raise UsageError(f"has {size}, and such a text has {mib(largest)} at most")
        if data.startswith((b"\xff\xfe", b"\xfe\xff")) or 3 * data.count(0) >= len(data) > 0:
            wrong = "is UTF-16, as Notepad's \"Unicode\" and PowerShell's > write it, and not UTF-8"
        elif b"\0" in data:
            wrong = f"holds NUL bytes (the first is byte {data.index(0)})"
        else:
            return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        wrong = f"is not UTF-8 text (byte {error.start})"
    raise UsageError(f"{wrong}: save it as UTF-8")


def mib(num_bytes: float) -> str:
    """Return a size for people: "3.8 MiB", "290 KiB"."""
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**19 else f"{num_bytes / 2**10:.0f} KiB"


def size_text(num_bytes: float) -> str:
    """Return a size of memory for people: "8.4 GiB", "31.2 MiB"."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else mib(num_bytes)


def sha256_of(*paths: Path) -> str:
    """Return the SHA-256 of files, one after another; raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.part")
"""Names of files and folders that are being written; a killed process leaves them behind."""


def unfinished_name() -> str:
    """Return a new name for a file or folder that is being written."""
    return f".{secrets.token_hex(8)}.part"


def write_fault(error: OSError, path: Path) -> str:
    """Return the reason of a failed write, with the free space where the disk is full."""
    reason = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return reason
    return f"{reason} ({mib(free_bytes(path))} free)"


@contextmanager
def whole_file(path: Path, size: int) -> Iterator[IO[bytes]]:
    """Yield a file to write; it appears at `path` complete or not at all.

    Written beside its place, brought to the disk (fsync), renamed. Missing folders are made. The
    name beside it is drawn, and must be new: nobody can lay a link there, and of two writers each
    has its own.

    path: of the file.
    size: in bytes, for the error message.

    Raises:
        RunError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    beside = path.with_name(unfinished_name())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise RunError(
            f"{path} ({mib(size)}) could not be written: {write_fault(error, path)}"
        ) from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write bytes to a file, all of them or none. Raises: as `whole_file`."""
    with whole_file(path, len(data)) as file:
        file.write(data)


def write_tensors(
    path: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    header: Mapping[str, str],
) -> None:
    """Write a safetensors file, one tensor in memory at a time.

    The layout is the safetensors library's, in whatever order the tensors come: wider dtypes first,
    then by key. If the header has `sshs_model_hash`, the value is replaced by the SHA-256 of
    everything behind the header, as kohya's tools and model sites compute theirs.

    path: of the file.
    specs: key → dtype and shape of every tensor.
    tensors: (key, tensor) of each of them, in any order.
    header: metadata.

    Raises:
        RunError: the file could not be written; nothing is left behind.
        ValueError: a tensor is unlike its spec, or missing.
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
        name = _SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")]
        table[key] = {"dtype": name, "shape": list(shape), "data_offsets": [starts[key], end]}
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
    """Write a safetensors header at the start of a file; return where the tensors begin."""
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.seek(0)
    file.write(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def _bytes_of(tensor: Tensor) -> memoryview | bytes:
    import torch

    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
