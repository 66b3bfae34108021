"""The harness for a GPU, tried without one: what it measures there is written by the same code."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sd_lora.training.recorders import OperatorRecorder

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu


def test_a_step_is_measured_and_written(tmp_path: Path) -> None:
    """A tiny step of ours and of peft's has its time and its line in the table; a part that fails
    is told and stops nothing."""
    found, rows = gpu.Found(tmp_path), []
    found.say("product, TFLOP/s", round(gpu.product_rate(), 1))
    cell = gpu.Cell("sd1", "all", 1, checkpointed=True)
    found.attempt("step", lambda: rows.append(gpu.steps(found, cell)))
    found.attempt("none", lambda: gpu.steps(found, gpu.Cell("sd1", "no such targets", 1)))
    assert found.numbers["none"].startswith("FAILED: UsageError")
    assert json.loads((tmp_path / "gpu.json").read_text()) == found.numbers
    head, rule, line = "\n".join(gpu.table(rows)).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert rows[0]["ours over peft"] == pytest.approx(
        rows[0]["ms"]["ours"] / rows[0]["ms"]["peft"], rel=0.01
    )


def test_a_graphed_step_is_the_step() -> None:
    """The step whose pass is recorded leaves the factors of the plain one, to the bit, after three
    steps of both."""
    cell = gpu.Cell("sd1", "all", 1)
    config = gpu.config_of(gpu.CONFIGS["sd1"]["unet"] | gpu.TINY)
    given, factors = gpu.conditions(config, gpu.DTYPE, 8, 1), []
    for make in (
        lambda: gpu.Step("ours", config, cell, given),
        lambda: gpu.FreedStep("graphed", config, cell, given, OperatorRecorder),
    ):
        torch.manual_seed(0)
        step = make()
        for _ in range(3):
            step()
        factors.append([p.detach().clone() for p in step.candidate.trained])
    assert all(map(torch.equal, *factors))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_are_measured_on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card a tiny cell has times, peaks and shares of all candidates, the recorded one too."""
    tiny = gpu.CONFIGS["sd1"] | {"unet": gpu.CONFIGS["sd1"]["unet"] | gpu.TINY}
    monkeypatch.setattr(gpu, "CONFIGS", {"sd1": tiny})
    monkeypatch.setattr(gpu, "SIDES", {"sd1": 64})
    monkeypatch.setattr(gpu, "WAYS", {"graphed": ("graphs",)})
    found = gpu.Found(tmp_path, {"product, TFLOP/s": 1.0})
    row = gpu.steps(found, gpu.Cell("sd1", "attention", 1))
    names = {*gpu.NAMES, "graphed"}
    assert row["ms"].keys() == row["peak GiB"].keys() == names
    assert {"counted peak GiB", "TFLOP/s", "of the card's rate"} <= row.keys()
    assert all(value > 0 for value in row["ms"].values())


def test_memory_is_that_of_a_check() -> None:
    """The step that is counted is the one that is measured: SD 1.5's 859,520,964 weights in
    bfloat16, and what `steps.py count` says of activations, 506 MiB with attention adapted, beside
    copies of the factors and the last of the loss."""
    count = gpu.counted(gpu.Cell("sd1", "attention", 1))
    assert count.frozen == pytest.approx(859_520_964 * 2, rel=1e-3)
    assert 506 < count.rest / 2**20 < 600
