"""The front door: help, exit codes, and errors without tracebacks."""

import re
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import sd_lora
from sd_lora.cli import _COMMANDS, main
from sd_lora.config.command_line import parse
from tests.training.runs import images


def test_help_is_quick_and_complete() -> None:
    """`sd-lora --help` answers in under 2 seconds: every command in one column, and last a command
    with a folder that is understood."""
    started = time.monotonic()
    command = [sys.executable, "-c", "import sys; from sd_lora.cli import main; sys.exit(main())"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 2
    rows = re.findall(r"^  (\w+ +)\S", done.stdout, re.M)
    assert [row.strip() for row in rows] == [*_COMMANDS]
    assert len({len(row) for row in rows}) == 1
    program, train, *words = shlex.split(done.stdout.splitlines()[-1])
    assert (program, train, words[0]) == ("sd-lora", "train", "FOLDER")
    assert parse(words).instance_prompt == "a photo of sks dog"


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`help COMMAND` and `COMMAND help` are `COMMAND --help`; that of check has the folder, model
    and prompt, its own description and flags, and the pages of train's flags."""

    def shown(*words: str) -> str:
        with suppress(SystemExit):  # argparse's way to end
            main(words)
        return capsys.readouterr().out

    page = shown("help", command)
    assert page == shown(command, "--help") == shown(command, "help")
    assert "usage: sd-lora " + command in page
    if command == "check":
        usage = "check FOLDER [--model MODEL] [--prompt PROMPT]"
        assert all(words in page for words in (usage, "decode every image", "--json "))
        assert "Train a" not in page
        assert "--lr_power" in shown("check", "--help", "training")


def test_commands_and_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """No command and an unknown one are usage errors, exit code 2; --version is the version."""
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "unknown command 'trian'. Did you mean train?" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == sd_lora.__version__


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data),
        "--output_dir", str(output), "--resolution", "64", "--max_train_steps", "2",
        "--num_validation_images", "0", "--report_to", "none", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--rank", "0"], 2, "error: --rank must be at least 1"),
        (["--rnak", "4"], 2, "error: unknown flag --rnak"),
        (["--targets", "attentoin"], 2, "Did you mean attention"),
        (["--targets", "attention+no_such_module.*"], 2, "matches no module"),
        (["--rank_pattern", "no_such=4"], 2, "matches none of the"),
        (["--pretrained_model_name_or_path", "./nowhere"], 2, "model ./nowhere does not exist"),
        (["--train_data_dir", "./nowhere"], 2, "--train_data_dir ./nowhere does not exist"),
        (["--caption_column", "txet"], 2, "Did you mean text"),
        (["--resolution", "60"], 2, "resolution 60 is not a multiple of 32"),
        (["--conv_rank", "8"], 2, "--conv_rank and --conv_alpha are for convolutions"),
        (["--output_dir", "/"], 2, "--output_dir / is the root of a disk: name a folder in it"),
        (["--report_to", "nobody"], 2, "error: --report_to is one of"),
        (
            ["--report_to", "comet_ml"],
            2,
            "report_to comet_ml needs a package: pip install comet_ml",
        ),
        (["--resume_from_checkpoint", "latest"], 2, "no such checkpoint; "),
        (["--use_8bit_adam"], 2, 'pip install "bitsandbytes>='),
    ],
)
def test_bad_input_is_told_without_a_traceback(
    more: list[str], code: int, message: str, tiny_sd1: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each mistake ends with its exit code and one message, and writes nothing."""
    data = images(tmp_path / "data", 2)
    output = tmp_path / "out"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    assert main(arguments(tiny_sd1, data, output, *more)) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not output.exists()


@pytest.mark.parametrize("below", ["out", "out/deeper"])
def test_a_folder_that_cannot_be_made(
    below: str, tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An output folder that is a file, or lies under one, is told before anything is loaded."""
    data = images(tmp_path / "data", 2)
    (tmp_path / "out").write_text("I am a file")
    assert main(arguments(tiny_sd1, data, tmp_path / below)) == 2
    assert "out is a file, not a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "I am a file"


def test_a_folder_whose_name_is_no_utf8(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors opens no file in it: told before the run, not after."""
    data = images(tmp_path / "data", 2)
    assert main(arguments(tiny_sd1, data, tmp_path / "out\udcff")) == 2
    assert r"out\xff: its name is not valid UTF-8" in capsys.readouterr().err


def test_a_broken_image_is_a_failure_where_that_is_asked_for(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What fails on the way, not in the asking, has exit code 1: with --strict, a broken image.
    Without, the others are trained, and the summary says what was left out."""
    data = images(tmp_path / "data", 3)
    (data / "1.png").write_text("not an image")
    words = arguments(tiny_sd1, data, tmp_path / "out")
    assert main([*words, "--strict"]) == 1
    assert "1.png: it is not an image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert re.search(r"images +2\n", said)
    assert re.search(r"left out: 1\n.*1\.png: it is not an image", said, re.DOTALL)
