"""What a run's files say of it, and the precision they are written in."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sd_lora
from sd_lora.formats.inspect import body_hash
from tests.training.runs import dreambooth, images, text_to_image


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six images; the captions have tags in common."""
    folder = images(tmp_path / "data")
    rows = [json.loads(r) for r in (folder / "metadata.jsonl").read_text().splitlines()]
    tagged = [row | {"text": f"{row['text']}, red,  sky"} for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, tagged)))
    return folder


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_header_says_how_it_was_trained(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """kohya's and Stability's keys, the base's hash, the captions' tags and the resolved
    configuration are in every file; the hash is that of the tensors."""
    result = sd_lora.train(text_to_image(tiny_sd1, data, tmp_path / "mine", snr_gamma=5.0))
    for file in result.files:
        said = header(file.path)
        captions = [json.loads(r) for r in (data / "metadata.jsonl").read_text().splitlines()]
        assert said["ss_num_train_images"] == str(len(captions))
        assert said["ss_steps"] == str(len(result.losses))
        assert said["ss_min_snr_gamma"] == "5.0"
        assert said["ss_sd_model_name"] == tiny_sd1.name
        assert said["ss_base_model_version"] == "sd_v1"
        assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert said["sshs_model_hash"] == body_hash(file.path)
        tags = json.loads(said["ss_tag_frequency"])["instance"]
        parts = [part.strip() for row in captions for part in row["text"].split(",")]
        assert tags == {part: parts.count(part) for part in parts}
        own = json.loads(said["sd_lora"])
        weights = tiny_sd1 / "unet" / "diffusion_pytorch_model.safetensors"
        assert own["base_model_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert own["config"]["snr_gamma"] == 5.0
        assert own["versions"]["torch"] == torch.__version__
        assert own["family"] == "sd1"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_files_of_half_precision(
    precision: str, dtype: torch.dtype, tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """`save_precision` halves both files, which load as trained within its rounding; checkpoints
    stay float32."""
    config = dreambooth(
        tiny_sd1, data, tmp_path / "mine", save_precision=precision, checkpointing_steps=2,
        max_train_steps=2,
    )  # fmt: skip
    result = sd_lora.train(config)
    for file in result.files:
        assert {t.dtype for t in load_file(file.path).values()} == {dtype}
        assert 0 < file.worst_error < 2e-2
        assert header(file.path)["modelspec.trigger_phrase"] == config.instance_prompt
    (state,) = (tmp_path / "mine" / "checkpoint-2").glob("*.safetensors")
    assert torch.float32 in {t.dtype for t in load_file(state).values()}
