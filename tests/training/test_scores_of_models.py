"""Runs and files are scored by vision models from disk, from the command to the verdict."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

import sd_lora
from sd_lora.cli import main
from sd_lora.report.verdict import verdict_of
from tests.sampling.vision_models import save_dino, save_two_towers
from tests.training.runs import dreambooth, images


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data") / "images", 3)


def strictly(text: str) -> Any:
    """JSON; raises ValueError for NaN and Infinity, which it does not have."""

    def refused(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refused)


def scored(model: Path, data: Path, run: Path, features: Path) -> dict[str, Any]:
    """The record of a run of two steps that is scored by features before and after."""
    rules = {"max_train_steps": 2, "validation_steps": 1, "score_every": 2, "validate_every": 0}
    sd_lora.train(dreambooth(model, data, run, **rules, score_features=str(features)))
    record: dict[str, Any] = strictly((run / "report.json").read_text())
    assert [row["step"] for row in record["scores"]["rows"]] == [0, 2]
    return record


def test_a_run_and_its_file_are_scored_by_dino(
    tiny_sd1: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DINO reads no text: harm is not told, at no step and in no verdict; the verdict is by images
    and says that its thresholds are of drawings; the scores hold similarity, drift and redrawn.
    `sd-lora judge` of the run's file draws as well: each strength has a row with the same measures,
    and a verdict."""
    torch.manual_seed(0)
    save_dino(tmp_path / "dino")
    record = scored(tiny_sd1, data, tmp_path / "run", tmp_path / "dino")
    for row in record["scores"]["rows"]:
        told = {name for name, number in row["score"].items() if number["mean"] is not None}
        assert {"fidelity", "similarity", "drift", "redrawn"} < told
        assert not {"harm", "followed", "followed_before"} & told
    assert record["scores"]["rows"][0]["score"]["drift"]["mean"] == pytest.approx(0, abs=1e-6)
    verdict = verdict_of(record)
    assert verdict is not None
    assert verdict.text.startswith(
        "By its images (limits measured on drawings: a rough guess here), "
    )
    assert "harm" not in verdict.numbers
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "limits measured on drawings" in re.sub(r"<[^>]+>", "", page)
    words = ["judge", tmp_path / "run", "--model", tiny_sd1, "--images", data, "--prompt"]
    words += ["a photo of sks thing", "--features", tmp_path / "dino", "--strengths", 1]
    words += ["--resolution", 64, "--validation_steps", 1, "--out", tmp_path / "judge.png"]
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    file, row, *_, last, where = capsys.readouterr().out.splitlines()
    assert file == f"{tmp_path / 'run'}:"
    assert row.startswith("  strength 1     loss ")
    assert "fidelity " in row
    assert "harm" not in row
    assert last.startswith("  By its images (limits measured on drawings: a rough guess here), ")
    assert where == f"look at {tmp_path / 'judge.png'}"


def test_a_run_is_scored_by_clip(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """CLIP reads prompts: harm is told, too, and counts in the merit; thresholds are of drawings
    here as well."""
    torch.manual_seed(0)
    save_two_towers(tmp_path / "clip", CLIPModel, CLIPConfig)
    record = scored(tiny_sd1, data, tmp_path / "run", tmp_path / "clip")
    for row in record["scores"]["rows"]:
        told = {name for name, number in row["score"].items() if number["mean"] is not None}
        assert {"fidelity", "harm", "followed_before", "similarity", "drift", "redrawn"} < told
        fidelity, leak, harm = (
            row["score"][name]["mean"] for name in ("fidelity", "unrelated_leak", "harm")
        )
        assert row["merit"] == pytest.approx(fidelity - leak - harm)
    verdict = verdict_of(record)
    assert verdict is not None
    assert verdict.text.startswith(
        "By its images (limits measured on drawings: a rough guess here), "
    )
    assert "harm" in verdict.numbers
