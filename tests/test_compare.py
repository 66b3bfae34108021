"""`sd-lora compare`: a change is told from chance, and measured on the images that are in both."""

import json
import math
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
    better = compared(capsys, run, "--learning_rate", 1e-2, "--steps", 20, "--seeds", 0, 1)
    assert better["helps"] is True
    assert better["changed"] == {"learning_rate": [1e-9, 1e-2]}
    same = compared(capsys, run, "--cache_latents", "disk", "--seeds", 0)
    assert same["steps"] == {AS_IT_WAS: 1, CHANGED: 1}  # a quarter of the run's
    assert same["losses"][CHANGED] == same["losses"][AS_IT_WAS]
    assert (same["difference"], same["doubt"], same["helps"]) == (0.0, None, None)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_an_image_that_is_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without one of five images a training has four fifths of the steps, so that the others are
    seen as often; they alone are measured; the result is in words for people."""
    words = ["compare", str(run), "--leave_out", "3.png", "--seeds", "0", "--steps", "5"]
    assert main([*words, "--train_batch_size", "1"]) == 0
    out = capsys.readouterr().out
    assert "leave_out: not given → 3.png" in out
    # 5 steps of 4 are 4 epochs of 5 images, which are 16 steps of 1 without one of them
    assert "as it was (5 steps), and 1 with the change (16 steps, as many epochs)" in out
    assert "changes by 0.0 % of the base model's" in out  # at 1e-9
    assert "of one seed, which tells nothing from chance" in out


def test_mistakes_are_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No change, a change of what a short training leaves out, or with which a loss is another
    number, images that are not there, and a folder that is none of a run end with a sentence."""
    for words, told in (
        ([run], "nothing differs"),
        ([run, "--sample_every", "5", "--rank", "4"], "sample_every: not compared"),
        ([run, "--seed", "5"], "seed: not compared"),
        ([run, "--preset", "style"], "preset"),
        ([run, "--prediction_type", "v_prediction"], "a loss is another number"),
        ([run, "--leave_out", "03.png"], "leave_out names no usable image: 03.png. Did you mean"),
        ([run, "--leave_out", "*"], "leaves no image to train"),
        ([tmp_path], "has no report.json"),
    ):
        assert main(["compare", *map(str, words)]) == 2, words
        assert told in capsys.readouterr().err


def test_chance_is_no_help() -> None:
    """The interval is Student's t of two samples of seeds' means, or that of the items in pairs if
    it is larger; of one seed it is infinite. The numbers are in parts of the base's loss."""

    def result(new: list[float], old: list[float], spread: float = 0.0) -> Compared:
        found = Compared({"rank": (4, 8)}, {AS_IT_WAS: 10, CHANGED: 10}, base=[2.0, 2.0])
        found.losses[CHANGED] = {i: [x + spread, x - spread] for i, x in enumerate(new)}
        found.losses[AS_IT_WAS] = {i: [x, x] for i, x in enumerate(old)}
        return found

    clear = result([0.80, 0.82, 0.84], [1.0, 1.02, 1.04])
    mean, half = clear.difference
    assert mean == pytest.approx(-0.1)
    assert half == pytest.approx(2.776 * math.sqrt(2 * 0.02**2 / 3) / 2)  # 4 degrees of freedom
    assert clear.helps is True
    assert result([1.0, 1.02, 1.04], [0.80, 0.82, 0.84]).helps is False
    assert result([0.99, 1.01, 1.03], [1.0, 1.02, 1.04]).helps is None
    assert result([0.80, 0.82, 0.84], [1.0, 1.02, 1.04], spread=0.5).helps is None
    assert result([0.8], [1.0]).difference == (pytest.approx(-0.1), math.inf)
