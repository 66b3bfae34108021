"""Saving in mid-run: checkpoints, and LoRA files of a step; and the folder for them."""

import dataclasses
import json
import time
from collections.abc import Callable

from sd_lora.config.schema import RunConfig
from sd_lora.files import write_whole
from sd_lora.findings import Finding
from sd_lora.formats.canonical import adapter_of
from sd_lora.report.events import (
    BestTaken,
    CheckpointSaved,
    LedgerRead,
    LoraSaved,
    ValidationDone,
    Warned,
)
from sd_lora.training import checkpoint
from sd_lora.training.checkpoint_folders import BEST_FILE, PREFIX, fault
from sd_lora.training.export import export, export_words, header_of, shared_config
from sd_lora.training.out_of_memory import memory_for
from sd_lora.training.output_folder import (
    LORA_PREFIX,
    remove_earlier_steps,
    remove_unfinished,
    resumes_here,
)
from sd_lora.training.processes import on_main
from sd_lora.training.run import Run
from sd_lora.training.soundness import BatchLoss, refuse_ruined
from sd_lora.training.thumbnails import image_rows
from sd_lora.training.trackers import start_trackers


def minutes_are_over(config: RunConfig, saved_at: float) -> bool:
    """Whether the last save is `checkpoint_minutes` ago. saved_at: its time, of the monotonic
    clock."""
    minutes = config.checkpoint_minutes
    return minutes is not None and time.monotonic() - saved_at >= 60 * minutes


def is_best(run: Run, step: int) -> bool:
    """Whether a checkpoint is saved for what was measured after a step: of the best one so far, if
    it is kept, and of the one that ends the run."""
    judged = run.judged
    return judged.ended_after(step) or (run.config.keeps_best and judged.best == step)


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
        write_best(run)
        checkpoint.prune(path, config.checkpoints_total_limit, config.keep_every, _kept(run))
        run.emit(LedgerRead(image_rows(run), len(run.images.instances.samples), run.ledger.width))
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
        limit, every = run.config.checkpoints_total_limit, run.config.keep_every
        checkpoint.prune(saved, limit, every, _kept(run))


def _kept(run: Run) -> int | None:
    """The step whose checkpoint is kept as the best one."""
    return run.judged.best if run.config.keeps_best else None


def write_best(run: Run) -> None:
    """Write the name of the best checkpoint and its numbers, if it is kept and there."""
    best = _kept(run)
    path = run.output_dir / f"{PREFIX}{best}"
    if best and path.is_dir():
        facts = {"checkpoint": path.name, "step": best, **run.judged.facts(best)}
        write_whole(run.output_dir / BEST_FILE, json.dumps(facts, indent=1).encode())


def end_at_best(run: Run) -> int:
    """Give a run that ends early the state of its best step, as if that were its last one, on all
    processes; returns the step. The last step stays where none was better than the start, or where
    its checkpoint is gone, of which a warning tells.
    """
    best = run.judged.best
    path = run.output_dir / f"{PREFIX}{best}"
    steps = ended = max(run.judged.rows)
    if best and on_main(run.accelerator, lambda: path.is_dir() and not fault(path)):
        losses, scores = run.validation.record(), run.scores.record() if run.scores else {}
        run.load(checkpoint.read(path, run.models))
        steps = best
        if best in run.validation.rows:
            record = {**run.validation.record(), "rows": losses["rows"], "exported": best}
            run.emit(ValidationDone(best, run.validation.rows[best], record))
        taken = {**scores, "exported": best} if scores else {}
        run.emit(BestTaken(best, ended, taken))
    elif best:
        run.emit(Warned([Finding("best-gone", path.name)]))
    else:
        run.emit(Warned([Finding("none-better", f"step {steps}")]))
    run.plan = dataclasses.replace(run.plan, num_steps=steps)
    return steps


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


def open_output(run: Run) -> None:
    """Make the output folder, with the configuration and a log that ends where the run starts."""
    if run.main:
        text = run.config.replace(seed=run.plan.seed).to_json()
        remove_unfinished(run.config)
        remove_earlier_steps(run.config, run.saved.path if run.saved else None)
        prune_earlier(run)
        write_whole(run.output_dir / "config.json", text.encode())
        run.log.cut(run.first_step)
    run.accelerator.wait_for_everyone()
    runs = run.saved.state["trackers"] if run.saved else {}
    # some of them on the web
    start_trackers(run.accelerator, shared_config(run.config), run.first_step, runs)
