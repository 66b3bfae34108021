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
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sd_lora.adapters.inject import inject, lora_layers, updates
from sd_lora.data.cache import Latents
from sd_lora.data.sources import Source
from sd_lora.data.stream import Batch, Order, Slot, Stream
from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.errors import RunError, UsageError
from sd_lora.models.load import Parts, load_parts
from sd_lora.models.prompts import token_ids
from sd_lora.training import checkpoint, report
from sd_lora.training.config import TrainConfig
from sd_lora.training.dataset import (
    DTYPES,
    cache_embeddings,
    cache_latents,
    class_samples,
    find_samples,
    framing,
)
from sd_lora.training.optimizers import build_lr_scheduler, build_optimizer, check_installed
from sd_lora.training.summary import summarise


def _as_is(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run.

    num_samples: pictures × repeats, an epoch. samples_per_step: instances per optimiser step, over
    all processes. num_steps: optimiser steps in all.
    """

    config: TrainConfig
    seed: int
    num_samples: int
    samples_per_step: int
    num_steps: int

    @classmethod
    def of(cls, config: TrainConfig, seed: int, num_pictures: int, num_processes: int) -> "Plan":
        num_samples = num_pictures * config.repeats
        samples_per_step = (
            config.train_batch_size * config.gradient_accumulation_steps * num_processes
        )
        num_steps = config.max_train_steps or math.ceil(
            config.num_train_epochs * num_samples / samples_per_step
        )
        return cls(config, seed, num_samples, samples_per_step, num_steps)

    def progress(self, step: int) -> checkpoint.Progress:
        return checkpoint.Progress(
            step, self.seed, self.samples_per_step, self.num_samples, self.config.as_dict()
        )


@dataclass
class Run:
    """Everything that the loop needs.

    models: component → injected model. prepared: the same, as Accelerate wrapped them.
    embeddings: caption → (77, D), None when the text encoder is trained.
    sources: "instance", "class" → where the pictures came from.
    saved: the checkpoint to go on from.
    """

    plan: Plan
    accelerator: Accelerator
    parts: Parts
    models: dict[str, nn.Module]
    prepared: dict[str, nn.Module]
    schedule: NoiseSchedule
    latents: Latents
    embeddings: dict[str, Tensor] | None
    stream: Stream
    sources: dict[str, Source]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    summary: report.Summary
    saved: checkpoint.Saved | None = None

    @property
    def config(self) -> TrainConfig:
        return self.plan.config

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for model in self.models.values() for p in lora_layers(model)]

    @property
    def first_step(self) -> int:
        """How many steps are done when the run starts: those of its checkpoint."""
        return self.saved.progress.step if self.saved else 0

    def restore(self) -> None:
        """Loads the checkpoint to go on from, with this run's learning rates."""
        if self.saved is None:
            return
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]
        self.saved.load_factors(self.models)
        self.optimizer.load_state_dict(self.saved.state["optimizer"])
        self.lr_scheduler.load_state_dict(self.saved.state["lr_scheduler"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if group["initial_lr"] != rate:
                group["lr"] *= rate / group["initial_lr"]
                group["initial_lr"] = rate
        self.lr_scheduler.base_lrs = rates
        if self.accelerator.scaler is not None and self.saved.state.get("scaler"):
            self.accelerator.scaler.load_state_dict(self.saved.state["scaler"])

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
        for batch in loader:
            if isinstance(batch, RunError):
                raise batch
            yield batch

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
    log_with = trackers(config, summary) or None
    project = ProjectConfiguration(
        project_dir=config.output_dir,
        logging_dir=str(Path(config.output_dir) / config.logging_dir),
    )
    try:
        return Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=log_with,
            project_config=project,
            kwargs_handlers=[
                # base and inputs have one dtype already, and a layer casts its factors itself;
                # autocast would look at every operand of every operator once more
                AutocastKwargs(enabled=False),
                # all buffers are constants
                DistributedDataParallelKwargs(broadcast_buffers=False),
                # processes wait while the main one draws samples: on a slow device, for hours
                InitProcessGroupKwargs(timeout=timedelta(hours=6)),
            ],
        )
    except ValueError as error:
        raise UsageError(f"mixed_precision {config.mixed_precision}: {error}") from None


def _check_processes(accelerator: Accelerator) -> None:
    """Raises UsageError if a launcher started several processes and Accelerate joined none.

    It does so for torchrun on a CPU, without a word: each would train by itself, into one folder.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UsageError(
            f"{started} processes were started, and accelerate sees {accelerator.num_processes}: "
            "on a CPU, set ACCELERATE_USE_CPU=true"
        )


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
    shared: dict[str, Any] = {
        "rank": config.rank,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "init": config.init_lora_weights,
        "seed": seed,
        "method": config.method,
        "rule": "decompose" if config.use_dora else "add",
        "rslora": config.use_rslora,
        "neuron_dropout": config.neuron_dropout,
        "rank_dropout": config.rank_dropout,
        "module_dropout": config.module_dropout,
        "train_bias": config.train_bias,
    }
    options = {
        "tucker": config.use_tucker,
        "factor": config.lokr_factor,
        "full_matrix": config.lokr_full_matrix,
        "decompose_both": config.lokr_decompose_both,
    }
    shared |= {name: value for name, value in options.items() if value}
    inject(
        parts.unet,
        config.targets,
        conv_rank=config.conv_rank,
        conv_alpha=config.conv_alpha,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        modules_to_save=config.modules_to_save.split("+") if config.modules_to_save else (),
        **shared,
    )
    models: dict[str, nn.Module] = {"unet": parts.unet}
    if config.train_text_encoder:
        shared.pop("tucker", None)  # a text encoder has no kernel to give a core to
        inject(parts.text_encoder, "text", **shared)
        models["text_encoder"] = parts.text_encoder
    return models


def _check_output(config: TrainConfig) -> None:
    folder = Path(config.output_dir)
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UsageError(f"output_dir {folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise UsageError(f"output_dir {folder} cannot be written: no permission for {there}")
    if not config.resume_from_checkpoint:
        checkpoint.refuse_others(folder)


def _check_size(config: TrainConfig, parts: Parts) -> None:
    step = parts.pixels_per_latent
    if config.resolution % step:
        near = max(step, round(config.resolution / step) * step)
        raise UsageError(
            f"resolution {config.resolution} is not a multiple of {step}, the pixels of a latent "
            f"of this model: take {near}"
        )


def prepare(config: TrainConfig) -> Run:
    """Returns a run that is ready for its first step.

    What can be known early is checked early: flags and folders before the model is read, pictures
    and the checkpoint before class pictures are generated, which takes longest.

    Raises:
        UsageError, RunError: whatever would stop the run later, where it can be known.
    """
    _check_output(config)
    check_installed(config)
    path = None
    if config.resume_from_checkpoint:
        path = checkpoint.find(Path(config.output_dir), config.resume_from_checkpoint)
    summary = report.Summary()
    accelerator = build_accelerator(config, summary)
    _check_processes(accelerator)
    seed = _agreed_seed(config, path)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    sources = {"instance": find_samples(config, seed)}
    plan = Plan.of(config, seed, len(sources["instance"].samples), accelerator.num_processes)
    if path:
        progress = checkpoint.read_progress(path)
        checkpoint.check_continues(progress, plan.progress(0), plan.num_steps, path)
    parts = load_parts(
        str(config.pretrained_model_name_or_path),
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        tokenizer_name=config.tokenizer_name,
    )
    _check_size(config, parts)
    schedule = NoiseSchedule.of(parts.scheduler, config.prediction_type)
    models = inject_all(config, parts, seed)
    saved = checkpoint.read(path, models) if path else None
    latents = Latents(parts.vae, framing(config), accelerator.device)
    cache_latents(latents, "instance", sources["instance"], accelerator)
    if config.with_prior_preservation:
        # the injected model still is the base, bit for bit
        sources["class"] = class_samples(config, parts, accelerator, seed)
        cache_latents(latents, "class", sources["class"], accelerator)
    if not latents.needs_vae:
        parts.vae.to("cpu")
    embeddings = None
    if not config.train_text_encoder:
        embeddings = cache_embeddings(parts, sources, accelerator.device)
    prepared = _prepare_models(config, accelerator, models)
    optimizer = build_optimizer(models, config, plan.samples_per_step)
    run = Run(
        plan=plan,
        accelerator=accelerator,
        parts=parts,
        models=models,
        prepared=prepared,
        schedule=schedule.to(accelerator.device),
        latents=latents,
        embeddings=embeddings,
        stream=_stream(plan, accelerator, sources, latents),
        sources=sources,
        optimizer=accelerator.prepare_optimizer(optimizer),
        lr_scheduler=build_lr_scheduler(optimizer, config, plan.num_steps),
        summary=summary,
        saved=saved,
    )
    summarise(run)
    return run


CHECKPOINTING = (
    "enable_gradient_checkpointing",
    "activation_checkpointing_enable",
    "gradient_checkpointing_enable",
)
"""What switches it on: diffusers, transformers, transformers before it renamed it."""


def _prepare_models(
    config: TrainConfig, accelerator: Accelerator, models: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """Casts the frozen bases to the precision of the run, and hands the models to Accelerate."""
    dtype = weight_dtype(accelerator)
    for model in models.values():
        # an update's frozen tensors stay float32 like its trained ones: LoRA-FA's A, PiSSA's start
        kept = {id(t) for d in updates(model).values() for t in (*d.parameters(), *d.buffers())}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in kept and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        model.train()
    if config.gradient_checkpointing:
        for model in models.values():
            getattr(model, next(name for name in CHECKPOINTING if hasattr(model, name)))()
    return {name: accelerator.prepare_model(model) for name, model in models.items()}


def _stream(
    plan: Plan, accelerator: Accelerator, sources: dict[str, Source], latents: Latents
) -> Stream:
    config = plan.config
    repeats = {"instance": config.repeats, "class": 1}
    orders = {
        kind: Order(source.samples, kind, repeats[kind], config.random_flip, plan.seed)
        for kind, source in sources.items()
    }
    return Stream(
        orders["instance"],
        orders.get("class"),
        config.train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        latents.framing,
        latents.uncached,
        plan.num_steps * config.gradient_accumulation_steps,
    )
