"""Training: from a configuration to verified LoRA files."""

import dataclasses
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

from sd_lora.config.schema import TrainConfig
from sd_lora.data.batches.stream import Batch
from sd_lora.diffusion.loss import sample_losses, weighted_loss
from sd_lora.diffusion.schedule import draw_noise, draw_timesteps
from sd_lora.errors import RunError
from sd_lora.files import write_whole
from sd_lora.formats.verify import Verified
from sd_lora.report.events import (
    CheckpointSaved,
    Exported,
    FindingMade,
    Listener,
    RunEnded,
    RunPlanned,
    StepDone,
    StepRecord,
    StepsLogged,
    TrainingStarted,
    Validated,
)
from sd_lora.seeds import seed_for
from sd_lora.training import checkpoint
from sd_lora.training.checkpoint_folders import RESUME
from sd_lora.training.export import export, export_words, usage
from sd_lora.training.optimizers import use_average
from sd_lora.training.output_folder import remove_earlier_results, remove_earlier_steps
from sd_lora.training.run import ImageLost, Run
from sd_lora.training.samples import (
    draw_samples,
    samples_are_due,
    show_samples,
    write_before_after,
)
from sd_lora.training.setup import prepare

LOG_EVERY = 10
"""Steps between reads of the loss: each read waits for the device."""

VALIDATION_STEPS = 20
"""Number of first steps whose batches and noise the trained model is asked again."""

DROPOUTS = ("lora_dropout", "neuron_dropout", "rank_dropout", "module_dropout")


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    files: verified LoRA files. words: files of new words' embeddings. losses: one a step of this
    process's part of the run, mean over processes. first_losses: mean loss of the first steps, in
    training. replayed: mean loss of the same batches and noise by the trained model: progress
    without the luck of the draw. before_after: the sheet of samples, None without samples.
    """

    output_dir: Path
    files: list[Verified]
    words: list[Path]
    losses: list[float]
    first_losses: float
    replayed: float
    before_after: Path | None
    seconds: float


def train(config: TrainConfig, listeners: Sequence[Listener] = ()) -> Result:
    """Train a LoRA and write it in every format that can hold it, verified.

    Args:
        config: the run's options.
        listeners: functions of one event, see `report.events`; `sd_lora.terminal.Terminal()` shows
            the run. Called on the main process alone.

    Returns:
        The files and losses; on other processes than the main one the losses alone.

    Raises:
        UsageError: options, folders or images with which no run can start, before any work.
        RunError: an image that cannot be read any more, a diverged loss, a full disk, an
            interruption (after a checkpoint).
    """
    started = time.monotonic()
    try:
        run = prepare(config, listeners)
        for finding in run.summary.findings:
            run.emit(FindingMade(finding))
        run.emit(RunPlanned(run.summary))
        before = draw_samples(run)  # of the bare base model, also in a resumed run
        run.restore()
        log = LossLog(run)
        with stop_requests() as requests, rescued(run, log):
            open_output(run)
            run.emit(TrainingStarted(run.first_step, run.plan.num_steps))
            done = train_steps(run, log, requests)
        finished = done == run.plan.num_steps
        if finished:
            use_average(run.optimizer)
        first_losses, replayed = replay(run) if finished else (math.nan, math.nan)
        run.release_distributed()
        if not finished:
            run.accelerator.end_training()
            raise RunError(
                f"interrupted by {requests[0] if requests else 'another process'} at step {done} "
                f"of {run.plan.num_steps}; continue with the same command and "
                f"{RESUME}"
            )
        files, words, sheet = finish(run, before) if run.main else ([], [], None)
        seconds = time.monotonic() - started
        run.emit(RunEnded(seconds, sheet))
        run.accelerator.end_training()
        return Result(
            run.output_dir, files, words, log.losses, first_losses, replayed, sheet, seconds
        )
    finally:
        # Accelerate keeps precision and devices in a singleton: the next run may want others
        AcceleratorState._reset_state(reset_partial_state=True)


def train_steps(run: Run, log: "LossLog", requests: Sequence[str] = ()) -> int:
    """Do the optimiser steps from the run's first one on; returns how many are done in all.

    requests: names of signals that ask to stop; the list may grow meanwhile.
    """
    config, accelerator, num_steps = run.config, run.accelerator, run.plan.num_steps
    batches = run.batches()
    done = run.first_step
    while done < num_steps:
        # one optimiser step: accumulate gradients, clip, update
        loss = torch.zeros((), device=accelerator.device)
        for number, batch in one_step(batches):
            loss = loss + accumulate(run, number, batch, done)
        for parameter in run.text.stops.stopped_parameters(done):
            parameter.grad = None  # no step, no decay, and no part in the norm
        norm = accelerator.clip_grad_norm_(run.parameters, config.max_grad_norm or math.inf)
        run.optimizer.step()
        run.limit_norms(done)
        run.optimizer.zero_grad()
        done += 1
        log.add(done, loss, norm)
        run.lr_scheduler.step()
        run.emit(StepDone(done))

        # once in a while: read the losses, save, stop, draw samples
        if done % LOG_EVERY == 0 or done == num_steps:
            log.flush()
        stopping = stop_requested(run, requests)
        if done % config.checkpointing_steps == 0 or (stopping and done < num_steps):
            log.flush()  # a diverged run leaves no checkpoint
            save_checkpoint(run, done)
        if stopping:
            break
        if samples_are_due(run, done):
            with run.averaged():
                show_samples(run, done)
    return done


def accumulate(run: Run, number: int, batch: Batch, done: int) -> Tensor:
    """Add the gradients of a micro-batch; returns its part of the step's loss, detached."""
    if any(getattr(run.config, name) for name in DROPOUTS):
        process = run.accelerator.process_index
        torch.manual_seed(seed_for(run.plan.seed, "dropout", number, process))
    with run.gradient_exchange(batch.last):
        loss = batch_loss(run, batch, done)
        run.accelerator.backward(loss / batch.accumulation_steps)
    return loss.detach() / batch.accumulation_steps


def one_step(batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
    """Yield numbered micro-batches up to the last one of their optimiser step."""
    for number, batch in batches:
        yield number, batch
        if batch.last:
            return


def batch_loss(run: Run, batch: Batch, step: int) -> Tensor:
    """A process's part of the loss of one micro-batch, a function of its items' addresses and the
    model: the mean over processes and over the step's micro-batches is the step's loss.

    step: number of steps done, since text encoders and new words may stop learning.
    """
    return torch.stack([_loss(run, part, step) for part in batch.by_size()]).sum()


def _loss(run: Run, batch: Batch, step: int) -> Tensor:
    """Loss of items of one size."""
    config, schedule, device = run.config, run.schedule, run.accelerator.device
    items = batch.items
    addresses = [item.address for item in items]
    drawn = run.latents.latents(items, batch.loaded)
    x0 = drawn.x0  # (B, C, H, W)
    noise = draw_noise(x0.shape[1:], addresses, config.noise_offset).to(device)
    first, last = run.timesteps
    t = draw_timesteps(addresses, last, first).to(device)
    x_t = run.unet_input(schedule.add_noise(x0, noise, t), batch)
    conditions = run.conditions(items, step)
    unet = run.prepared["unet"]
    prediction = unet(x_t, schedule.timesteps[t], **conditions.arguments()).sample
    losses = sample_losses(prediction, x0, noise, t, schedule, drawn.mask)
    weights = torch.tensor([item.weight for item in items], device=device)
    return weighted_loss(losses, weights, batch.loss_scale)


@dataclass
class LossLog:
    """Losses and gradient norms, kept on the device until they are read together.

    waiting: step, learning rate, those of the groups, loss and norm of steps that were not read
    yet. losses: all read ones. step: the last one added.
    """

    run: Run
    waiting: list[tuple[int, float, dict[str, float], Tensor, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.step = self.run.first_step

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Keep the numbers of a step, with the learning rates that it used."""
        self.step, run = step, self.run
        self.waiting.append((step, run.learning_rate, run.learning_rates, loss, norm))

    def flush(self) -> None:
        """Read the waiting numbers and tell them.

        Raises:
            RunError: a loss or gradient norm that is not finite.
        """
        if not self.waiting:
            return
        values = torch.stack([torch.stack([loss, norm]) for *_, loss, norm in self.waiting])
        values = self.run.accelerator.reduce(values, "mean").tolist()
        steps = [(step, rate, rates) for step, rate, rates, _, _ in self.waiting]
        self.waiting.clear()
        records = []
        for (step, rate, rates), (loss, norm) in zip(steps, values, strict=True):
            self._refuse_divergence(step, loss, norm)
            found = norm if math.isfinite(norm) else None
            records.append(StepRecord(step, loss, rate, found, rates))
        self.losses += [record.loss for record in records]
        self.run.emit(StepsLogged(tuple(records)))

    def _refuse_divergence(self, step: int, loss: float, norm: float) -> None:
        # under fp16 the scaler meets infinite gradients now and then, and skips their step
        bad_norm = not math.isfinite(norm) and self.run.accelerator.scaler is None
        if math.isfinite(loss) and not bad_norm:
            return
        finite = math.isfinite(loss)
        found = f"gradient's norm became {norm}" if finite else f"loss became {loss}"
        raise RunError(
            f"the {found} at step {step}: the run has diverged and stops here. Lower "
            f"--learning_rate, and start anew or with {RESUME}"
        )


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Collect SIGINT and SIGTERM, so that the loop ends after a whole step; a second one is
    obeyed at once."""
    requests: list[str] = []
    previous: dict[int, Any] = {}

    def request(number: int, frame: object) -> None:
        if requests:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        requests.append(signal.Signals(number).name)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
    except ValueError:  # not in the main thread: whoever started this one handles signals
        pass
    try:
        yield requests
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def stop_requested(run: Run, requests: Sequence[str]) -> bool:
    """Whether any process was asked to stop: all must leave the loop at the same step."""
    if run.accelerator.num_processes == 1:
        return bool(requests)
    flag = torch.tensor(float(bool(requests)), device=run.accelerator.device)
    return bool(run.accelerator.reduce(flag, "sum") > 0)


def save_checkpoint(run: Run, step: int) -> None:
    """Write the checkpoint of a step, on the main process."""
    if run.main:
        limit = run.config.checkpoints_total_limit
        progress, state = run.plan.progress(step), run.checkpoint_state()
        path = checkpoint.save(run.output_dir, progress, run.models, state, limit)
        run.emit(CheckpointSaved(step, path))
    run.accelerator.wait_for_everyone()


@contextmanager
def rescued(run: Run, log: LossLog) -> Iterator[None]:
    """Save the steps before one whose image is lost."""
    try:
        yield
    except ImageLost as error:
        if run.accelerator.num_processes > 1 or log.step == run.first_step:
            raise  # other processes wait in their step, and would not help to save
        log.flush()
        save_checkpoint(run, log.step)
        raise RunError(
            f"{error}. Step {log.step} is saved: restore the image, and continue with the same "
            f"command and {RESUME}"
        ) from None


@torch.no_grad()
def replay(run: Run) -> tuple[float, float]:
    """Mean loss of the first steps as logged, and of the same batches and noise now.

    Single losses say little: they differ tenfold by timestep. Randomness is a function of the
    position, so the first steps can be computed once more. The first number is NaN on other
    processes than the main one, and where a resumed run's log is gone.
    """
    steps = min(VALIDATION_STEPS, run.plan.num_steps)
    first = []
    if run.main:
        first = [row["loss"] for row in run.log.rows() if row["step"] <= steps]
    for model in run.models.values():
        model.eval()
    # no gradients, so nothing to exchange
    alone = dataclasses.replace(run, prepared=run.models, text=run.text.without_learning())
    try:
        batches = map(run.stream.batch, range(run.plan.epochs.first_of_step(steps)))
        losses = [batch_loss(alone, b, run.plan.num_steps) / b.accumulation_steps for b in batches]
        mean = torch.stack(losses).sum() / steps
    except RunError:  # a lost image costs a number now, not the trained LoRA
        mean = torch.tensor(math.nan, device=run.accelerator.device)
    trained = float(run.accelerator.reduce(mean, "mean"))
    mean_first = sum(first) / steps if len(first) == steps else math.nan
    run.emit(Validated(steps, mean_first, trained))
    return mean_first, trained


def open_output(run: Run) -> None:
    """Make the output folder, with the configuration and a log that ends where the run starts."""
    if run.main:
        text = run.config.replace(seed=run.plan.seed).to_json()
        remove_earlier_steps(run.config, run.saved.path if run.saved else None)
        write_whole(run.output_dir / "config.json", text.encode())
        run.log.cut(run.first_step)
    run.accelerator.wait_for_everyone()
    plain = int | float | str | bool  # all that trackers take
    values = {k: v if isinstance(v, plain) else str(v) for k, v in run.config.as_dict().items()}
    run.accelerator.init_trackers("sd_lora", config=values)


def finish(run: Run, before: list[Image.Image]) -> tuple[list[Verified], list[Path], Path | None]:
    """Write and verify the LoRA files, and the sheet of samples before and after.

    Returns the files, those of new words, and the sheet's path.
    """
    files, words = export(run), export_words(run)
    remove_earlier_results(run.config, [*(file.path for file in files), *words])
    run.emit(Exported(files, usage(run, files, words)))
    return files, words, write_before_after(run, before)
