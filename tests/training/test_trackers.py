"""Trackers: each name has its row, and one that cannot start says why."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from sd_lora.config.rows import TRACKERS
from sd_lora.config.schema import TrainConfig
from sd_lora.errors import RunError
from sd_lora.report.summary import Summary
from sd_lora.training.trackers import KNOWN, start_trackers, trackers


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
