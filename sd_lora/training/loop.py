"""One run, from a configuration to verified files."""

import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sd_lora.adapters.inject import deltas_of, limit_norms
from sd_lora.config.contradictions import DROPOUTS
from sd_lora.config.schema import TrainConfig
from sd_lora.data.batches.stream import Batch
from sd_lora.diffusion.loss import sample_losses, weighted_loss
from sd_lora.diffusion.schedule import draw_noise, draw_timesteps
from sd_lora.errors import RunError
from sd_lora.files import write_whole
from sd_lora.formats.embeddings import how_to_load
from sd_lora.formats.files import formats_of
from sd_lora.formats.verify import Verified
from sd_lora.report import summary as report
from sd_lora.report.sheets import grid, write_image
from sd_lora.seeds import seed_for
from sd_lora.training import checkpoint
from sd_lora.training.export import export, export_words
from sd_lora.training.previews import sample_prompts, sample_row, validate
from sd_lora.training.setup import ImageLost, Run, prepare

LOG_EVERY = 10
"""Steps between reads of the loss: each one waits for the device."""

REPLAYED = 20
"""How many of the first steps are asked once more at the end."""


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    files: the verified exports. words: files of new words' embeddings.
    losses: of every step of this run, averaged over processes.
    first_losses, replayed: mean loss of the run's first steps as they were, and of the very same
        batches and noise by the trained model: what was learned, without the luck of the draw.
    before_after: the sample grid, None if no sample images were asked for.
    """

    output_dir: Path
    files: list[Verified]
    words: list[Path]
    losses: list[float]
    first_losses: float
    replayed: float
    before_after: Path | None
    seconds: float


@dataclass
class History:
    """Losses and gradient norms, kept on the device until the next log tick; step: how many steps
    are done."""

    step: int = 0
    waiting: list[tuple[int, float, Tensor, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def flush(self, run: Run) -> float:
        """Reads what waits, logs it, and returns its mean loss; a loss that is not finite ends
        the run."""
        if not self.waiting:
            return math.nan
        values = torch.stack([torch.stack([loss, norm]) for _, _, loss, norm in self.waiting])
        values = run.accelerator.reduce(values, "mean").tolist()
        steps = [(step, lr) for step, lr, _, _ in self.waiting]
        self.waiting.clear()
        lines = []
        for (step, lr), (loss, norm) in zip(steps, values, strict=True):
            # under fp16 the scaler meets infinite gradients now and then, and skips their step
            bad_norm = not math.isfinite(norm) and run.accelerator.scaler is None
            if bad_norm or not math.isfinite(loss):
                finite = math.isfinite(loss)
                what = f"gradient's norm became {norm}" if finite else f"loss became {loss}"
                raise RunError(
                    f"the {what} at step {step}: the run has diverged and stops here. Lower "
                    "--learning_rate, and start anew or with --resume_from_checkpoint latest"
                )
            row = {"step": step, "loss": loss, "lr": lr}
            row |= {"grad_norm": norm} if math.isfinite(norm) else {}
            run.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step)
            lines.append(json.dumps(row))
            self.losses.append(loss)
        if run.main:
            try:
                with open(_log(run), "a", encoding="utf-8") as file:
                    file.write("\n".join(lines) + "\n")
            except OSError as error:
                raise RunError(f"{_log(run)} could not be written: {error.strerror}") from None
        return sum(self.losses[-len(lines) :]) / len(lines)


def _log(run: Run) -> Path:
    return run.output_dir / "training_log.jsonl"


def batch_loss(run: Run, batch: Batch, step: int) -> Tensor:
    """Returns a process's part of the loss of one micro-batch, a function of its slots' addresses
    and the model: the mean over processes and over the step's micro-batches is the step's loss.

    step: how many steps are done, since text encoders and new words may stop learning.
    """
    return torch.stack([_loss(run, part, step) for part in batch.by_size()]).sum()


def _loss(run: Run, batch: Batch, step: int) -> Tensor:
    """Returns the loss of samples of one size."""
    config, schedule, device = run.config, run.schedule, run.accelerator.device
    items = batch.items
    addresses = [item.address for item in items]
    drawn = run.latents.latents(items, batch.loaded)
    x0 = drawn.x0  # (B, C, H, W)
    noise = draw_noise(x0.shape[1:], addresses, config.noise_offset).to(device)
    first, last = run.timesteps
    t = draw_timesteps(addresses, last, first).to(device)
    x_t = run.unet_input(schedule.add_noise(x0, noise, t), batch)
    conditions = run.conditioning(items, step)
    unet = run.prepared["unet"]
    prediction = unet(x_t, schedule.timesteps[t], **conditions.arguments()).sample
    losses = sample_losses(prediction, x0, noise, t, schedule, drawn.mask)
    prior = config.prior_loss_weight
    weights = [item.weight * (1.0 if item.kind == "instance" else prior) for item in items]
    return weighted_loss(losses, torch.tensor(weights, device=device), batch.loss_scale)


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Collects SIGINT and SIGTERM, so that the loop ends after a whole step; twice is at once."""
    requests: list[str] = []
    previous: dict[int, Any] = {}

    def request(number: int, crop: object) -> None:
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


def _asked_to_stop(run: Run, requests: list[str]) -> bool:
    """Whether any process was asked to stop: all must leave the loop at the same step."""
    if run.accelerator.num_processes == 1:
        return bool(requests)
    flag = torch.tensor(float(bool(requests)), device=run.accelerator.device)
    return bool(run.accelerator.reduce(flag, "sum") > 0)


def _save_checkpoint(run: Run, step: int) -> None:
    if run.main:
        scaler = run.accelerator.scaler
        state = {
            "optimizer": run.optimizer.state_dict(),
            "lr_scheduler": run.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "tokens": run.texts.tokens.state_dict() if run.texts.tokens else None,
        }
        limit = run.config.checkpoints_total_limit
        checkpoint.save(run.output_dir, run.plan.progress(step), run.models, state, limit)
    run.accelerator.wait_for_everyone()


def _optimise(run: Run, history: History, requests: list[str]) -> int:
    """Runs the steps from the run's position on; returns how many are done in all."""
    with report.step_bar(run.plan.num_steps, run.first_step, run.main) as bar:
        try:
            return _steps(run, history, requests, bar)
        except ImageLost as error:
            done = history.step
            if run.accelerator.num_processes > 1 or done == run.first_step:
                raise  # other processes wait in their step, and would not help to save
            history.flush(run)
            _save_checkpoint(run, done)
            raise RunError(
                f"{error}. Step {done} is kept: mend that, and go on with the same command and "
                "--resume_from_checkpoint latest"
            ) from None


def _steps(run: Run, history: History, requests: list[str], bar: tqdm) -> int:
    config, accelerator, step = run.config, run.accelerator, run.first_step
    models, parameters = list(run.prepared.values()), run.parameters
    history.step = step
    norm = torch.zeros((), device=accelerator.device)
    total = torch.zeros((), device=accelerator.device)
    micro = run.plan.epochs.first_of_step(step)
    begins = True
    for batch in run.batches():
        if begins:  # an epoch's last step may have fewer micro-batches
            accelerator.gradient_accumulation_steps = batch.accumulation_steps
            accelerator.step = 0
        begins = batch.last
        if any(getattr(config, name) for name in DROPOUTS):
            torch.manual_seed(seed_for(run.plan.seed, "dropout", micro, accelerator.process_index))
        micro += 1
        with accelerator.accumulate(*models):
            loss = batch_loss(run, batch, step)
            accelerator.backward(loss)
            total = total + loss.detach() / batch.accumulation_steps
            for parameter in run.texts.stopped(step):
                parameter.grad = None  # no step, no decay, and no part in the norm
            if accelerator.sync_gradients:
                limit = config.max_grad_norm or math.inf
                norm = accelerator.clip_grad_norm_(parameters, limit)
            run.optimizer.step()
            if accelerator.sync_gradients and config.scale_weight_norms:
                for component, model in run.models.items():
                    if not run.texts.has_stopped(component, step):
                        limit_norms(model, config.scale_weight_norms)
            run.optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        history.step = step
        history.waiting.append((step, _rate(run.optimizer), total, norm))
        run.lr_scheduler.step()
        total = torch.zeros_like(total)
        bar.update()
        if step % LOG_EVERY == 0 or step == run.plan.num_steps:
            bar.set_postfix(loss=f"{history.flush(run):.4f}")
        stopping = _asked_to_stop(run, requests)
        if step % config.checkpointing_steps == 0 or (stopping and step < run.plan.num_steps):
            history.flush(run)  # a diverged run leaves no checkpoint
            _save_checkpoint(run, step)
        if stopping:
            break
        validate(run, step)
    return step


@torch.no_grad()
def replay(run: Run) -> tuple[float, float]:
    """Returns the mean loss of the first steps as logged, and of the same batches and noise now.

    Single losses say little: they differ tenfold by timestep. Randomness being a function of the
    position, the first steps can be asked once more. "Then" is NaN on other processes than the
    main one, and where a resumed run's log is gone.
    """
    steps = min(REPLAYED, run.plan.num_steps)
    then = []
    if run.main:
        rows = [json.loads(line) for line in _log(run).read_text(encoding="utf-8").splitlines()]
        then = [row["loss"] for row in rows if row["step"] <= steps]
    for model in run.models.values():
        model.eval()
    micro_batches = range(run.plan.epochs.first_of_step(steps))
    # no gradients, so nothing to exchange
    texts = dataclasses.replace(run.texts, trained={})
    alone = dataclasses.replace(run, prepared=run.models, texts=texts)
    try:
        batches = map(run.stream.batch, micro_batches)
        losses = [batch_loss(alone, b, run.plan.num_steps) / b.accumulation_steps for b in batches]
        mean = torch.stack(losses).sum() / steps
    except RunError:  # an image that is lost now costs a number, not what was trained
        mean = torch.tensor(math.nan, device=run.accelerator.device)
    now = run.accelerator.reduce(mean, "mean")
    return (sum(then) / steps if len(then) == steps else math.nan), float(now)


def _rate(optimizer: torch.optim.Optimizer) -> float:
    """Returns the learning rate that is logged: of modules without a factor of their own."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("multiple", 1.0)


def train(config: TrainConfig) -> Result:
    """Trains a LoRA and writes it in the formats that can hold it, verified.

    Returns what was written; on other processes than the main one, nothing but the losses.

    Raises:
        UsageError: what cannot be meant, before any work.
        RunError: an image that cannot be read, a diverged loss, a full disk, an interruption
            (after a checkpoint).
    """
    started = time.monotonic()
    try:
        run = prepare(config)
        report.say(f"sd_lora trains a LoRA:\n{run.summary.text()}", run.main)
        before = sample_row(run)  # of the bare base, also where a checkpoint goes on
        run.restore()
        history = History()
        with stop_requests() as requests:
            _open_output(run)
            step = _optimise(run, history, requests)
        whole = step == run.plan.num_steps
        first_losses, replayed = replay(run) if whole else (math.nan, math.nan)
        release_distributed(run)
        if not whole:
            run.accelerator.end_training()
            raise RunError(
                f"interrupted by {requests[0] if requests else 'another process'} at step {step} "
                f"of {run.plan.num_steps}; go on with the same command and "
                "--resume_from_checkpoint latest"
            )
        files, words, before_after = _finish(run, before) if run.main else ([], [], None)
        seconds = time.monotonic() - started
        result = Result(
            run.output_dir, files, words, history.losses, first_losses, replayed, before_after,
            seconds,
        )  # fmt: skip
        if run.main:
            _say_result(run, result)
        run.accelerator.end_training()
        return result
    finally:
        # Accelerate keeps precision and devices in a singleton: the next run may want others
        AcceleratorState._reset_state(reset_partial_state=True)


def release_distributed(run: Run) -> None:
    """Ends what the processes do together; the others do not wait for the main one's exports.

    DistributedDataParallel goes first, while all are there: dropped after its process group, the
    group's destructor waits for a thread that waits for the interpreter (torch 2.13, gloo).
    """
    run.prepared.clear()
    run.texts.trained.clear()
    run.accelerator.free_memory()
    run.accelerator.wait_for_everyone()


def _open_output(run: Run) -> None:
    """Makes the output folder, with the configuration and a log that ends where the run starts."""
    if run.main:
        text = dataclasses.replace(run.config, seed=run.plan.seed).to_json()
        write_whole(run.output_dir / "config.json", text.encode())
        log = _log(run)
        rows = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        kept = [row + "\n" for row in rows if json.loads(row)["step"] <= run.first_step]
        write_whole(log, "".join(kept).encode())
    run.accelerator.wait_for_everyone()
    run.accelerator.init_trackers("sd_lora", config=_plain(run.config))


def _finish(run: Run, before: list[Image.Image]) -> tuple[list[Verified], list[Path], Path | None]:
    files, words = export(run), export_words(run)
    if not before:
        return files, words, None
    path = run.output_dir / "before_after.png"
    rows, labels = [before, sample_row(run)], ["before", f"after {run.plan.num_steps} steps"]
    write_image(path, grid(rows, labels, sample_prompts(run)))
    return files, words, path


def _say_result(run: Run, result: Result) -> None:
    steps = min(REPLAYED, run.plan.num_steps)
    then = "" if math.isnan(result.first_losses) else f"{result.first_losses:.4f} then, "
    report.say(
        f"done in {report.duration(result.seconds)}; loss of the first {steps} steps' batches and "
        f"noise: {then}{result.replayed:.4f} now"
    )
    report.say(report.verified(result.files))
    base = str(run.config.pretrained_model_name_or_path)
    pipeline = f'DiffusionPipeline.from_pretrained("{base}")'
    if Path(base).expanduser().is_file():
        name = run.parts.family.pipelines[run.parts.task.name]
        pipeline = f'{name}.from_single_file("{base}")'
    formats, _ = formats_of({name: deltas_of(model) for name, model in run.models.items()})
    report.say(report.how_to_use(pipeline, [file.path for file in result.files], formats))
    if run.texts.tokens:
        for path, concept in zip(result.words, run.texts.tokens.concepts, strict=True):
            lines = how_to_load(path, concept.word, run.parts.family.text_encoders)
            report.say(f"  {path}  the word {concept.word}, verified; in diffusers:")
            report.say("    " + lines.replace("\n", "\n    "))
    if result.before_after:
        report.say(f"  look at {result.before_after}")


def _plain(config: TrainConfig) -> dict[str, Any]:
    """Returns the configuration as trackers take it: numbers, texts and truth values alone."""
    plain = int | float | str | bool
    return {k: v if isinstance(v, plain) else str(v) for k, v in config.as_dict().items()}
