"""Snippets of README and docs are run as printed: Python to the image, commands to the file."""

import re
import shlex
import shutil
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import sd_lora
from sd_lora import cli
from sd_lora.adapters.deltas import METHODS
from sd_lora.config.command_line import SCRIPTS, parse_jobs
from sd_lora.models.load import load_parts
from tests.conftest import ROOT
from tests.training.runs import images

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = {"sh": "\\\n", "powershell": "`\n"}
"""Language of a block of commands → its sign for a line that goes on."""

OF_OTHERS = ("scripts/train.py", "train_network.py", "sdxl_train_network.py")
"""Scripts of other trainers, in comparisons."""

INSTALLING = ("make", "pip", "uv", "python3.11", "py", ".", ".venv\\Scripts\\Activate.ps1")
"""First words of lines that install."""

SMALL = "--resolution 64 --max_train_steps 1 --num_validation_images 0 --report_to none --seed 0"
SMALL += " --mixed_precision no --train_batch_size 1"


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Yield the blocks of a language: page and text."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.M):
            yield page.name, block


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of all pages, as words."""
    for language, goes_on in SHELLS.items():
        for page, block in blocks(language):
            if re.match(r"# \w+\.\w+\n", block):  # another trainer's script, to be translated
                continue
            for line in block.replace(goes_on, " ").splitlines():
                for command in re.split(" && ", line):
                    # a backslash is no escape in PowerShell, nor in paths of its lines
                    lexer = shlex.shlex(command, posix=True, punctuation_chars=False)
                    lexer.whitespace_split, lexer.escape = True, ""
                    if words := list(lexer):
                        yield page, words


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """A command and arguments of `sd-lora`, or a launch script and its flags; None for others."""
    if words[0] == "sd-lora":
        return words[1], words[2:]
    if words[:3] == ["python", "-m", "sd_lora"]:
        return words[3], words[4:]
    scripts = [i for i, word in enumerate(words) if Path(word).parent.name == "train_scripts"]
    return (Path(words[scripts[0]]).name, words[scripts[0] + 1 :]) if scripts else None


COMMANDS = list(commands())
OURS = [(page, *found) for page, words in COMMANDS if (found := ours(words))]
TRAINING = [(p, name, words) for p, name, words in OURS if name == "train" or name in SCRIPTS]
CHECKS = dict.fromkeys(tuple(words) for _, name, words in OURS if name == "check")


def test_every_command_is_looked_at() -> None:
    """A command in a page is ours, and run or read below; or one that installs; or another
    trainer's, in a comparison. So a new kind of line comes to somebody's eyes."""
    for page, words in COMMANDS:
        foreign = any(word in OF_OTHERS for word in words)
        assert ours(words) or foreign or words[0] in INSTALLING, (page, words)
    assert len(OURS) > 25


@pytest.fixture(scope="module")
def stock(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the snippets name: models, images with captions, LoRA files, the
    clone's sample data."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "sample_data").symlink_to(ROOT / "sample_data")
    for model in ("MODEL", "BASE", "TUNED", "sd15.safetensors", "stable-diffusion-v1-5"):
        shutil.copytree(tiny_sd1, folder / model)
    tuned = folder / "TUNED" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: t + 0.01 * torch.randn_like(t) for k, t in load_file(tuned).items()}, tuned)
    for name in ("my_dog", "images", "dogs"):
        for path in images(folder / name, 2).glob("*.png"):
            path.with_suffix(".txt").write_text("a photo", encoding="utf-8")
    for name, method in {"my-dog": "lora", "loha": "loha", "dora": "lora"}.items():
        parts = load_parts(str(tiny_sd1))
        for component, targets in (("unet", "up.*to_q"), ("text_encoder", ".*fc1")):
            sd_lora.inject(parts.models[component], targets=targets, rank=2, method=method,
                           rule="decompose" if name == "dora" else "add")  # fmt: skip
            for parameter in sd_lora.lora_layers(parts.models[component]):
                nn.init.normal_(parameter, std=0.1)
        sd_lora.save_adapter(parts.models, folder / name, family="sd1")
    for name in ("some", "my", "a", "b", "big"):
        source = folder / "my-dog" / "my-dog_kohya.safetensors"
        shutil.copy(source, folder / f"{name}.safetensors")
    shutil.copy(folder / "loha" / "loha_lycoris.safetensors", folder / "loha.safetensors")
    shutil.copy(folder / "dora" / "dora_lycoris.safetensors", folder / "dora.safetensors")
    return folder


@pytest.fixture
def place(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stock, to run a snippet in."""
    shutil.copytree(stock, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "number"), [(p, i) for i, (p, _) in enumerate(blocks("python"))])
def test_python(page: str, number: int, place: Path) -> None:
    """Each Python block runs from its first import to its last line, with models of the reader's
    where it speaks of any; one that draws leaves an image."""

    def reader() -> nn.Module:
        parts = {name: nn.Linear(4, 4) for name in ("query", "key", "value", "dense")}
        body = nn.Sequential(OrderedDict(parts))
        return nn.Sequential(OrderedDict(layer=body, classifier=nn.Linear(4, 2)))

    state = reader()
    sd_lora.inject(state, targets=[r".*\.query"], rank=2)
    states = [sd_lora.lora_state_dict(state)] * 2
    names: dict[str, Any] = {"model": reader(), "fresh_model": reader()}
    names |= dict(zip("ab", states, strict=True))
    _, code = list(blocks("python"))[number]
    try:
        exec(code.replace('"MODEL"', repr(str(place / "MODEL"))), names)
    finally:
        METHODS.pop("outer", None)
    if "image.png" in code:
        with Image.open("image.png") as image:
            assert image.size[0] >= 16


def test_tools(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line of a tool runs one after another, on files of its names; the model is small, so
    that it is named where the line means the published one."""
    for page, name, words in OURS:
        if name not in cli._TOOLS:
            continue
        model = [] if name == "bake" else ["--model", "MODEL"]
        again = ["--overwrite"] if "--out" in words else []
        assert cli.main([name, *words, *model, *again]) == 0, (page, words, capsys.readouterr().err)
        if again:
            assert (place / words[words.index("--out") + 1]).exists()


@pytest.mark.parametrize("words", [*map(list, CHECKS)], ids=lambda w: w[-1])
def test_check(words: list[str], place: Path) -> None:
    """Each line of `sd-lora check` runs."""
    assert cli.main(["check", *words, "--no_page"]) == 0


def test_every_training_line_is_understood(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line that trains, ours in the comparisons included, is a configuration without a
    contradiction; my.toml is one."""
    shutil.copy(root / "sample_data/configs/text_to_image.toml", tmp_path / "my.toml")
    (tmp_path / "sample_data").symlink_to(root / "sample_data")
    monkeypatch.chdir(tmp_path)
    assert len(TRAINING) >= 8
    for _, name, words in TRAINING:
        script = name if name in SCRIPTS else None
        jobs = parse_jobs(words, script, has_captions=lambda folder: True)
        assert all(job.config.base_model for job in jobs)


OF_A_READER = ("README.md", "first-lora.md", "models.md", "training.md")
RUN_HERE = dict.fromkeys((n, *words) for page, n, words in TRAINING if page in OF_A_READER)
"""The training lines of these pages, each once."""


@pytest.mark.parametrize("line", RUN_HERE, ids=lambda line: line[0])
def test_training(line: tuple[str, ...], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of the pages for a first reader train, for one step and small; class images that
    the line asks for are there already."""
    name = line[0]
    words = [word.replace("stable-diffusion-v1-5/", "", 1) for word in line[1:]]
    shutil.rmtree(place / "my-dog")  # finished work, which a run does not overwrite
    if "--steps" in words:  # one option by two flags is an error
        words[words.index("--steps")] = "--max_train_steps"
    words += [*SMALL.split(), *["--num_class_images", "2"] * ("--class_data_dir" in words)]
    words += ["--validation_steps", "1"] * ("--score_features" in words)  # images of the score
    if name in SCRIPTS:
        monkeypatch.setattr(sys, "argv", [name, *words])
        assert cli.train_script(name) == 0
    else:
        assert cli.main([name, *words]) == 0
    script = name if name in SCRIPTS else None
    for job in parse_jobs(words, script, has_captions=lambda folder: True):
        assert list((place / job.config.output_path).glob("*.safetensors"))
