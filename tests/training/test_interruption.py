"""Requests to end or to save a run: by signals, by the clock, by a file."""

import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sd_lora
from sd_lora.cli import guarded
from sd_lora.config.schema import TrainConfig
from sd_lora.errors import Interrupted, RunError, UsageError
from sd_lora.report.events import Event, StepDone
from sd_lora.training import interruption
from sd_lora.training.checkpoint_folders import checkpoints
from sd_lora.training.interruption import Requests, listening
from sd_lora.training.state_files import read_state
from tests.training.runs import images, text_to_image


def test_signals_save_end_and_leave_drawing(tmp_path: Path) -> None:
    """SIGUSR1 asks once for a save. SIGTERM leaves a drawing at once, and is the reason to end;
    a second one goes to the handler of before. Handlers of before are back afterwards."""
    met: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: met.append(number))
    try:
        requests = Requests(tmp_path)
        with listening(requests):
            assert requests.reason == ""
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (requests.take_save(), requests.take_save()) == (True, False)
            with requests.drawing():
                os.kill(os.getpid(), signal.SIGTERM)
                pytest.fail("drawn on")
            assert requests.reason == "interrupted by SIGTERM"
            assert met == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert met == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_clock_and_a_file_end_a_run(tmp_path: Path) -> None:
    """The reason is the limit as it was given, or the file, which stays until it is forgotten."""
    requests = Requests(tmp_path, time.monotonic() + 0.05, "0.05s")
    assert requests.reason == ""
    time.sleep(0.06)
    assert requests.reason == "ended by --max_train_time 0.05s"
    (tmp_path / "stop").touch()
    requests = Requests(tmp_path)
    assert [requests.reason, requests.reason] == [f"ended by the file {tmp_path / 'stop'}"] * 2
    requests.forget_file()
    assert requests.reason == ""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90m", 5400), ("1h30m", 5400), ("1h 30m", 5400), ("2h", 7200), ("1.5h", 5400), ("40s", 40)],
)
def test_a_time_is_written_as_people_do(text: str, seconds: float) -> None:
    """Hours, minutes and seconds, in this order; anything else is told with the right form."""
    given = {"train_data_dir": "d", "pretrained_model_name_or_path": "m"}
    assert TrainConfig(**given, max_train_time=text).time_limit == seconds
    for wrong in ("", "0m", "30", "m90", text + "x"):
        with pytest.raises(UsageError, match="Write 90m, 2h or 1h30m"):
            TrainConfig(**given, max_train_time=wrong)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the package, which is not installed, that keeps its runs: `runs` is id →
    steps, `starts` the arguments of each start; driven by Accelerate's own class."""
    found: Any = ModuleType("wandb")
    found.runs, found.starts, found.config = {}, [], {}

    class OwnRun:
        def __init__(self, project: str, id: str = "", **options: str) -> None:
            found.starts.append({"id": id, **options} if id else options)
            self.id = id or f"drawn-{len(found.starts)}"

        def log(self, values: dict, step: int) -> None:
            found.runs.setdefault(self.id, []).append(step)

        def finish(self) -> None:
            pass

    found.init = OwnRun
    found.config = SimpleNamespace(update=lambda values, **options: None)
    monkeypatch.setitem(sys.modules, "wandb", found)
    both = [tracking.LoggerType.TENSORBOARD, tracking.LoggerType.WANDB]
    monkeypatch.setattr(tracking, "_available_trackers", both)
    return found


def test_a_run_is_saved_ended_and_goes_on(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any
) -> None:
    """SIGUSR1 after the first step leaves its checkpoint and the run goes on; the stop file ends it
    after a step, with a checkpoint, exit code 3 and the way on, and is gone; a file of before ends
    nothing. A limit of time ends the resumed run after a step. It goes on in the trackers' runs:
    that of W&B by its id, that of tensorboard in its folder, where each step is once."""
    monkeypatch.setattr(interruption, "LOOK_EVERY", 0.0)
    out = tmp_path / "out"
    out.mkdir()
    (out / "stop").touch()
    config = text_to_image(
        tiny_sd1, images(tmp_path / "data", 3), out, max_train_steps=9, report_to="all"
    )

    def ask(event: Event) -> None:
        if event == StepDone(1):
            os.kill(os.getpid(), signal.SIGUSR1)
        if event == StepDone(2):
            (out / "stop").touch()

    with pytest.raises(Interrupted, match="stop at step 2 of 9; continue .* latest") as ended:
        sd_lora.train(config, [ask])
    assert ended.value.exit_code == 3
    assert [path.name for path in checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]
    assert not (out / "stop").exists()
    more = config.replace(resume_from_checkpoint="checkpoint-1", max_train_time="0.001s")
    with pytest.raises(Interrupted, match=r"ended by --max_train_time 0.001s at step 2 of 9"):
        sd_lora.train(more)
    assert wandb.starts == [{}, {"id": "drawn-1", "resume": "allow"}]
    assert wandb.runs == {"drawn-1": [1, 2, 2]}
    assert read_state(out / "checkpoint-2")["trackers"] == {"wandb": "drawn-1"}
    told = EventAccumulator(str(out / "logs" / "sd_lora")).Reload().Scalars("loss")
    assert [scalar.step for scalar in told] == [1, 2]


def test_a_command_ended_by_sigterm(capsys: pytest.CaptureFixture[str]) -> None:
    """Outside of the steps SIGTERM ends a command at once, with a word and 143, even if a library
    turns the exception into an error of its own."""

    def end() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def end_in_a_library() -> None:
        try:
            end()
        except SystemExit:
            raise RunError("a library's words") from None

    for work in (end, end_in_a_library):
        assert guarded(work) == 143
        assert capsys.readouterr().err == "ended by SIGTERM\n"
