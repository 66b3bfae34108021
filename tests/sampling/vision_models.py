"""Tiny vision models of transformers with random weights, in the folders that features are read
from."""

import json
from pathlib import Path

from transformers import CLIPTokenizer, Dinov2Config, Dinov2Model

ROOT = Path(__file__).parents[2]


def save_processor(folder: Path, name: str, side: int) -> None:
    """The file that says how a model's images are resized and normalised."""
    size, square = {"shortest_edge": side}, {"height": side, "width": side}
    made = {"image_processor_type": name, "size": size, "crop_size": square}
    (folder / "preprocessor_config.json").write_text(json.dumps(made))


def save_two_towers(folder: Path, model: type, config: type) -> None:
    """A tiny CLIP or SigLIP with the embedded base's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "sample_data" / "tiny-sd" / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": 32, "patch_size": 8}
    made = config(
        text_config=small | words | {"max_position_embeddings": 77}, vision_config=small | vision
    )
    for part in (model(made), tokenizer):
        part.save_pretrained(folder)
    save_processor(folder, "CLIPImageProcessor", 32)


def save_dino(folder: Path) -> None:
    """A tiny DINOv2."""
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    save_processor(folder, "BitImageProcessor", 28)
