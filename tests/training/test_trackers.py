"""Trackers: each gets all numbers and images in order; one that fails costs no run."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator, tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sd_lora
from sd_lora.config.rows import TRACKERS
from sd_lora.config.schema import TrainConfig
from sd_lora.errors import RunError
from sd_lora.report.events import (
    Event,
    ImagesScored,
    RunEnded,
    SamplesDrawn,
    StepRecord,
    StepsLogged,
    TrainingStarted,
    ValidationDone,
    Warned,
)
from sd_lora.report.record import RECORD
from sd_lora.report.summary import Summary
from sd_lora.sampling.interval import Interval
from sd_lora.sampling.score import Score
from sd_lora.terminal import Terminal
from sd_lora.training.trackers import (
    KNOWN,
    Trackers,
    end_trackers,
    start_trackers,
    tracker_runs,
    trackers,
)
from tests.training.runs import images, text_to_image


def test_every_tracker_has_its_row() -> None:
    """The names that `report_to` takes are the rows, and Accelerate has each."""
    assert {*TRACKERS} - {"all", "none"} == {*KNOWN} <= {kind.value for kind in LoggerType}


def test_the_summary_says_how_to_look(tmp_path: Path) -> None:
    """TensorBoard is there in the tests, and its command names the folder of the run's files."""
    summary = Summary()
    config = TrainConfig(
        mode="text_to_image", pretrained_model_name_or_path="base", train_data_dir="images",
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    assert trackers(config, summary) == ["tensorboard"]
    place = tmp_path / "out" / "logs"
    assert summary.notes == [f'curves as it goes: tensorboard --logdir "{place}"']


class Keyless(GeneralTracker):
    """A tracker as one without its key: it fails when it starts."""

    name = "keyless"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__(_blank=True)

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        raise ValueError("no API key")

    def store_init_configuration(self, values: dict) -> None:
        raise ValueError("no API key")


def test_a_tracker_that_cannot_start_says_why() -> None:
    """The library's reason comes in an error for people, which says how to go on."""
    accelerator = Accelerator(cpu=True, log_with=[Keyless()])
    with pytest.raises(RunError, match=r"could not be started: no API key\. Mend it, or leave out"):
        start_trackers(accelerator, {"rank": 4}, 0, {})


Told = list[tuple[int, str]]
"""Step and name of each number and image, in the order in which a tracker got them."""


class Recorder:
    """The run of a package that is not installed here, by the calls that Accelerate's own class and
    ours make of it, as the packages of 2026 take them: W&B 0.31, trackio 0.43, MLflow 3.17,
    Comet 3.58, each of which has been tried with a real run."""

    id = name = "run-1"

    def __init__(self) -> None:
        self.told: Told = []
        self.captions: list[str] = []
        self.ended = False
        self.info = SimpleNamespace(run_id="run-1")

    def get_key(self) -> str:
        return "run-1"

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told += [(step, name) for name in values]

    def log_metric(self, name: str, value: float, step: int) -> None:
        self.told.append((step, name))

    def log_image(self, image: Image.Image, name: str, step: int, metadata: dict[str, str]) -> None:
        self.told.append((step, name))
        self.captions.append(metadata["prompt"])

    def wrapped(self, image: Image.Image, caption: str) -> Image.Image:
        self.captions.append(caption)
        return image

    def set_step(self, step: int) -> None:
        pass

    def log_parameters(self, values: dict[str, Any]) -> None:
        self.options = values

    def finish(self) -> None:
        self.ended = True

    end = finish


class MLflow(ModuleType):
    """The module `mlflow`. names: of all numbers; those that it refuses are errors, as are in its
    store of files "lr" and "lr/unet", a file and a folder of one name."""

    def __init__(self, run: Recorder) -> None:
        super().__init__("mlflow")
        self.run, self.names = run, set[str]()
        self.utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
        )
        self.log_params = run.log_parameters
        self.end_run = run.finish

    def search_experiments(self, filter_string: str) -> list[Any]:
        return [SimpleNamespace(experiment_id="0")]

    def start_run(self, **options: Any) -> Recorder:
        return self.run

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        for name in values:
            assert re.fullmatch(r"[\w\-. :/]+", name)
            parts = name.split("/")
            assert not {"/".join(parts[:i]) for i in range(1, len(parts))} & self.names
            self.names.add(name)
        self.run.log(values, step)

    def log_image(self, image: Image.Image, key: str, step: int) -> None:
        self.run.told.append((step, key))


def stand_in(name: str, run: Recorder) -> ModuleType:
    """The module of a tracker, whose runs are all this one."""
    found: Any = MLflow(run) if name == "mlflow" else ModuleType(name)
    found.init = found.start = lambda **options: run
    found.config = SimpleNamespace(update=lambda values, **options: run.log_parameters(values))
    found.Image, found.__version__ = run.wrapped, "3.58.8"
    return found


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Tracker → its run, of all those that Accelerate now takes for installed."""
    found = {name: Recorder() for name in ("wandb", "trackio", "mlflow", "comet_ml")}
    for name, run in found.items():
        monkeypatch.setitem(sys.modules, name, stand_in(name, run))
    there = [LoggerType(name) for name in (*found, "tensorboard")]
    monkeypatch.setattr(tracking, "_available_trackers", there)
    return found


def started(folder: Path) -> Accelerator:
    accelerator = Accelerator(cpu=True, log_with="all", project_dir=folder)
    start_trackers(accelerator, {"rank": 4, "targets": ["a"]}, 0, {})
    return accelerator


def record(step: int) -> StepRecord:
    """A step of LoRA+, whose groups have a sign in their names."""
    return StepRecord(step, 0.5, 1e-3, 1.0, {"unet": 1e-3, "unet ×16, decay ×0": 1.6e-2})


def events() -> list[Event]:
    """Those of a run of two steps, with samples in two sizes."""
    one = Interval((0.5,))
    names = (
        "fidelity", "copies", "followed", "class_leak", "unrelated_leak", "base_leak", "harm",
        "followed_before", "redrawn", "similarity", "drift",
    )  # fmt: skip
    score = Score(**dict.fromkeys(names, one) | {"drift": Interval((float("nan"),))}, blind="")
    images = [Image.new("RGB", size) for size in ((8, 8), (8, 16), (8, 8))]
    return [
        SamplesDrawn(0, ["a", "b", "c"], images),
        ValidationDone(0, {"trained": [1.0, 2.0], "held out": [3.0]}, {}),
        StepsLogged((record(1), record(2))),
        ValidationDone(2, {"trained": [1.0, 1.0], "held out": [2.0]}, {}),
        ImagesScored(2, score, {"rows": [{"step": 2, "merit": 0.4}]}),
        SamplesDrawn(2, ["a", "b", "c"], images),
    ]


def test_each_tracker_gets_the_same_in_order(runs: dict[str, Recorder], tmp_path: Path) -> None:
    """Losses, one line of rates a group, validation, scores and images reach all five, each by the
    calls that its library takes, with steps that never fall (W&B drops those that do) and names
    that it accepts; a number that is not known is none. Images have their prompts, where a library
    takes them. TensorBoard's are read from its files."""
    accelerator = started(tmp_path)
    listen = Trackers(accelerator, lambda event: pytest.fail(str(event)))
    for event in events():
        listen(event)
    ids = dict.fromkeys(runs, "run-1")
    assert tracker_runs(accelerator) == ids
    end_trackers(accelerator, lambda event: pytest.fail(str(event)))
    numbers = {"loss", "lr", "lr/unet", "lr/unet ×16, decay ×0", "grad_norm",
               "validation/trained", "validation/held_out"}  # fmt: skip
    scores = {f"score/{name}" for name in ("fidelity", "harm", "similarity", "merit")}
    for name, run in runs.items():
        assert run.ended
        assert run.options["rank"] == 4
        steps = [step for step, _ in run.told]
        assert steps == sorted(steps)
        assert {1, 2} == {step for step, told in run.told if told == "loss"}
        told = {told for _, told in run.told}
        assert {KNOWN[name].named(number) for number in numbers | scores} <= told
        assert "score/drift" not in told
        shown = [step for step, what in run.told if what.startswith("samples/8x8")]
        assert shown == ([0, 2] if name == "wandb" else [0, 0, 2, 2])  # W&B: a list of images
        assert run.captions == ([] if name == "mlflow" else ["a", "c", "b"] * 2)
    read = EventAccumulator(str(tmp_path / "sd_lora")).Reload()
    assert numbers | scores <= {*read.Tags()["scalars"]}
    assert [scalar.value for scalar in read.Scalars("validation/held_out")] == [3.0, 2.0]
    assert [image.step for image in read.Images("samples/8x8")] == [0, 2]
    (text, _) = read.Tensors("samples/8x8/prompts/text_summary")
    assert text.tensor_proto.string_val == [b"0. a\n1. c"]


def test_a_resumed_run_sends_no_samples_again(runs: dict[str, Recorder], tmp_path: Path) -> None:
    """The samples of the base, which a resumed run draws for its sheet, reach no tracker that has
    them; those of the step that it goes on from, which may be missing, do."""
    listen = Trackers(started(tmp_path), lambda event: pytest.fail(str(event)))
    before, *_, after = events()
    for event in (TrainingStarted(2, 4), before, after):
        listen(event)
    assert {step for run in runs.values() for step, _ in run.told} == {2}


def test_a_tracker_that_fails_costs_no_run(
    runs: dict[str, Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is gone after the first step is told once, with its reason; its tracker gets
    nothing more, its run's id stays for a resumed run, and the others have everything. So is one
    that fails at its end. TensorBoard's files on a full disk are an error still."""
    accelerator, warned = started(tmp_path), list[str]()

    def tell(event: Event) -> None:
        assert isinstance(event, Warned)
        warned.extend(finding.line() for finding in event.findings)

    def log_metrics(values: dict[str, float], step: int) -> None:
        if step:
            raise ConnectionError("no route to host\nat line 7")  # an OSError, as a full disk is

    monkeypatch.setattr(sys.modules["mlflow"], "log_metrics", log_metrics)
    monkeypatch.setattr(runs["comet_ml"], "end", lambda: 1 / 0)
    listen = Trackers(accelerator, tell)
    for event in events():
        listen(event)
    assert tracker_runs(accelerator) == dict.fromkeys(runs, "run-1")
    end_trackers(accelerator, tell)
    assert [step for step, _ in runs["mlflow"].told] == [0, 0, 0]  # images of before
    assert (2, "loss") in runs["wandb"].told
    first, second = warned
    assert first.startswith("mlflow: no route to host; what it has not yet got of this run is lost")
    assert second.startswith("comet_ml: division by zero")

    other = started(tmp_path / "full")
    writer = other.get_tracker("tensorboard").writer

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "add_scalar", full)
    with pytest.raises(RunError, match="tracker's files in .*full could not be written"):
        Trackers(other, tell)(events()[2])


def test_a_tracker_that_fails_at_its_end_is_told_before_the_last_lines(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The end of the run is its last event, so that the record and the last lines have the warning
    of a tracker that could not end."""
    monkeypatch.setattr(tracking.TensorBoardTracker, "finish", lambda self: 1 / 0)
    out, told = tmp_path / "out", list[Event]()
    config = text_to_image(
        tiny_sd1, images(tmp_path / "images", 4), out, max_train_steps=1, report_to="tensorboard"
    )
    with Terminal() as terminal:
        sd_lora.train(config, [told.append, terminal])
    warned, last = told[-2:]
    assert isinstance(warned, Warned)
    assert isinstance(last, RunEnded)
    line = "tensorboard: division by zero; what it has not yet got of this run is lost to it; "
    assert any(str(w).startswith(line) for w in json.loads((out / RECORD).read_text())["warnings"])
    assert re.search(r"warnings, above: .*tracker-lost", capsys.readouterr().out)
