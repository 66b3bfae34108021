"""Attention alone against attention + convolutions on the same subject, drawn side by side.

python benchmarks/attention_vs_conv.py --out docs/attention_vs_conv.png
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

import sd_lora
from sd_lora.adapters.inject import lora_layers
from sd_lora.demo import SUBJECT, demo_config, draw, find_sample_data
from sd_lora.formats.files import load_adapter
from sd_lora.models.load import load_parts
from sd_lora.training.sampling import grid, write_picture
from sd_lora.training.validation import score

TARGETS = ("attention", "attention+conv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    parser.add_argument("--steps", type=int, help="instead of the demo's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sample_data = find_sample_data()
    held_out = [Image.open(p) for p in sorted((sample_data / "dreambooth/holdout").glob("*.png"))]
    base = load_parts(str(sample_data / "tiny-sd"))
    before = draw(base, 64, 4.0)
    shown = len(SUBJECT)
    real = [Image.open(p) for p in sorted((sample_data / "dreambooth/instance").glob("*.png"))]
    rows, labels = [real[:shown], before.subject], ["trained on", "base model"]
    for targets in TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            # the UNet alone, so that the difference is that of the targets
            changes = {"targets": targets, "train_text_encoder": False, "text_encoder_lr": None}
            if args.steps:
                changes["max_train_steps"] = args.steps
            config = demo_config(sample_data, folder, **changes)
            started = time.monotonic()
            result = sd_lora.train(config)
            seconds = time.monotonic() - started
            tuned = load_parts(str(sample_data / "tiny-sd"))
            load_adapter({"unet": tuned.unet}, result.files[0].path)
        parameters = sum(p.numel() for p in lora_layers(tuned.unet))
        after = draw(tuned, 64, 4.0)
        outcome = score(base, before, after, held_out, torch.device("cpu"))
        rows.append(after.subject)
        labels.append(
            f"LoRA on {targets}, {parameters:,} parameters: {outcome.learned:.0%} of the way"
        )
        row = {"targets": targets, "parameters": parameters, "seconds": round(seconds, 1)}
        losses = result.losses[-50:]
        print(json.dumps(row | {"loss": sum(losses) / len(losses)} | asdict(outcome)))
    captions = [p.removeprefix("a photo of ") for p in SUBJECT]
    write_picture(args.out, grid(rows, labels, captions, side=128))


if __name__ == "__main__":
    main()
