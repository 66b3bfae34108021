"""Finished work in an output folder stays, or is replaced where that is asked for."""

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

import sd_lora
from sd_lora.formats import verify
from sd_lora.training import output_folder
from sd_lora.training.setup import prepare
from tests.training.runs import images, text_to_image


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return images(tmp_path / "data", 4)


def contents(folder: Path) -> dict[str, bytes]:
    """Path → bytes of every file in a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_finished_lora_stays(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """A second run into the folder of a finished one is refused before it loads anything, and each
    file stays bit for bit, whichever of the two LoRA files is left; the error has both remedies.
    With overwrite_output_dir the LoRA files, checkpoints, log and configuration are the new run's,
    and no file of the first one is left beside them."""
    out = tmp_path / "mine"
    short = {"max_train_steps": 2, "checkpointing_steps": 1}
    sd_lora.train(text_to_image(tiny_sd1, data, out, **short))
    for path in out.glob("checkpoint-*/*"):
        path.unlink()
    before = contents(out)
    again = text_to_image(tiny_sd1, data, out, max_train_steps=1, method="lokr", seed=5)
    with pytest.raises(sd_lora.UsageError, match="pytorch_lora_weights.safetensors, mine_kohya"):
        sd_lora.train(again)
    (out / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(
        sd_lora.UsageError,
        match="has mine_kohya.safetensors of an earlier run: choose another --output_dir, or "
        "replace its work with --overwrite_output_dir",
    ):
        sd_lora.train(again)
    del before["pytorch_lora_weights.safetensors"]
    assert contents(out) == before

    events: list[object] = []
    sd_lora.train(again.replace(overwrite_output_dir=True), [events.append])
    assert any("replaces mine_kohya.safetensors of an earlier run" in str(e) for e in events)
    left = {path.name for path in out.iterdir() if path.suffix == ".safetensors"}
    assert left == {"mine_lycoris.safetensors"}
    assert len((out / "training_log.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert '"seed": 5' in (out / "config.json").read_text(encoding="utf-8")


def test_earlier_checkpoints_are_replaced(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """With overwrite_output_dir, `latest` is a checkpoint of the new run although the earlier one
    had later steps, and the interrupted command goes on with --resume_from_checkpoint added."""
    out = tmp_path / "mine"
    (out / "checkpoint-3").mkdir(parents=True)
    (out / "checkpoint-3" / "progress.json").touch()
    new = text_to_image(
        tiny_sd1, data, out, max_train_steps=1, checkpointing_steps=1, overwrite_output_dir=True
    )
    sd_lora.train(new)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    resumed = new.replace(max_train_steps=2, resume_from_checkpoint="latest")
    assert len(sd_lora.train(resumed).losses) == 1
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b_kohya.safetensors").touch()
    elsewhere = new.replace(
        overwrite_output_dir=False, max_train_steps=3, output_dir=str(tmp_path / "b"),
        resume_from_checkpoint=str(out / "checkpoint-2"),
    )  # fmt: skip
    with pytest.raises(sd_lora.UsageError, match="b_kohya.safetensors of an earlier run"):
        sd_lora.train(elsewhere)


def test_the_old_file_is_there_until_the_new_one_is_verified(
    tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that does not load as trained leaves the earlier files bit for bit, and its own in
    the folder that the error names; a verified one leaves nothing but its files. Windows moves no
    file that is open or mapped into memory: at each move this process holds neither of the two."""
    out, moves, replace = tmp_path / "mine", [], os.replace

    def watched(source: Path, target: Path) -> None:
        this = psutil.Process()
        held = {m.path for m in this.memory_maps()} | {f.path for f in this.open_files()}
        assert held.isdisjoint({str(source), str(target)})
        moves.append(target.name)
        replace(source, target)

    first = text_to_image(tiny_sd1, data, out, max_train_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(output_folder.os, "replace", watched)
        sd_lora.train(first)
    before = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert len(before) == 2
    assert before.keys() <= set(moves)
    assert not (out / output_folder.UNVERIFIED).exists()
    with monkeypatch.context() as patch:
        patch.setattr(verify, "compare", lambda *_: (1, 1.0, ["unet conv_in is off by 100.0%"]))
        with pytest.raises(sd_lora.RunError, match="conv_in is off") as caught:
            sd_lora.train(first.replace(overwrite_output_dir=True, seed=3))
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == before
    (kept,) = {path for path in (out / "unverified").iterdir() if str(path) in str(caught.value)}
    assert load_file(kept)


SHORT = {"max_train_steps": 2, "checkpointing_steps": 1, "targets": "conv_in", "rank": 1}

STARTS = {
    "anew": {},
    "resumed": {"resume_from_checkpoint": "latest-if-any"},
    "replacing": {"overwrite_output_dir": True},
}


@pytest.fixture(scope="module")
def cut_off(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and `mine`, with the first checkpoint of a run of two steps."""
    folder = tmp_path_factory.mktemp("cut_off")
    images(folder / "data", 4)
    config = text_to_image(tiny_sd1, folder / "data", folder / "mine", **SHORT)
    sd_lora.train(config)
    for path in (*folder.glob("mine/*.safetensors"), *folder.glob("mine/checkpoint-2/*")):
        path.unlink()
    return folder


@pytest.mark.parametrize("first", STARTS)
def test_two_runs_in_one_folder(first: str, cut_off: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    """While a run lives, begun anew, resumed or replacing an earlier one, each second run into its
    folder is refused, begun in any of these ways, and touches no file; when the first is killed,
    its folder can be resumed."""
    out = (
        tmp_path / "mine"
        if first == "anew"
        else shutil.copytree(cut_off / "mine", tmp_path / "mine")
    )
    given = (tiny_sd1, cut_off / "data", out)
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            prepare(text_to_image(*given, **SHORT, **STARTS[first]))
            os.write(writing, b"ready")
            time.sleep(60)
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 5) == b"ready"
        before = contents(out)
        for second in STARTS.values():
            with pytest.raises(sd_lora.UsageError, match="another run works in|of an earlier run"):
                sd_lora.train(text_to_image(*given, **SHORT, **second))
        with pytest.raises(sd_lora.UsageError, match="another run works in"):
            sd_lora.train(text_to_image(*given, **SHORT, overwrite_output_dir=True))
        assert contents(out) == before
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        for handle in (reading, writing):
            os.close(handle)
    done = sd_lora.train(text_to_image(*given, **SHORT, **STARTS["resumed"]))
    assert len(done.losses) == (2 if first == "anew" else 1)


def test_a_run_that_died_at_the_end_writes_what_is_missing(
    cut_off: Path, tiny_sd1: Path, tmp_path: Path
) -> None:
    """After its last step, a run with one of two files not in its place, or without its sheet or
    the file of a new word, is not finished: the same command writes all of them."""
    made = {**SHORT, "num_validation_images": 1, "validation_steps": 1,
            "token_abstraction": "<thing>", "caption_prefix": "<thing> ",
            "validation_prompt": "a <thing>"}  # fmt: skip
    config = text_to_image(
        tiny_sd1, cut_off / "data", tmp_path / "mine", **made, **STARTS["resumed"]
    )
    sd_lora.train(config)
    whole = contents(tmp_path / "mine")
    names = {name for name in whole if "/" not in name and name.endswith(("png", "safetensors"))}
    assert len(names) == 4
    for name in ("before_after.png", "mine_thing.safetensors"):
        (tmp_path / "mine" / name).unlink()
        sd_lora.train(config)
        assert names <= contents(tmp_path / "mine").keys()
    with pytest.raises(sd_lora.UsageError, match="has done all steps"):
        sd_lora.train(config)
