"""Checkpoints: whole or passed over, at each moment one to go on from, pruned by rule."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sd_lora
from sd_lora.cli import main
from sd_lora.errors import RunError, UsageError
from sd_lora.files import HASH_KEY, TensorFile
from sd_lora.report.events import Warned
from sd_lora.training import checkpoint, checkpoint_folders, disk, loop
from sd_lora.training.checkpoint_folders import checkpoints, fault, find, write_manifest
from sd_lora.training.state_files import read_state, write_state
from tests.training.runs import images, text_to_image

SHORT = {
    "max_train_steps": 2, "checkpointing_steps": 1, "save_lora_every": 1, "targets": "attention",
    "rank": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a run `mine` with two checkpoints, and one of another seed, `other`."""
    folder = tmp_path_factory.mktemp("runs")
    images(folder / "data", 4)
    for seed, name in enumerate(("mine", "other")):
        config = text_to_image(tiny_sd1, folder / "data", folder / name, **SHORT, seed=seed)
        sd_lora.train(config)
    return folder


@pytest.fixture
def mine(runs: Path, tmp_path: Path) -> Path:
    """A copy of the run `mine`."""
    return shutil.copytree(runs / "mine", tmp_path / "mine")


def flipped(data: bytes, place: float) -> bytes:
    """The data with a bit of one byte turned; place: 0 to 1."""
    index = round(place * (len(data) - 1))
    return data[:index] + bytes([data[index] ^ 4]) + data[index + 1 :]


def damages(data: bytes, other: bytes) -> Iterator[bytes | None]:
    """Yield every damage of a file: emptied, halved, zeroed, a byte flipped at eight places,
    replaced by another run's; None: removed."""
    yield from (b"", data[: len(data) // 2], bytes(len(data)), None)
    yield from (flipped(data, place / 7) for place in range(8))
    if other != data:
        yield other


def test_a_damaged_checkpoint_is_passed_over(runs: Path, mine: Path) -> None:
    """Whatever damage to whichever file of the newest checkpoint: it is found, with the file's
    name, and `latest` is the one before; by its own name it is refused. Without a whole one there
    is nothing to resume, and `latest-if-any` starts anew."""
    newest, before = mine / "checkpoint-2", mine / "checkpoint-1"
    assert find(mine, "latest").path == newest
    names = {path.name for path in newest.iterdir()}
    assert names == {
        "adapter.safetensors", "manifest.json", "progress.json", "state.json", "state.safetensors",
    }  # fmt: skip
    tried = 0
    for path in sorted(newest.iterdir()):
        data, other = path.read_bytes(), (runs / "other" / "checkpoint-2" / path.name).read_bytes()
        for damaged in damages(data, other):
            path.unlink(missing_ok=True)
            if damaged is not None:
                path.write_bytes(damaged)
            found = find(mine, "latest")
            assert found.path == before
            # another run's manifest is whole, and so the first file that it names is not
            foreign = path.name == "manifest.json" and damaged == other
            assert ("adapter.safetensors" if foreign else path.name) in found.damaged[newest]
            tried += 1
        with pytest.raises(UsageError, match=r"checkpoint-2: .*`latest` is the newest one that is"):
            find(mine, "checkpoint-2")
        path.write_bytes(data)
    assert tried >= 5 * 12
    assert not find(mine, "latest").damaged
    for path in (newest, before):
        (path / "manifest.json").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no checkpoint in .* is whole: checkpoint-2: manifest"):
        find(mine, "latest")
    assert find(mine, "latest-if-any").path is None


def test_a_run_goes_on_from_the_whole_one(runs: Path, mine: Path, tiny_sd1: Path) -> None:
    """A run killed in its second step, with the first step's checkpoint before a broken one and
    half a line in its log, says so and ends with the factors, state, log and digest of the
    undisturbed run, byte for byte; where no checkpoint is whole, `latest-if-any` does the same from
    the start. A run of another seed differs in each part of its digest."""
    for path in mine.glob("*.safetensors"):
        path.unlink()
    newest, log = mine / "checkpoint-2", mine / "training_log.jsonl"
    for broken in ([newest], [newest, mine / "checkpoint-1"]):
        for path in broken:
            (path / "adapter.safetensors").write_bytes(b"")
        whole = log.read_bytes()
        log.write_bytes(whole[:-9])
        (mine / ".0123456789abcdef.part").mkdir()
        events: list[object] = []
        config = text_to_image(
            tiny_sd1, runs / "data", mine, **SHORT, resume_from_checkpoint="latest-if-any"
        )
        (mine / "digest.json").unlink()
        result = sd_lora.train(config, [events.append])
        assert len(result.losses) == len(broken)
        other, undisturbed = (runs / name / "digest.json" for name in ("other", "mine"))
        assert (mine / "digest.json").read_bytes() == undisturbed.read_bytes()
        digests = [json.loads(path.read_bytes()) for path in (undisturbed, other)]
        assert not {*digests[0].values()} & {*digests[1].values()}
        assert digests[0]["digest"] == result.digest.whole
        (warned,) = (event for event in events if isinstance(event, Warned))
        told = {f.name for f in warned.findings if f.code == "damaged-checkpoint"}
        assert told == {str(path) for path in broken}
        undisturbed = runs / "mine" / "checkpoint-2"
        for name in ("state.safetensors", "state.json"):
            assert (newest / name).read_bytes() == (undisturbed / name).read_bytes()
        assert_equal_tensors(newest / "adapter.safetensors", undisturbed / "adapter.safetensors")
        assert log.read_bytes() == whole
        assert not [path for path in mine.iterdir() if path.name.startswith(".")]
        for file in result.files:
            file.path.unlink()


def test_a_resumed_command_reads_its_checkpoint_once(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hashes of the checkpoint are compared before torch is imported, and not again by the run;
    a damaged one ends the command there."""
    hashed: list[str] = []
    original = checkpoint_folders.sha256_of

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return original(path)

    monkeypatch.setattr(checkpoint_folders, "sha256_of", counted)
    flags = ["--config", str(mine / "config.json"), "--output_dir", str(mine)]
    command = ["train", *flags, "--resume_from_checkpoint", "checkpoint-2"]
    assert main(command) == 2
    assert "has done all steps of this run" in capsys.readouterr().err
    assert sorted(hashed) == [
        "adapter.safetensors", "progress.json", "state.json", "state.safetensors",
    ]  # fmt: skip
    state = mine / "checkpoint-2" / "state.json"
    state.write_bytes(flipped(state.read_bytes(), 0.5))
    monkeypatch.setattr(loop, "train", None)
    assert main(command) == 2
    assert "state.json is not as it was written" in capsys.readouterr().err


def assert_equal_tensors(a: Path, b: Path) -> None:
    """Both files have the same tensors to the last bit; headers have dates and folders."""
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_files_of_a_checkpoint(
    runs: Path, mine: Path, tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """`sd-lora export` of each checkpoint writes the files that the run wrote after that step,
    headers included, in mid-run by save_lora_every and at the end; files that are there and damaged
    checkpoints are refused. The other tools read the folder as it is."""
    for step, written in ((1, runs / "mine" / "lora-1"), (2, runs / "mine")):
        saved, out = mine / f"checkpoint-{step}", tmp_path / f"out-{step}"
        assert main(["export", str(saved), "--out", str(out)]) == 0
        assert "verified: 56 modules load as trained" in capsys.readouterr().out
        names = sorted(path.name for path in out.iterdir())
        assert names == ["mine_kohya.safetensors", "pytorch_lora_weights.safetensors"]
        for name in names:
            assert_equal_tensors(out / name, written / name)
            headers = [TensorFile(place / name).header for place in (out, written)]
            for header in headers:
                header.pop("modelspec.date")
            assert headers[0] == headers[1]
            assert headers[0]["ss_steps"] == str(step)
    assert main(["export", str(saved)]) == 0
    assert (mine / "lora-2" / "mine_kohya.safetensors").is_file()
    assert main(["export", str(saved)]) == 2
    assert "has pytorch_lora_weights.safetensors, mine_kohya" in capsys.readouterr().err
    converted = tmp_path / "converted.safetensors"
    model = ["--model", str(tiny_sd1)]
    assert main(["convert", str(saved), "--to", "kohya", "--out", str(converted), *model]) == 0
    assert_equal_tensors(converted, runs / "mine" / "mine_kohya.safetensors")
    assert main(["inspect", str(saved)]) == 0
    said = " ".join(capsys.readouterr().out.split())  # its lines are as long as a terminal's
    assert "`sd-lora export` writes its LoRA files" in said
    (saved / "state.json").unlink()
    assert main(["export", str(saved), "--overwrite"]) == 2
    assert "is no whole checkpoint of a run: state.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("../../evil", 2),
        ("/tmp/evil", 2),
        ("..", 2),
        ("a\\b", 2),
        ("", 2),
        ("mine", "2/../../evil"),
    ],
)
def test_a_strangers_checkpoint_names_no_place(
    name: str, step: object, mine: Path, capsys: pytest.CaptureFixture
) -> None:
    """A whole checkpoint whose header or progress has a path where a name or number should be is
    refused by `export`, and nothing is written."""
    saved = mine / "checkpoint-2"
    file = TensorFile(saved / "adapter.safetensors")
    header = {k: v for k, v in file.header.items() if k != HASH_KEY} | {"ss_output_name": name}
    save_file({key: file[key].clone() for key in file}, saved / "adapter.safetensors", header)
    progress = json.loads((saved / "progress.json").read_text()) | {"step": step}
    (saved / "progress.json").write_text(json.dumps(progress))
    (saved / "manifest.json").unlink()
    write_manifest(saved)
    before = sorted(mine.parent.rglob("*"))
    assert main(["export", str(saved)]) == 2
    said = capsys.readouterr().err
    assert "which is no file's name" in said or "its step is no number" in said
    assert sorted(mine.parent.rglob("*")) == before


@pytest.fixture
def saving(mine: Path) -> Callable[[], Path]:
    """A function that writes `checkpoint-2` of `mine` anew, with other factors."""
    model = nn.Sequential(nn.Linear(3, 3))
    sd_lora.inject(model, targets=".*", rank=1)
    progress = checkpoint.read_progress(mine / "checkpoint-2")
    return lambda: checkpoint.save(mine, progress, {"unet": model}, {"moments": torch.ones(2)}, {})


def test_at_each_moment_a_checkpoint_is_whole(
    mine: Path, saving: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every call that changes the disk, the newest checkpoint verifies and is of the step
    that is written anew: a kill there loses nothing."""
    calls = []

    def watched(module: object, name: str) -> None:
        original = getattr(module, name)

        def call(*args: object, **options: object) -> object:
            found = find(mine, "latest")
            assert found.path is not None
            assert checkpoint.step_of(found.path) == 2
            assert not found.damaged
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(module, name, call)

    for name in ("replace", "mkdir", "fsync", "unlink"):
        watched(os, name)
    watched(shutil, "rmtree")
    assert saving() == mine / "checkpoint-2"
    assert calls.count("replace") >= 8  # five files, the old one away, the new one in, the old gone
    monkeypatch.undo()
    assert sorted(p.name for p in checkpoints(mine)) == ["checkpoint-1", "checkpoint-2"]
    assert fault(mine / "checkpoint-2") == ""
    # killed between the two moves: the earlier one is found under its other name
    (mine / "checkpoint-2").rename(mine / "checkpoint-2.replaced")
    assert find(mine, "latest").path == mine / "checkpoint-2.replaced"


def test_a_full_disk_costs_no_checkpoint(
    mine: Path, saving: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full at any of the writes of a checkpoint: the error names checkpoint, space
    and reason, the earlier ones are bit for bit as they were, and nothing lies beside them. The
    same where the space is known to be too small before."""
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    fsync, said = (
        os.fsync,
        r"checkpoint-2.* could not be written: No space left on device \(.* free\)",
    )
    for failing in range(5):  # one a file; the fsync of a folder that fails is no failure
        calls = iter(range(9))

        def full(handle: int, failing: int = failing, calls: Iterator[int] = calls) -> None:
            if next(calls) >= failing:
                raise OSError(28, "No space left on device")
            fsync(handle)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=said):
            saving()
        assert {p: p.read_bytes() for p in mine.rglob("*") if p.is_file()} == before
        assert not list(mine.glob(".*"))
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 5)
    with pytest.raises(RunError, match=r"checkpoint-2 takes 0 KiB, and 0 KiB are free there"):
        saving()


def test_room_is_compared_before_a_run(
    runs: Path, tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk without room for a checkpoint and the LoRA files refuses the run, and one without room
    for all checkpoints warns."""
    config = text_to_image(tiny_sd1, runs / "data", tmp_path / "out", **SHORT)
    factors = load_file(runs / "mine" / "checkpoint-2" / "adapter.safetensors")
    parameters = sum(t.numel() for key, t in factors.items() if not key.endswith(".alpha"))
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    with pytest.raises(UsageError, match=r"a checkpoint takes .* and 1 KiB are free: make room"):
        sd_lora.train(config)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(
        disk, "free_bytes", lambda path: (3 + 2) * 4 * parameters
    )  # AdamW; two files
    events: list[object] = []
    sd_lora.train(config, [events.append])
    warned = [f for e in events if isinstance(e, Warned) for f in e.findings]
    assert [f.name for f in warned if f.code == "little-room"] == ["disk"]


def test_a_tracker_without_room(runs: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    """Where a tracker cannot write its files, the error names their folder and the reason."""
    config = text_to_image(
        tiny_sd1, runs / "data", tmp_path, **SHORT, report_to="tensorboard", logging_dir="taken"
    )
    (tmp_path / "taken").touch()
    with pytest.raises(RunError, match=r"tracker's files in .*taken could not be written: "):
        sd_lora.train(config)


def test_pruning(tmp_path: Path) -> None:
    """The newest ones stay, and the multiples of keep_every; later steps than the newest, of the
    run before it was resumed, are left alone."""
    for step in range(1, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "state.json").touch()
        write_manifest(folder)
    checkpoint.prune(tmp_path / "checkpoint-7", 2, 3)
    assert [checkpoint.step_of(p) for p in checkpoints(tmp_path)] == [3, 5, 6, 7, 8]
    checkpoint.prune(tmp_path / "checkpoint-7", None, None)
    checkpoint.prune(tmp_path / "checkpoint-8", 1, None)
    assert [checkpoint.step_of(p) for p in checkpoints(tmp_path)] == [8]
    assert not list(tmp_path.glob(".*"))


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Every kind of value of an optimiser's state comes back equal, with its type, to the last
    bit; tensors that share memory are separate."""
    shared = torch.arange(4.0)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2).T}, 7: {}},
        "groups": [{"lr": 1 / 3, "betas": (0.9, 0.999), "fused": None, "amsgrad": False}],
        "half": torch.tensor([1.1], dtype=torch.bfloat16), "bytes": torch.tensor([255]).byte(),
        "one": shared, "two": shared[1:], "none": torch.empty(0), "big": 2**70, "inf": float("inf"),
    }  # fmt: skip
    write_state(tmp_path, state)
    read = read_state(tmp_path)
    assert read.keys() == state.keys()
    assert [*read["state"]] == [0, 7]
    assert read["groups"] == state["groups"]
    assert type(read["groups"][0]["betas"]) is tuple
    assert (read["big"], read["inf"]) == (2**70, float("inf"))
    for was, now in ((state[k], read[k]) for k in ("half", "bytes", "one", "two", "none")):
        assert now.dtype == was.dtype
        assert torch.equal(now, was)
    assert torch.equal(read["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert read["state"][0]["step"].shape == ()
    with pytest.raises(TypeError, match="cannot hold a set"):
        write_state(tmp_path, {"a": {1}})
