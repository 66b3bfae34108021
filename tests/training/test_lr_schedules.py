"""Learning-rate schedules: each equals a closed form or diffusers' own at every step."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler

from sd_lora.config.command_line import parse
from sd_lora.config.rows import SCHEDULES
from sd_lora.config.schema import RunConfig, TrainConfig
from sd_lora.errors import UsageError
from sd_lora.training.lr_schedules import SHAPES, build_lr_scheduler, read_points

STEPS, WARMUP, LEAST = 40, 8, 0.1
RATE = 1e-3


def config_of(schedule: str, **options: object) -> RunConfig:
    values = {"pretrained_model_name_or_path": "m", "train_data_dir": "d", "learning_rate": RATE}
    if "lr_warmup_steps" in SCHEDULES[schedule]:
        values |= {"lr_warmup_steps": WARMUP}
    config = TrainConfig(lr_scheduler=schedule, **(values | options))
    return config.resolve("sd1", 512)


def rates(config: RunConfig) -> list[float]:
    """The rates of all steps, as the loop steps the schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=RATE)
    schedule, found = build_lr_scheduler(optimizer, config, STEPS), []
    for _ in range(STEPS + 1):  # the loop's last call comes after the last step
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "least"),
    [
        (name, least)
        for name, options in SCHEDULES.items()
        for least in ((0.0, LEAST) if "lr_min_ratio" in options else (0.0,))
        if name not in SHAPES
    ],
)
def test_diffusers_schedules_are_diffusers(schedule: str, least: float) -> None:
    """Its schedules equal `get_scheduler`'s to the bit at every step, and above a least share they
    are least + (1 − least) · factor after the warm-up, as transformers' cosine has it."""
    more = {"lr_num_cycles": 3} if "lr_num_cycles" in SCHEDULES[schedule] else {}
    more |= {"lr_power": 2.0} if "lr_power" in SCHEDULES[schedule] else {}
    found = rates(config_of(schedule, lr_min_ratio=least, **more))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=RATE)
    theirs = get_scheduler(
        schedule, optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS, num_cycles=3,
        power=2.0,
    ).lr_lambdas[0]  # fmt: skip
    for step, rate in enumerate(found):
        factor = theirs(step)
        wanted = factor if step < WARMUP or not least else least + (1 - least) * factor
        assert rate == RATE * wanted if not least else rate == pytest.approx(RATE * wanted)


def test_a_piecewise_constant_schedule_is_diffusers() -> None:
    """Its rules in diffusers' form give diffusers' factors at every step."""
    rules = "1:5,0.5:20,0.1"
    theirs = get_scheduler(
        "piecewise_constant", torch.optim.SGD([torch.zeros(1)], lr=RATE), step_rules=rules
    ).lr_lambdas[0]
    found = rates(config_of("piecewise_constant", lr_step_rules=rules))
    assert found == [RATE * theirs(step) for step in range(STEPS + 1)]


CLOSED: dict[str, tuple[dict[str, object], Callable[[int], float]]] = {
    "inverse_sqrt": ({}, lambda t: math.sqrt(WARMUP / t)),
    "rex": ({}, lambda t: (1 - (x := (t - WARMUP) / (STEPS - WARMUP))) / (1 - x / 2)),
    "warmup_stable_decay": (
        {"lr_decay_steps": 0.25}, lambda t: 1 - math.sqrt(max(0, t - 30) / 10)
    ),
}  # fmt: skip


@pytest.mark.parametrize("schedule", CLOSED)
def test_own_schedules_have_closed_forms(schedule: str) -> None:
    """A linear warm-up, then the paper's function at every step, above a least share if asked."""
    options, shape = CLOSED[schedule]
    for least in (0.0, LEAST) if "lr_min_ratio" in SCHEDULES[schedule] else (0.0,):
        found = rates(config_of(schedule, lr_min_ratio=least, **options))
        wanted = [
            t / WARMUP if t < WARMUP else least + (1 - least) * shape(t) for t in range(STEPS + 1)
        ]
        assert found == pytest.approx([RATE * factor for factor in wanted], abs=1e-12)


def test_points_of_a_file(tmp_path: Path) -> None:
    """Straight lines between points at steps and percentages, a jump where two have one step, and
    constant rates outside; the file may have comments, commas and empty lines."""
    file = tmp_path / "rate.txt"
    file.write_text("# rise and fall\n4 0\n20% 1\n\n20, 1  # a jump\n20, 0.5\n90% 0.1\n")
    found = rates(config_of("points", lr_points=str(file)))
    wanted = {0: 0, 4: 0, 6: 0.5, 8: 1, 19: 1, 20: 0.5, 28: 0.3, 36: 0.1, 40: 0.1}
    assert {step: found[step] / RATE for step in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0 1\n5 -1\n", "line 2: '5 -1' is not a step"),
        ("5 1\n3 1\n", "line 2: .* the steps in their order"),
        ("1 2 3\n", "line 1"),
        ("x 1\n", "line 1"),
        ("0 inf\n", "line 1"),
        ("# nothing\n", "holds no points"),
        (None, "does not exist"),
    ],
)
def test_a_broken_file_of_points_is_told_by_line(
    tmp_path: Path, text: str | None, found: str
) -> None:
    """The message names the file, the line and the right form."""
    file = tmp_path / "rate.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=f"lr_points .*rate.txt.*{found}"):
        read_points(file, STEPS)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--lr_scheduler", "points"], "lr_scheduler points needs .*lr_points"),
        (["--lr_scheduler", "piecewise_constant"], "needs .*lr_step_rules"),
        (["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:9,0.5:3,1"], "increasing"),
        (["--lr_scheduler", "constant", "--lr_min_ratio", "0.1"], "lr_min_ratio has no effect"),
        (["--lr_scheduler", "cosine", "--lr_decay_steps", "5"], "lr_decay_steps has no effect"),
    ],
)
def test_a_schedule_without_its_shape_is_refused(words: list[str], found: str) -> None:
    """A missing or useless shape is a mistake of the command."""
    with pytest.raises(UsageError, match=found):
        parse(["--model", "m", "--train_data_dir", "d", *words])
