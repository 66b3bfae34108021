"""The scripts as users start them, in processes of their own, on the embedded base."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import sd_lora
from sd_lora.config.command_line import parse
from sd_lora.formats import file_names, verify
from sd_lora.formats.lora_file import open_lora
from tests.training.runs import images, trained_adapter

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


@pytest.mark.parametrize("mode", ["text_to_image", "dreambooth"])
def test_two_processes_train_as_one(
    mode: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with half the batch each end within 1e-4 of one process, text encoder too: in
    every ΔW and in the losses. (A factor's entry whose gradient is rounding noise may differ more:
    AdamW's first steps are the sign of the gradient times the rate.) Together they draw each class
    image that is missing once, and fill a cache on disk, every entry once, or exchange what each
    has encoded in memory; the one encodes as it goes."""
    monkeypatch.chdir(root)
    one, two, cache, class_dir = (tmp_path / name for name in ("one", "two", "cache", "class"))
    of_class = ["--class_data_dir", str(class_dir), "--num_class_images", "5"]
    of_class += ["--sample_batch_size", "2"]
    flags = TEXT_TO_IMAGE if mode == "text_to_image" else [*DREAMBOOTH, *of_class]
    script, kept = f"train_{mode}_lora.py", "disk" if mode == "text_to_image" else "memory"
    common = [*flags, "--max_train_steps", "10", "--num_validation_images", "0"]
    said = run(
        root, "torchrun", "--nproc_per_node", "2", f"train_scripts/{script}", *common,
        "--train_batch_size", "2", "--output_dir", str(two),
        "--cache_latents", kept, "--data_cache_dir", str(cache),
    )  # fmt: skip
    assert re.search(r"latents +(on disk .*, 0 of 28 from before|in memory)", said)
    found = {
        kind: sum(path.is_file() for path in (cache / kind).rglob("*"))
        for kind in ("latents", "texts", "facts")
    }
    if mode == "text_to_image":  # 28 images, 9 captions
        assert found == {"latents": 28, "texts": 9, "facts": 28}
    else:
        assert found == {"latents": 0, "texts": 0, "facts": 8 + 5}
        names = sorted(path.name for path in class_dir.iterdir())
        assert names == [f"class-0-{n:05}.png" for n in range(5)]
    alone = ["--train_batch_size", "4", "--output_dir", str(one), "--cache_latents", "no"]
    sd_lora.train(parse([*common, *alone], script))
    assert_same(one, two)


def assert_same(one: Path, two: Path) -> None:
    """The LoRAs and the losses of two runs agree within 1e-4."""
    a, b = (open_lora(f / file_names.DIFFUSERS).adapter for f in (one, two))
    assert a.keys() == b.keys()
    for component, modules in a.items():
        assert modules.keys() == b[component].keys()
        for name, delta in modules.items():
            other = b[component][name]
            assert (delta.weight() - other.weight()).abs().max() < 1e-4, name
            if delta.magnitude is not None:
                torch.testing.assert_close(delta.magnitude, other.magnitude, rtol=0, atol=1e-4)
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)


def test_two_processes_train_sdxl_as_one(
    tiny: Callable[[str], Path], root: Path, tmp_path: Path
) -> None:
    """So for SDXL with both text encoders, one of which stops, new words, captions of several
    pieces and half of them dropped, a frozen A and magnitudes, by diffusers' command for it: a
    process whose captions are all dropped does not leave the other waiting."""
    data = images(tmp_path / "data", size=(96, 64))
    script = "train_scripts/train_dreambooth_lora_sdxl.py"
    common = [
        "--pretrained_model_name_or_path", str(tiny("sdxl")), "--instance_data_dir", str(data),
        "--instance_prompt", "a photo of <thing> " + "and so on " * 20, "--targets",
        "attention+conv", "--train_text_encoder", "--text_encoder_stop_step", "3",
        "--text_encoder_2_stop_step", "100", "--token_abstraction", "<thing>",
        "--max_token_length", "225", "--caption_dropout", "0.5", "--random_flip", "--seed", "3",
        "--learning_rate", "1e-3", "--text_encoder_lr", "1e-3", "--max_train_steps", "8",
        "--num_validation_images", "0", "--resolution", "64", "--method", "lora_fa", "--use_dora",
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    alone = ["--train_batch_size", "2", "--output_dir", str(one)]
    sd_lora.train(parse([*common, *alone], Path(script).name))
    run(
        root, "torchrun", "--nproc_per_node", "2", script, *common,
        "--train_batch_size", "1", "--output_dir", str(two),
    )  # fmt: skip
    assert_same(one, two)
    words = [load_file(f / f"{f.name}_thing.safetensors") for f in (one, two)]
    for key in ("clip_l", "clip_g"):
        torch.testing.assert_close(words[0][key], words[1][key], rtol=0, atol=1e-4)


def test_a_killed_run_goes_on(root: Path, tmp_path: Path) -> None:
    """SIGTERM to the running script leaves a checkpoint and exit code 3; the same command with
    --resume_from_checkpoint latest finishes."""
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
    run(root, "python", *command[1:], *more)
    assert len(losses(out)) == step + 3
