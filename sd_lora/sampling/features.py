"""Features of images for the score: of the encoder of drawings, or of a model from disk.

`load_features` opens either: the encoder that ships with the embedded base, or a folder of DINO,
CLIP, SigLIP or another vision model of transformers, for photographs and real base models.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from sd_lora.errors import UsageError
from sd_lora.sampling.drawing_encoder import SIDE, DrawingEncoder, load_encoder

BATCH = 64
"""Images a forward pass."""


class Features(Protocol):
    """Embeddings of images, and how well images follow their prompts.

    name: of the model. blind: differences that it does not see, as a sentence's end.
    """

    name: str
    blind: str

    def subject(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D), near for images of one subject."""

    def style(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D), near for images of one style."""

    def follows(
        self, images: Sequence[Image.Image], prompts: Sequence[str], about: Collection[str] = ()
    ) -> Tensor:
        """How well each image shows its prompt, (N,), from 0 to 1; NaN where it cannot be told.

        about: names of the questions that count; all by default.
        """


class DrawingFeatures:
    """The encoder of drawings: images of any size are reduced to 64×64."""

    name = "encoder of drawings"
    blind = (
        "details below three pixels, mirrored images, and of a prompt all but the thing, its "
        "colour, the background and the number"
    )

    def __init__(self, encoder: DrawingEncoder) -> None:
        self.encoder = encoder.eval()

    @torch.no_grad()
    def _encoded(
        self, images: Sequence[Image.Image]
    ) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        x = torch.stack([pixels(image, SIDE) for image in images])
        return [self.encoder(part) for part in x.split(BATCH)]

    def subject(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.cat([subject for subject, _, _ in self._encoded(images)])

    def style(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.cat([style for _, style, _ in self._encoded(images)])

    def follows(
        self, images: Sequence[Image.Image], prompts: Sequence[str], about: Collection[str] = ()
    ) -> Tensor:
        """Mean probability of the answers that the prompt names."""
        parts = [answers for _, _, answers in self._encoded(images)]
        logits = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        chances = {name: out.softmax(1) for name, out in logits.items()}
        means = []
        for i, prompt in enumerate(prompts):
            asked = self.encoder.asked(prompt)
            right = [chances[n][i, k] for n, k in asked.items() if not about or n in about]
            means.append(torch.stack(right).mean() if right else torch.tensor(torch.nan))
        return torch.stack(means)


class ModelFeatures:
    """A vision model of transformers: its pooled image embedding serves for subject and for style.

    A model with a text encoder (CLIP, SigLIP) also tells how well images follow their prompts: the
    probability, by its own logits, of the image's prompt among all those of the same call.
    """

    def __init__(self, model: Any, processor: Any, tokenizer: Any | None, name: str) -> None:
        self.model, self.processor, self.tokenizer = model.eval(), processor, tokenizer
        self.name = name
        unseen = "" if tokenizer else "whether prompts are followed (the model reads no text), "
        self.blind = f"{unseen}where things stand, and differences that {name} was not trained on"

    @torch.no_grad()
    def subject(self, images: Sequence[Image.Image]) -> Tensor:
        parts = []
        rgb = [image.convert("RGB") for image in images]
        for start in range(0, len(rgb), BATCH):
            x = self.processor(images=rgb[start : start + BATCH], return_tensors="pt").pixel_values
            if hasattr(self.model, "get_image_features"):
                out = self.model.get_image_features(pixel_values=x)
            else:
                out = self.model(pixel_values=x)
            parts.append(F.normalize(pooled(out).float(), dim=1))
        return torch.cat(parts)

    style = subject

    @torch.no_grad()
    def follows(
        self, images: Sequence[Image.Image], prompts: Sequence[str], about: Collection[str] = ()
    ) -> Tensor:
        if self.tokenizer is None:
            return torch.full((len(images),), torch.nan)
        known = list(dict.fromkeys(prompts))
        words = self.tokenizer(known, padding="max_length", truncation=True, return_tensors="pt")
        inputs = {"input_ids": words.input_ids, "attention_mask": words.get("attention_mask")}
        text = F.normalize(pooled(self.model.get_text_features(**inputs)).float(), dim=1)
        logits = self.model.logit_scale.exp() * self.subject(images) @ text.T
        own = torch.tensor([known.index(prompt) for prompt in prompts])
        return logits.softmax(1)[torch.arange(len(images)), own]


def pooled(out: Any) -> Tensor:
    """The pooled embedding (B, D) of a model's output: the class token's where it has no pooler."""
    if isinstance(out, Tensor):
        return out
    found = getattr(out, "pooler_output", None)
    return (out.last_hidden_state[:, 0] if found is None else found).flatten(1)


def pixels(image: Image.Image, side: int) -> Tensor:
    """An image cut to a square and reduced or enlarged, (3, side, side) in [-1, 1]."""
    square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BOX)
    x = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return x.view(side, side, 3).permute(2, 0, 1).float() / 127.5 - 1


def load_features(folder: Path) -> Features:
    """Features of the model in a folder: the encoder of drawings, or a model of transformers.

    Raises:
        UsageError: the folder holds neither.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(
            f"{folder} holds no config.json: give the folder of a vision model of transformers "
            "(DINO, CLIP, SigLIP), as `save_pretrained` writes it"
        )
    if json.loads(config.read_text(encoding="utf-8")).get("model_type") == "drawing_encoder":
        return DrawingFeatures(load_encoder(folder))
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    tokenizer = None
    if hasattr(model, "get_text_features"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return ModelFeatures(model, processor, tokenizer, model.config.model_type)
