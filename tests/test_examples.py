"""The examples do what they say: their own figures, on their own data, at their own size."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def example(
    root: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> ModuleType:
    """The script named by the test, imported as `python examples/<name>.py` would."""
    monkeypatch.syspath_prepend(str(root / "examples"))
    yield importlib.import_module(request.param)
    for name in ("digits", "text_classifier", "gpt2", "measure", "texts"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("example", ["digits"], indirect=True)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_rank_one_update_repairs_a_digit(example: ModuleType, seed: int) -> None:
    """With less than 1 % of the parameters the worst digit's errors fall to a third or less; both
    routes give the same ΔW; taken out, every weight and every error is as before."""
    result = example.run(seed)
    worst = result.worst
    assert result.before[worst] >= 8
    assert result.adapted[worst] <= result.before[worst] / 3
    assert 0 < result.added < 0.01 * result.parameters
    assert result.max_difference < 1e-5
    assert result.weights_identical
    assert result.ejected == result.before
    assert f"{worst:5}" in example.table(result)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["text_classifier"], indirect=True)
def test_lora_on_query_and_value(example: ModuleType) -> None:
    """LoRA is clearly better than the head alone and than biases, with a twentieth of the
    parameters and of the file of full fine-tuning, which is better still on so small a base and
    needs more memory; and the published count of roberta-base."""
    outcomes = example.run(seed=0)
    head, biases, lora, full = outcomes.values()
    assert lora.accuracy > max(head.accuracy, biases.accuracy) + 0.03
    assert full.accuracy > lora.accuracy > 0.55
    assert head.trained < biases.trained < lora.trained < 0.06 * full.trained
    assert lora.file < 0.06 * full.file
    assert head.memory < lora.memory < 0.75 * full.memory
    assert example.count_in_roberta_base() == 294_912
    assert all(name in example.table(outcomes) for name in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["gpt2"], indirect=True)
def test_lora_on_gpt2(example: ModuleType) -> None:
    """LoRA wins at least three quarters of what full fine-tuning does on the new text, with a
    seventh of the parameters and less memory; taken out, both losses are the base's exactly."""
    rows = example.run(seed=0)
    base, full, lora, ejected = rows.values()
    assert base.new - full.new > 0.25
    assert base.new - lora.new > 0.75 * (base.new - full.new)
    assert lora.trained < 0.15 * full.trained
    assert lora.file < 0.15 * full.file
    assert lora.memory < full.memory
    assert (ejected.new, ejected.old) == (base.new, base.old)
    assert "LoRA taken out" in example.table(rows)


@pytest.mark.parametrize("example", ["digits", "text_classifier", "gpt2"], indirect=True)
def test_bad_flags_are_told(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong flag ends with the parser's message, before anything is trained."""
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit):
        example.main(["--sede", "1"])
    assert "--sede" in capsys.readouterr().err
    assert torch.get_num_threads() == threads
