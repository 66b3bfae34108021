"""Every terminal: a sign that a stream cannot encode ends no command."""

import io
import json
import logging
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from sd_lora.cli import main
from sd_lora.streams import PLAIN, UNASKED, encode_everything, quiet_imports
from tests.training.runs import images


def narrow_streams(patch: pytest.MonkeyPatch, encoding: str) -> io.BytesIO:
    """Standard output and error as pipes of an encoding; returns the bytes of the output."""
    raw = io.BytesIO()
    patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    patch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    return raw


@pytest.mark.parametrize("encoding", ["cp1251", "cp1252"])
def test_a_whole_round_on_a_code_page(
    encoding: str, tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """check, train into a folder with a Japanese name, inspect, merge: all have exit code 0 on a
    pipe with a code page; our own signs are written plainly, and JSON keeps the name whole."""
    data, out = images(tmp_path / "data", 2), tmp_path / "少女"
    monkeypatch.chdir(tmp_path)
    raw = narrow_streams(monkeypatch, encoding)
    run = [
        "--pretrained_model_name_or_path", str(tiny_sd1), "--train_data_dir", str(data),
        "--output_dir", str(out), "--resolution", "64", "--max_train_steps", "1",
        "--num_validation_images", "0", "--report_to", "none",
    ]  # fmt: skip
    file, model = str(out / "少女_kohya.safetensors"), ["--model", str(tiny_sd1)]
    merge = ["merge", file, file, "--out", str(tmp_path / "合.safetensors"), "--rank", "1"]
    for words in (["check", *run], ["train", *run], [*merge, *model], ["inspect", file, *model]):
        assert main(words) == 0, words
    text = raw.getvalue().decode(encoding)
    assert "64x64" in text.replace("×", "x")
    assert "??_kohya.safetensors" in text
    assert re.search(r"batch +16\n", text)
    raw.truncate(0)
    raw.seek(0)
    assert main(["inspect", file, "--json", *model]) == 0
    assert json.loads(raw.getvalue())["path"] == file


@pytest.mark.parametrize("encoding", ["cp1251", "cp1252", "ascii"])
def test_every_help(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The help of every command, and the schema."""
    raw = narrow_streams(monkeypatch, encoding)
    commands = "check demo inspect verify convert merge resize extract bake schema".split()
    assert main(["--help"]) == main(["schema"]) == 0
    for command in (*commands, "train"):
        with suppress(SystemExit):  # argparse's way to end
            assert main([command, "--help"]) == 0
        assert "usage" in raw.getvalue().decode(encoding)
        raw.truncate(0)
        raw.seek(0)


def test_signs_in_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our signs have an ASCII form; others, and lone surrogates of file names, become "?"; a
    handler that somebody chose is left alone."""
    raw = narrow_streams(monkeypatch, "ascii")
    encode_everything()
    print("‖ΔW‖ 2 × 3 … 少\udcff")  # noqa: T201
    assert raw.getvalue().decode() == "|dW| 2 x 3 ... ??\n"
    assert all(plain.isascii() for plain in PLAIN.values())
    chosen = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", chosen)
    encode_everything()
    assert chosen.errors == "backslashreplace"


def test_libraries_keep_their_notes(caplog: pytest.LogCaptureFixture) -> None:
    """Messages about parts that an extra's package does without are kept from the log, those of the
    same loggers about anything else are not."""
    quiet_imports()
    for name, start in UNASKED.items():
        logging.getLogger(name).warning(f"{start} ...", *["x"] * start.count("%s"))
        logging.getLogger(name).warning("something else")
    assert [record.msg for record in caplog.records] == ["something else"] * len(UNASKED)


def test_python_m_sd_lora() -> None:
    """`python -m sd_lora` is `sd-lora`: its exit code and its errors, on a real pipe."""
    command = [sys.executable, "-m", "sd_lora", "trian"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean train?" in done.stderr
