"""The demo on the embedded base: a subject is learned, the rest stays, and the score says so."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

import sd_lora
from sd_lora.cli import main
from sd_lora.config.command_line import parse
from sd_lora.demo import demo_config, evaluate, find_sample_data
from tests.report.test_run_page import data_of

pytestmark = pytest.mark.slow


def test_a_short_demo_learns_the_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """140 steps of the demo at a constant rate: the exported file, loaded into a fresh base, draws
    images nearer to the held-out ones than the base's, none a copy, and other prompts are followed
    as before; real images lose some of their fidelity behind the base's VAE. Eight steps of the
    sampler in place of twenty, and one set of images of three."""
    monkeypatch.setattr("sd_lora.demo.STEPS", 8)
    monkeypatch.setattr("sd_lora.demo.SETS", 1)
    sample_data = find_sample_data()
    schedule = {"lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": 140}
    config = demo_config(sample_data, str(tmp_path / "out"), **schedule)
    result = sd_lora.train(config)
    outcome, reachable, sheet = evaluate(config, result.files[0].path, sample_data)
    assert outcome.fidelity.mean > 0.2
    assert outcome.copies.mean == 0
    assert 0.8 < reachable < 1
    assert outcome.harm.mean < 0.1  # -0.01
    assert sheet.draw().width > 1000


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """`sd-lora demo` leaves both LoRA files, the sheet, the score, and the run's page with the
    images that it has scored, says the best checkpoint, the verdict by them, and what is next."""
    import sd_lora.demo as demo

    short = demo.demo_config
    monkeypatch.setattr(demo, "STEPS", 2)
    looks = demo.watched
    monkeypatch.setattr(demo, "watched", lambda folder: looks(folder) | {"validation_steps": 1})
    monkeypatch.setattr(
        demo, "demo_config", lambda folder, out: short(folder, out, max_train_steps=3)
    )
    assert main(["demo", "--output_dir", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "fidelity:" in out
    assert "Not seen:" in out
    assert out.count("verdict: By its images, undertrained: fidelity is") == 2
    end = out[out.rindex("can hardly be drawn") :]
    assert (tmp_path / "demo" / "best.json").exists()
    assert "best checkpoint: checkpoint-3, merit" in end
    assert "verdict: " in end
    assert "'Scored images'" in str(data_of((tmp_path / "demo" / "report.html").read_text()))
    command = shlex.split(re.search(r"next, on your own images.*\n +(.*)", out)[1])
    assert command[:4] == [sys.executable, "-m", "sd_lora", "train"]
    assert parse(command[4:]).instance_prompt == "a photo of sks dog"
    names = {p.name for p in (tmp_path / "demo").iterdir()}
    assert {
        "before_after.png", "demo_kohya.safetensors", "pytorch_lora_weights.safetensors",
        "score.json",
    } <= names  # fmt: skip
    numbers = json.loads((tmp_path / "demo" / "score.json").read_text())
    assert f"fidelity {100 * numbers['reachable']:.0f} %; more can hardly" in out
    assert numbers["fidelity"].keys() == {"mean", "low", "high", "values"}
    assert len(numbers["fidelity"]["values"]) == 3
    with Image.open(tmp_path / "demo" / "before_after.png") as sheet:
        assert sheet.height > 500


def test_outside_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without sample_data the demo says where it can be run."""
    import sd_lora.embedded as embedded

    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "site" / "sd_lora" / "embedded.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    assert "run it in a clone" in capsys.readouterr().err
