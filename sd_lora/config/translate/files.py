"""Other trainers' files: JSON, TOML and YAML, and the files that they name."""

from pathlib import Path
from typing import Any

from sd_lora.config.values import parsed
from sd_lora.errors import UsageError
from sd_lora.files import utf8_text

YAML = (".yaml", ".yml")
TABLES = (".json", ".toml", *YAML)
"""Ends of names of files with settings."""


def load(path: Path) -> Any:
    """The contents of a JSON, TOML or YAML file, told apart by the name's end.

    Raises:
        UsageError: no such file, no permission, or a file of another form.
    """
    suffix = path.suffix.lower()
    kind = "TOML" if suffix == ".toml" else "YAML" if suffix in YAML else "JSON"
    try:
        text = utf8_text(path)
    except UsageError as error:
        raise UsageError(f"{path} {error}") from None
    try:
        return _yaml(text) if kind == "YAML" else parsed(text, kind)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not {kind}: {error}") from None


def _yaml(text: str) -> Any:
    import yaml  # 30 ms: for ai-toolkit's files alone

    try:
        # a value written once and named often grows without bound where it is read out
        if any(isinstance(event, yaml.events.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("aliases (*name) are not read: write their values out")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from None


def find(name: str, folder: Path) -> Path | None:
    """A file named in a configuration: as it is named, else from the configuration's folder or
    those above it, as their programs start elsewhere; None if there is none."""
    path = Path(name).expanduser()
    places = [Path(), folder, *folder.absolute().parents]
    found = (place / path for place in places)
    return next((file for file in found if file.is_file()), None)
