"""From a configuration to a run that is ready for its first step, or to an error before it."""

import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sd_lora.adapters.inject import adapted_layers, inject, lora_layers
from sd_lora.data.cache import Latents
from sd_lora.data.sources import Source
from sd_lora.data.stream import Batch, Order, Slot, Stream
from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.errors import UsageError
from sd_lora.models.load import Parts, load_parts
from sd_lora.models.prompts import token_ids, too_long
from sd_lora.training import checkpoint, report
from sd_lora.training.config import TrainConfig
from sd_lora.training.dataset import (
    DTYPES,
    cache_embeddings,
    cache_latents,
    class_samples,
    find_samples,
)
from sd_lora.training.optimizers import build_lr_scheduler, build_optimizer


def _as_is(batch: Any) -> Any:
    return batch


@dataclass
class Run:
    """Everything that the loop needs.

    models: component → injected model. prepared: the same, as Accelerate wrapped them.
    embeddings: caption → (77, D), None when the text encoder is trained.
    samples_per_step: instances per optimiser step, over all processes.
    """

    config: TrainConfig
    seed: int
    accelerator: Accelerator
    parts: Parts
    models: dict[str, nn.Module]
    prepared: dict[str, nn.Module]
    schedule: NoiseSchedule
    latents: Latents
    embeddings: dict[str, Tensor] | None
    stream: Stream
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    num_steps: int
    num_samples: int
    samples_per_step: int
    summary: report.Summary
    first_step: int = 0

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for model in self.models.values() for p in lora_layers(model)]

    def progress(self, step: int) -> checkpoint.Progress:
        return checkpoint.Progress(step, self.seed, self.samples_per_step, self.num_samples)

    def batches(self) -> Iterator[Batch]:
        """Yields this process's micro-batches from the run's position on."""
        start = self.first_step * self.config.gradient_accumulation_steps
        loader = DataLoader(
            self.stream,
            batch_size=None,
            sampler=range(start, len(self.stream)),
            num_workers=self.config.dataloader_num_workers,
            collate_fn=_as_is,
        )
        return iter(loader)

    def conditioning(self, slots: list[Slot]) -> Tensor:
        """Returns the text conditioning (B, 77, D) of a batch, in the base's dtype."""
        captions = [slot.caption for slot in slots]
        if self.embeddings is None:
            ids = token_ids(self.parts.tokenizer, captions).to(self.accelerator.device)
            hidden = self.prepared["text_encoder"](ids)[0]
        else:
            hidden = torch.stack([self.embeddings[c] for c in captions])
        return hidden.to(self.accelerator.device, weight_dtype(self.accelerator))


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    return DTYPES[accelerator.mixed_precision]


def trackers(config: TrainConfig, summary: report.Summary) -> list[str]:
    """Returns Accelerate's tracker names; says so when the usual one is not installed."""
    chosen = config.report_to
    if chosen == "none":
        return []
    if chosen is None:
        if importlib.util.find_spec("tensorboard"):
            return ["tensorboard"]
        summary.notes.append("no tracker: pip install 'sd_lora[tensorboard]' for curves")
        return []
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml"}
    if chosen != "all" and chosen not in packages:
        raise UsageError(f"report_to is one of {', '.join(packages)}, all, none, not {chosen!r}")
    if chosen != "all" and not importlib.util.find_spec(packages[chosen]):
        raise UsageError(f"report_to {chosen} needs the package {packages[chosen]}: pip install it")
    return [chosen]


def build_accelerator(config: TrainConfig, summary: report.Summary) -> Accelerator:
    """Returns the Accelerator: device, processes, precision, accumulation, trackers."""
    project = ProjectConfiguration(
        project_dir=config.output_dir,
        logging_dir=str(Path(config.output_dir) / config.logging_dir),
    )
    try:
        return Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=trackers(config, summary) or None,
            project_config=project,
            # the base and its inputs have one dtype already and the factors are cast once a layer;
            # autocast would cast everything again (shared by no peer: 12 to 20 % of a step)
            # the others wait while the main process draws samples: minutes, on a slow device hours
            kwargs_handlers=[
                AutocastKwargs(enabled=False),
                InitProcessGroupKwargs(timeout=timedelta(hours=6)),
            ],
        )
    except ValueError as error:
        raise UsageError(f"mixed_precision {config.mixed_precision}: {error}") from None


def _agreed_seed(config: TrainConfig, resumed: Path | None) -> int:
    """Returns the run's seed, the same on all processes: given, resumed, or drawn."""
    if config.seed is not None:
        return config.seed
    if resumed:
        return checkpoint.read_progress(resumed).seed
    drawn = [int.from_bytes(os.urandom(4), "little")]
    return int(broadcast_object_list(drawn)[0])


def inject_all(config: TrainConfig, parts: Parts, seed: int) -> dict[str, nn.Module]:
    """Adapts the UNet, and the text encoder if it is trained; returns component → model."""
    inject(
        parts.unet,
        config.targets,
        config.rank,
        config.lora_alpha,
        config.conv_rank,
        config.conv_alpha,
        config.rank_pattern,
        config.alpha_pattern,
        config.lora_dropout,
        seed=seed,
    )
    models: dict[str, nn.Module] = {"unet": parts.unet}
    if config.train_text_encoder:
        inject(
            parts.text_encoder,
            "text",
            config.rank,
            config.lora_alpha,
            dropout=config.lora_dropout,
            seed=seed,
        )
        models["text_encoder"] = parts.text_encoder
    return models


def _check_output(config: TrainConfig) -> None:
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir {folder} is a file, not a folder")
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK):
        raise UsageError(f"output_dir {folder} cannot be written: no permission for {there}")


def _check_size(config: TrainConfig, parts: Parts) -> None:
    step = parts.resolution_step
    if config.resolution % step:
        near = max(step, round(config.resolution / step) * step)
        raise UsageError(
            f"resolution {config.resolution} is not a multiple of {step} (VAE factor × UNet depth "
            f"of this model): take {near}"
        )


def prepare(config: TrainConfig) -> Run:
    """Returns a run that is ready for its first step; nothing is written before all is checked.

    Raises:
        UsageError, RunError: whatever would stop the run later, where it can be known.
    """
    _check_output(config)
    summary = report.Summary()
    accelerator = build_accelerator(config, summary)
    resumed = None
    if config.resume_from_checkpoint:
        resumed = checkpoint.find(Path(config.output_dir), config.resume_from_checkpoint)
    seed = _agreed_seed(config, resumed)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    source = find_samples(config, seed)
    parts = load_parts(
        str(config.pretrained_model_name_or_path),
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        tokenizer_name=config.tokenizer_name,
    )
    _check_size(config, parts)
    models = inject_all(config, parts, seed)
    sources = {"instance": source}
    if config.with_prior_preservation:
        # the injected model still is the base, bit for bit
        sources["class"] = class_samples(config, parts, accelerator, seed)
    latents = cache_latents(config, parts, sources, accelerator)
    embeddings = None
    if not config.train_text_encoder:
        embeddings = cache_embeddings(parts, sources, accelerator.device)
    prepared = _prepare_models(config, accelerator, models)
    run = _assemble(
        config, seed, accelerator, parts, models, prepared, latents, embeddings, sources, summary
    )
    if resumed:
        run.first_step = _resume(run, resumed)
    _summarise(run, sources)
    return run


def _prepare_models(
    config: TrainConfig, accelerator: Accelerator, models: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """Casts the frozen bases to the precision of the run, and hands the models to Accelerate."""
    dtype = weight_dtype(accelerator)
    for model in models.values():
        trained = {id(p) for p in lora_layers(model)}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in trained and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        model.train()
    if config.gradient_checkpointing:
        for model in models.values():
            enable = getattr(model, "enable_gradient_checkpointing", None)
            (enable or model.gradient_checkpointing_enable)()  # type: ignore[operator]
    return {name: accelerator.prepare_model(model) for name, model in models.items()}


def _assemble(
    config: TrainConfig,
    seed: int,
    accelerator: Accelerator,
    parts: Parts,
    models: dict[str, nn.Module],
    prepared: dict[str, nn.Module],
    latents: Latents,
    embeddings: dict[str, Tensor] | None,
    sources: dict[str, Source],
    summary: report.Summary,
) -> Run:
    processes, accumulation = accelerator.num_processes, config.gradient_accumulation_steps
    samples_per_step = config.train_batch_size * accumulation * processes
    flip = config.random_flip
    instance = Order(sources["instance"].samples, "instance", config.repeats, flip, seed)
    prior = Order(sources["class"].samples, "class", 1, flip, seed) if "class" in sources else None
    num_steps = config.max_train_steps or math.ceil(
        config.num_train_epochs * instance.length / samples_per_step
    )
    stream = Stream(
        instance,
        prior,
        config.train_batch_size,
        accelerator.process_index,
        processes,
        latents.framing,
        latents.uncached,
        num_steps * accumulation,
    )
    optimizer = build_optimizer(models, config, samples_per_step)
    return Run(
        config=config,
        seed=seed,
        accelerator=accelerator,
        parts=parts,
        models=models,
        prepared=prepared,
        schedule=NoiseSchedule.of(parts.scheduler, config.prediction_type).to(accelerator.device),
        latents=latents,
        embeddings=embeddings,
        stream=stream,
        optimizer=accelerator.prepare_optimizer(optimizer),
        lr_scheduler=build_lr_scheduler(optimizer, config, num_steps),
        num_steps=num_steps,
        num_samples=instance.length,
        samples_per_step=samples_per_step,
        summary=summary,
    )


def _resume(run: Run, path: Path) -> int:
    """Loads a checkpoint into the run; returns the number of steps that it has done."""
    progress = checkpoint.read_progress(path)
    checkpoint.check_continues(progress, run.progress(0), path)
    if progress.step >= run.num_steps:
        raise UsageError(
            f"{path} has done {progress.step} steps already, and this run is to do "
            f"{run.num_steps}: raise max_train_steps to go on"
        )
    state = checkpoint.load(path, run.models)
    run.optimizer.load_state_dict(state["optimizer"])
    run.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if run.accelerator.scaler is not None and state.get("scaler"):
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.summary.notes.append(f"resumed from {path} at step {progress.step}")
    return progress.step


def _summarise(run: Run, sources: dict[str, Source]) -> None:
    """Fills the summary that the user sees before the first step."""
    config, rows, notes = run.config, run.summary.rows, run.summary.notes
    accumulation, processes = config.gradient_accumulation_steps, run.accelerator.num_processes
    rows["model"] = f"{config.pretrained_model_name_or_path} ({run.parts.family.label})"
    pictures = f"{len(sources['instance'].samples)}"
    if config.repeats > 1:
        pictures += f" × {config.repeats} repeats = {run.num_samples} an epoch"
    if "class" in sources:
        pictures += f", and {len(sources['class'].samples)} of the class"
    rows["pictures"] = f"{pictures}, at {config.resolution}×{config.resolution}"
    rows["batch"] = (
        f"{config.train_batch_size} × {accumulation} accumulation × {processes} processes "
        f"= {run.samples_per_step}"
        + (", as many class pictures on top" if "class" in sources else "")
    )
    epochs = run.num_steps * run.samples_per_step / run.num_samples
    rows["steps"] = f"{run.num_steps} ({epochs:.1f} epochs)"
    parameters = {c: sum(p.numel() for p in lora_layers(m)) for c, m in run.models.items()}
    names = {c: list(adapted_layers(m)) for c, m in run.models.items()}
    rows["adapted"] = report.adapted(names, parameters)
    rows["LoRA file"] = f"{report.mib(4 * sum(parameters.values()))} (float32), in two formats"
    rows["objective"] = run.schedule.prediction_type + (
        f", min-SNR γ {config.snr_gamma:g}" if config.snr_gamma else ""
    )
    device = run.accelerator.device
    rows["device"] = f"{device}, {run.accelerator.mixed_precision} precision, seed {run.seed}"
    fresh = sum(map(len, run.latents.uncached.values()))
    if fresh:
        notes.append(
            f"{fresh} pictures are not square and are cropped at random: encoded anew each time "
            "(--center_crop caches them)"
        )
    for source in sources.values():
        notes += source.notes
    captions = [c for source in sources.values() for s in source.samples for c in s.captions]
    for caption, count in list(too_long(run.parts.tokenizer, captions).items())[:5]:
        limit = run.parts.tokenizer.model_max_length
        notes.append(f"caption of {count} tokens is cut at {limit}: {caption[:60]!r}…")
