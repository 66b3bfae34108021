"""A run's output folder: finished work in it is never overwritten, unless that is asked for.

An export is written into a subfolder, `unverified`, and takes its place when it is verified: an
earlier file of that name is there until then.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from sd_lora.config.schema import RunConfig, TrainConfig
from sd_lora.errors import RunError, UsageError
from sd_lora.files import UNFINISHED
from sd_lora.formats.file_names import embedding_paths, lora_paths
from sd_lora.training.checkpoint_folders import (
    BEST_FILE,
    LATEST_IF_ANY,
    RESUME,
    Found,
    checkpoints,
    find,
)

if TYPE_CHECKING:  # torch is not imported here: earlier work is told of before it is
    from sd_lora.formats.verify import Verified

UNVERIFIED = "unverified"
"""Folder, inside output_dir, of files that are not verified yet."""

SHEET = "before_after.png"

CARD = "README.md"
"""The model card."""

LORA_PREFIX = "lora-"
"""Folders of LoRA files in mid-run are of this name and their step."""


def lora_files(config: TrainConfig) -> list[Path]:
    """LoRA files, and those of new words, that are in the output folder under a run's names."""
    folder = config.output_path
    name = folder.resolve().name
    words = embedding_paths(config.new_words, folder, name)
    return [path for path in (*lora_paths(folder, name), *words) if path.exists()]


def resumed_checkpoint(config: TrainConfig) -> Found:
    """The checkpoint that a run goes on from; checks that it overwrites no file of another run.

    Raises:
        UsageError: no such checkpoint, or work of an earlier run.
    """
    name = config.resume_from_checkpoint
    found = find(config.output_path, name) if name else Found(None, {})
    if config.overwrite_output_dir or resumes_here(config, found.path):
        return found
    # a job that starts itself again has nothing to lose where no checkpoint is whole
    lost = name == LATEST_IF_ANY and found.path is None and not lora_files(config)
    if not lost and (earlier := earlier_work(config)):
        raise UsageError(earlier)
    return found


def earlier_work(config: TrainConfig) -> str:
    """A sentence on the work of an earlier run in the output folder, with the remedy, or ""."""
    folder = config.output_path
    there = checkpoints(folder)
    names = ", ".join(path.name for path in (*there, *lora_files(config)))
    resume = f"resume it with {RESUME}, " * bool(there)
    remedy = "choose another --output_dir, or replace its work with --overwrite_output_dir"
    return f"{folder} has {names} of an earlier run: {resume}{remedy}" if names else ""


def resumes_here(config: TrainConfig, saved: Path | None) -> bool:
    """Whether the checkpoint that a run goes on from is one of its own folder."""
    return saved is not None and saved.resolve().parent == config.output_path.resolve()


class Finished(UsageError):
    """A run that has done its steps and written all of its files."""


def refuse_finished(config: TrainConfig, saved: Path, draws: bool) -> None:
    """Raise Finished for a run that has done its steps and written all of its files.

    One that died while its files took their places, one after another, writes them again. draws:
    whether the run draws samples, and so writes a sheet.
    """
    files, folder = lora_files(config), config.output_path
    owed = embedding_paths(config.new_words, folder, folder.resolve().name)
    owed += [folder / CARD, *([folder / SHEET] if draws else [])]
    cut_off = any((folder / UNVERIFIED).glob("*")) or not all(path.exists() for path in owed)
    if files and not cut_off:
        remove_unfinished(config)  # of its page, which is written last
        raise Finished(
            f"{saved} has done all steps of this run, and {', '.join(p.name for p in files)} is "
            "there: give it more --steps to go on"
        )


def replacement_note(config: RunConfig, saved: Path | None) -> list[str]:
    """The note that names the earlier work to be replaced; empty without any."""
    if not config.overwrite_output_dir or resumes_here(config, saved):
        return []
    earlier = [*checkpoints(config.output_path), *lora_files(config)]
    names = ", ".join(path.name for path in earlier)
    return [f"replaces {names} of an earlier run"] if earlier else []


def remove_earlier_steps(config: RunConfig, saved: Path | None) -> None:
    """Remove checkpoints, LoRA files and samples in mid-run of an earlier run that is replaced."""
    if config.overwrite_output_dir and not resumes_here(config, saved):
        of_steps = config.output_path.glob(f"{LORA_PREFIX}[0-9]*")
        for path in (*checkpoints(config.output_path), *of_steps):
            shutil.rmtree(path, ignore_errors=True)
        (config.output_path / BEST_FILE).unlink(missing_ok=True)
        samples = config.output_path / "samples"
        for path in chain(*(samples.glob(f"{kind}-*") for kind in ("step", "now", "score"))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove_earlier_results(config: RunConfig, written: Sequence[Path]) -> None:
    """Remove the LoRA files and the sheet of an earlier run that `written` does not replace."""
    if config.overwrite_output_dir:
        for path in {*lora_files(config), config.output_path / SHEET}.difference(written):
            path.unlink(missing_ok=True)


def remove_unfinished(config: TrainConfig) -> None:
    """Remove files and folders that a killed run was writing: in the output folder, its subfolders,
    and those of LoRA files and samples."""
    depths = (
        *(".*.part", "*/.*.part", f"{LORA_PREFIX}*/{UNVERIFIED}/.*.part"),
        *("samples/*/.*.part", "samples/*/*/.*.part"),
    )
    for path in chain.from_iterable(map(config.output_path.glob, depths)):
        if UNFINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def unverified_folder(output_dir: Path) -> Iterator[Path]:
    """Yield the folder for files to verify; if it is empty at the end, it is removed."""
    folder = output_dir / UNVERIFIED
    try:
        yield folder
    finally:
        with suppress(OSError):  # not empty: the file that failed is kept for its owner
            folder.rmdir()


def take_place(paths: Iterable[Path]) -> list[Path]:
    """Move verified files from the unverified folder to their places, which are returned.

    Raises:
        RunError: a file that cannot be replaced, as on Windows while a program has it open.
    """
    places = []
    for path in paths:
        place = path.parent.parent / path.name
        try:
            os.replace(path, place)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{place} cannot be replaced: {reason}. {path} is verified") from None
        places.append(place)
    return places


def moved(files: Sequence["Verified"]) -> "list[Verified]":
    """Verified files in their places."""
    places = take_place(file.path for file in files)
    return [dataclasses.replace(f, path=p) for f, p in zip(files, places, strict=True)]
