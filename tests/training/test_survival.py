"""Runs that are killed again and again end as if nothing had been."""

from pathlib import Path

import pytest

from tests.training.survival import CLOCK, Trial, inputs


@pytest.mark.parametrize(("mode", "rounds"), [("captioned", 2), ("dreambooth", 3)])
def test_a_killed_run_ends_as_an_undisturbed_one(
    mode: str, rounds: int, tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL 31 times: in each phase of a run (caching, saves, exports, the log; with class
    images, these and samples too) and at any moment, twice in captioned mode and three times in
    DreamBooth. The same command each time comes to the end, and every file that the run leaves, the
    last checkpoints included, is byte for byte the one of a run that nobody killed.
    `benchmarks/survival.py` does the same for hours."""
    killed_often(mode, tiny_sd1, tmp_path, monkeypatch, rounds)


@pytest.mark.hours
@pytest.mark.parametrize("mode", ["captioned", "dreambooth"])
def test_600_kills(
    mode: str, tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with fifty kills in each phase and at any moment: 250 and 350."""
    killed_often(mode, tiny_sd1, tmp_path, monkeypatch, rounds=50)


def killed_often(
    mode: str, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")  # the same bytes, headers included
    trial = Trial(mode, inputs(folder, model), seed=0)
    phases = {"caching", "save", "export", "log and settings", CLOCK}
    phases |= {"class images", "samples"} if mode == "dreambooth" else set()
    trial.survive(rounds)
    assert trial.killed == dict.fromkeys(phases, rounds)
    assert trial.finished >= rounds
