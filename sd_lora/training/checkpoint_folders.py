"""The checkpoints in an output folder and their manifests, known before torch is imported.

A manifest names every file of a checkpoint with its size and SHA-256, and ends with its own: a
checkpoint verifies if each byte is the one that was written.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sd_lora.errors import UsageError
from sd_lora.files import sha256_of, write_whole
from sd_lora.formats.file_names import MANIFEST

PREFIX = "checkpoint-"
"""A checkpoint is the folder of this name and its step."""

REPLACED = ".replaced"
"""End of the name of an earlier checkpoint of a step, until the new one has its place."""

OF_EARLIER_VERSIONS = "optimizer.pt"
"""A file of checkpoints without a manifest."""

EARLIER_VERSION = "it was written by an earlier version, which alone can finish it"

RESUME = "--resume_from_checkpoint latest"
"""The flag that goes on with a run, for messages."""

BEST, BEST_FILE = "best", "best.json"
"""Name for the checkpoint of the best validation, and the file that names it."""

LATEST, LATEST_IF_ANY = "latest", "latest-if-any"
"""Names for the newest checkpoint that verifies; with the second, a run without any starts anew."""

_LIBRARIES = ("sd_lora", "torch", "diffusers", "transformers", "accelerate")


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume. path: None to start anew. damaged: newer ones → their faults."""

    path: Path | None
    damaged: dict[Path, str]


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name; -1 for another name."""
    number = path.name.removesuffix(REPLACED).removeprefix(PREFIX)
    return int(number) if number.isdecimal() else -1


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, whole or damaged, oldest first."""
    found = (p for p in output_dir.glob(f"{PREFIX}*") if step_of(p) >= 0 and p.is_dir())
    there = (path for path in found if any(path.iterdir()))
    return sorted(there, key=lambda path: (step_of(path), not path.name.endswith(REPLACED)))


def find(output_dir: Path, name: str) -> Found:
    """The checkpoint that `resume_from_checkpoint` names: the latest, one by name, or by path.

    Raises:
        UsageError: no such checkpoint, with the names of the existing ones, or a damaged one.
    """
    there = checkpoints(output_dir)
    if name == BEST:
        name = _best(output_dir)
    if name not in (LATEST, LATEST_IF_ANY):
        return Found(_named(output_dir, name, there), {})
    damaged: dict[Path, str] = {}
    for path in reversed(there):
        found = fault(path)
        if not found:
            return Found(path, damaged)
        damaged[path] = found
    if name == LATEST_IF_ANY and EARLIER_VERSION not in damaged.values():
        return Found(None, damaged)
    if damaged:
        faults = "; ".join(f"{path.name}: {found}" for path, found in damaged.items())
        raise UsageError(
            f"resume_from_checkpoint {name}: no checkpoint in {output_dir} is whole: {faults}. "
            "Start anew in another folder"
        )
    raise UsageError(f"resume_from_checkpoint {name}: no such checkpoint; {output_dir} has none")


def _best(output_dir: Path) -> str:
    """The name of the best checkpoint; raises UsageError where none is kept."""
    try:
        return str(json.loads((output_dir / BEST_FILE).read_bytes())["checkpoint"])
    except (OSError, ValueError, LookupError, TypeError):
        raise UsageError(
            f"resume_from_checkpoint best: {output_dir} names none in {BEST_FILE}: runs with "
            "scores, --keep_best or --early_stopping_patience do"
        ) from None


def _named(output_dir: Path, name: str, there: list[Path]) -> Path:
    """A checkpoint by its name in the output folder, or by its path; it verifies."""
    for path in (output_dir / name, Path(name).expanduser()):
        if not path.is_dir() or (step_of(path) < 0 and not (path / MANIFEST).exists()):
            continue
        if found := fault(path):
            raise UsageError(
                f"resume_from_checkpoint {name}: {path}: {found}. `latest` is the newest one that "
                "is whole"
            )
        return path
    names = ", ".join(path.name for path in there) or "none"
    raise UsageError(f"resume_from_checkpoint {name}: no such checkpoint; {output_dir} has {names}")


def write_manifest(folder: Path) -> None:
    """Write the manifest of a checkpoint whose other files are there."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    rows = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files}
    versions = {library: version(library) for library in _LIBRARIES}
    write_whole(folder / MANIFEST, _manifest({"files": rows, "versions": versions}))


def fault(folder: Path) -> str:
    """The first fault of a checkpoint, with the file's name; "" if every byte is as written."""
    path = folder / MANIFEST
    try:
        if not path.exists() and (folder / OF_EARLIER_VERSIONS).exists():
            return EARLIER_VERSION
        data = path.read_bytes()
        rows = _rows_of(data)
        if rows is None:
            return f"{MANIFEST} is not as it was written"
        for name, row in rows.items():
            size = (folder / name).stat().st_size
            if size != row["bytes"]:
                return f"{name} has {size} bytes, and {row['bytes']} were written"
            if sha256_of(folder / name) != row["sha256"]:
                return f"{name} is not as it was written (its SHA-256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    return ""


def _rows_of(data: bytes) -> dict[str, dict[str, Any]] | None:
    """File → size and hash, of a manifest whose own hash is right; None for any other."""
    try:
        values = json.loads(data)
        values.pop("sha256")
        return values["files"] if data == _manifest(values) else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _manifest(values: dict[str, Any]) -> bytes:
    """The bytes of a manifest, its own SHA-256 last."""
    own = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    return json.dumps(values | {"sha256": own}, indent=1).encode()
