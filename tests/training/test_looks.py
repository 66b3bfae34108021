"""The share of a run's time in which it is looked at: planned in passes, told in seconds."""

import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sd_lora.report.events import Event, Warned
from sd_lora.report.summary import shares_of
from sd_lora.training.looks import MOST, Look, timed, too_many_looks
from sd_lora.training.scoring import looked

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
    """Where the samples or scores before and after alone are too much, other options are named; a
    validation can be left out, and then the samples can stay."""
    alone = "before and after training alone take more than a tenth: "
    text = too_many_looks([of_samples(0, 200)], STEPS, TRAINING)
    assert f"the samples {alone}--num_validation_images 1 or 0" in text
    scores = Look("scores", "score", 200, 2, 3)
    assert f"the scores {alone}--score_sets 1, " in too_many_looks([scores], STEPS, TRAINING)
    dear = Look("validation", "validate", 200, 2, 0)
    for looks in ([dear], [of_samples(2), dear]):
        text = too_many_looks(looks, STEPS, TRAINING)
        assert text.endswith("): --validate_every 0 leaves the validation out")
    two = [of_samples(0, 60), Look("scores", "score", 70, 2, 0)]
    assert f"samples and scores {alone}--score_sets 1, " in too_many_looks(two, STEPS, TRAINING)
    assert too_many_looks([], STEPS, TRAINING) == ""


@pytest.mark.parametrize("between", [12, 30, 99])
@pytest.mark.parametrize("validations", [6, 12, 40])
def test_two_dear_looks_share_the_tenth(between: int, validations: int) -> None:
    """Where either alone is too much, a frequency is named for each, more of both than the start
    and the end, and with them the two take a tenth at most."""
    looks = [of_samples(between), Look("validation", "validate", 32, 2, validations)]
    text = too_many_looks(looks, STEPS, TRAINING)
    assert "alone" not in text
    found = re.search(r"\): --\w+_every \d+ and --\w+_every \d+ would take less$", text)
    assert found, text
    every = {verb: int(n) for verb, n in re.findall(r"--(\w+)_every (\d+)", text)}
    times = {verb: len(range(n, STEPS, n)) for verb, n in every.items()}
    assert min(times.values()) > 0
    fewer = [replace(look, between=times[look.verb]) for look in looks]
    assert not too_many_looks(fewer, STEPS, TRAINING)
    work = sum(look.work for look in looks)
    assert f"about {round(100 * work / (work + TRAINING))} % of the time is for looking" in text


class Moved:
    """Features that know where they were moved."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def to(self, device: object) -> None:
        self.places.append(str(device))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full\nat 7"),
                                   NotImplementedError("no such operator on MPS")])  # fmt: skip
def test_a_device_that_cannot_look_is_told_once(error: Exception) -> None:
    """The first score that finds no room, or no operator, on the device is made on the CPU, with
    the reason in a warning; later ones do not try the device again."""
    told: list[Event] = []
    run: Any = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("mps")), emit=told.append,
        scores=SimpleNamespace(on_cpu=False),
    )  # fmt: skip
    features: Any = Moved()

    def work() -> str:
        if features.places[-1] != "cpu":
            raise error
        return "done"

    assert [looked(run, features, work) for _ in range(3)] == ["done"] * 3
    assert features.places == ["mps", "cpu"]
    (warned,) = told
    assert isinstance(warned, Warned)
    (finding,) = warned.findings
    reason = str(error).partition("\n")[0]
    assert (finding.code, finding.name, finding.details) == ("scored-on-cpu", "mps", reason)


def test_a_fault_of_the_work_is_no_lack_of_the_device() -> None:
    """Another error goes on to the caller."""
    accelerator = SimpleNamespace(device=torch.device("mps"))
    run: Any = SimpleNamespace(accelerator=accelerator, scores=None)
    features: Any = Moved()

    def fault() -> None:
        raise RuntimeError("of shapes")

    with pytest.raises(RuntimeError, match="of shapes"):
        looked(run, features, fault)
    assert features.places == ["mps", "cpu"]


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
