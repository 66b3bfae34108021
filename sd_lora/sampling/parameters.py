"""The parameters of a drawn image, as text that other programs read."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

SAMPLER = "DPM++ 2M"
"""A1111's name for the method of `sampler.sample`."""

_CHECKPOINTS = (".safetensors", ".ckpt")


@dataclass(frozen=True, slots=True)
class Parameters:
    """How a model draws an image.

    prompt: of the image, whole.
    seed: of its noise, drawn on the CPU.
    steps: of the sampler.
    guidance_scale: of classifier-free guidance.
    size: (width, height) in pixels.
    model: the base, a folder, a file or a hub id.
    lora: name of the LoRA on it; empty for the base alone.
    lora_steps: optimiser steps that the LoRA has learned.
    clip_skip: layers left out at the end of the text encoder.
    negative: the negative prompt.
    strengths: name and strength of each LoRA file, for A1111's tags behind the prompt.
    beside: names of the LoRA files of this column alone, on a sheet of several columns.
    strength: of this column's prompt, which multiplies that of each row.
    guidance_rescale: φ of rescaled guidance.
    """

    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    size: tuple[int, int]
    model: str
    lora: str = ""
    lora_steps: int = 0
    clip_skip: int = 0
    negative: str = ""
    strengths: tuple[tuple[str, float], ...] = ()
    beside: str = ""
    strength: float = 1.0
    guidance_rescale: float = 0.0

    @property
    def place(self) -> str:
        """Seed and size, in ASCII for a sheet's small font: "seed 3, 512 x 512"."""
        return f"seed {self.seed}, {self.size[0]} x {self.size[1]}"

    @property
    def caption(self) -> str:
        """The words below a sheet's column: the prompt, its strength, and the LoRA files that it
        alone has."""
        strength = f"  [strength x {self.strength:g}]" * (self.strength != 1)
        return self.prompt + strength + f"  [with {self.beside}]" * bool(self.beside)

    def text(self) -> str:
        """The text that A1111 writes into a PNG and reads back: prompt, negative prompt, settings.

        Names without folders: it is passed on with the image, and a path tells of a machine.
        Unknown settings ("LoRA", "LoRA steps") are kept by A1111 and change nothing there.
        """
        settings: dict[str, object] = {
            "Steps": self.steps,
            "Sampler": SAMPLER,
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.size[0]}x{self.size[1]}",
            "Model": _name(self.model),
            "RNG": "CPU",
        }
        if self.guidance_rescale:
            settings["CFG Rescale"] = f"{self.guidance_rescale:g}"
        if self.clip_skip:
            settings["Clip skip"] = self.clip_skip + 1  # A1111 counts from 1
        if self.lora:
            settings |= {"LoRA": self.lora, "LoRA steps": self.lora_steps}
        line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items())
        tags = "".join(f" <lora:{name}:{value:g}>" for name, value in self.strengths)
        return f"{self.prompt}{tags}\n{f'Negative prompt: {self.negative}'.strip()}\n{line}"


def _name(model: str) -> str:
    """A base model's name: of the folder, of the file without its suffix, or of the hub id."""
    path = Path(os.path.abspath(os.path.expanduser(model)))
    return path.stem if path.suffix in _CHECKPOINTS else path.name


def _quoted(value: str) -> str:
    """A setting's value, in quotes if it holds a character that ends it."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\n') else value
