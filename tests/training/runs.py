"""Tiny runs on images made in the test."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from sd_lora.adapters.state import deltas_from_state
from sd_lora.config.schema import TrainConfig
from sd_lora.formats.canonical import Adapter, canonical_name

FEW = (
    r"(down_blocks\.0|mid_block)\..*(to_(q|k|v|out\.0)|conv1|time_emb_proj|downsamplers\.0\.conv)"
    r"|down_blocks\.1\..*conv_shortcut"
    r"|up_blocks\.1\.(attentions\.1\..*to_q|resnets\.1\.conv(1|_shortcut)|upsamplers\.0\.conv)"
)
"""A quarter of the modules of attention+conv; a run's verification takes time by the module, and is
half of a tiny run. On the way down and in the middle: linear layers of self- and cross-attention,
3×3 and strided convolutions, time projections, a 1×1 shortcut. On the way up: queries of both
attentions, a 3×3 convolution and a 1×1 shortcut that read a skip connection, an upsampler's."""


def images(folder: Path, count: int = 6, size: tuple[int, int] = (64, 64)) -> Path:
    """Writes `count` random images with metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        pixels = rng.integers(0, 255, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
        name = f"{i}.png"
        Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": f"a photo of thing {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def text_to_image(model: Path, data: Path, output: Path, **changes: object) -> TrainConfig:
    """Six steps of a few modules on six images."""
    values: dict[str, object] = {
        "pretrained_model_name_or_path": str(model),
        "train_data_dir": str(data),
        "output_dir": str(output),
        "resolution": 64,
        "train_batch_size": 4,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "targets": FEW,
        "seed": 0,
        "num_validation_images": 0,
        "report_to": "none",
    }
    return TrainConfig(mode="text_to_image", **(values | changes))


def dreambooth(model: Path, data: Path, output: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": str(data),
        "instance_prompt": "a photo of sks thing",
        "output_dir": str(output),
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "targets": FEW,
        "seed": 0,
        "num_validation_images": 0,
        "report_to": "none",
    }
    return TrainConfig(mode="dreambooth", **(values | changes))


def trained_adapter(folder: Path) -> Adapter:
    """The adapter of the last checkpoint: the raw factors, which no writer has folded."""
    (checkpoint,) = folder.glob("checkpoint-*")
    raw = load_file(checkpoint / "adapter.safetensors")
    adapter: Adapter = {}
    for path, delta in deltas_from_state(raw).items():
        component, name = path.split("/")
        adapter.setdefault(component, {})[canonical_name(component, name)] = delta
    return adapter
