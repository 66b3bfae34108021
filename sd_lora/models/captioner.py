"""Captions of images by an image-to-text model of the user's: BLIP, GIT, or one that chats."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sd_lora.errors import UsageError, near_path

PROMPT = "Describe this image in one sentence."
"""The question to a model that chats, unless the user asks another."""


@dataclass
class Captioner:
    """A model that writes captions, with the readers of its images and words.

    chat: the reader of both, and the question about each image; None for a model that writes a
    caption without being asked.
    """

    model: Any
    images: Any
    tokenizer: Any
    chat: tuple[Any, str] | None = None

    @classmethod
    def load(cls, folder: Path, device: torch.device, prompt: str | None = None) -> "Captioner":
        """Load a model from a folder in the layout of transformers, from safetensors alone; no code
        of the folder is run, and nothing is downloaded.

        prompt: the question to a model that chats, which one with a chat template is.

        Raises:
            UsageError: a folder without such a model, or a prompt for one that takes none.
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
            chats = bool(getattr(processor, "chat_template", None))
            if prompt and not chats:
                raise UsageError(
                    f"{folder} has no chat template: it writes captions without a prompt"
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
        if chats:
            words.padding_side = "left"  # each answer begins where the questions end
        chat = (processor, prompt or PROMPT) if chats else None
        return cls(model.to(device).eval(), images, words, chat)

    def captions(self, images: Sequence[Image.Image], max_tokens: int) -> list[str]:
        """A caption of each image, in order, on one line each, by the likeliest words.

        max_tokens: of a caption.
        """
        given = self._given(images).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            out = self.model.generate(**given, max_new_tokens=max_tokens, do_sample=False)
        if self.chat:
            out = out[:, given["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _given(self, images: Sequence[Image.Image]) -> Any:
        """The model's inputs: images, with the question about each in a chat."""
        if self.chat is None:
            return self.images(images=list(images), return_tensors="pt")
        processor, prompt = self.chat
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return processor(
            text=[text] * len(images), images=[[image] for image in images], padding=True,
            return_tensors="pt", add_special_tokens=not begun,
        )  # fmt: skip
