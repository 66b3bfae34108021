"""The tensor reader and the whole-file writers, by themselves."""

import hashlib
import json
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sd_lora import files
from sd_lora.errors import RunError, UsageError
from sd_lora.files import HASH_KEY, TensorFile, write_tensors, write_whole

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def example() -> dict[str, Tensor]:
    """Tensors of several shapes and dtypes, one of them empty."""
    g = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(50, 60, generator=g),
        "half": torch.randn(3, generator=g).half(),
        "number": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }


def write(path: Path, tensors: dict[str, Tensor], kind: str) -> Path:
    """Write tensors in one of the kinds of file that are read."""
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "compressed zip":
        torch.save(tensors, path)
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    return path


KINDS = ["safetensors", "zip", "compressed zip", "before torch 1.6"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_read(kind: str, tmp_path: Path) -> None:
    """Values, shapes and dtypes are those written, in a safetensors file, in a zip of torch, in
    one that was compressed afterwards, and in a file of torch before 1.6."""
    tensors = example()
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.ckpt")
    file = TensorFile(write(path, tensors, kind))
    assert sorted(file) == sorted(tensors)
    assert len(file) == 4
    assert file.shapes == {key: tuple(t.shape) for key, t in tensors.items()}
    for key, tensor in tensors.items():
        assert file.spec(key) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(file[key], tensor)
    with pytest.raises(KeyError):
        file["nothing"]


def test_a_zip_is_mapped_and_not_copied(tmp_path: Path) -> None:
    """Tensors of an uncompressed zip share one mapped storage of the file's size."""
    path = write(tmp_path / "a.ckpt", example(), "zip")
    file = TensorFile(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # untyped storages are deprecated to look at
        address = file["wide"].data_ptr() - file["half"].data_ptr()
    assert abs(address) < path.stat().st_size


def test_shapes_are_known_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, dtypes and the header of a safetensors file are told while no tensor may be read."""
    path = tmp_path / "a.safetensors"
    save_file(example(), path, {"made": "here"})
    file = TensorFile(path)

    def read(self: TensorFile, key: str) -> Tensor:
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr(TensorFile, "__getitem__", read)
    assert file.header == {"made": "here"}
    assert file.shapes["wide"] == (50, 60)
    assert file.spec("half") == (torch.float16, (3,))


def test_dtypes_unknown_to_torch(tmp_path: Path) -> None:
    """A tensor of a dtype that torch lacks is an error of ours when it is read."""
    table = {"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    text = json.dumps(table).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(3))
    with pytest.raises(UsageError, match="cannot be read"):
        TensorFile(path)["a"]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_file_that_is_cut_off(kind: str, tmp_path: Path) -> None:
    """Wherever a download stopped, the error says that the file is cut off."""
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.ckpt")
    whole = write(path, example(), kind).read_bytes()
    for size in (0, 1, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError, match="cut off"):
            TensorFile(path)


class Payload:
    """An object whose pickle runs code when it is read."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Payload(), "was not opened.*may run code"),
        ({"a": Payload()}, "was not opened.*may run code"),
        ([torch.ones(2)], "holds a list and not tensors by name"),
        ({"a": torch.ones(2), "note": "x"}, "holds 'note', a str and no tensor"),
        ({"state_dict": {"a": torch.ones(2)}, "b": torch.ones(2)}, "beside its state_dict: 'b'"),
        ({"a": torch.ones(2).to_sparse()}, "'a' is sparse"),
        ({"a": torch.ones(1).expand(10**6, 9)}, "'a' .*without values of its own"),
        ({"a": torch.ones(2, device="meta")}, "'a' .*without values of its own"),
    ],
)
def test_pickles_of_other_objects(content: Any, message: str, tmp_path: Path) -> None:
    """A pickle that is not tensors by name is refused, and no code in it runs."""
    path = tmp_path / "a.ckpt"
    torch.save(content, path, pickle_protocol=2)
    with pytest.raises(UsageError, match=message):
        TensorFile(path)
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UsageError):
        TensorFile(path)


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_a_pointer_of_git_lfs(name: str, tmp_path: Path) -> None:
    """A file that git-lfs has not downloaded is told as one, with the command."""
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UsageError, match="git-lfs pointer.*git lfs pull"):
        TensorFile(path)


# --- writing ---


def test_every_dtype_is_written_and_read(tmp_path: Path) -> None:
    """Each dtype comes back with its bits, by the safetensors library and by ours."""
    path = tmp_path / "a.safetensors"
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    specs = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    write_tensors(path, specs, reversed(tensors.items()), {"z": "1", "a": "2"})
    theirs, ours = load_file(path), TensorFile(path)
    assert ours.header == {"a": "2", "z": "1"}
    for key, tensor in tensors.items():
        for found in (theirs[key], ours[key]):
            assert found.dtype == tensor.dtype
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_the_hash_is_of_the_bytes_behind_the_header(tmp_path: Path) -> None:
    """`sshs_model_hash` is the SHA-256 of everything after the header, whatever was given."""
    path = tmp_path / "a.safetensors"
    tensors = example()
    specs = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    write_tensors(path, specs, tensors.items(), {HASH_KEY: "something"})
    data = path.read_bytes()
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    assert TensorFile(path).header[HASH_KEY] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", torch.ones(3))], r"a is torch.float32 \(3,\), not"),
        ([("a", torch.ones(2).half())], "a is torch.float16"),
        ([], "a was announced and not written"),
    ],
)
def test_tensors_unlike_their_specs(
    tensors: list[tuple[str, Tensor]], message: str, tmp_path: Path
) -> None:
    """A tensor of another shape or dtype than announced, or none: an error, and no file."""
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / "a.safetensors", {"a": (torch.float32, (2,))}, tensors, {})
    assert list(tmp_path.iterdir()) == []


def test_files_are_written_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Of 50 tensors, `write_tensors` has one, and the generator the next."""
    alive: list[StorageWeakRef] = []
    most = 0

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for number in range(50):
            tensor = torch.full((64,), float(number))
            alive.append(StorageWeakRef(tensor.untyped_storage()))
            most = max(most, sum(not ref.expired() for ref in alive))
            yield f"t{number:02}", tensor

    specs = {f"t{number:02}": (torch.float32, (64,)) for number in range(50)}
    write_tensors(tmp_path / "o.safetensors", specs, stream(), {})
    assert most <= 2
    assert float(load_file(tmp_path / "o.safetensors")["t49"][0]) == 49


def test_a_file_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file replaces the earlier one; on a full disk the earlier one stays, nothing lies beside
    it, and the error says the size."""
    path = tmp_path / "folder" / "a.json"
    write_whole(path, b"first")
    write_whole(path, b"second")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match=r"a\.json \(2\.0 MiB\) could not be written: No space left"):
        write_whole(path, bytes(2**21))
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name under which a file is written is drawn each time; a link that lies there all the
    same is an error, and its target stays as it was."""
    assert files.unfinished_name() != files.unfinished_name()
    assert files.UNFINISHED.fullmatch(files.unfinished_name())
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    monkeypatch.setattr(files, "unfinished_name", lambda: ".planted.part")
    (tmp_path / ".planted.part").symlink_to(target)
    with pytest.raises(RunError, match=r"a\.json .* could not be written: File exists"):
        write_whole(tmp_path / "a.json", b"data")
    assert target.read_bytes() == b"precious"


def test_files_are_importable_without_torch() -> None:
    """Code without torch may use the writers: importing them loads none of it."""
    code = "import sys, sd_lora.files; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
