"""From a configuration to a run that is ready for its first step, or to an error before it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from sd_lora.adapters.inject import deltas_of
from sd_lora.adapters.merging import idle_off
from sd_lora.config.schema import RunConfig, TrainConfig
from sd_lora.data.batches.preservation import Preservation
from sd_lora.data.batches.stream import Stream
from sd_lora.data.cache.latents import PixelSettings
from sd_lora.diffusion.timesteps import Timesteps
from sd_lora.errors import UsageError
from sd_lora.findings import Finding
from sd_lora.folders import RUN_LOG, disown, own
from sd_lora.formats.metadata import date
from sd_lora.models.load import Base, Parts
from sd_lora.models.quantized_base import quantize_base
from sd_lora.report.events import Listener, Warned, to_all
from sd_lora.report.log_file import LogFile
from sd_lora.report.summary import Summary
from sd_lora.sampling.sampler import can_generate_images
from sd_lora.training import checkpoint
from sd_lora.training.adapt import inject_all, prepare_models
from sd_lora.training.average import WORDS, Average, profiles_of
from sd_lora.training.budget import within_budget
from sd_lora.training.caches import Caches, open_store
from sd_lora.training.checkpoint_folders import Found
from sd_lora.training.class_images import check_class_images, fill_class_folder
from sd_lora.training.conditioning import (
    LearningStops,
    TextConditioning,
    add_new_words,
    planned_caption_encoder,
    run_caption_encoder,
)
from sd_lora.training.data import RunImages, base_of, crop_settings_of, pixel_settings_of
from sd_lora.training.disk import check_room
from sd_lora.training.forecast import warnings_of
from sd_lora.training.graphs import graphs_of
from sd_lora.training.hub_push import check_hub
from sd_lora.training.init_lora import start_from
from sd_lora.training.jobs.base import SharedBase
from sd_lora.training.ledger import Ledger
from sd_lora.training.lr_schedules import build_lr_scheduler, factor_of
from sd_lora.training.objective import objective_of
from sd_lora.training.offload import check_offload, ways_of
from sd_lora.training.optimizers import build_optimizer, check_optimizer
from sd_lora.training.out_of_memory import memory_for
from sd_lora.training.output_folder import refuse_finished, resumed_checkpoint
from sd_lora.training.plan import Plan
from sd_lora.training.processes import (
    Device,
    agreed_seed,
    build_accelerator,
    check_processes,
    on_main,
    vae_dtype,
    weight_dtype,
)
from sd_lora.training.recompute import Recomputed
from sd_lora.training.run import Run
from sd_lora.training.samples import check_sample_sizes, schedule_of
from sd_lora.training.scoring import PlannedScores, planned_scores, scores_of
from sd_lora.training.sharding import check_even, shards, without_fsdp
from sd_lora.training.summary import summarise
from sd_lora.training.trackers import Trackers
from sd_lora.training.validation import Validation


@dataclass(frozen=True)
class CheckedRun:
    """A run whose flags, folders and images are checked, before weights are loaded.

    device: facts about it. emit: tells events. saved_path: the checkpoint to resume. sharded:
    whether processes share the base.
    """

    plan: Plan
    base: Base
    images: RunImages
    pixel_settings: PixelSettings
    accelerator: Accelerator
    device: Device
    summary: Summary
    emit: Listener
    saved_path: Path | None
    sharded: bool
    repo: str
    recomputed: Recomputed | None = None
    scores: PlannedScores | None = None

    @property
    def blocks(self) -> frozenset[str] | None:
        """Those whose activations are computed again, by a budget of memory; None without one."""
        return self.recomputed.blocks if self.recomputed else None

    @property
    def draws(self) -> bool:
        """Whether this process draws sample images, or its part of the UNet is needed for them."""
        needed = self.accelerator.is_main_process or self.sharded
        return needed and can_generate_images(self.base.family)


@contextmanager
def prepared_run(
    config: TrainConfig, listeners: Sequence[Listener] = (), resumed: Found | None = None
) -> Iterator[Run]:
    """A run of `prepare` within a `with` block, after which another one can begin."""
    with released([config]):
        yield prepare(config, listeners, resumed)


@contextmanager
def released(configs: Sequence[TrainConfig]) -> Iterator[None]:
    """A context after which the output folders of runs are nobody's, and other runs can begin."""
    try:
        yield
    finally:
        for config in configs:
            disown(config.output_path)
        # Accelerate keeps precision and devices in a singleton: the next run may want others
        AcceleratorState._reset_state(reset_partial_state=True)


def prepare(
    config: TrainConfig, listeners: Sequence[Listener] = (), resumed: Found | None = None
) -> Run:
    """Make a run that is ready for its first step, and the owner of its output folder.

    Checks come as early as they can: flags and folders before the model is read, images and the
    checkpoint before class images are generated, which takes longest.

    resumed: the checkpoint to resume, verified; None: not looked for yet.

    Raises:
        UsageError, RunError: any later failure of the run, where it can be known now.
    """
    return ready(checked_run(config, listeners, resumed), listeners)


def ready(
    checked: CheckedRun, listeners: Sequence[Listener] = (), several: SharedBase | None = None
) -> Run:
    """The run of a `CheckedRun`, with its model.

    several: the base that it shares with other runs of this process; None: its own.
    """
    plan, accelerator, images = checked.plan, checked.accelerator, checked.images
    resolved, seed = plan.config, plan.seed
    load = several.parts if several else load_base
    parts = load(checked.base, resolved, accelerator)
    objective = objective_of(resolved, parts, checked.base.resolution)
    run_caption_encoder(resolved, parts, None).check_clip_skip(parts.text_encoders)
    meta_pipeline = parts.meta_pipeline
    models = inject_all(resolved, parts.family, parts.models, seed, checked.saved_path)
    check_room(plan, models, checked.emit)
    text = _text_conditioning(resolved, parts, images, accelerator, seed)
    saved = checkpoint.read(checked.saved_path, models) if checked.saved_path else None
    start = start_from(resolved.init_path, models) if resolved.init_path and not saved else None
    # the injected model still is the base, bit for bit
    _fill_class_folder(checked, parts, text, shared=several is not None)
    caches = Caches(resolved, open_store(resolved), accelerator, checked.emit)
    with memory_for("encoding images", resolved):
        latents = caches.latents(images, parts, checked.pixel_settings)
    stream = Stream(
        images.instances, plan.epochs, images.classes, accelerator.process_index,
        accelerator.num_processes, latents.table, plan.num_micro_batches,
        resolved.prior_loss_weight, _preservation(resolved, images, seed),
    )  # fmt: skip
    validation = _validation(plan, images, objective.timesteps)
    text.let_learn(models)
    # before the UNet is on the device: it and SDXL's text encoders would take 8 GiB
    caches.embeddings(text, stream, validation.captions, checked.draws)
    caches.make_room(images, latents, text)
    prepared = prepare_models(resolved, accelerator, models, text, checked.sharded, checked.blocks)
    text.let_learn(prepared)
    with memory_for("bringing the models to the device", resolved):
        # of several runs `Together` puts the shared weights side by side, once
        own = {c: model for c, model in models.items() if c != "unet"} if several else models
        fast_ones, offload = ways_of(resolved, own, accelerator.device)
        if offload:
            offload.add(text.in_steps | latents.in_steps(found.set for found in images.all))
    optimizer = build_optimizer(models, resolved, plan.samples_per_step, text.tokens)
    log = LogFile(resolved.output_path / RUN_LOG)
    run = Run(
        plan=plan,
        emit=_to_all(log, accelerator, listeners),
        log=log,
        accelerator=accelerator,
        device=checked.device,
        parts=parts,
        models=models,
        prepared=prepared,
        objective=objective.to(accelerator.device),
        latents=latents,
        text=text,
        meta_pipeline=meta_pipeline,
        stream=stream,
        images=images,
        lr_scheduler=build_lr_scheduler(optimizer, resolved, plan.num_steps),  # wraps `step`
        optimizer=accelerator.prepare_optimizer(optimizer),
        summary=checked.summary,
        validation=validation,
        ledger=Ledger.of(images.instances, objective.timesteps, plan.samples_per_step),
        average=_average(resolved, models, text),
        fast_models=fast_ones,
        saved=saved,
        start=start,
        repo=checked.repo,
        recomputed=checked.recomputed,
    )
    run.graphs = graphs_of(run, shares=several is not None)
    run.schedule, run.scores = schedule_of(run), scores_of(run, checked.scores)
    summarise(run, caches, checked.base.notes())
    return run


def _to_all(log: LogFile, accelerator: Accelerator, listeners: Sequence[Listener]) -> Listener:
    """A listener that tells the log, the trackers and the listeners, on the main process alone.
    All but the trackers hear of one that fails."""
    if not accelerator.is_main_process:
        return to_all([])
    trackers = Trackers(accelerator, to_all([log, *listeners]))
    return to_all([log, trackers, *listeners])


def checked_run(
    config: TrainConfig, listeners: Sequence[Listener] = (), resumed: Found | None = None
) -> CheckedRun:
    """Run all checks that need no weights, and plan the steps."""
    config.check_output()
    date()  # a wrong SOURCE_DATE_EPOCH is told now, and not at the export
    found = resumed or resumed_checkpoint(config)  # its hashes take seconds a gigabyte
    saved_path = found.path
    summary = Summary()
    sharded = shards()
    accelerator = build_accelerator(config, summary)
    check_processes(accelerator)
    on_main(accelerator, partial(own, config.output_path))
    emit = to_all(listeners if accelerator.is_main_process else ())
    seed = agreed_seed(config, saved_path)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    base = base_of(config)
    resolved = config.resolve(base.family.name, base.resolution)
    check_optimizer(resolved, accelerator.device)
    check_offload(resolved, accelerator.device, sharded and accelerator.num_processes > 1)
    if resolved.base_precision == "fp8" and accelerator.device.type == "mps":
        raise UsageError("base_precision fp8: MPS has no floats of 8 bits. Give int8")
    caption_encoder = planned_caption_encoder(resolved, base)
    pixel_settings = pixel_settings_of(resolved, base)
    crop_settings = crop_settings_of(resolved, base)
    store = open_store(resolved)
    images = RunImages(
        resolved, crop_settings, seed, store, caption_encoder, emit, partial(on_main, accelerator)
    )
    images.check_sources()
    scores = planned_scores(resolved, base.family, images.instances.samples)
    if sharded and accelerator.num_processes > 1:
        check_even(resolved, bool(crop_settings.step), images.has_classes)
    check_sample_sizes(resolved.asked_prompts, base.pixels_per_latent)
    if resolved.class_images:
        check_class_images(resolved.class_images, images.num_class_images, base.family)
    steps = resolved.preserves and resolved.preservation_sampler_steps
    if steps and not can_generate_images(base.family):
        raise UsageError(
            f"preservation_sampler_steps {steps}: {base.family.label} cannot draw images alone. "
            "Give 0, which preserves answers to your own images"
        )
    plan = Plan.of(resolved, images.instances, accelerator.num_processes, images.has_classes)
    factor_of(resolved, plan.num_steps)  # a file of points is read now, before the model
    if saved_path:
        progress = checkpoint.read_progress(saved_path)
        checkpoint.check_continues(progress, plan.progress(0), plan.num_steps, saved_path)
        if progress.step == plan.num_steps:
            draws = resolved.draws_samples and can_generate_images(base.family)
            refuse_finished(resolved, saved_path, draws)
    device = Device.of(accelerator.device, accelerator.mixed_precision)
    warnings = [
        Finding("damaged-checkpoint", str(path), fault) for path, fault in found.damaged.items()
    ]
    warnings += warnings_of(plan, device, base.width)
    if warnings:
        emit(Warned(warnings))
    recomputed = within_budget(plan, base, device.type)
    # the last check, for it may make a repository
    repo = on_main(accelerator, partial(check_hub, config)) if config.push_to_hub else ""
    return CheckedRun(
        plan, base, images, pixel_settings, accelerator, device, summary, emit, saved_path, sharded,
        repo, recomputed, scores,
    )  # fmt: skip


def _average(
    config: RunConfig, models: dict[str, nn.Module], text: TextConditioning
) -> Average | None:
    """The moving average that the configuration asks for, of all trained parameters."""
    if not profiles_of(config):
        return None
    parameters: dict[str, Tensor] = {
        f"{component}/{name}.{key}": parameter  # the keys of a checkpoint's factors
        for component, model in models.items()
        for name, delta in deltas_of(model).items()
        for key, parameter in delta.named_parameters()
        if parameter.requires_grad
    }
    words = text.tokens.parameters() if text.tokens else []
    parameters |= {f"{WORDS}{i}": parameter for i, parameter in enumerate(words)}
    return Average.of(parameters, config)


def _validation(plan: Plan, images: RunImages, timesteps: Timesteps) -> Validation:
    """The images, noise and timesteps by which the run is measured."""
    held_out = images.held_out.set if images.held_out else None
    config, size = plan.config, plan.samples_per_step
    return Validation.of(
        images.instances, held_out, timesteps, config.validate_every, size, plan.num_steps,
        config.keeps_best, config.early_stopping_patience,
    )  # fmt: skip


def _preservation(config: RunConfig, images: RunImages, seed: int) -> Preservation | None:
    """The captions that are preserved beside the instances; None without.

    Raises:
        UsageError: a class word for captions without a trigger word that it could replace.
    """
    if not config.output_preservation:
        return None
    sources = {s.source.where: s.source.rules for s in images.instances.samples}
    without = [where for where, rules in sources.items() if not rules.trigger_word]
    if config.preservation_class and without:
        raise UsageError(
            "preservation_class takes the place of the trigger word in captions, and "
            f"{without[0]} has no trigger_word: give it, or --output_preservation blank"
        )
    return Preservation(config.preservation_class, config.preservation_weight, seed)


def _text_conditioning(
    config: RunConfig, parts: Parts, images: RunImages, accelerator: Accelerator, seed: int
) -> TextConditioning:
    """Captions → embeddings, with the run's new words; nothing is encoded yet."""
    tokens = add_new_words(config, parts, images.instances, seed)
    return TextConditioning(
        run_caption_encoder(config, parts, tokens),
        parts.text_encoders,
        LearningStops.of(config, parts.text_encoders, tokens),
        accelerator.device,
        weight_dtype(accelerator),
    )


def load_base(base: Base, config: RunConfig, accelerator: Accelerator) -> Parts:
    """Load the base model's weights."""
    with memory_for("loading the base model", config), without_fsdp():
        parts = base.load(
            dtype=weight_dtype(accelerator),
            vae_dtype=vae_dtype(config),
            tokenizer_name=config.tokenizer_name,
            zero_terminal_snr=config.rescale_betas_zero_snr,
            flow_shift=config.flow_shift,
        )
        if config.base_precision:
            quantize_base(parts.unet, config.base_precision, accelerator.device)
        return parts


def _fill_class_folder(
    checked: CheckedRun, parts: Parts, text: TextConditioning, shared: bool
) -> None:
    """Draw the class images that are missing, and take them into the run. shared: whether another
    run of this process may have drawn them since the check."""
    images, config = checked.images, checked.plan.config
    wanted = config.class_images
    if not wanted:
        return
    if shared and wanted.folder.is_dir():
        images.check_class_folder(wanted, required=False)
    with memory_for("drawing class images", config), idle_off(parts.models.values()):
        fill_class_folder(
            wanted, images.num_class_images, parts, text.caption_encoder,
            images.crop_settings.resolution, checked.accelerator, checked.plan.seed, checked.emit,
        )  # fmt: skip
    images.check_class_folder(wanted)
