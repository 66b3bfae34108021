"""The short way in: a folder, short names of flags, pages of the help."""

from pathlib import Path

import pytest
from PIL import Image

from sd_lora.config.command_line import parse
from sd_lora.config.flags import build_parser
from sd_lora.config.schema import OPTIONS, SECTIONS, SHORT_NAMES
from sd_lora.data.sources.open import has_captions
from sd_lora.errors import UsageError

MODEL = ["--model", "base"]


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
    assert parse([*words, "--preset", "character"], has_captions=has_captions).preset == "character"


def test_a_folder_without_captions_needs_a_prompt(folder: Path) -> None:
    """The error names the folder and the way out."""
    with pytest.raises(UsageError, match=r"photos has no captions.*Give --prompt") as error:
        parse([str(folder), *MODEL], has_captions=has_captions)
    assert len(error.value.problems) == 1
    with pytest.raises(UsageError, match=r"--foo\n.*nowhere does not exist") as error:
        parse(["nowhere", *MODEL, "--foo", "3"], has_captions=has_captions)
    assert len(error.value.problems) == 2


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


def test_options_with_another_meaning_elsewhere_explain_themselves() -> None:
    """Steps between samples given as sampler steps, and a folder given as a tracker."""
    words = [*MODEL, "--train_data_dir", "i"]
    with pytest.raises(UsageError, match="sampler steps.*validation_epochs"):
        parse([*words, "--validation_steps", "500"])
    with pytest.raises(
        UsageError, match=r"report_to is one of tensorboard, .*tracker.*not a folder"
    ):
        parse([*words, "--report_to", "./logs"])
