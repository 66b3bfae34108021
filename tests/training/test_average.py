"""Moving averages of a run: their weights, those made afterwards, and the files of a run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sd_lora
from sd_lora.errors import UsageError
from sd_lora.formats.file_names import FACTORS
from sd_lora.training.average import Average, Constant, Power, reconstructed
from sd_lora.training.export_checkpoint import export_checkpoint
from sd_lora.training.state_files import read_state
from tests.training.runs import images, text_to_image

LENGTHS = (0.05, 0.1, 0.2)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_power_functions_length_is_the_deviation_of_its_weights(length: float) -> None:
    """Averages of the unit vectors of 2,000 steps are the weights of the steps: they sum to 1, are
    (γ + 1) tᵞ / Tᵞ⁺¹, and deviate by the length as a share of the run (EDM2, equation 5)."""
    steps = 2000
    parameter = torch.zeros(steps, dtype=torch.float64)
    average = Average({"a": parameter}, {"": Power(length)}, "")
    for step in range(1, steps + 1):
        parameter.zero_()[step - 1] = 1
        average.update(step)
    weights = average.values[""]["a"]
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    gamma = Power(length).gamma
    assert weights.sum() == pytest.approx(1)
    torch.testing.assert_close(
        weights * steps, (gamma + 1) * t**gamma, rtol=0, atol=0.01 * (gamma + 1)
    )
    deviation = (weights @ t**2 - (weights @ t) ** 2).sqrt()
    assert deviation == pytest.approx(length, rel=5e-3)


def test_a_constant_decay_forgets_the_start() -> None:
    """β is (1 + t) / (10 + t) until that is the decay, as in diffusers' EMAModel: of a parameter
    that goes from 0 to 1, the product of all β is left of the start."""
    parameter, decay = torch.zeros(1, dtype=torch.float64), 0.9
    average = Average({"a": parameter}, {"": Constant(decay)}, "")
    parameter.fill_(1)
    left = 1.0
    for step in range(1, 101):
        average.update(step)
        left *= min(decay, (1 + step) / (10 + step))
    assert float(average.values[""]["a"]) == pytest.approx(1 - left)


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15])
def test_averages_are_made_afterwards(length: float) -> None:
    """Of a random walk of 1,000 steps, averages of two lengths at every 25th step give that of a
    third length: within 5 % of the distance between the two kept ones (EDM2, section 3.2)."""
    torch.manual_seed(0)
    parameter = torch.zeros(200, dtype=torch.float64)
    profiles = {"0.05": Power(0.05), "0.1": Power(0.1)}
    average = Average({"a": parameter}, profiles, "0.1")
    wanted = Average({"a": parameter}, {"": Power(length)}, "")
    snapshots = {}
    for step in range(1, 1001):
        parameter += torch.randn(200, dtype=torch.float64)
        average.update(step)
        wanted.update(step)
        if step % 25 == 0:
            state = average.state_dict()
            snapshots[step] = {name: {"a": v["a"].clone()} for name, v in state.items()}
    made, last = reconstructed(snapshots, length)["a"], snapshots[1000]
    apart = (last["0.05"]["a"] - last["0.1"]["a"]).norm()
    assert (made - wanted.values[""]["a"]).norm() < 0.05 * apart


def test_a_run_exports_the_average(tiny_sd1: Path, tmp_path: Path) -> None:
    """The checkpoints' factors are the averages of the trained ones, computed here in float64; the
    run's files, `sd-lora export` of the last checkpoint, and with the run's own length, are they; a
    resumed run ends in the same bytes."""
    data, steps = images(tmp_path / "data"), 5
    options = {"use_ema": True, "max_train_steps": steps, "checkpointing_steps": 1}
    options |= {"targets": "attention", "learning_rate": 1e-2}
    config = text_to_image(tiny_sd1, data, tmp_path / "out", **options)
    sd_lora.train(config)
    folders = [tmp_path / "out" / f"checkpoint-{step}" for step in range(1, steps + 1)]
    states = [read_state(folder) for folder in folders]
    trained = [state["trained"]["factors"] for state in states]
    exported, moved = load_file(folders[-1] / FACTORS), 0
    for key in exported:
        mean = trained[0][key].double().numpy()
        for step in range(2, steps + 1):
            beta = (1 - 1 / step) ** (Power(0.1).gamma + 1)
            mean = beta * mean + (1 - beta) * trained[step - 1][key].double().numpy()
        np.testing.assert_allclose(exported[key].double().numpy(), mean, rtol=1e-5, atol=1e-8)
        moved += not torch.equal(exported[key], trained[-1][key])
    assert moved > len(exported) / 2

    (file,) = (tmp_path / "out").glob("*_kohya.safetensors")
    whole = load_file(file)
    for length in (None, 0.1):
        out = tmp_path / f"export-{length}"
        export_checkpoint(folders[-1], out, False, None, length)
        for key, value in load_file(out / file.name).items():
            torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-9)
    for length, message in ((0.5, "ema_length must be .*below 0.25"), (0.0, "ema_length must be")):
        with pytest.raises(UsageError, match=message):
            export_checkpoint(folders[-1], tmp_path / "none", False, None, length)
    sd_lora.train(config.replace(resume_from_checkpoint="checkpoint-2"))
    assert all(torch.equal(value, whole[key]) for key, value in load_file(file).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 0.9}, "ema_decay has no effect without use_ema"),
        ({"use_ema": True, "ema_decay": 0.9, "ema_length": 0.1}, "two kinds of moving average"),
        ({"use_ema": True, "optimizer": "adamwschedulefree"}, "averages its steps itself"),
        ({"use_ema": True, "ema_length": 0.5}, "ema_length must be"),
    ],
)
def test_wrong_averages_are_told(options: dict, message: str, tmp_path: Path) -> None:
    """Options of the average that contradict each other are errors before anything is loaded."""
    with pytest.raises(UsageError, match=message):
        text_to_image(tmp_path, tmp_path, tmp_path / "out", **options)
