"""Saving in mid-run: checkpoints, and LoRA files of a step."""

import dataclasses
import time
from collections.abc import Callable

from sd_lora.config.schema import RunConfig
from sd_lora.formats.canonical import adapter_of
from sd_lora.report.events import CheckpointSaved, LoraSaved
from sd_lora.training import checkpoint
from sd_lora.training.export import export, export_words, header_of
from sd_lora.training.out_of_memory import memory_for
from sd_lora.training.output_folder import LORA_PREFIX, resumes_here
from sd_lora.training.processes import on_main
from sd_lora.training.run import Run
from sd_lora.training.soundness import BatchLoss, refuse_ruined


def minutes_are_over(config: RunConfig, saved_at: float) -> bool:
    """Whether the last save is `checkpoint_minutes` ago. saved_at: its time, of the monotonic
    clock."""
    minutes = config.checkpoint_minutes
    return minutes is not None and time.monotonic() - saved_at >= 60 * minutes


def save_checkpoint(run: Run, step: int, batch_loss: BatchLoss) -> None:
    """Write the checkpoint of a step on the main process, then remove those that it replaces.

    batch_loss: the loss of a micro-batch, by which a ruined model is known.

    Raises:
        RunError: a failed write or a ruined model, on all processes.
    """
    config, check = run.config, _check(run, step, batch_loss)

    def save() -> None:
        check()
        progress = dataclasses.replace(run.plan.progress(step), fit=run.fit.record())
        state = run.checkpoint_state()
        with memory_for("writing files", config), run.averaged():
            state["tokens"] = run.words_state()
            header = header_of(run, adapter_of(run.models), step)
            path = checkpoint.save(run.output_dir, progress, run.models, state, header)
        checkpoint.prune(path, config.checkpoints_total_limit, config.keep_every)
        run.emit(CheckpointSaved(step, path))

    on_main(run.accelerator, save)
    run.saved_steps.append(step)


def _check(run: Run, step: int, batch_loss: BatchLoss) -> Callable[[], None]:
    """The check of the model for the main process; done at once where all must do it."""

    def check() -> None:
        with memory_for("checking the model", run.config):
            refuse_ruined(run, step, batch_loss)

    if not run.joint:
        return check
    check()
    return lambda: None


def prune_earlier(run: Run) -> None:
    """Remove the checkpoints that a run needs no more whose process was killed before it did so."""
    saved = run.saved.path if run.saved else None
    if saved is not None and resumes_here(run.config, saved):
        checkpoint.prune(saved, run.config.checkpoints_total_limit, run.config.keep_every)


def lora_is_due(run: Run, step: int) -> bool:
    """Whether LoRA files are written after a step; never at the run's end, which has its own."""
    config, epoch = run.config, run.plan.epochs.num_steps
    every = config.save_lora_every or (config.save_lora_every_epochs or 0) * epoch
    return bool(every) and step % every == 0 and step < run.plan.num_steps


def save_lora(run: Run, step: int, batch_loss: BatchLoss) -> None:
    """Write and verify the LoRA files of a step, and those of new words, in a folder of their own.

    batch_loss: as for `save_checkpoint`.

    Raises:
        RunError: as `export` and `export_words`, or a ruined model, on all processes.
    """
    place, check = run.output_dir / f"{LORA_PREFIX}{step}", _check(run, step, batch_loss)

    def save() -> None:
        check()
        with memory_for("writing files", run.config):
            files, words = export(run, step, place), export_words(run, step, place)
        run.emit(LoraSaved(step, files, words))

    with run.exportable():
        on_main(run.accelerator, save)
