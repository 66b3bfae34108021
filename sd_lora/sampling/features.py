"""Features of images for the score: of the encoder of drawings, or of a model from disk.

`load_features` opens either: the encoder that ships with the embedded base, or a folder of DINO,
CLIP, SigLIP or another vision model of transformers, for photographs and real base models.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from sd_lora.errors import UsageError
from sd_lora.sampling.comparison import Comparison
from sd_lora.sampling.drawing_encoder import OTHERS, SIDE, DrawingEncoder, load_encoder

BATCH = 64
"""Images a forward pass."""


class Looks(Protocol):
    """The look of N images, as features see it."""

    def likeness(self, other: Any) -> Tensor:
        """Likeness of each of these images to each of M others, (N, M), at most 1."""


@dataclass(frozen=True)
class Vectors:
    """Unit vectors (N, D), whose likeness is their cosine."""

    of: Tensor

    def likeness(self, other: "Vectors") -> Tensor:
        return self.of @ other.of.T


@dataclass(frozen=True)
class Drawn:
    """Subjects of drawings: embeddings (N, D), and layouts (N, LAYOUT, 11, 11).

    The likeness is the mean of two opinions, the embeddings' cosine above OTHERS and the comparison
    of layouts: the first ranks subjects that share little, the second sees a part too many.
    """

    vectors: Tensor
    layouts: Tensor
    comparison: Comparison

    @torch.no_grad()
    def likeness(self, other: "Drawn") -> Tensor:
        cosine = self.vectors @ other.vectors.T
        above = (cosine - OTHERS).clamp(min=0) / (1 - OTHERS)
        return (above + self.comparison.likeness(self.layouts, other.layouts).cpu()) / 2


class Seen(Protocol):
    """N images as features see them, each embedded once.

    subject: looks that are alike for images of one subject. style: for images of one style.
    """

    @property
    def subject(self) -> Looks: ...

    @property
    def style(self) -> Looks: ...

    def follows(self, prompts: Sequence[str], about: Collection[str] = ()) -> Tensor:
        """How well each image shows its prompt, (N,), from 0 to 1; NaN where it cannot be told.

        about: names of the questions that count; all by default.
        """


class Features(Protocol):
    """The look of images, and how well images follow their prompts. All results are on the CPU.

    name: of the model. blind: differences that it does not see, as a sentence's end.
    """

    name: str
    blind: str

    def to(self, device: torch.device | str) -> None:
        """Compute on a device from now on."""

    def look(self, images: Sequence[Image.Image]) -> Seen:
        """The images as they are seen."""


class DrawingFeatures:
    """The encoder of drawings: images of any size are reduced to 64×64."""

    name = "encoder of drawings"
    blind = (
        "details below three pixels, mirrored images, and of a prompt all but the thing, its "
        "colour, the background and the number"
    )

    def __init__(self, encoder: DrawingEncoder) -> None:
        self.encoder = encoder.eval()

    def to(self, device: torch.device | str) -> None:
        self.encoder.to(device)

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image]) -> "SeenDrawings":
        x = torch.stack([pixels(image, SIDE) for image in images]).to(self.encoder.device)
        layouts, styles, answers = zip(
            *(self.encoder(part) for part in x.split(BATCH)), strict=True
        )
        chances = {
            name: torch.cat([part[name] for part in answers]).softmax(1).cpu()
            for name in answers[0]
        }
        return SeenDrawings(
            self.encoder, torch.cat(layouts).cpu(), torch.cat(styles).cpu(), chances
        )


@dataclass(frozen=True)
class SeenDrawings:
    """Drawings as their encoder sees them.

    layouts: (N, LAYOUT, 11, 11). styles: (N, D). chances: question → probability of each of its
    answers, (N, answers).
    """

    encoder: DrawingEncoder
    layouts: Tensor
    styles: Tensor
    chances: Mapping[str, Tensor]

    @cached_property
    @torch.no_grad()
    def subject(self) -> Drawn:
        vectors = self.encoder.embedded(self.layouts.to(self.encoder.device)).cpu()
        return Drawn(vectors, self.layouts, self.encoder.comparison)

    @property
    def style(self) -> Vectors:
        return Vectors(self.styles)

    def follows(self, prompts: Sequence[str], about: Collection[str] = ()) -> Tensor:
        """Mean probability of the answers that the prompt names."""
        means = []
        for i, prompt in enumerate(prompts):
            asked = self.encoder.asked(prompt)
            right = [self.chances[n][i, k] for n, k in asked.items() if not about or n in about]
            means.append(torch.stack(right).mean() if right else torch.tensor(torch.nan))
        return torch.stack(means)


class ModelFeatures:
    """A vision model of transformers: its pooled image embedding serves for subject and for style.

    A model with a text encoder (CLIP, SigLIP) also tells how well images follow their prompts: the
    probability, by its own logits, of the image's prompt among all those of the same call.
    """

    def __init__(self, model: Any, processor: Any, tokenizer: Any, name: str) -> None:
        self.model, self.processor, self.tokenizer = model.eval(), processor, tokenizer
        self.name, self.device = name, torch.device("cpu")
        unseen = "" if tokenizer else "whether prompts are followed (the model reads no text), "
        self.blind = f"{unseen}where things stand, and differences that {name} was not trained on"

    def to(self, device: torch.device | str) -> None:
        self.model.to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image]) -> "SeenByModel":
        parts = []
        rgb = [image.convert("RGB") for image in images]
        for start in range(0, len(rgb), BATCH):
            x = self.processor(images=rgb[start : start + BATCH], return_tensors="pt").pixel_values
            x = x.to(self.device)
            if hasattr(self.model, "get_image_features"):
                out = self.model.get_image_features(pixel_values=x)
            else:
                out = self.model(pixel_values=x)
            parts.append(F.normalize(pooled(out).float().cpu(), dim=1))
        return SeenByModel(self, Vectors(torch.cat(parts)))

    @torch.no_grad()
    def logits(self, seen: Vectors, prompts: Sequence[str]) -> Tensor:
        """The model's own logits of images and prompts (N, M)."""
        words = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        words = words.to(self.device)
        inputs = {"input_ids": words.input_ids, "attention_mask": words.get("attention_mask")}
        text = F.normalize(pooled(self.model.get_text_features(**inputs)).float().cpu(), dim=1)
        return self.model.logit_scale.exp().cpu() * seen.of @ text.T


@dataclass(frozen=True)
class SeenByModel:
    """Images as a vision model sees them."""

    features: ModelFeatures
    subject: Vectors

    @property
    def style(self) -> Vectors:
        return self.subject

    def follows(self, prompts: Sequence[str], about: Collection[str] = ()) -> Tensor:
        """Probability of the image's prompt among all those of the call; NaN of a model without a
        text encoder, and of a single prompt, which there is no other to tell from."""
        known = list(dict.fromkeys(prompts))
        if self.features.tokenizer is None or len(known) == 1:
            return torch.full((len(prompts),), torch.nan)
        chances = self.features.logits(self.subject, known).softmax(1)
        own = torch.tensor([known.index(prompt) for prompt in prompts])
        return chances[torch.arange(len(prompts)), own]


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


@contextmanager
def placed(features: Features, device: torch.device | str) -> Iterator[None]:
    """Let features compute on a device in a block; behind it they are on the CPU again, and take
    no room beside a training."""
    try:
        features.to(device)
        yield
    finally:
        features.to("cpu")


def load_features(folder: Path) -> Features:
    """Features of the model in a folder, on the CPU: the encoder of drawings, or a model of
    transformers.

    Raises:
        UsageError: the folder holds neither.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(
            f"{folder} holds no config.json: give the folder of a vision model of transformers "
            "(DINO, CLIP, SigLIP), as `save_pretrained` writes it"
        )
    try:
        return _opened(folder, config)
    except UsageError:
        raise
    except Exception as error:  # foreign files: any error is the folder's fault
        text = str(error).strip().partition("\n")[0]
        raise UsageError(f"{folder} cannot be opened as a vision model: {text}") from None


def _opened(folder: Path, config: Path) -> Features:
    if json.loads(config.read_text(encoding="utf-8")).get("model_type") == "drawing_encoder":
        return DrawingFeatures(load_encoder(folder))
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    with torch.random.fork_rng(devices=[]):  # missing weights are drawn
        model, loaded = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    missing = {name.partition(".")[0] for name in loaded["missing_keys"]}
    if "pooler" in missing:  # DINO was published without one: the class token stands for it
        model.pooler = None
    if missing - {"pooler"}:
        raise UsageError(f"{folder} lacks weights of {', '.join(sorted(missing - {'pooler'}))}")
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    tokenizer = None
    if hasattr(model, "get_text_features"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return ModelFeatures(model, processor, tokenizer, model.config.model_type)
