"""Checkpoints: complete or absent, pruned only after the next one verifies, exact on resume.

A checkpoint holds the factors as they are (unfolded, float32), the optimiser, the schedule and the
position in the data, in safetensors files and JSON, with a manifest of their hashes. It needs no
random state: every draw is a function of the position.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor, nn

from sd_lora.adapters.state import (
    check_lora_state_dict,
    load_lora_state_dict,
    lora_state_dict,
)
from sd_lora.config.schema import OPTIONS, with_present_names
from sd_lora.errors import RunError, UsageError
from sd_lora.files import mib, unfinished_name, write_fault, write_tensors, write_whole
from sd_lora.folders import free_bytes, sync_folder
from sd_lora.formats.file_names import FACTORS
from sd_lora.training.checkpoint_folders import (
    PREFIX,
    REPLACED,
    checkpoints,
    fault,
    step_of,
    write_manifest,
)
from sd_lora.training.state_files import read_state, tensors_in, write_state

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Position and identity of a run: it can be resumed as the same run only.

    step: optimiser steps done. seed, samples_per_step, num_samples: the meaning of a position in
    the data. settings: the configuration. order: digest of the samples of each step. images: digest
    of the images and captions. fit: the means by which its steps took less memory, see `Fit`.
    """

    step: int
    seed: int
    samples_per_step: int
    num_samples: int
    settings: dict[str, Any]
    order: str
    images: str
    fit: dict[str, Any] = field(default_factory=dict)


def save(
    output_dir: Path,
    progress: Progress,
    models: Mapping[str, nn.Module],
    state: Mapping[str, Any],
    header: Mapping[str, str],
) -> Path:
    """Write `checkpoint-<step>`, verify it, and give it its name; returns its path.

    An earlier one of the same step stays under a name that is found, too, until the new one stands.

    Args:
        output_dir: the run's folder.
        progress: position of the run.
        models: component → injected model.
        state: name → state dict of the optimiser, schedule and scaler.
        header: of the factors' file, as LoRA files of this step have it.

    Raises:
        RunError: a disk that is too full, or a failed write; earlier checkpoints are untouched.
    """
    final = output_dir / f"{PREFIX}{progress.step}"
    beside = output_dir / unfinished_name()
    tensors = factors_of(models)
    size = sum(t.numel() * t.element_size() for t in [*tensors.values(), *tensors_in(state)])
    if (free := free_bytes(output_dir)) < size:
        raise RunError(
            f"{final} takes {mib(size)}, and {mib(free)} are free there: make room, and continue "
            "from the checkpoint before it"
        )
    specs = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    try:
        beside.mkdir(parents=True)
        write_tensors(beside / FACTORS, specs, tensors.items(), header)
        write_state(beside, dict(state))
        write_whole(beside / PROGRESS, json.dumps(asdict(progress)).encode())
        write_manifest(beside)
        sync_folder(beside)
        if found := fault(beside):
            raise RunError(f"{final} was written, and the disk gives other bytes back: {found}")
        _take_place(beside, final)
    except OSError as error:
        reason = write_fault(error, output_dir)
        raise RunError(f"{final} ({mib(size)}) could not be written: {reason}") from None
    except RunError as error:  # names the folder by its name while it is written
        raise RunError(str(error).replace(str(beside), str(final))) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return final


def factors_of(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """`<component>/<key>` → copy of each tensor of injected models, as a checkpoint has them."""
    return {
        f"{component}/{key}": value
        for component, model in models.items()
        for key, value in lora_state_dict(model).items()
    }


def _take_place(beside: Path, final: Path) -> None:
    """Give a written checkpoint its name; at each moment it or the earlier one can be found."""
    old = final.with_name(final.name + REPLACED)
    if final.exists():
        remove(old)
        os.replace(final, old)
    os.replace(beside, final)
    sync_folder(final.parent)
    remove(old)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there: at no moment is a part of it left under its name."""
    gone = checkpoint.with_name(unfinished_name())
    with suppress(OSError):  # Windows, while a program has a file open: it stays whole
        os.replace(checkpoint, gone)
    shutil.rmtree(gone, ignore_errors=True)


def prune(newest: Path, limit: int | None, keep_every: int | None, best: int | None = None) -> None:
    """Remove the oldest checkpoints that a run needs no more.

    Args:
        newest: the last one, which verifies. Those of later steps stay.
        limit: number of checkpoints to keep; None for all.
        keep_every: steps, whose multiples stay beside these.
        best: a step whose checkpoint stays.
    """
    last = step_of(newest)
    earlier = [path for path in checkpoints(newest.parent) if step_of(path) <= last]
    for path in earlier:
        if path.name.endswith(REPLACED) and path.with_name(f"{PREFIX}{step_of(path)}").exists():
            remove(path)
    rolling = [
        path
        for path in earlier
        if step_of(path) != best and not (keep_every and step_of(path) % keep_every == 0)
    ]
    for path in rolling[:-limit] if limit else []:
        remove(path)


def read_progress(path: Path) -> Progress:
    """The position of a checkpoint's run; raises UsageError for a foreign file."""
    try:
        found = Progress(**json.loads((path / PROGRESS).read_text(encoding="utf-8")))
        if not (isinstance(found.step, int) and isinstance(found.settings, dict)):
            raise TypeError("its step is no number, or its settings are no table")
        return found
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a checkpoint of this project: {error}") from None


def check_continues(progress: Progress, ours: Progress, num_steps: int, path: Path) -> None:
    """Raise UsageError if a checkpoint belongs to another run, or has more steps than this one.

    One with as many steps has a run that ended before its files were written.
    """
    if progress.step > num_steps:
        raise UsageError(
            f"{path} has done {progress.step} steps already, and this run has {num_steps}: "
            "raise max_train_steps to continue"
        )
    for name, meaning in (
        ("seed", "seed"),
        ("samples_per_step", "batch size × accumulation × processes"),
        ("num_samples", "number of training images × repeats"),
    ):
        then, now = getattr(progress, name), getattr(ours, name)
        if then != now:
            raise UsageError(
                f"{path} was written with {meaning} = {then}, and this run has {now}: it would not "
                "be the same run; use the same settings, or start anew in another folder"
            )

    settings, _ = with_present_names(progress.settings)
    changed = [
        f"{name} was {earlier!r} and is {ours.settings[name]!r}"
        for name, option in OPTIONS.items()
        # earlier versions wrote other defaults of options that a folder with a prompt ignores
        if not (option.may_change or any(ours.settings[place] for place in option.ignored_by))
        # options that the earlier version did not have were at their defaults
        if (earlier := settings.get(name, option.default)) != ours.settings[name]
    ]
    if changed:
        raise UsageError(
            f"{path} belongs to a run with other settings: {'; '.join(changed)}. Use the same "
            "ones, or start anew in another folder"
        )
    if progress.order != ours.order:
        raise UsageError(
            f"{path} was written with images of other shapes, in another order, with other rules "
            "of their captions or crops, or with another split of the batch (train_batch_size × "
            "processes, accumulation): it would not be the same run; use the same, or start anew "
            "in another folder"
        )


@dataclass(frozen=True)
class Saved:
    """A checkpoint that fits its run. factors: component → factors. state: as given to `save`."""

    path: Path
    progress: Progress
    factors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    def load_factors(self, models: Mapping[str, nn.Module]) -> None:
        """Put the factors into injected models."""
        for component, model in models.items():
            load_lora_state_dict(model, self.factors[component])


STATE = ("optimizer", "schedule", "scaler", "average", "uncertainty", "trained", "tokens", "losses",
         "redrawn", "validation", "scores", "ledger", "trackers")  # fmt: skip
"""Names in a checkpoint's state."""


def state_of(path: Path) -> dict[str, Any]:
    """The state of a checkpoint; raises UsageError for one of another version."""
    state = read_state(path)
    if missing := [name for name in STATE if name not in state]:
        raise UsageError(
            f"{path} is of another version, which alone can go on with it: it has no "
            f"{', '.join(missing)}"
        )
    return dict(state)


def read(path: Path, models: Mapping[str, nn.Module]) -> Saved:
    """Read a checkpoint for injected models, which stay as they are.

    Raises:
        UsageError: adapters of other components, modules or ranks, or files that cannot be read.
    """
    try:
        # whole, not mapped into memory: Windows would keep the file from being pruned
        tensors = load((path / FACTORS).read_bytes())
        state = state_of(path)
        if state["trained"]:  # the factors' file has an average
            tensors = state["trained"]["factors"]
    except UsageError:
        raise
    except Exception as error:  # a foreign parser over foreign bytes: any error is the file's fault
        raise UsageError(f"{path} cannot be read: {error}") from None
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        component, _, name = key.partition("/")
        factors.setdefault(component, {})[name] = tensor
    if factors.keys() != models.keys():
        has, trains = ", ".join(sorted(factors)), ", ".join(sorted(models))
        raise UsageError(f"{path} has adapters of {has}, and this run trains {trains}")
    for component, model in models.items():
        check_lora_state_dict(model, factors[component])
    return Saved(path, read_progress(path), factors, state)
