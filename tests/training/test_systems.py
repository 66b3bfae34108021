"""Windows and macOS, as far as another system can show: how processes start, which files are held.

Windows neither moves nor removes a file that is open or mapped into memory.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import sd_lora
from sd_lora.cli import main
from sd_lora.models.load import load_parts
from sd_lora.training import checkpoint
from tests.training.runs import FEW, images, text_to_image


def held(place: Path | str) -> set[str]:
    """Files of a folder, or one file, that this process has open or mapped."""
    this = psutil.Process()
    files = {m.path for m in this.memory_maps()} | {f.path for f in this.open_files()}
    return {name for name in files if Path(place) in (Path(name), *Path(name).parents)}


@pytest.fixture
def spawn() -> Iterator[None]:
    """New processes start from nothing, as on Windows and macOS, and inherit no memory."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_loading_in_spawned_processes(spawn: None, tiny_sd1: Path, tmp_path: Path) -> None:
    """A run whose images are loaded by a spawned process has the losses, to the last bit, of one
    that loads them itself: everything that the process needs is sent to it. Random crops are read
    from the images in each step."""
    data = images(tmp_path / "data", 3, (96, 64))
    losses = []
    for workers in (0, 1):
        config = text_to_image(
            tiny_sd1, data, tmp_path / str(workers), max_train_steps=2, train_batch_size=2,
            center_crop=False, random_flip=True, dataloader_num_workers=workers,
        )  # fmt: skip
        losses.append(sd_lora.train(config).losses)
    assert losses[0] == losses[1]


def test_a_resumed_checkpoint_can_be_pruned(tiny_sd1: Path, tmp_path: Path) -> None:
    """A checkpoint that was read is held by nobody, so that pruning removes it."""
    data = images(tmp_path / "data", 2)
    config = text_to_image(
        tiny_sd1, data, tmp_path / "out", max_train_steps=1, checkpointing_steps=1
    )
    sd_lora.train(config)
    parts = load_parts(str(tiny_sd1))
    sd_lora.inject(parts.models["unet"], targets=[FEW], rank=4)
    saved = checkpoint.read(tmp_path / "out" / "checkpoint-1", {"unet": parts.models["unet"]})
    assert saved.factors["unet"]
    assert held(tmp_path / "out") == set()


def test_tools_let_go_of_their_files(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a verified file takes its name, and when the folder of intermediate deltas goes, no file
    concerned is held."""
    parts = load_parts(str(tiny_sd1))
    sd_lora.inject(parts.models["unet"], targets="attention", rank=2)
    file = str(sd_lora.save_adapter(parts.models, tmp_path / "lora", family="sd1")[1])
    replace, cleanup, seen = os.replace, tempfile.TemporaryDirectory.cleanup, []

    def watched_replace(source: Path, target: Path) -> None:
        assert held(source) | held(target) == set()
        seen.append("file")
        replace(source, target)

    def watched_cleanup(folder: tempfile.TemporaryDirectory) -> None:
        assert held(folder.name) == set()
        seen.append("folder")
        cleanup(folder)

    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", watched_cleanup)
    out = ["--model", str(tiny_sd1), "--out", str(tmp_path / "b.safetensors")]
    assert main(["merge", file, file, "--rank", "2", *out]) == 0
    assert main(["resize", file, "--rank", "1", *out, "--overwrite"]) == 0
    assert {"file", "folder"} <= set(seen)
