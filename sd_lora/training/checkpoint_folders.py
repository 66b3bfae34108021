"""The checkpoints in an output folder, known before torch is imported."""

from pathlib import Path

from sd_lora.errors import UsageError

PREFIX = "checkpoint-"
"""A checkpoint is the folder of this name and its step."""

RESUME = "--resume_from_checkpoint latest"
"""The flag that goes on with a run, for messages."""


def _step_of(path: Path) -> int:
    number = path.name.removeprefix(PREFIX)
    return int(number) if number.isdigit() else -1


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in output_dir.glob(f"{PREFIX}*") if _step_of(p) >= 0]
    return sorted((p for p in found if (p / "progress.json").is_file()), key=_step_of)


def find(output_dir: Path, name: str) -> Path:
    """The checkpoint that `resume_from_checkpoint` names: "latest", a name, or a path.

    Raises:
        UsageError: no such checkpoint, with the names of the existing ones.
    """
    there = checkpoints(output_dir)
    if name == "latest":
        if there:
            return there[-1]
    else:
        for path in (output_dir / name, Path(name).expanduser()):
            if (path / "progress.json").is_file():
                return path
    names = ", ".join(path.name for path in there) or "none"
    raise UsageError(f"resume_from_checkpoint {name}: no such checkpoint; {output_dir} has {names}")
