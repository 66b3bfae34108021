"""The short way in: a folder, short names of flags, pages of the help."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sd_lora.config.command_line import parse
from sd_lora.config.flags import build_parser
from sd_lora.config.schema import OPTIONS, SECTIONS, SHORT_NAMES
from sd_lora.data.sources.open import has_captions
from sd_lora.errors import RunError, UsageError

MODEL = ["--model", "base"]
LONG_MODEL = ["--pretrained_model_name_or_path", "base"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "metadata.jsonl", "metadata.csv", "10_sks"])
def test_a_folder_with_captions_is_enough(folder: Path, name: str) -> None:
    """Caption files, metadata or a numbered folder make a captioned run with the preset of styles;
    the same by --data."""
    (folder / name).mkdir() if name == "10_sks" else (folder / name).write_text("x")
    config = parse([str(folder), *MODEL], has_captions=has_captions)
    assert (config.mode, config.train_data_dir) == ("text_to_image", str(folder))
    assert config.preset == "style"
    assert config == parse(["--data", str(folder), *MODEL], has_captions=has_captions)


def test_a_folder_with_a_prompt_is_a_subject(folder: Path) -> None:
    """A prompt makes a DreamBooth run, with or without captions; a mode or preset that is given
    stays."""
    words = [str(folder), *MODEL, "--prompt", "a photo of sks dog"]
    config = parse(words, has_captions=has_captions)
    assert (config.mode, config.instance_data_dir) == ("dreambooth", str(folder))
    assert (config.preset, config.instance_prompt) == ("subject", "a photo of sks dog")
    assert config.output_dir == "photos-lora"
    assert parse([*words, "--preset", "character"], has_captions=has_captions).preset == "character"


def test_a_folder_without_captions_needs_a_prompt(folder: Path) -> None:
    """The error names the folder and the way out."""
    with pytest.raises(UsageError, match=r"photos has no captions.*Give --prompt") as error:
        parse([str(folder), *MODEL], has_captions=has_captions)
    assert len(error.value.problems) == 1
    with pytest.raises(UsageError, match=r"--foo\n.*nowhere does not exist") as error:
        parse(["nowhere", *MODEL, "--foo", "3"], has_captions=has_captions)
    assert len(error.value.problems) == 2


def told(*words: str, **options: Any) -> list[str]:
    """The lines of a command line's error."""
    with pytest.raises(UsageError) as error:
        parse(words, **options)
    lines = str(error.value).splitlines()
    assert [problem.line() for problem in error.value.problems] == lines
    return lines


def test_a_forgotten_folder_is_told_with_the_command() -> None:
    """Without images, the first line says so, with the command to paste; the prompt is no mistake,
    and in a script, which takes no folder first, the options are named."""
    words = [*MODEL, "--prompt", "a photo of sks dog"]
    command = 'sd-lora train FOLDER --model base --prompt "a photo of sks dog"'
    assert told(*words) == [f"no folder of images is given. Put it first: {command}"]
    (line,) = told(*MODEL, prog="sd-lora check")
    assert line.endswith("Put it first: sd-lora check FOLDER --model base")
    (line,) = told(*words[2:], *LONG_MODEL, script="train_dreambooth_lora.py")
    assert line.startswith("no folder or set of images is given: give one of --instance_data_dir, ")


def test_a_folder_has_one_way(folder: Path, tmp_path: Path) -> None:
    """The folder stands anywhere among the flags, overrides a file's, and is given once."""
    words = [*MODEL, "--prompt", "a dog"]
    first = parse([str(folder), *words])
    assert first == parse([*words, str(folder)]) == parse([*words, "--data", str(folder)])
    file = tmp_path / "my.toml"
    file.write_text("train_data_dir = 'others'\nrank = 8")
    assert parse([str(folder), *words, "--config", str(file)]) == first.replace(rank=8)
    for flag in ("--data", "--instance_data_dir"):
        (line,) = told(str(folder), *words, flag, "others")
        assert line == f"FOLDER and {flag} are the same option. Give one of them"


def test_errors_name_options_as_the_person_did(folder: Path, tmp_path: Path) -> None:
    """By the flag that was typed, by the key of the file that it stands in, by the short flag where
    it is missing; one option by two flags is an error, and a switch turned off again is none."""
    words = [str(folder), *MODEL, "--prompt", "a dog"]
    wrong = ["--lr", "0", "--train_batch_size=0", "--rank", "0", "--lora_dropout", "1"]
    names = ["--rank", "--lora_dropout", "--train_batch_size", "--lr"]
    assert [line.split()[0] for line in told(*words, *wrong)] == names
    assert told(str(folder), "--prompt", "x") == [
        "--model is required: a folder, a file or a hub id"
    ]
    file = tmp_path / "my.toml"
    file.write_text("mode = 'dreambooth'\ninstance_prompt = 'x'\nrank = 0\nlearning_rate = 0.0")
    lines = told("--config", str(file), "--steps", "0")
    assert [line.split()[0] for line in lines[:4]] == [
        "rank", "--steps", "learning_rate", "pretrained_model_name_or_path",
    ]  # fmt: skip
    assert "give one of instance_data_dir, dataset_name, " in lines[4]
    (line,) = told(*words, "--steps", "1", "--max_train_steps", "10")
    assert line == "--steps and --max_train_steps are the same option. Give one of them"
    off = ["--gradient_checkpointing", "--no-gradient_checkpointing", "--steps", "1", "--steps=2"]
    assert parse([*words, *off]).max_train_steps == 2


def test_errors_after_the_flags_do_too(folder: Path) -> None:
    """An error in the middle of a run has the names of the command line, and its type; quoted words
    and parts of paths stay."""
    config = parse([str(folder), *MODEL, "--prompt", "a dog", "--lr", "1"])
    text = "instance_data_dir learning_rate/x: learning_rate, 'rank', a rank of --max_train_steps"
    with pytest.raises(RunError) as error, config.spelling.in_errors():
        raise RunError(text)
    assert str(error.value) == "FOLDER learning_rate/x: --lr, 'rank', a rank of --max_train_steps"


def test_words_that_are_no_flags_are_one_mistake(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt without quotes is told once; a folder that is nearly one, with that one; a slip in a
    short flag, with the flag."""
    monkeypatch.chdir(folder.parent)
    words = ["photos", *MODEL, "--prompt"]
    quotes = "is not expected here: no flag, and a value with spaces needs quotes"
    assert told(*words, "a", "photo", "of", "a", "photos") == [f"'photo of a photos' {quotes}"]
    assert told(*words[1:], "a dog", "potos")[0] == f"'potos' {quotes}. Did you mean photos?"
    (line,) = told(*words, "a dog", "--stps", "3")
    assert line == "unknown flag --stps. Did you mean --steps?"


def test_short_names_are_the_long_ones() -> None:
    """Each short name of the rows gives the option of the long one."""
    assert set(SHORT_NAMES) == {"model", "prompt", "steps", "lr", "batch", "alpha"}
    short = "--model b --prompt p --steps 3 --lr 1e-3 --batch 2 --alpha 8 --instance_data_dir i"
    long = short.split()
    for name, option in SHORT_NAMES.items():
        long[long.index(f"--{name}")] = f"--{option}"
    words = ["--mode", "dreambooth"]
    assert parse([*words, *short.split()]) == parse([*words, *long])


def test_the_help_has_pages(capsys: pytest.CaptureFixture[str]) -> None:
    """--help fits a screen of 50 lines, --help SECTION has all flags of the section and no others,
    --help all has all."""
    shown = {}
    for page in ("main", "all", *SECTIONS):
        with pytest.raises(SystemExit):
            parse(["--help", *([] if page == "main" else [page])])
        words = capsys.readouterr().out.replace(",", " ").split()
        shown[page] = {name for name in OPTIONS if f"--{name}" in words}
    assert len(build_parser(page="main").format_help().splitlines()) <= 50
    of_tables = {name for name, option in OPTIONS.items() if option.kind == "list"}
    assert shown["all"] == OPTIONS.keys() - of_tables
    for name, section in SECTIONS.items():
        assert shown[name] == section.model_fields.keys() - of_tables
    with pytest.raises(UsageError, match="sections are run, model, data"):
        parse(["--help", "images"])


def test_the_first_page_shows_what_a_folder_gets(folder: Path, tmp_path: Path) -> None:
    """Each default on the first page of the help is the value that a folder alone gives, with a
    prompt and with captions."""
    page = build_parser(page="main").format_help()
    rows = []
    for text in (" ".join(part.split()) for part in page.split("\n  --")[1:]):
        if default := re.search(r"\(default: ([^)]+)\)", text):
            rows.append((text.split()[0], default[1]))
    assert {"rank", "lr", "batch", "with_prior_preservation", "gradient_checkpointing"} <= {
        name for name, _ in rows
    }
    subject = parse([str(folder), *MODEL, "--prompt", "x"], has_captions=has_captions)
    (folder / "a.txt").write_text("x")
    captioned = parse([str(folder), *MODEL], has_captions=has_captions)
    for name, default in rows:
        with_prompt, _, otherwise = default.partition(" with --prompt, else ")
        for config, text in ((subject, with_prompt), (captioned, otherwise or with_prompt)):
            value = getattr(config.resolve("sd1", 512), SHORT_NAMES.get(name, name))
            words = {True: "on", False: "off"}[value] if isinstance(value, bool) else f"{value}"
            words = words.removesuffix(".0")
            assert words == text.replace("FOLDER", "photos").replace("- ", "-"), name


def test_options_with_another_meaning_elsewhere_explain_themselves() -> None:
    """Steps between samples given as sampler steps, and a folder given as a tracker."""
    words = [*MODEL, "--train_data_dir", "i"]
    with pytest.raises(UsageError, match="sampler steps.*sample_every"):
        parse([*words, "--validation_steps", "500"])
    with pytest.raises(
        UsageError, match=r"report_to is one of tensorboard, .*tracker.*not a folder"
    ):
        parse([*words, "--report_to", "./logs"])
