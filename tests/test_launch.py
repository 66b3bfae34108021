"""The scripts as users start them, in processes of their own, on the embedded base."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sd_lora.cli import train_script
from sd_lora.formats import verify
from tests.training.runs import trained_adapter

pytestmark = pytest.mark.launch
BIN = Path(sys.executable).parent


def environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
    }


def run(root: Path, *command: str) -> str:
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=root, capture_output=True, text=True,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


TEXT_TO_IMAGE = (
    "--pretrained_model_name_or_path sample_data/tiny-sd --train_data_dir sample_data/captioned "
    "--caption_column text --resolution 64 --learning_rate 1e-3 --rank 8 "
    "--targets attention+conv --seed 0"
).split()
DREAMBOOTH = (
    "--pretrained_model_name_or_path sample_data/tiny-sd "
    "--instance_data_dir sample_data/dreambooth/instance --with_prior_preservation "
    "--class_data_dir sample_data/dreambooth/class --num_class_images 24 --resolution 64 "
    "--learning_rate 1e-3 --rank 8 --targets attention+conv --train_text_encoder --seed 0"
).split() + [
    "--instance_prompt",
    "a photo of a sks monster",
    "--class_prompt",
    "a photo of a monster",
]


def first_batches(text: str) -> tuple[float, float]:
    """The loss on the first steps' images and noise, before and after, from a run's last words."""
    then, now = re.search(r"noise: ([\d.]+) in the first steps, ([\d.]+) after", text).groups()
    return float(then), float(now)


def losses(folder: Path) -> list[float]:
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def assert_loads_as_trained(root: Path, folder: Path) -> int:
    """Both files, in a pipeline from disk, give every ΔW of the last checkpoint's raw factors."""
    adapter = trained_adapter(folder)
    for path in (folder, folder / f"{folder.name}_kohya.safetensors"):
        pipeline = StableDiffusionPipeline.from_pretrained(
            root / "sample_data/tiny-sd", torch_dtype=torch.float32
        )
        pipeline.load_lora_weights(path)
        count, worst, wrong = verify.compare(adapter, verify.loaded_adapter(pipeline))
        assert wrong == []
        assert worst < 1e-5
    return count


def test_accelerate_launch(root: Path, tmp_path: Path) -> None:
    """The documented command for DreamBooth with prior preservation and text encoder, in bf16: it
    finishes, the loss falls, and both files load as what was trained, convolutions included."""
    out = tmp_path / "db"
    text = run(
        root, "accelerate", "launch", "train_scripts/train_dreambooth_lora.py", *DREAMBOOTH,
        "--train_batch_size", "4", "--max_train_steps", "40", "--mixed_precision", "bf16",
        "--checkpointing_steps", "40", "--output_dir", str(out),
    )  # fmt: skip
    assert "verified" in text
    assert len(losses(out)) == 40
    then, now = first_batches(text)
    assert now < 0.95 * then
    assert assert_loads_as_trained(root, out) > 68
    assert (out / "before_after.png").is_file()


def test_a_killed_run_goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to the running script leaves a checkpoint and exit code 3; its function, called here,
    in another process, with the same flags and --resume_from_checkpoint latest, finishes."""
    out = tmp_path / "cut"
    command = [
        str(BIN / "python"), "train_scripts/train_text_to_image_lora.py", *TEXT_TO_IMAGE,
        "--train_batch_size", "4", "--max_train_steps", "2000", "--num_validation_images", "0",
        "--output_dir", str(out),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=root, stderr=subprocess.PIPE, text=True, env=environment()
    )
    deadline = time.monotonic() + 120
    while not (out / "training_log.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "interrupted by SIGTERM at step" in err
    assert "Traceback" not in err
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    more = ["--max_train_steps", str(step + 3), "--resume_from_checkpoint", "latest"]
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", [*command[1:], *more])
    assert train_script("train_text_to_image_lora.py") == 0  # all that the script does
    assert len(losses(out)) == step + 3
