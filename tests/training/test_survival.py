"""Runs that are killed again and again end as if nothing had been."""

from pathlib import Path

import pytest

from tests.training.survival import CLOCK, Trial, inputs


@pytest.mark.parametrize("mode", ["captioned", "dreambooth"])
def test_a_killed_run_ends_as_an_undisturbed_one(
    mode: str, tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL twenty times and more: four times within each of caching, class images, saves,
    exports and the log, and at any moment. The same command each time comes to the end, and every
    file that the run leaves, the last checkpoints included, is byte for byte the one of a run that
    nobody killed. `benchmarks/survival.py` does the same for hours."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")  # the same bytes, headers included
    trial = Trial(mode, inputs(tmp_path, tiny_sd1), seed=0)
    phases = {"caching", "save", "export", "log and settings", CLOCK}
    phases |= {"class images"} if mode == "dreambooth" else set()
    trial.survive(rounds=4)
    assert trial.killed == dict.fromkeys(phases, 4)
    assert trial.finished >= 4
