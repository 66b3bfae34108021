"""Memory of loading a base model: the needed parts, each once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.single import build_single_pipeline, write_single

MIB = 2**20
SLACK = 60 * MIB
"""Beyond the parts: the largest tensor twice during its conversion, tables, the allocator."""

MEASURE = """
import json, re, sys, torch
from sd_lora.models.load import load_parts
def peak():  # of this process since its exec; getrusage's begins with its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
load_parts(sys.argv[3], tokenizer_name=sys.argv[2])  # a small one: imports, first uses
before = peak()
parts = load_parts(sys.argv[1], tokenizer_name=sys.argv[2], dtype=getattr(torch, sys.argv[4]))
models = [*parts.models.values(), parts.vae]
size = sum(p.numel() * p.element_size() for m in models for p in m.parameters())
print(json.dumps({"parts": size, "grown": peak() - before}))
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline of some 400 MiB as a folder and as a single file, and a small one."""
    place = tmp_path_factory.mktemp("models")
    pipeline = build_single_pipeline("sd1")
    pipeline.save_pretrained(place / "small")
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel.from_config(
        pipeline.unet.config, block_out_channels=(256, 768), cross_attention_dim=512
    )
    config = pipeline.text_encoder.config.to_dict()
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    pipeline.text_encoder = CLIPTextModel(
        CLIPTextConfig(**config | wide | {"num_hidden_layers": 12})
    )
    pipeline.vae = AutoencoderKL.from_config(
        pipeline.vae.config, block_out_channels=(64, 128, 128, 256)
    )
    pipeline.save_pretrained(place / "folder")
    write_single(pipeline, place / "single.safetensors")
    return {
        "small": place / "small",
        "folder": place / "folder",
        "single": place / "single.safetensors",
        "tokenizer": place / "folder" / "tokenizer",
    }


@pytest.mark.parametrize(("form", "dtype"), [("folder", "bfloat16"), ("single", "float32")])
def test_loading_takes_the_parts_once(form: str, dtype: str, places: dict[str, Path]) -> None:
    """The peak of a process's memory, the pages of files that it maps included, grows by the parts'
    own size and not by twice a pipeline's, from a folder and from a single file; where the UNet is
    the larger part, by the UNet and its pages of the file, before the others are loaded."""
    words = [str(places[name]) for name in (form, "tokenizer", "small")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words, dtype], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parts"] > 150 * MIB
    file = sum(p.stat().st_size for p in (places["folder"] / "unet").glob("*.safetensors"))
    unet = file if dtype == "float32" else file // 2
    assert found["grown"] < max(found["parts"], unet + file) + SLACK < 2 * found["parts"]
