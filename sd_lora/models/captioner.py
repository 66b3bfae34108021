"""Captions of images by an image-to-text model of the user's, such as BLIP or GIT."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sd_lora.errors import UsageError, near_path

CHAT = ("chat_template.jinja", "chat_template.json")
"""Files of models that answer questions."""


@dataclass
class Captioner:
    """A model that writes captions, with the readers of its images and words."""

    model: Any
    images: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Captioner":
        """Load a model from a folder in the layout of transformers, from safetensors alone; no code
        of the folder is run, and nothing is downloaded.

        Raises:
            UsageError: a folder without such a model, or with one that answers questions.
        """
        from transformers import (
            AutoImageProcessor,
            AutoModelForImageTextToText,
            AutoProcessor,
            AutoTokenizer,
        )

        if not (folder / "config.json").is_file():
            near = near_path(folder) if not folder.exists() else ": it has no config.json"
            raise UsageError(f"{folder} is no folder of an image-to-text model{near}")
        how = {"local_files_only": True, "trust_remote_code": False}
        try:
            processor = AutoProcessor.from_pretrained(str(folder), **how)
            talks = any((folder / name).is_file() for name in CHAT)
            if talks or getattr(processor, "chat_template", None):
                raise UsageError(
                    f"{folder} is a model that answers questions in a chat: only models that write "
                    "a caption by themselves are read, such as BLIP and GIT"
                )
            images = getattr(processor, "image_processor", None)
            words = getattr(processor, "tokenizer", None)
            images = images or AutoImageProcessor.from_pretrained(str(folder), **how)
            words = words or AutoTokenizer.from_pretrained(str(folder), **how)
            model = AutoModelForImageTextToText.from_pretrained(
                str(folder), use_safetensors=True, **how
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UsageError(f"{folder} holds no image-to-text model: {first[:300]}") from None
        return cls(model.to(device).eval(), images, words)

    def captions(self, images: Sequence[Image.Image], max_tokens: int) -> list[str]:
        """A caption of each image, in order, on one line each, by the likeliest words.

        max_tokens: of a caption.
        """
        given = dict(self.images(images=list(images), return_tensors="pt"))
        device = self.model.device
        with torch.inference_mode():
            out = self.model.generate(
                **{name: value.to(device) for name, value in given.items()},
                max_new_tokens=max_tokens, do_sample=False,
            )  # fmt: skip
        texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
