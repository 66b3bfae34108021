"""Memory of loading a base model: the needed parts, each once."""

import json
import os
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
from pathlib import Path
from sd_lora.models.load import load_parts
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
small, tokenizer, *words = sys.argv[1:]
load_parts(small, tokenizer_name=tokenizer)  # imports, first uses
for path, dtype in zip(words[::2], words[1::2]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = memory("VmRSS")
    parts = load_parts(path, tokenizer_name=tokenizer, dtype=getattr(torch, dtype))
    models = [*parts.models.values(), parts.vae]
    size = sum(p.numel() * p.element_size() for m in models for p in m.parameters())
    print(json.dumps({"parts": size, "grown": memory("VmHWM") - before}))
    del parts, models
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_the_parts_once(places: dict[str, Path]) -> None:
    """The peak of a process's memory, the pages of files that it maps included, grows by the parts'
    own size and not by twice a pipeline's, from a folder and from a single file; where the UNet is
    the larger part, by the UNet and its pages of the file, before the others are loaded."""
    kinds = [("folder", "bfloat16"), ("single", "float32")]
    words = [str(places["small"]), str(places["tokenizer"])]
    for form, dtype in kinds:
        words += [str(places[form]), dtype]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True,
        # a tensor is the system's own block, and leaves the process when it is freed
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    measured = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    file = sum(p.stat().st_size for p in (places["folder"] / "unet").glob("*.safetensors"))
    for (_, dtype), found in zip(kinds, measured, strict=True):
        assert found["parts"] > 150 * MIB
        unet = file if dtype == "float32" else file // 2
        most = max(found["parts"], unet + file) + SLACK
        assert 0.9 * found["parts"] < found["grown"] < most < 2 * found["parts"]
