"""Training: from a configuration to verified LoRA files."""

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sd_lora.adapters.merging import idle_off
from sd_lora.config.schema import TrainConfig
from sd_lora.data.batches.stream import Batch
from sd_lora.errors import Interrupted, RunError
from sd_lora.formats.verify import Verified
from sd_lora.report.digest import Digest
from sd_lora.report.events import (
    Exported,
    FindingMade,
    Listener,
    RunEnded,
    RunPlanned,
    StepDone,
    TrainingStarted,
)
from sd_lora.report.run_page import PAGE, RunPage
from sd_lora.seeds import seed_for
from sd_lora.training.agreement import Agreement
from sd_lora.training.batch_loss import batch_loss
from sd_lora.training.changes import changes_of
from sd_lora.training.checkpoint_folders import RESUME, Found
from sd_lora.training.compiled import try_compiled
from sd_lora.training.export import export, export_words, usage
from sd_lora.training.failure import told_once
from sd_lora.training.fast.step import fast
from sd_lora.training.going_back import go_back, start_of
from sd_lora.training.hub_push import push
from sd_lora.training.interruption import Requests, listening
from sd_lora.training.looks import timed
from sd_lora.training.losses import LossLog, skips
from sd_lora.training.measure import replay, validate_if_due, validation_is_due
from sd_lora.training.memory import peak_of
from sd_lora.training.model_card import write_card
from sd_lora.training.out_of_memory import memory_for
from sd_lora.training.output_folder import remove_earlier_results
from sd_lora.training.processes import determinism
from sd_lora.training.run import ImageLost, Run
from sd_lora.training.samples import (
    draw_after,
    draw_samples,
    samples_are_due,
    show_missing_samples,
    show_samples,
    tell_samples,
    write_before_after,
)
from sd_lora.training.saving import (
    end_at_best,
    is_best,
    lora_is_due,
    minutes_are_over,
    open_output,
    save_checkpoint,
    save_lora,
)
from sd_lora.training.scoring import draw_base, score_if_due, score_is_due
from sd_lora.training.setup import prepared_run
from sd_lora.training.soundness import Diverged, overflow_is_divergence, tell_silent
from sd_lora.training.trackers import end_trackers
from sd_lora.training.trial import StepOutOfMemory, step_memory, try_largest

SAVE, DRAW = 0, 1
"""Places of the wishes of a step; the last one is to end."""

LOG_EVERY = 10
"""Steps between reads of the loss: each read waits for the device."""


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    files: verified LoRA files. words: files of new words' embeddings. losses: one a step of this
    process's part of the run, mean over processes. first_losses: mean loss of the first steps, in
    training. replayed: mean loss of the same batches and noise by the trained model: progress
    without the luck of the draw. before_after: the sheet of samples, None without samples. digest:
    hashes of data, losses and tensors.
    """

    output_dir: Path
    files: list[Verified]
    words: list[Path]
    losses: list[float]
    first_losses: float
    replayed: float
    before_after: Path | None
    seconds: float
    digest: Digest


@told_once()
def train(
    config: TrainConfig, listeners: Sequence[Listener] = (), resumed: Found | None = None
) -> Result:
    """Train a LoRA and write it in every format that can hold it, verified.

    Args:
        config: the run's options.
        listeners: functions of one event, see `report.events`; `sd_lora.terminal.Terminal()` shows
            the run. Called on the main process alone.
        resumed: the checkpoint to resume, if it is verified already; else the run does that.

    Returns:
        The files and losses; on other processes than the main one the losses alone.

    Raises:
        UsageError: options, folders or images with which no run can start, before any work.
        RunError: an image that cannot be read any more, a diverged loss, a full disk, an
            interruption (after a checkpoint).
    """
    with determinism(config.deterministic):
        return _train(config, listeners, resumed)


@dataclass
class Begun:
    """A run that may take its first step. before: sample images of the base. started: its time of
    the monotonic clock."""

    run: Run
    log: LossLog
    requests: Requests
    before: list[Image.Image]
    started: float


def _train(config: TrainConfig, listeners: Sequence[Listener], resumed: Found | None) -> Result:
    """See `train`."""
    started = time.monotonic()
    with prepared_run(config, [*listeners, RunPage(config)], resumed) as run:
        begun = begin(run, started)
        with listening(begun.requests), rescued(run, begun.log):
            look_before(begun)
            with timed(run, "training"):
                done = train_steps(run, begun.log, begun.requests)
        return end(begun, done)


def begin(run: Run, started: float) -> Begun:
    """Try the largest batch, tell the plan, and bring the model to where the run starts."""
    try_largest(run, accumulate)
    try_compiled(run, accumulate)
    for finding in run.summary.findings:
        run.emit(FindingMade(finding))
    run.emit(RunPlanned(run.summary))
    with idle_off(run.models.values()):  # images of the base, also when resumed
        with memory_for("drawing sample images", run.config):
            before = draw_samples(run, "samples before training")
        draw_base(run)
    run.restore()
    limit = run.config.time_limit
    last = None if limit is None else started + limit
    requests = Requests(run.output_dir, last, run.config.max_train_time)
    return Begun(run, LossLog(run), requests, before, started)


def look_before(begun: Begun) -> None:
    """Open the output folder, and look at the model before its first step."""
    run = begun.run
    open_output(run)
    begun.requests.forget_file()
    run.emit(TrainingStarted(run.first_step, run.plan.num_steps))
    if run.main:
        tell_samples(run, 0, begun.before)
    with memory_for("drawing sample images", run.config):
        show_missing_samples(run)
    validate_if_due(run, run.first_step)
    score_if_due(run, run.first_step)


def end(begun: Begun, done: int) -> Result:
    """Measure, export and tell a run after its last step.

    Raises:
        Interrupted: `done` steps are not all.
    """
    run = begun.run
    if run.judged.ended_after(done):
        done = end_at_best(run)
    finished = done == run.plan.num_steps
    if finished:
        run.use_average()
    with memory_for("checking the model", run.config):
        first_losses, replayed = replay(run) if finished else (math.nan, math.nan)
    with memory_for("drawing sample images", run.config):
        after = draw_after(run) if finished and run.joint else None
    run.release_distributed()
    if not finished:
        end_trackers(run.accelerator, run.emit)
        reason = begun.requests.reason or "interrupted by another process"
        if run.main:
            begun.requests.forget_file()
        raise Interrupted(
            f"{reason} at step {done} of {run.plan.num_steps}; continue with the same command "
            f"and {RESUME}"
        )
    digest = run.digest()
    files, words, sheet = finish(run, begun.before, after, digest) if run.main else ([], [], None)
    seconds = time.monotonic() - begun.started
    end_trackers(run.accelerator, run.emit)  # a warning of one comes before the last lines
    page, peak = run.output_dir / PAGE, peak_of(run.accelerator.device)
    run.emit(RunEnded(seconds, sheet, digest, page, run.spent, peak))
    losses = begun.log.losses
    return Result(
        run.output_dir, files, words, losses, first_losses, replayed, sheet, seconds, digest
    )


@dataclass(frozen=True)
class Turn:
    """A micro-batch that a run is to learn now, by its number. done: steps before."""

    run: Run
    number: int
    batch: Batch
    done: int

    def learn(self) -> Tensor:
        """Add its gradients, by itself; returns its part of the step's loss, detached."""
        with step_memory(self.run, self.number, self.done):
            return accumulate(self.run, self.number, self.batch, self.done)


Steps = Generator[Turn, Tensor, int]
"""The steps of a run: yields a micro-batch when its gradients are to be added, is sent its loss,
and returns how many steps are done in all. So one run can go by itself, and several together."""


def train_steps(run: Run, log: "LossLog", requests: Requests | None = None) -> int:
    """Do the optimiser steps from the run's first one on; returns how many are done in all.

    requests: to end or to save; None: of nobody.
    """
    steps = steps_of(run, log, requests or Requests(run.output_dir))
    try:
        turn = next(steps)
        while True:
            turn = steps.send(turn.learn())
    except StopIteration as last:
        return int(last.value)


def steps_of(run: Run, log: "LossLog", requests: Requests) -> Steps:
    """The optimiser steps from the run's first one on, and again from where it goes back to."""
    start, done, agreed = start_of(run), run.first_step, Agreement(run.accelerator)
    while True:
        try:
            return (yield from steps_from(done, run, log, requests, agreed))
        except Diverged as error:
            done = go_back(run, log, error, start)


def steps_from(done: int, run: Run, log: "LossLog", requests: Requests, agreed: Agreement) -> Steps:
    """The steps after the first `done` ones."""
    config, accelerator, num_steps = run.config, run.accelerator, run.plan.num_steps
    batches, saved_at = run.batches(done), time.monotonic()
    while done < num_steps and not run.judged.ended_after(done):
        # one optimiser step: accumulate gradients, clip, update
        loss = torch.zeros((), device=accelerator.device)
        for number, batch in one_step(batches):
            loss = loss + (yield Turn(run, number, batch, done))
        for parameter in run.text.stops.stopped_parameters(done):
            parameter.grad = None  # no step, no decay, and no part in the norm
        if done == run.first_step:
            run.latents.check()
            tell_silent(run, done)
        norm = accelerator.clip_grad_norm_(run.parameters, config.max_grad_norm or math.inf)
        skipped = skips(run, norm)
        if not skipped:
            with overflow_is_divergence(done + 1), memory_for("updating the weights", config):
                run.optimizer.step()
            run.limit_norms(done)
        run.learn_weights(skipped)
        if run.average:
            run.average.update(done + 1)
        run.optimizer.zero_grad()
        done += 1
        log.add(done, loss, norm)
        run.next_rate()
        run.emit(StepDone(done))

        # once in a while: read the losses, save, stop, draw samples
        if done % LOG_EVERY == 0 or done == num_steps:
            log.flush()
        saves = requests.take_save() or minutes_are_over(config, saved_at)
        wishes = [saves, requests.wants_sample, bool(requests.reason)]  # SAVE, DRAW, to end
        is_time, drawing, stopping = agreed(wishes, wait=done == num_steps)
        saving = stopping or is_time or done % config.checkpointing_steps == 0 or done == num_steps
        looks = validation_is_due(run, done) or score_is_due(run, done)
        if looks or drawing or samples_are_due(run, done):
            log.flush()  # trackers take steps in their order alone
        validate_if_due(run, done)  # before the checkpoint, which has its losses and scores
        score_if_due(run, done)
        saving |= is_best(run, done)
        if saving or lora_is_due(run, done):
            log.flush()  # a diverged run leaves no checkpoint
        if lora_is_due(run, done):  # before the checkpoint: a run killed between does it again
            with memory_for("writing files", config), run.averaged():
                save_lora(run, done, batch_loss)
        if saving:
            save_checkpoint(run, done, batch_loss)
            saved_at = time.monotonic()
            agreed.meet(SAVE)
        if stopping:
            break
        if drawing or samples_are_due(run, done):
            with memory_for("drawing sample images", config), run.averaged():
                show_samples(run, done, requests)
            agreed.meet(DRAW)
    return done


def accumulate(run: Run, number: int, batch: Batch, done: int) -> Tensor:
    """Add the gradients of a micro-batch; returns its part of the step's loss, detached."""
    if run.config.dropouts:
        process = run.accelerator.process_index
        draw = run.stream.draw_of(run.plan.epochs.micro_batch(number))
        again = ("draw", draw) if draw else ()
        torch.manual_seed(seed_for(run.plan.seed, "dropout", number, process, *again))
    apart = run.fit.at_once or run.config.masks_ranks  # masks are those of one part
    parts = batch.by_size(run.fit.at_once) if apart else [batch]
    losses = []
    for part in parts:
        exchange = run.gradient_exchange(batch.last and part is parts[-1])
        with exchange, run.unmasking():
            learn_one = run.graphs.learn if run.graphs else learn
            losses.append(learn_one(run, part, done))
    return torch.stack(losses).sum()


def learn(run: Run, batch: Batch, done: int) -> Tensor:
    """Go forward and backward; returns the batch's part of the step's loss, detached."""
    with fast(run.fast_models):
        loss = batch_loss(run, batch, done) / batch.accumulation_steps
        run.accelerator.backward(loss)
    return loss.detach()


def one_step(batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
    """Yield numbered micro-batches up to the last one of their optimiser step."""
    for number, batch in batches:
        yield number, batch
        if batch.last:
            return


@contextmanager
def rescued(run: Run, log: LossLog) -> Iterator[None]:
    """Save the steps before one whose image is lost, or for which the memory is too small."""
    try:
        yield
    except (ImageLost, StepOutOfMemory) as error:
        remedy, end = "restore the image", ". "
        if isinstance(error, StepOutOfMemory):
            remedy, end = "give one of the flags", "\n"
        if log.step == run.first_step:
            raise
        if run.accelerator.num_processes > 1:  # the others wait in their step, and cannot save
            raise RunError(
                f"{error}{end}{remedy.capitalize()}, and continue with the same command and "
                f"{RESUME}"
            ) from None
        log.flush()
        save_checkpoint(run, log.step, batch_loss)
        raise RunError(
            f"{error}{end}Step {log.step} is saved: {remedy}, and continue with the same command "
            f"and {RESUME}"
        ) from None


def finish(
    run: Run,
    before: list[Image.Image],
    after: dict[float, list[Image.Image]] | None,
    digest: Digest,
) -> tuple[list[Verified], list[Path], Path | None]:
    """Write the digest, the verified LoRA files, the sheet of samples before and after and the
    model card, and upload them where that is asked for.

    Returns the files, those of new words, and the sheet's path.
    """
    steps, place = run.plan.num_steps, run.output_dir
    digest.write(place)
    with memory_for("writing files", run.config):
        files, words = export(run, steps, place), export_words(run, steps, place)
    remove_earlier_results(run.config, [*(file.path for file in files), *words])
    changes = {} if run.joint else changes_of(run.models)  # a part of the base is elsewhere
    lines = usage(run, files, words)
    run.emit(Exported(files, lines, changes))
    with memory_for("drawing sample images", run.config):
        sheet = write_before_after(run, before, after)
    shared = write_card(run, [*(file.path for file in files), *words], lines)
    if run.repo:
        push(run, shared)
    return files, words, sheet
