"""The share of a run's time in which it is looked at: planned in passes, told in seconds."""

import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sd_lora.report.summary import shares_of
from sd_lora.training.looks import MOST, Look, timed, too_many_looks

STEPS = 1000
TRAINING = 2 * STEPS
"""Forward passes that the steps of one image are worth."""


def of_samples(between: int, forwards: int = 20) -> Look:
    return Look("samples", "sample", forwards, 2, between)


VALIDATION = Look("validation", "validate", 32, 2, 1)


@pytest.mark.parametrize("between", range(1, 60))
def test_the_frequency_that_is_named_takes_less(between: int) -> None:
    """Above a tenth of the work the line names each share, and the frequency of the dearest look:
    with it all of them take a tenth at most, and one time more would be above."""
    looks = [of_samples(between), VALIDATION]
    text, work = too_many_looks(looks, STEPS, TRAINING), sum(look.work for look in looks)
    assert bool(text) == (work > MOST * (work + TRAINING))
    if not text:
        return
    assert f"validation {round(100 * 96 / (work + TRAINING))} %" in text
    every = int(re.findall(r"--sample_every (\d+) would take less", text)[0])
    times = len(range(every, STEPS, every))
    assert not too_many_looks([of_samples(times), VALIDATION], STEPS, TRAINING)
    assert too_many_looks([of_samples(times + 1), VALIDATION], STEPS, TRAINING)


def test_looks_that_no_frequency_makes_cheap() -> None:
    """Where the samples before and after alone are too much, other options are named; a validation
    can be left out."""
    assert "fewer sampler steps" in too_many_looks([of_samples(0, 200)], STEPS, TRAINING)
    dear = Look("validation", "validate", 200, 2, 0)
    assert "--validate_every 0" in too_many_looks([dear], STEPS, TRAINING)
    assert too_many_looks([], STEPS, TRAINING) == ""


def test_time_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block within another takes its time from it, also where it fails; the shares are of all."""
    clock = iter((0.0, 1.0, 3.0, 3.0, 4.0, 10.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    run: Any = SimpleNamespace(spent={})
    with timed(run, "training"):
        with timed(run, "samples"):
            pass
        with pytest.raises(ValueError, match="a fault"), timed(run, "scores"):
            raise ValueError("a fault")
    assert run.spent == {"samples": 2.0, "scores": 1.0, "training": 7.0}
    assert shares_of(run.spent, 20.0) == (
        "of the time 35 % in training, 10 % in samples, 5 % in scores"
    )
    assert shares_of({}, 1.0) == ""
