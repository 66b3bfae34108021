"""Presets: options that suit a purpose, each a TOML file in this folder with its reasons.

Options of `[options]` hold for all models, those of `[sd]` (SD 1 and 2) and `[sdxl]` for their
families; `[length]` says how long a run is that names neither steps nor epochs.
"""

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from sd_lora.config.rows import PRESETS, Mode


@dataclass(frozen=True)
class Length:
    """Length of a run, counted in images seen.

    uses: of each image. least, most: images seen in all; each image is seen once at least.
    """

    uses: float
    least: int
    most: int

    def num_steps(self, num_images: int, samples_per_step: int) -> int:
        """Optimiser steps for a number of images."""
        seen = max(num_images, min(self.most, max(self.least, round(self.uses * num_images))))
        return math.ceil(seen / samples_per_step)


@dataclass(frozen=True)
class Preset:
    """A preset: its purpose, its options for all models and by family, its file's text."""

    name: str
    title: str
    options: dict[str, Any]
    sd: dict[str, Any]
    sdxl: dict[str, Any]
    length: Length
    text: str

    def of_family(self, family: str) -> dict[str, Any]:
        """The options that depend on the base model's family."""
        return self.sdxl if family.startswith("sdxl") else self.sd


@cache
def preset(name: str) -> Preset:
    """The preset of a name in `PRESETS`."""
    text = files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    return Preset(
        name, table["title"], table["options"], table["sd"], table["sdxl"],
        Length(**table["length"]), text,
    )  # fmt: skip


OF_MODE: dict[Mode, str] = {"dreambooth": "subject", "text_to_image": "style"}
"""Mode → preset whose length a run without a preset has."""


def listing(name: str | None = None) -> str:
    """All presets, a line each; or the file of one, with its reasons."""
    if name is not None:
        return preset(name).text.rstrip("\n")
    rows = [f"  {preset(name).name:<10} {preset(name).title}" for name in PRESETS]
    return "\n".join(
        [
            "presets, each with its length and rates for SD 1, 2 and XL:",
            *rows,
            "",
            "sd-lora presets NAME shows its options with their reasons;",
            "sd-lora train --preset NAME … uses it, and flags override it",
        ]
    )
