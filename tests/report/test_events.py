"""A run tells its listeners everything that the terminal, the log file and trackers show."""

import json
import os
import re
from pathlib import Path

import pytest

import sd_lora
from sd_lora.errors import RunError
from sd_lora.report.events import (
    CheckpointSaved,
    Event,
    Exported,
    Progress,
    RunEnded,
    RunPlanned,
    SamplesDrawn,
    StepDone,
    StepRecord,
    StepsLogged,
    TrainingStarted,
    Validated,
    Warned,
    tracked,
)
from sd_lora.report.log_file import LogFile
from sd_lora.report.summary import duration, shares_of
from tests.training.runs import images, text_to_image

STEPS = 6


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events if not isinstance(event, Progress)]


def test_events_come_in_the_order_of_the_run(told: tuple[list[Event], Path, str]) -> None:
    """The warning of a short run is first. Two epochs of two steps end at step 4, and their samples
    come after it; checkpoints come every three steps, behind the images as they stand; losses are
    told before samples and checkpoints of later steps, for trackers take steps in their order
    alone; the end is last."""
    events, _, _ = told
    step = ["StepDone"]
    assert kinds(events) == [
        "Warned",
        "RunPlanned",
        "TrainingStarted",
        "SamplesDrawn",
        *step * 3, "StepsLogged", "LedgerRead", "CheckpointSaved",
        *step, "StepsLogged", "SamplesDrawn",
        *step * 2, "StepsLogged", "LedgerRead", "CheckpointSaved",
        "Validated",
        "Exported",
        "SamplesDrawn",
        "RunEnded",
    ]  # fmt: skip
    assert [e.step for e in events if isinstance(e, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events if isinstance(e, CheckpointSaved)] == [3, 6]
    assert [e.step for e in events if isinstance(e, SamplesDrawn)] == [0, 4, 6]
    assert TrainingStarted(0, STEPS) in events


def test_events_hold_the_numbers_and_files(told: tuple[list[Event], Path, str]) -> None:
    """Records equal the rows of the log file; every path exists; the summary is the run's."""
    events, out, _ = told
    records = [r for e in events if isinstance(e, StepsLogged) for r in e.records]
    rows = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": r.step, "loss": r.loss, "lr": r.learning_rate, "grad_norm": r.grad_norm}
        for r in records
    ]
    (validated,) = (e for e in events if isinstance(e, Validated))
    assert validated.first == pytest.approx(sum(r.loss for r in records) / STEPS)
    (exported,) = (e for e in events if isinstance(e, Exported))
    (ended,) = (e for e in events if isinstance(e, RunEnded))
    (planned,) = (e for e in events if isinstance(e, RunPlanned))
    assert planned.summary.rows["images"] == "6"
    assert ended.spent.keys() == {"training", "samples"}
    assert 0 < min(ended.spent.values()) <= sum(ended.spent.values()) < ended.seconds
    record = json.loads((out / "report.json").read_text())
    assert record["spent"].keys() == ended.spent.keys()
    assert record["process_seconds"] == round(ended.seconds, 3)
    paths = [f.path for f in exported.files]
    paths += [e.path for e in events if isinstance(e, CheckpointSaved)]
    paths += [e.sheet for e in events if isinstance(e, RunEnded) and e.sheet]
    paths.append(out / "samples" / "step-000004.png")
    assert len(paths) == 6
    assert ended.sheet in paths
    assert all(path.exists() for path in paths)


def test_the_page_and_the_terminal_tell_shares_of_one_whole(
    told: tuple[list[Event], Path, str],
) -> None:
    """Both are of all seconds of the process, of which loading and verifying are a part too."""
    events, out, printed = told
    (ended,) = (e for e in events if isinstance(e, RunEnded))
    record = json.loads((out / "report.json").read_text())
    assert shares_of(ended.spent, ended.seconds) in printed
    text = shares_of(record["spent"], record["process_seconds"])
    assert text in (out / "report.html").read_text(encoding="utf-8")
    assert sum(map(int, re.findall(r"(\d+) %", text))) < 100


def test_progress_is_counted_to_its_end(told: tuple[list[Event], Path, str]) -> None:
    """Each label counts from 0 to its total, one by one, and ends."""
    events, _, _ = told
    of_label: dict[str, list[Progress]] = {}
    for event in events:
        if isinstance(event, Progress):
            of_label.setdefault(event.label, []).append(event)
    before_and_after = {"samples before training", "samples at step 4", "samples after training"}
    assert {"checking", "instance latents", "captions"} | before_and_after == of_label.keys()
    for label, progress in of_label.items():
        *counts, end = progress
        assert [p.done for p in counts] == list(range(end.done + 1)), label
        assert end.ended
        assert end.total in (end.done, None)


def test_the_terminal_prints_the_summary_and_the_files(
    told: tuple[list[Event], Path, str],
) -> None:
    """Standard output holds warnings and summary before, and the files after; nothing else
    prints."""
    events, out, printed = told
    (warned,) = (e for e in events if isinstance(e, Warned))
    (finding,) = warned.findings
    (planned,) = (e for e in events if isinstance(e, RunPlanned))
    start = f"warning: {finding.line()}\nsd_lora trains a LoRA:\n{planned.summary.text()}\ndone in "
    assert printed.startswith(start)
    seen = f"{out / 'before_after.png'} and {out / 'report.html'}"
    assert f"  look at {seen}\n  warnings, above: {finding.code}\n" in printed
    assert f"{out / 'pytorch_lora_weights.safetensors'}  " in printed


def test_a_run_without_listeners_is_silent(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the terminal prints: without it a run writes nothing to standard output."""
    data = images(tmp_path / "images", 2)
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path / "out", max_train_steps=1))
    assert capsys.readouterr().out == ""


def test_tracked_ends_where_its_consumer_stops() -> None:
    """A consumer that breaks off still gets the end, with the number of finished items."""
    events: list[Progress] = []
    for item in tracked("abc", events.append, "letters", 3):  # type: ignore[arg-type]
        if item == "b":
            break
    assert [(e.done, e.ended) for e in events] == [(0, False), (1, False), (1, True)]


def test_the_log_is_cut_where_a_run_resumes(tmp_path: Path) -> None:
    """`cut` keeps the rows up to a step; a missing file becomes an empty one."""
    log = LogFile(tmp_path / "log.jsonl")
    log.cut(3)
    assert log.rows() == []
    log.path.write_text("".join(json.dumps({"step": s, "loss": 0.1 * s}) + "\n" for s in range(5)))
    log.cut(2)
    assert [row["step"] for row in log.rows()] == [0, 1, 2]


def test_the_log_has_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle of a write leaves the log as it was, and the error names
    it and the free space; a part of a line and zeros, as a machine without power leaves them, are
    no rows, and `cut` removes them."""
    log = LogFile(tmp_path / "log.jsonl")
    log(StepsLogged((StepRecord(1, 0.5, 1e-4, 1.0),)))
    before, write = log.path.read_bytes(), os.write

    def filling(file: int, data: memoryview) -> int:
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return write(file, data[:60])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", filling)
        with pytest.raises(RunError, match=r"log\.jsonl could not be .*No space .*free\)"):
            log(StepsLogged(tuple(StepRecord(step, 0.5, 1e-4, 1.0) for step in (2, 3))))
    assert log.path.read_bytes() == before
    log(StepsLogged((StepRecord(2, 0.25, 1e-4, None),)))
    log.path.write_bytes(log.path.read_bytes() + b'{"step": 3, "lo' + bytes(9))
    assert [row["loss"] for row in log.rows()] == [0.5, 0.25]
    log.cut(5)
    assert len(log.path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (187, "3 min 07 s"), (7500, "2 h 05 min")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    """Seconds, minutes and hours are rounded to the unit that is shown."""
    assert duration(seconds) == text
