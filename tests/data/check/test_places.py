"""Mistakes that cost nothing to find: told at once, before torch is imported."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sd_lora.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Captioned images, and images with a table of captions."""
    for name in ("captioned", "table", "empty"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "captioned" / "0.png")
    (tmp_path / "captioned" / "0.txt").write_text("a shape", encoding="utf-8")
    Image.new("RGB", (64, 64)).save(tmp_path / "table" / "0.png")
    (tmp_path / "table" / "metadata.csv").write_text("file_name,tags\n0.png,a shape\n")
    (tmp_path / "a_file").write_text("")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "done_kohya.safetensors").touch()
    (tmp_path / "done" / "training_log.jsonl").touch()
    return tmp_path


DATA = ("--train_data_dir", "captioned")
MISTAKES: dict[str, tuple[list[str], str]] = {
    "model": (["--pretrained_model_name_or_path", "./nowhere", *DATA], "nowhere does not exist"),
    "no model": ([*DATA], "--model is required"),
    "no folder": (["--prompt", "a dog"], 'train FOLDER --prompt "a dog"'),
    "near model": (["--model", "table/captoined", *DATA], "does not exist: there is no such"),
    "model folder": (["--pretrained_model_name_or_path", "empty", *DATA], "no model_index.json"),
    "images": (["captoined"], "folder captoined does not exist. Did you mean captioned?"),
    "a file": (["--train_data_dir", "a_file"], "is a file, not a folder"),
    "no images": (["--train_data_dir", "empty"], "empty"),
    "column": (["--train_data_dir", "table"], "column"),
    "flag": ([*DATA, "--learnin_rate", "1"], "Did you mean --learning_rate"),
    "value": ([*DATA, "--rank", "four"], "rank must be a whole number"),
    "finished": ([*DATA, "--output_dir", "done"], "done_kohya.safetensors of an earlier run"),
    "among images": ([*DATA, "--output_dir", "./captioned"], "captioned is the folder of images"),
    "a run's": (["done", "--prompt", "a dog"], "done is the output folder of a run"),
    "output": ([*DATA, "--output_dir", "a_file/out"], "a_file is a file, not a folder"),
}
"""Mistake → flags, and words of its message."""


def flags(words: list[str], root: Path) -> list[str]:
    """Flags with the embedded base unless another is given."""
    given = {"--pretrained_model_name_or_path", "--model"} & {*words} or words == [*DATA]
    base = [] if given else ["--pretrained_model_name_or_path", f"{root}/sample_data/tiny-sd"]
    return [*words, *base]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_typical_mistakes_are_told_in_two_seconds(mistake: str, folder: Path, root: Path) -> None:
    """A fresh process tells a mistake by path, name, column or value with exit code 2, in less than
    two seconds of CPU time and without torch."""
    words, message = MISTAKES[mistake]
    code = (
        "import sys; from sd_lora.cli import main; code = main(); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *flags(words, root)], cwd=folder,
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_all_wrong_places_come_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong model, folder of images and output folder are told together."""
    monkeypatch.chdir(folder)
    words = ["--pretrained_model_name_or_path", "./nowhere", "--train_data_dir", "captoined"]
    assert main(["train", *words, "--output_dir", "a_file/out"]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in ("nowhere", "captoined", "a_file is a file"))
