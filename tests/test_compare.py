"""`sd-lora compare`: a change is told from chance, and measured on the images that are in both."""

import json
from pathlib import Path

import pytest

import sd_lora
from sd_lora.cli import main
from sd_lora.compare import AS_IT_WAS, CHANGED, Compared
from tests.training.runs import images, text_to_image


@pytest.fixture(scope="module")
def run(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on five images, which learned next to nothing."""
    place = tmp_path_factory.mktemp("compare")
    data = images(place / "images", 5)
    rate = {"learning_rate": 1e-9, "rank": 2, "targets": "attention", "validate_every": 0}
    sd_lora.train(text_to_image(tiny_sd1, data, place / "run", max_train_steps=4, **rate))
    return place / "run"


def compared(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    """The JSON of a command."""
    capsys.readouterr()
    assert main(["compare", *map(str, words), "--json"]) == 0
    found: dict = json.loads(capsys.readouterr().out)
    return found


def test_a_rate_that_teaches_helps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a rate of nothing one that teaches lowers the loss beyond the interval; where the
    latents are cached changes no loss by a bit; the run's own folder stays as it is."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    better = compared(capsys, run, "--learning_rate", 1e-2, "--steps", 20, "--seeds", 0)
    assert better["helps"] is True
    assert better["changed"] == {"learning_rate": [1e-9, 1e-2]}
    same = compared(capsys, run, "--cache_latents", "disk", "--seeds", 0)
    assert same["steps"] == 1  # a quarter of the run's
    assert same["seeds"] == [{"seed": 0, "difference": 0.0, "doubt": 0.0}]
    assert same["helps"] is None
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_an_image_that_is_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trainings differ by the image alone, and the result is in words for people."""
    assert main(["compare", str(run), "--leave_out", "3.png", "--seeds", "0"]) == 0
    out = capsys.readouterr().out
    assert "leave_out: not given → 3.png" in out
    assert "seed 0: 0.0 % ± 0.0 % of the base's loss" in out  # after one step at 1e-9
    assert "no difference that matters" in out


def test_mistakes_are_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No change, a change of what a short training leaves out, an image that is not there, and a
    folder that is none of a run end with a sentence."""
    for words, told in (
        ([run], "nothing differs"),
        ([run, "--sample_every", "5"], "nothing differs"),
        ([run, "--leave_out", "03.png"], "leave_out names no usable image: 03.png. Did you mean"),
        ([run, "--leave_out", "*"], "leaves no image to train"),
        ([tmp_path], "has no report.json"),
    ):
        assert main(["compare", *map(str, words)]) == 2
        assert told in capsys.readouterr().err


def test_chance_is_no_help() -> None:
    """A change helps or hurts if each seed says so beyond its interval; seeds that differ, or an
    interval with 0 in it, say nothing. The numbers are in parts of the base's loss."""

    def result(*changes: float, spread: float = 0.0) -> Compared:
        found = Compared({"rank": (4, 8)}, 10, base=[2.0, 2.0])
        for seed, change in enumerate(changes):
            new = [1.0 + change + spread, 1.0 + change - spread]
            found.losses[seed] = {AS_IT_WAS: [1.0, 1.0], CHANGED: new}
        return found

    assert result(-0.1, -0.2).helps is True
    assert result(0.1, 0.2).helps is False
    assert result(-0.1, 0.1).helps is None
    assert result(-0.1, -0.2, spread=0.3).helps is None
    assert result(-0.1).difference(0) == pytest.approx((-0.05, 0.0))
    assert "seed 0: -5.0 % ± 0.0 % of the base's loss" in "\n".join(result(-0.1).lines())
