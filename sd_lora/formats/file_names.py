"""Names of the files that a run exports, known before torch is imported."""

import re
from collections.abc import Iterable
from pathlib import Path

DIFFUSERS = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for; those of the other formats begin with the adapter's."""

FACTORS, MANIFEST = "adapter.safetensors", "manifest.json"
"""Files of a run's checkpoint: the factors as they are trained, and the list of all files."""

KOHYA_END = "_kohya.safetensors"
LYCORIS_END = "_lycoris.safetensors"
COMFYUI_END = "_comfyui.safetensors"


def lora_paths(folder: Path, name: str) -> list[Path]:
    """Paths of an adapter's LoRA files, one for each format."""
    ends = (KOHYA_END, LYCORIS_END, COMFYUI_END)
    return [folder / DIFFUSERS, *(folder / f"{name}{end}" for end in ends)]


def is_file_name(name: str) -> bool:
    """Whether a text, such as a name in a foreign header, names a file of a folder and no place."""
    return name not in ("", ".", "..") and re.search(r"[/\\:\x00-\x1f]", name) is None


def embedding_paths(words: Iterable[str], folder: Path, name: str) -> list[Path]:
    """Paths of new words' files: `<folder>/<name>_<word>.safetensors`."""
    paths: list[Path] = []
    for given in words:
        word = re.sub(r"[^\w-]+", "_", given).strip("_") or "word"
        path, number = folder / f"{name}_{word}.safetensors", 2
        while path in paths:
            path, number = folder / f"{name}_{word}-{number}.safetensors", number + 1
        paths.append(path)
    return paths


def name_of(path: Path) -> str:
    """The name of a LoRA file or folder; of a run's checkpoint with its run."""
    real = path.expanduser().absolute()
    if real.suffix in (".safetensors", ".ckpt", ".pt", ".bin"):
        usual = real.name == DIFFUSERS
        return real.parent.name if usual else real.stem
    return f"{real.parent.name}/{real.name}" if real.name.startswith("checkpoint-") else real.name
