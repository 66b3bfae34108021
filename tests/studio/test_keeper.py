"""Jobs are processes of their own, which neither a studio's end nor a full queue loses."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sd_lora.studio.keeper import Keeper, state_after
from sd_lora.studio.store import Job, Store

PATIENCE = 60.0


def until(true: Callable[[], bool]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


def ended(store: Store, number: int) -> Callable[[], bool]:
    return lambda: store.job(number).is_over


def test_jobs_run_and_end(store: Store) -> None:
    """A command that works is done, a wrong one has failed, and both outputs are kept."""
    good = store.add("presets", "presets", ["subject"])
    wrong = store.add("presets", "presets", ["nothing"])
    with Keeper(store) as keeper:
        until(lambda: ended(store, good)() and ended(store, wrong)())
        assert (store.job(good).state, store.job(good).code) == ("done", 0)
        assert (store.job(wrong).state, store.job(wrong).code) == ("failed", 2)
        assert "learning_rate" in keeper.log_of(store.job(good)).read_text()
        assert "error: preset is one of" in keeper.log_of(store.job(wrong)).read_text()


def test_another_keeper_finds_a_running_job(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job outlives the keeper that started it; the next one, of another process as it were,
    knows it by number and start, learns of its end, and takes no other process for it."""
    monkeypatch.setenv("SD_LORA_STUDIO", str(tmp_path / "inner"))
    number = store.add("studio", "a command that goes on", ["--no_open", "--port", "0"])
    keeper = Keeper(store)
    keeper.tick()
    job = store.job(number)
    assert job.state == "running"
    if hasattr(os, "getsid"):
        assert os.getsid(job.pid) == job.pid  # a session of its own: no terminal ends it
    other = Keeper(store)
    other.tick()
    assert store.job(number).state == "running"
    store.change(number, born=job.born - 60)
    assert other.process(store.job(number)) is None  # the number of another process
    store.change(number, born=job.born)
    other.end_at_once(store.job(number))
    until(lambda: other.process(store.job(number)) is None)
    other.tick()
    assert (store.job(number).state, store.job(number).code) == ("stopped", None)


def test_fifty_runs_wait_for_one(store: Store, tmp_path: Path) -> None:
    """Of 50 runs one is at work; the order holds, and survives the store."""
    numbers = [store.add("train", str(i), [], folder=str(tmp_path / str(i))) for i in range(50)]
    keeper = Keeper(store)
    keeper.tick()
    keeper.tick()
    assert [job.id for job in store.jobs("state = 'running'")] == numbers[:1]
    store.close()
    again = Store(tmp_path / "state")
    assert [job.id for job in again.jobs("state = 'queued'")] == numbers[1:]
    Keeper(again).end_at_once(again.job(numbers[0]))


@pytest.mark.parametrize(
    ("wish", "code", "log", "state"),
    [
        ("", 0, "", "done"),
        ("pause", 3, "", "paused"),
        ("stop", 3, "", "stopped"),
        ("", 3, "", "stopped"),
        ("stop", -signal.SIGTERM, "", "stopped"),
        ("", 1, "", "failed"),
        ("pause", None, "error: ended by the file; continue with the same command", "paused"),
        ("", None, "error: out of memory", "failed"),
        ("", None, "", "failed"),
    ],
)
def test_states_after_the_end(
    tmp_path: Path, wish: str, code: int | None, log: str, state: str
) -> None:
    """Exit codes, and where there is none the output, give the state."""
    (tmp_path / "log").write_text(log)
    job = Job(1, "train", "", [], folder=str(tmp_path), wish=wish, started=time.time())
    assert state_after(job, code, tmp_path / "log") == state
