"""Checkpoints: complete or absent, pruned only after the next one is complete, exact on resume.

A checkpoint holds the factors as they are (unfolded, float32), the optimiser, the schedule and the
position in the data. It needs no random state: every draw is a function of the position.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from sd_lora.adapters.state import (
    check_lora_state_dict,
    load_lora_state_dict,
    lora_state_dict,
)
from sd_lora.config.schema import OPTIONS, with_present_names
from sd_lora.errors import RunError, UsageError
from sd_lora.training.checkpoint_folders import PREFIX, checkpoints


@dataclass(frozen=True)
class Progress:
    """Position and identity of a run: it can be resumed as the same run only.

    step: optimiser steps done. seed, samples_per_step, num_samples: the meaning of a position in
    the data. settings: the configuration. order: digest of the samples of each step; empty in
    checkpoints of earlier versions. images: digest of the images and captions.
    """

    step: int
    seed: int
    samples_per_step: int
    num_samples: int
    settings: dict[str, Any]
    order: str = ""
    images: str = ""


def save(
    output_dir: Path,
    progress: Progress,
    models: Mapping[str, nn.Module],
    state: Mapping[str, Any],
    limit: int | None = None,
) -> Path:
    """Write `checkpoint-<step>`, then remove the oldest beyond `limit`; returns its path.

    Args:
        output_dir: the run's folder.
        progress: position of the run.
        models: component → injected model.
        state: name → state dict of the optimiser, schedule and scaler.
        limit: number of checkpoints to keep.

    Raises:
        RunError: a failed write; earlier checkpoints are untouched.
    """
    final = output_dir / f"{PREFIX}{progress.step}"
    beside = output_dir / f".{final.name}.part"
    shutil.rmtree(beside, ignore_errors=True)
    tensors = {
        f"{component}/{key}": value
        for component, model in models.items()
        for key, value in lora_state_dict(model).items()
    }
    try:
        beside.mkdir(parents=True)
        save_file(tensors, beside / "adapter.safetensors")
        torch.save(dict(state), beside / "optimizer.pt")
        (beside / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        for path in beside.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
    except (OSError, RuntimeError) as error:  # torch and safetensors wrap what the disk says
        shutil.rmtree(beside, ignore_errors=True)
        raise RunError(f"checkpoint {final} could not be written: {error}") from None
    if limit is not None:
        for old in checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def read_progress(path: Path) -> Progress:
    """The position of a checkpoint's run; raises UsageError for a foreign file."""
    try:
        values = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        if "pictures" in values:  # the key's name before version 0.2
            values["images"] = values.pop("pictures")
        return Progress(**values)
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
                "be the same run; use the same settings, or start anew in another output_dir"
            )

    if not progress.order:
        raise UsageError(
            f"{path} was written by an earlier version, whose batches ran on over an epoch's end "
            "and whose images were cut to squares, so it cannot be resumed here. Finish it "
            "with that version, or start anew in another output_dir"
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
            "ones, or start anew in another output_dir"
        )
    if progress.order != ours.order:
        raise UsageError(
            f"{path} was written with images of other shapes, in another order, with other rules "
            "of their captions or crops, or with another split of the batch (train_batch_size × "
            "processes, accumulation): it would not be the same run; use the same, or start anew "
            "in another output_dir"
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


def read(path: Path, models: Mapping[str, nn.Module]) -> Saved:
    """Read a checkpoint for injected models, which stay as they are.

    Raises:
        UsageError: adapters of other components, modules or ranks, or files that cannot be read.
    """
    try:
        # whole, not mapped into memory: Windows would keep the file from being pruned
        tensors = load((path / "adapter.safetensors").read_bytes())
        state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what its unpickler raises
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
