"""Several ways to adapt the embedded base to the demo's subject, scored and drawn side by side.

    python benchmarks/compare.py targets --out docs/attention_vs_conv.png
    python benchmarks/compare.py methods --out methods.png

Targets are compared with the text encoder trained, as the demo does, and by the UNet alone
(targets_unet); methods by the UNet alone.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import sd_lora
from sd_lora.adapters.inject import lora_layers
from sd_lora.demo import (
    PROMPTS,
    SUBJECT,
    columns,
    demo_config,
    draw_sets,
    find_sample_data,
    taught,
)
from sd_lora.formats.adapter_files import load_adapter
from sd_lora.models.load import load_parts
from sd_lora.report.sheets import Sheet
from sd_lora.sampling.features import load_features
from sd_lora.sampling.judge import score
from sd_lora.sampling.score import SETS

Changes = dict[str, object]
ATTENTION: Changes = {"targets": "attention", "rank": 79, "lora_alpha": 79.0}
WAYS: dict[str, dict[str, Changes]] = {
    # about as many parameters each; attention alone at the rate that suits more ranks as well
    "targets": {
        "attention, rank 79": ATTENTION,
        "attention, rank 79, half the rate": ATTENTION
        | {"learning_rate": 1e-3, "text_encoder_lr": 1e-3},
        "attention, feed-forward and convolutions, rank 16": {},
    },
    # about as many parameters each: LoHa has two pairs, a Tucker core is small
    "methods": {
        "LoRA, rank 16": {},
        "DoRA, rank 16": {"use_dora": True},
        "LoHa, rank 8": {"method": "loha", "rank": 8, "lora_alpha": 8.0},
        "LoKr, factor 4": {"method": "lokr", "lokr_factor": 4, "rank": 64, "lora_alpha": 64.0},
        "LoRA, rank 16, PiSSA": {"init_lora_weights": "pissa"},
    },
}
WAYS["targets_unet"] = WAYS["targets"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("--only", help="one of the ways, by name")
    parser.add_argument("--out", type=Path, required=True, help="the image to write")
    parser.add_argument("--steps", type=int, help="instead of the demo's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sample_data = find_sample_data()
    images = taught(sample_data)
    features = load_features(sample_data / "encoder")
    before = draw_sets(load_parts(str(sample_data / "tiny-sd")), 64, 4.0, SETS)
    shown = len(SUBJECT)
    rows = [images.training[:shown], before[0].subject]
    labels = ["trained on", "base model"]
    ways = WAYS[args.what]
    for name, way in ({args.only: ways[args.only]} if args.only else ways).items():
        with tempfile.TemporaryDirectory() as folder:
            changes = dict(way)
            if args.what != "targets":
                changes |= {"train_text_encoder": False, "text_encoder_lr": None}
            if args.steps:
                changes["max_train_steps"] = args.steps
            config = demo_config(sample_data, str(Path(folder) / args.what), **changes)
            started = time.monotonic()
            result = sd_lora.train(config)
            seconds = time.monotonic() - started
            tuned = load_parts(str(sample_data / "tiny-sd"))
            load_adapter(tuned.models, result.files[0].path)
        parameters = sum(p.numel() for p in lora_layers(tuned.unet))
        after = draw_sets(tuned, 64, 4.0, SETS)
        outcome = score(features, images, PROMPTS, before, after)
        rows.append(after[0].subject)
        labels.append(f"{name}, {parameters:,} parameters: fidelity {outcome.fidelity.text()}")
        row = {"way": name, "parameters": parameters, "seconds": round(seconds, 1)}
        losses = result.losses[-50:]
        print(json.dumps(row | {"loss": sum(losses) / len(losses)} | outcome.numbers()), flush=True)
    Sheet(rows, labels, columns(config, ((SUBJECT, shown),)), side=128).write(args.out)


if __name__ == "__main__":
    main()
