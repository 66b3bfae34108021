"""What the user knows before the first step."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from sd_lora.adapters.inject import adapted_layers, deltas_of, lora_layers
from sd_lora.config.schema import TrainConfig
from sd_lora.data.check.page import report_lines
from sd_lora.files import mib
from sd_lora.formats.canonical import Adapter
from sd_lora.formats.files import formats_of
from sd_lora.formats.names import naming_of
from sd_lora.models.caption_encoder import PIECE
from sd_lora.models.families import INPAINTING
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.report import summary as report
from sd_lora.sampling.sampler import can_generate_images
from sd_lora.training.adapt import rank_and_alpha

if TYPE_CHECKING:
    from sd_lora.training.setup import Run


def summarise(run: "Run") -> None:
    """Fills the summary that the user sees before the first step."""
    config, rows, notes = run.config, run.summary.rows, run.summary.notes
    kinds = run.data.images
    parts = run.parts
    task = f", {parts.task.label}" if parts.task is INPAINTING else ""
    rows["model"] = f"{config.pretrained_model_name_or_path} ({parts.family.label}{task})"
    rows |= run.plan.rows()
    if "class" in kinds:
        rows["images"] += f", and {len(kinds['class'].set.samples)} of the class"
        rows["batch"] += ", as many class images on top"
    rows |= run.data.rows
    parameters = {c: sum(p.numel() for p in lora_layers(m)) for c, m in run.models.items()}
    names = {c: list(adapted_layers(m)) for c, m in run.models.items()}
    if config.pretrained_vae_model_name_or_path or config.vae_precision != "fp32":
        rows["VAE"] = f"{config.pretrained_vae_model_name_or_path or 'the base’s'}, "
        rows["VAE"] += config.vae_precision
    notes += run.base_notes
    rows["method"] = method_of_run(config)
    ranks = {c: rank_and_alpha(config, c) for c in run.models if c != "unet"}
    if any(rank != config.rank for rank, _ in ranks.values()):
        rows["method"] += "; " + ", ".join(f"{c} rank {rank}" for c, (rank, _) in ranks.items())
    rows["adapted"] = report.adapted(names, parameters)
    _say_texts(run)
    rows["LoRA file"], lost = files_of(run.models, run.meta_pipeline, config.save_precision)
    notes += lost
    rows["objective"] = objective_of(run)
    if config.do_edm_style_training and not run.schedule.weighting:
        notes.append("do_edm_style_training changes nothing for a model that predicts epsilon")
    if not can_generate_images(parts.family):
        notes.append(
            f"no sample images: {parts.family.label} finishes those of another model, and draws "
            "none by itself"
        )
    device = run.accelerator.device
    rows["device"] = f"{device}, {run.accelerator.mixed_precision} precision, seed {run.plan.seed}"
    if parts.task is INPAINTING:
        notes.append("masks are drawn, and what they leave is encoded, anew each time")
    sets = [images.set for images in kinds.values()]
    drawn = sum(s.is_random(i) for s in sets for i in range(len(s.samples)))
    if drawn:
        notes.append(
            f"{drawn} images are cropped at random: encoded anew each time (--center_crop caches "
            "them)"
        )
    notes += run.data.notes
    if run.saved:
        notes.append(f"goes on from {run.saved.path}")
        if run.saved.progress.images != run.plan.content:
            notes.append("images or captions are others than when it was written")
    run.summary.findings += report_lines([f for p in kinds.values() for f in p.findings])


def _say_texts(run: "Run") -> None:
    """Adds what is particular to captions, new words, and text encoders that stop."""
    rows = run.summary.rows
    reading = reading_of(run.config)
    if reading:
        rows["captions"] = reading
    if run.texts.tokens:
        words = run.texts.tokens
        count = sum(p.numel() for p in words.parameters())
        rows["new words"] = (
            ", ".join(f"{c.word} ({c.num_vectors} vectors)" for c in words.concepts)
            + f", {count:,} parameters"
        )
    stops = {c: s for c, s in run.texts.stops.items() if s is not None}
    stops |= {"new words": run.texts.tokens_stop} if run.texts.tokens_stop is not None else {}
    if stops:
        rows["stop early"] = ", ".join(f"{what} after step {step}" for what, step in stops.items())


def objective_of(run: "Run") -> str:
    """Returns the objective as a line: "v_prediction, zero terminal SNR, min-SNR γ 5, …"."""
    schedule = run.schedule
    words = [schedule.prediction_type]
    words += ["zero terminal SNR"] if schedule.alpha[-1] == 0 else []
    words += [schedule.weighting] if schedule.weighting else []
    first, last = run.timesteps
    if (first, last) != (0, schedule.num_timesteps):
        words.append(f"timesteps {first} to {last - 1}")
    return ", ".join(words)


def reading_of(config: TrainConfig) -> str:
    """Returns what is particular to the reading of captions, as a line; empty if nothing is."""
    words = []
    if config.max_token_length > PIECE:
        words.append(f"up to {config.max_token_length} tokens, in pieces of {PIECE}")
    words += [f"clip skip {config.clip_skip}"] if config.clip_skip else []
    words += ["weighted"] if config.weighted_prompts else []
    words += [f"{config.caption_dropout:.0%} dropped"] if config.caption_dropout else []
    return ", ".join(words)


def method_of_run(config: TrainConfig) -> str:
    """Returns the method as a line: "lora, rank 16, alpha 16, …"."""
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    words = [config.method]
    if config.method != "full":
        words += [f"rank {config.rank}", f"alpha {alpha:g}"]
    words += ["with magnitudes (DoRA)"] if config.use_dora else []
    words += ["scaled by alpha / sqrt(rank)"] if config.use_rslora else []
    words += [f"started by {config.init_lora_weights}"] if config.init_lora_weights else []
    words += ["with Tucker cores"] if config.use_tucker else []
    return ", ".join(words)


def files_of(
    models: Mapping[str, nn.Module], meta_pipeline: MetaPipeline, precision: str
) -> tuple[str, list[str]]:
    """Returns the size and formats of the files to come, and notes on who will not read them."""
    adapter: Adapter = {component: deltas_of(model) for component, model in models.items()}
    family = meta_pipeline.family
    formats, notes = formats_of(adapter, meta_pipeline.layout if family.original_names else None)
    tensors = formats[0].write(adapter, naming_of(family))
    width = 4 if precision == "fp32" else 2
    size = mib(sum(t.numel() * width for _, t in tensors))
    return f"{size} ({precision}), for {' and for '.join(f.title for f in formats)}", notes
