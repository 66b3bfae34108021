"""docs/objectives.md: its numbers are the code's, and it names every option of the objective."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from sd_lora.config.schema import OPTIONS
from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.diffusion.timesteps import DISTRIBUTIONS, Timesteps

WEIGHTS = {
    "min-SNR 5": ("min_snr", {"gamma": 5.0}),
    "soft min-SNR 4": ("soft_min_snr", {"gamma": 4.0}),
    "debiased": ("debiased", {}),
    "P2 1": ("p2", {"gamma": 1.0}),
    "EDM style": ("edm_style", {}),
}
PARAMETERS = {
    "logit_normal": {"mean": 0.0, "std": 1.0},
    "mode": {"scale": 1.29},
    "beta": {"alpha": 2.0, "beta": 2.0},
}


@pytest.fixture
def page(root: Path) -> str:
    return (root / "docs/objectives.md").read_text(encoding="utf-8")


def test_every_option_of_the_objective_is_there(page: str) -> None:
    """The page names each option of the objective by its flag, and no flag that there is not."""
    named = set(re.findall(r"(?<![\w-])--(\w+)", page))
    assert named <= OPTIONS.keys()
    of_objective = {name for name, option in OPTIONS.items() if option.section == "objective"}
    assert of_objective <= named | {"preservation_weight"}


def test_the_weights_are_the_codes(page: str) -> None:
    """The table of weights, rounded."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    rows = re.findall(r"^\| ([^|]+), (epsilon|v) \| ([\d. |]+) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for name, kind, cells in rows:
        kind = "v_prediction" if kind == "v" else kind
        weighting, parameters = WEIGHTS[name]
        scheduler = DDPMScheduler(**betas, prediction_type=kind)
        weights = NoiseSchedule.of(scheduler, weighting, **parameters).weights
        ours = [f"{float(weights[t]):.2f}" for t in (20, 100, 250, 500, 750, 950)]
        assert cells.split(" | ") == ours, name


def test_the_factors_of_stratified_timesteps_are_exact(page: str) -> None:
    """Of n samples that share the timesteps, the variance of their mean is that of n independent
    ones divided by the variance over the mean variance within the n strata: each factor of the
    page is that number, from the quantiles of u at 48,000 even places; of a straight line n²."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = NoiseSchedule.of(DDPMScheduler(**betas), "min_snr", gamma=5.0)
    error = schedule.snr.double() / (1 + schedule.snr.double())
    courses = {
        "a straight line in t": torch.arange(1000).double(),
        "SNR / (1 + SNR), about an SD model's own error": error,
        "the same with min-SNR 5": error * schedule.weights,
    }
    (table,) = re.findall(r"^\| n \| (.*) \|$", page, re.MULTILINE)
    counts = [int(n) for n in table.split(" | ")]
    assert counts == [1, 2, 3, 4, 6, 8, 16]
    t = Timesteps(0, 1000).of((torch.arange(48_000, dtype=torch.float64) + 0.5) / 48_000)
    for name, course in courses.items():
        (cells,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", page, re.MULTILINE)
        values = course[t]
        exact = [
            float(values.var(correction=0) / values.view(n, -1).var(1, correction=0).mean())
            for n in counts
        ]
        shown = [f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" for value in exact]
        assert [cell.removesuffix(".0") for cell in shown] == cells.split(" | "), name
        if name == "a straight line in t":
            assert exact == pytest.approx([n**2 for n in counts], rel=1e-3)


def test_the_quarters_are_the_codes(page: str) -> None:
    """The shares of draws in each quarter of the timesteps, by distribution."""
    rows = re.findall(r"^\| `(\w+)`.*\| (\d+), (\d+), (\d+), (\d+) % \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == [*DISTRIBUTIONS]
    u = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    for name, *shares in rows:
        t = Timesteps(0, 1000, name, PARAMETERS.get(name, {})).of(u)
        counts = torch.histc(t.float(), 4, 0, 1000) / 400
        assert [round(float(count)) for count in counts] == [int(s) for s in shares], name
