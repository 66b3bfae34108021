"""The keys of a run's checkpoint: `<component>/<live delta name>.<tensor>`, the scale not folded.

Every tool reads the folder; no other program does, for which `sd-lora export` writes its files.
"""

from pathlib import Path

from sd_lora.formats.canonical import canonical_name
from sd_lora.formats.file_names import FACTORS, MANIFEST

TITLE = "checkpoint"

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def is_folder(path: Path) -> bool:
    """Whether a folder is a run's checkpoint."""
    return (path / FACTORS).is_file() and (path / MANIFEST).is_file()


def parse(key: str) -> tuple[str, str, str] | None:
    """Component, canonical delta name and kind of tensor of a key; None for another format's."""
    component, _, rest = key.partition("/")
    name, _, kind = rest.rpartition(".")
    if component not in _COMPONENTS or not name:
        return None
    return component, canonical_name(component, name), kind
