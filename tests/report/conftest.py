"""One run for all tests of this room."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import sd_lora
from sd_lora.report.events import Event
from sd_lora.terminal import Terminal
from tests.training.runs import images, text_to_image

ENCODER = Path(__file__).parents[2] / "sample_data" / "encoder"


@pytest.fixture(scope="session")
def told(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], Path, str]:
    """Events of one run, its folder, and the terminal's standard output."""
    folder = tmp_path_factory.mktemp("told")
    events: list[Event] = []
    config = text_to_image(
        tiny_sd1, images(folder / "images"), folder / "out", train_batch_size=3,
        checkpointing_steps=3, validation_prompt="a photo", num_validation_images=1,
        validation_steps=1, validation_epochs=2, targets="attention+conv",
    )  # fmt: skip
    printed = io.StringIO()
    with redirect_stdout(printed), Terminal() as terminal:
        sd_lora.train(config, [events.append, terminal])
    return events, folder / "out", printed.getvalue()


@pytest.fixture(scope="session")
def watched(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with everything that its page can show: samples in mid-run and at other
    strengths, an image held out, validation by step, scores of three kinds of prompts, and a ledger
    that compares its images."""
    folder = tmp_path_factory.mktemp("watched")
    config = text_to_image(
        tiny_sd1, images(folder / "images", 7), folder / "out", train_batch_size=6, holdout=1,
        max_train_steps=48, checkpointing_steps=1000, validation_prompt="a photo",
        num_validation_images=1, validation_steps=1, sample_every=24, validate_every=24,
        score_features=str(ENCODER), score_every=48,
        score_class_prompt="a photo of a thing",
    )  # fmt: skip
    sd_lora.train(config)
    return folder / "out"
