"""Results of slow computations, kept on disk for later runs: by content.

An entry is one file, named by the digest of everything it was computed from, so none is ever out of
date: a result of other inputs has another name. A file is a head of 16 bytes (a mark, the CRC-32 of
the key and the data, the length of the data), then the data.

Several runs may share a folder. A file appears whole, by rename, and an entry that is gone or not
whole is a miss. Nothing waits for the disk (`fsync` doubles the time of a write, at the least): the
remains of a power cut, an empty file, zeros or half of it, are found by head and checksum, and
computed again. The checksum takes 20 of the 50 µs for reading 128 KiB, and 150 of 240 µs for 1 MiB.
"""

import errno
import hashlib
import os
import re
import secrets
import struct
import time
import zlib
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sd_lora.errors import RunError
from sd_lora.files import mib, write_fault
from sd_lora.folders import user_folder

_HEAD = struct.Struct("<4sIQ")
_MARK = b"sdl1"
_KEY = re.compile(r"[a-z][a-z0-9_-]*/[0-9a-f]{32}")
_PART = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{16}\.part")

_BLOCK = 4096
"""Block size of usual file systems: 300 bytes of facts take as much of a disk."""

_TOUCH_EVERY = 3600.0
"""Seconds between two marks of use: every reading would write to the disk, too."""

_TO_DO = {
    (errno.ENOSPC, errno.EDQUOT): "Free some space there. ",
    (errno.EACCES, errno.EPERM, errno.EROFS): "Make it writable for you. ",
    (errno.ENOTDIR, errno.EEXIST): "A file is where a folder has to be: move it away. ",
}
"""Kinds of errors of the system → the remedy for users."""

_LEFT_OVER = 86400.0
"""Age in seconds at which an unfinished file must be of a killed run."""


def default_folder() -> Path:
    """The folder of the cache: $SD_LORA_CACHE, else by the XDG directories."""
    return user_folder("SD_LORA_CACHE", "XDG_CACHE_HOME", ".cache")


def digest_of(*parts: str | bytes) -> str:
    """The digest of parts, 32 hexadecimal digits; ("ab", "c") has another than ("a", "bc"),
    and a text another than its bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        # a file's name may hold bytes that are no UTF-8, as lone surrogates
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(struct.pack("<?Q", isinstance(part, str), len(data)) + data)
    return digest.hexdigest()


def weights_digest(module: nn.Module, leave_out: tuple[str, ...] = ()) -> str:
    """The digest of a module's state: names, dtypes, shapes and every byte.

    It does not depend on the device. leave_out: starts of names to ignore.
    """
    state = {k: t for k, t in module.state_dict().items() if not k.startswith(leave_out)}

    def one(name: str) -> str:
        tensor = state[name].detach().cpu().contiguous()
        data = tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b""
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return digest_of(name, str(tensor.dtype), str(tuple(tensor.shape)), digest)

    # hashing large blocks leaves the interpreter to other threads
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return digest_of(*pool.map(one, sorted(state)))


@dataclass(frozen=True)
class Store:
    """The entries in a folder, which is made at the first write.

    key: "facts/" and 32 hexadecimal digits, of `digest_of`. limit: bytes left by `evict`. Reading
    marks an entry as used, at most once an hour, by its time of change; reading also works in a
    folder without write permission.
    """

    folder: Path
    limit: int

    def __contains__(self, key: str) -> bool:
        """Whether an entry is there, whole by its head: `read` alone looks at the data."""
        return self._open(key, whole=False) is not None

    def read(self, key: str) -> bytes | None:
        """An entry's data; None if it is missing, or not whole. A broken entry is removed."""
        return self._open(key, whole=True)

    def write(self, key: str, data: bytes) -> None:
        """Write an entry, complete or not at all; of two at once, the last to finish stays.

        Raises:
            RunError: a failed write, its reason and the remedy. Nothing is left behind.
        """
        path = self._path(key)
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "xb", buffering=0) as file:
                _write(file, _HEAD.pack(_MARK, _checksum(key, data), len(data)))
                _write(file, data)
            os.replace(part, path)
        except OSError as error:
            raise RunError(self._why(error, len(data))) from None
        finally:  # after Ctrl-C, too
            _unlink(part)

    def tensors(self, key: str) -> dict[str, Tensor] | None:
        """An entry's tensors by name, on the CPU; None as `read`."""
        data = self.read(key)
        if data is None:
            return None
        try:
            return safetensors.torch.load(data)
        except (SafetensorError, ValueError, TypeError, RuntimeError):
            _unlink(self._path(key))  # whole, but no tensors
            return None

    def put_tensors(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors of any dtype and device as an entry. Raises: see `write`."""
        # clones: safetensors refuses tensors that share their memory, such as slices of a batch
        plain = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        self.write(key, safetensors.torch.save(plain))

    def size(self) -> int:
        """Bytes of entries and unfinished files on the disk, in blocks of 4096; 100,000 take half a
        second.
        """
        return sum(size for _, size, _, _ in self._files())

    def evict(self, keep: Container[str] = ()) -> tuple[int, int]:
        """Remove the longest unused entries, until the rest is within the limit.

        Another run may do the same at the same time, or read a removed entry: it reads to the end,
        or has a miss. Foreign files stay; unfinished ones of killed runs go when they are a day
        old.

        Args:
            keep: keys that stay in any case.

        Returns:
            The number of removed entries, and their bytes on the disk.
        """
        files = list(self._files())
        used = sum(size for _, size, _, _ in files)
        gone = freed = 0
        old = time.time() - _LEFT_OVER
        for changed, size, path, key in sorted(files):
            if key is None:
                if changed < old and _unlink(path):
                    used -= size
            elif used > self.limit and key not in keep:
                if _unlink(path):
                    gone, freed = gone + 1, freed + size
                    used -= size
                elif not os.path.exists(path):  # another run was faster
                    used -= size
        return gone, freed

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of a store")
        kind, name = key.split("/")
        # 100,000 files in one folder are slow to look at on some systems
        return self.folder / kind / name[:2] / name

    def _open(self, key: str, whole: bool) -> bytes | None:
        """The data of an entry, b"" unless `whole`; None if it is missing or broken."""
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                about = os.fstat(file.fileno())
                head = file.read(_HEAD.size)
                data = file.readall() if whole else b""
        except OSError:  # not there; or not readable, which writing it anew will tell or mend
            return None
        mark, checksum, length = _HEAD.unpack(head.ljust(_HEAD.size, b"\0"))
        sound = mark == _MARK and about.st_size == _HEAD.size + length
        if not sound or (whole and _checksum(key, data) != checksum):
            _unlink(path)
            return None
        if abs(time.time() - about.st_mtime) > _TOUCH_EVERY:  # abs: clocks are set back, too
            with suppress(OSError):
                os.utime(path)
        return data

    def _files(self) -> Iterator[tuple[float, int, str, str | None]]:
        """Yield (time of change, bytes on the disk, path, key) of each entry; key None: of each
        unfinished file."""
        for kind in _folders(self.folder):
            for shelf in _folders(kind.path):
                with suppress(OSError), os.scandir(shelf.path) as found:
                    for file in found:
                        key: str | None = f"{kind.name}/{file.name}"
                        if _PART.fullmatch(file.name):
                            key = None
                        elif not _KEY.fullmatch(str(key)) or file.name[:2] != shelf.name:
                            continue
                        with suppress(OSError):  # gone meanwhile
                            about = file.stat(follow_symlinks=False)
                            size = -(-about.st_size // _BLOCK) * _BLOCK
                            yield about.st_mtime, size, file.path, key

    def _why(self, error: OSError, size: int) -> str:
        todo = next((do for codes, do in _TO_DO.items() if error.errno in codes), "")
        reason = write_fault(error, self.folder)
        return (
            f"the cache {self.folder} could not take {mib(size)}: {reason}. {todo}Another folder "
            "can be named by --data_cache_dir, or in the environment variable SD_LORA_CACHE"
        )


def _checksum(key: str, data: bytes) -> int:
    """A CRC-32 of key and data: the same data under another name has another."""
    return zlib.crc32(data, zlib.crc32(key.encode()))


def _write(file: BinaryIO, data: bytes) -> None:
    """Write all of it: one call may take a part, as on an almost full disk."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _unlink(path: Path | str) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _folders(path: str | Path) -> list[os.DirEntry]:
    with suppress(OSError), os.scandir(path) as found:
        return [entry for entry in found if entry.is_dir(follow_symlinks=False)]
    return []
