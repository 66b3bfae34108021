"""From a configuration to a run that is ready for its first step, or to an error before it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sd_lora.adapters.inject import deltas_of, lora_layers
from sd_lora.config.schema import TrainConfig
from sd_lora.data.batches.stream import Batch, BatchItem, Stream
from sd_lora.data.cache.encode import Latents
from sd_lora.data.cache.latents import PixelSettings
from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.errors import RunError, UsageError
from sd_lora.models.caption_encoder import Conditioning, Geometry, collate
from sd_lora.models.families import INPAINTING
from sd_lora.models.load import Parts
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.report import summary as report
from sd_lora.sampling.sampler import can_generate_images
from sd_lora.training import checkpoint
from sd_lora.training.adapt import inject_all
from sd_lora.training.caches import Data, open_store
from sd_lora.training.class_images import check_class_images, fill_class_folder
from sd_lora.training.conditioning import (
    TextConditioning,
    add_new_words,
    planned_caption_encoder,
    run_caption_encoder,
    used_captions,
)
from sd_lora.training.data import base_of, crop_settings_of, pixel_settings_of
from sd_lora.training.optimizers import build_lr_scheduler, build_optimizer, check_installed
from sd_lora.training.plan import Plan
from sd_lora.training.processes import (
    DTYPES,
    agreed_seed,
    build_accelerator,
    check_processes,
    weight_dtype,
)
from sd_lora.training.summary import summarise


def _as_is(batch: Any) -> Any:
    return batch


class ImageLost(RunError):
    """An image that was there when the run started cannot be read any more."""


@dataclass
class Run:
    """Everything that the loop needs.

    models: component → injected model. prepared: what is trained, as Accelerate wrapped it.
    texts: what captions become. data: the images, and their caches.
    skeleton: the modules that the LoRA is for. timesteps: the first that is trained, and the one
    after the last. base_notes: what the user must know of the base. saved: the checkpoint to go on
    from.
    """

    plan: Plan
    accelerator: Accelerator
    parts: Parts
    models: dict[str, nn.Module]
    prepared: dict[str, nn.Module]
    schedule: NoiseSchedule
    timesteps: tuple[int, int]
    latents: Latents
    texts: TextConditioning
    meta_pipeline: MetaPipeline
    stream: Stream
    data: Data
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    summary: report.Summary
    base_notes: list[str]
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
    def prediction_type(self) -> str:
        """What the model says that it predicts; of EDM's, its own convention of sign."""
        return str(self.parts.scheduler.config.prediction_type)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained: the updates, and the new words."""
        tokens = self.texts.tokens
        layers = [p for model in self.models.values() for p in lora_layers(model)]
        return [*layers, *(tokens.parameters() if tokens else [])]

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
        if self.texts.tokens:
            self.texts.tokens.load_state_dict(self.saved.state["tokens"])
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
        start = self.plan.epochs.first_of_step(self.first_step)
        loader = DataLoader(
            self.stream,
            batch_size=None,
            sampler=range(start, len(self.stream)),
            num_workers=self.config.dataloader_num_workers,
            collate_fn=_as_is,
        )
        for batch in loader:
            if isinstance(batch, RunError):
                raise ImageLost(str(batch))
            yield batch

    def conditioning(self, items: list[BatchItem], step: int) -> Conditioning:
        """Returns what the UNet is told of a batch besides its noisy latents, on the device, in the
        base's dtype; `step`: how many steps are done."""
        device, dtype = self.accelerator.device, weight_dtype(self.accelerator)
        if self.texts.table is None and self.texts.are_frozen(step):
            self.texts.fill(device, dtype)  # nothing learns any more: once for the rest of the run
        captions = [item.caption for item in items]
        embeddings = self.texts.embeddings(captions, step, device, dtype)
        geometries = [_geometry(item) for item in items]
        conditions = collate(embeddings, geometries, self.parts.family)
        return conditions.to(device, dtype)

    def unet_input(self, x_t: Tensor, batch: Batch) -> Tensor:
        """Returns x_t (B, C, H, W) in the base's dtype, with the mask and what it leaves to see
        where the UNet is for inpainting (B, 2C + 1, H, W)."""
        if self.parts.task is INPAINTING:
            x_t = torch.cat([x_t, self.latents.masked(batch.items, batch.loaded)], dim=1)
        return x_t.to(weight_dtype(self.accelerator))


def _geometry(item: BatchItem) -> Geometry:
    """Returns where a slot's image comes from, for SDXL's conditions."""
    left, top = item.crop.corner_of(item.flip)
    original, target = item.crop.original[::-1], item.crop.size[::-1]
    return Geometry(original, (top, left), target)


def _check_output(config: TrainConfig) -> None:
    folder = Path(config.output_dir)
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UsageError(f"output_dir {folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise UsageError(f"output_dir {folder} cannot be written: no permission for {there}")
    if not config.resume_from_checkpoint:
        checkpoint.refuse_others(folder)


def _weighting(config: TrainConfig) -> tuple[str, dict[str, float]]:
    """Name and parameters of the loss weighting, a row of `WEIGHTINGS`."""
    if config.snr_gamma is not None:
        return "min_snr", {"gamma": config.snr_gamma}
    return ("edm_style" if config.do_edm_style_training else "uniform"), {}


def _timesteps(config: TrainConfig, parts: Parts, schedule: NoiseSchedule) -> tuple[int, int]:
    """Returns the first timestep that is trained, and the one after the last."""
    num = schedule.num_timesteps
    last = config.max_timestep or min(num, parts.family.max_timestep or num)
    if not config.min_timestep < last <= num:
        raise UsageError(
            f"timesteps from min_timestep {config.min_timestep} to max_timestep {last}: the model "
            f"has {num}, and max_timestep must be above min_timestep"
        )
    return config.min_timestep, last


def prepare(config: TrainConfig) -> Run:
    """Returns a run that is ready for its first step.

    What can be known early is checked early: flags and folders before the model is read, images
    and the checkpoint before class images are generated, which takes longest.

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
    check_processes(accelerator)
    seed = agreed_seed(config, path)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    base = base_of(config)
    config = config.for_base(base.family.name, base.resolution)
    caption_encoder, pixel_settings = (
        planned_caption_encoder(config, base),
        pixel_settings_of(config, base),
    )
    data = Data(
        config,
        crop_settings_of(config, base),
        seed,
        open_store(config),
        accelerator,
        caption_encoder,
    )
    data.check_sources()
    check_class_images(config, data.num_class_images, base.family)
    plan = Plan.of(config, data.instances, accelerator.num_processes)
    if path:
        progress = checkpoint.read_progress(path)
        checkpoint.check_continues(progress, plan.progress(0), plan.num_steps, path)
    parts = base.load(
        dtype=weight_dtype(accelerator),
        vae_dtype=DTYPES[config.vae_precision],
        tokenizer_name=config.tokenizer_name,
        prediction_type=config.prediction_type,
        zero_terminal_snr=config.rescale_betas_zero_snr,
    )
    return _assemble(plan, data, parts, pixel_settings, summary, path, base.notes())


def _assemble(
    plan: Plan,
    data: Data,
    parts: Parts,
    pixel_settings: PixelSettings,
    summary: report.Summary,
    path: Path | None,
    base_notes: list[str],
) -> Run:
    """Adapts the model, reads images and captions, and puts a run together."""
    config, seed, accelerator = plan.config, plan.seed, data.accelerator
    weighting, parameters = _weighting(config)
    schedule = NoiseSchedule.of(parts.scheduler, weighting, **parameters)
    timesteps = _timesteps(config, parts, schedule)
    parts.caption_encoder(clip_skip=config.clip_skip).check(parts.text_encoders)
    meta_pipeline = parts.meta_pipeline
    models = inject_all(config, parts.family, parts.models, seed)
    tokens = add_new_words(config, parts, data.instances, seed)
    texts = TextConditioning(
        run_caption_encoder(config, parts, tokens), parts.text_encoders, tokens
    )
    saved = checkpoint.read(path, models) if path else None
    if config.with_prior_preservation:
        # the injected model still is the base, bit for bit
        there = data.num_class_images
        fill_class_folder(config, there, parts, texts.caption_encoder, accelerator, seed)
        data.check_class_folder()
    latents = data.latents(parts, pixel_settings)
    prepared = _prepare_models(config, accelerator, models, texts)
    stream = Stream(
        data.instances,
        plan.epochs,
        data.images["class"].set if "class" in data.images else None,
        accelerator.process_index,
        accelerator.num_processes,
        latents.table,
        plan.num_micro_batches,
    )
    texts.set_trained(config, prepared)
    if texts.will_freeze:
        texts.captions = used_captions(stream)
        if texts.trained and not data.can_hold(texts):
            texts.captions = None  # read in each step, also after the encoders stopped
    if not texts.trained:
        data.fill_texts(texts)
        if not (
            config.num_validation_images
            and can_generate_images(parts.family)
            and accelerator.is_main_process
        ):
            texts.free_encoders()
    data.make_room(latents, texts)
    optimizer = build_optimizer(models, config, plan.samples_per_step, tokens)
    run = Run(
        plan=plan,
        accelerator=accelerator,
        parts=parts,
        models=models,
        prepared=prepared,
        schedule=schedule.to(accelerator.device),
        timesteps=timesteps,
        latents=latents,
        texts=texts,
        meta_pipeline=meta_pipeline,
        stream=stream,
        data=data,
        optimizer=accelerator.prepare_optimizer(optimizer),
        lr_scheduler=build_lr_scheduler(optimizer, config, plan.num_steps),
        summary=summary,
        base_notes=base_notes,
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
    config: TrainConfig,
    accelerator: Accelerator,
    models: dict[str, nn.Module],
    texts: TextConditioning,
) -> dict[str, nn.Module]:
    """Casts the frozen bases to the run's precision, and hands what is trained to Accelerate."""
    dtype = weight_dtype(accelerator)
    trained = models | (texts.encoders if texts.tokens else {})
    running = trained | (texts.encoders if len(trained) > 1 else {})  # captions are read each step
    words = {id(p) for p in texts.tokens.parameters()} if texts.tokens else set()
    for model in running.values():
        # an update's frozen tensors stay float32 like its trained ones: LoRA-FA's A, PiSSA's start
        kept = {id(t) for d in deltas_of(model).values() for t in (*d.parameters(), *d.buffers())}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in kept | words and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    for model in trained.values():
        model.train()
        if config.gradient_checkpointing:
            getattr(model, next(name for name in CHECKPOINTING if hasattr(model, name)))()
    for name in running.keys() - trained.keys():
        running[name].to(accelerator.device)
    return {name: accelerator.prepare_model(model) for name, model in trained.items()}
