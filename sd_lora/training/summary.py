"""The summary of a run, shown before its first step."""

from collections.abc import Mapping, Sequence

from torch import nn

from sd_lora.adapters.inject import adapted_layers, deltas_of, lora_layers
from sd_lora.errors import counted
from sd_lora.files import mib
from sd_lora.formats.adapter_files import formats_of
from sd_lora.formats.canonical import Adapter
from sd_lora.formats.names import naming_of
from sd_lora.models.families import INPAINTING
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.report.summary import adapted_modules
from sd_lora.sampling.sampler import can_generate_images
from sd_lora.training.caches import Caches
from sd_lora.training.data import RunImages
from sd_lora.training.forecast import forecast_rows, given_options
from sd_lora.training.looks import looks_of, too_many_looks
from sd_lora.training.model_card import is_foreign
from sd_lora.training.output_folder import CARD, replacement_note
from sd_lora.training.plan import Plan
from sd_lora.training.processes import DTYPES
from sd_lora.training.run import Run
from sd_lora.training.sample_schedule import training_forwards
from sd_lora.training.sharding import shard_bytes


def summarise(run: Run, caches: Caches, base_notes: Sequence[str]) -> None:
    """Fill a run's summary. base_notes: hints about the base model."""
    config, parts, rows = run.config, run.parts, run.summary.rows
    task = f", {parts.task.label}" if parts.task is INPAINTING else ""
    rows["model"] = f"{config.base_model} ({parts.family.label}{task})"
    rows |= data_rows(run.plan, run.images)
    planned = forecast_rows(run.plan, [*run.models], run.device)
    rows |= planned | caches.rows
    if run.recomputed:
        rows["memory budget"] = run.recomputed.text
    if run.joint:
        own, whole = shard_bytes(run.models["unet"])
        rows["sharded"] = f"{mib(own)} of the UNet's {mib(whole)} on each process"
    given = {row: texts for row, texts in given_options(config).items() if row not in planned}
    rows["method"] = ", ".join([config.method_text, *given.pop("method", [])])
    objective = [run.objective.text, *given.pop("objective", [])]
    ranks = {c: config.rank_and_alpha_of(c)[0] for c in run.models}
    if len({*ranks.values()}) > 1:
        del ranks["unet"]
        rows["method"] += "; " + ", ".join(f"{c} rank {rank}" for c, rank in ranks.items())
    rows["adapted"] = adapted_modules(
        {c: list(adapted_layers(m)) for c, m in run.models.items()},
        {c: sum(p.numel() for p in lora_layers(m)) for c, m in run.models.items()},
    )
    rows |= {row: ", ".join(texts) for row, texts in given.items()}
    rows |= _text_rows(run)
    rows["LoRA file"], format_notes = files_of(run.models, run.meta_pipeline, config.save_precision)
    rows["objective"] = ", ".join(objective)
    if run.validation.every:
        rows["validation"] = run.validation.text
    looks = looks_of(run)
    if run.scores:
        rows["scores"] = run.scores.text(run.schedule.share_of(looks["scores"].work))
    if run.schedule.forwards:
        rows["samples"] = run.schedule.text
    rows["seed"] = str(run.plan.seed)
    steps, forwards = run.plan.num_steps, training_forwards(run.plan)
    too_many = too_many_looks(looks.values(), steps, forwards)
    notes = [
        *([too_many] if too_many else []),
        *config.notes,
        *base_notes,
        *format_notes,
        *_notes(run),
        *caches.notes,
    ]
    run.summary.notes += [*replacement_note(config, run.saved.path if run.saved else None), *notes]
    if run.start:
        run.summary.notes.append(run.start.note)
    if run.saved:
        run.summary.notes.append(f"resumes {run.saved.path}")
        if run.saved.progress.images != run.plan.content:
            run.summary.notes.append("images, captions or crops have changed since it was written")
    run.summary.findings += run.images.findings


def data_rows(plan: Plan, images: RunImages) -> dict[str, str]:
    """Rows of the plan, with the class images; they may still have to be generated."""
    rows = plan.rows()
    if images.classes:
        rows["images"] += f", and {images.num_class_images} of the class"
    if images.classes or plan.config.class_images:
        rows["batch"] += ", as many class images on top"
    if plan.config.output_preservation:
        rows["batch"] += ", and each once more with its preserved caption"
    return rows


def _notes(run: Run) -> list[str]:
    """Hints about options without effect, and work that no cache can save."""
    notes = []
    if run.config.do_edm_style_training and not run.objective.schedule.weighting:
        notes.append("do_edm_style_training changes nothing for a model that predicts epsilon")
    if not can_generate_images(run.parts.family):
        notes.append(
            f"no sample images: {run.parts.family.label} refines images of another model and "
            "cannot draw them alone"
        )
    if is_foreign(run.output_dir / CARD):
        notes.append(
            f"{run.output_dir / CARD} is of no run: it stays, and no model card is written"
        )
    if run.parts.task is INPAINTING:
        notes.append("masks are drawn, and masked images encoded, in each step")
    sets = [found.set for found in run.images.by_kind.values()]
    random_crops = sum(s.is_random(i) for s in sets for i in range(len(s.samples)))
    if random_crops:
        notes.append(
            f"cropped at random, so that each step encodes them: "
            f"{counted(random_crops, 'image')} (--center_crop caches them)"
        )
    return notes


def _text_rows(run: Run) -> dict[str, str]:
    """Rows on new words, and text encoders that stop early."""
    rows = {}
    tokens = run.text.tokens
    if tokens:
        words = ", ".join(f"{c.word} ({counted(c.num_vectors, 'vector')})" for c in tokens.concepts)
        count = sum(p.numel() for p in tokens.parameters())
        rows["new words"] = f"{words}, {count:,} parameters"
    stops = {c: step for c, step in run.text.stops.lora.items() if step is not None}
    if run.text.stops.new_words is not None:
        stops["new words"] = run.text.stops.new_words
    if stops:
        rows["stop early"] = ", ".join(f"{name} after step {step}" for name, step in stops.items())
    return rows


def files_of(
    models: Mapping[str, nn.Module], meta_pipeline: MetaPipeline, precision: str
) -> tuple[str, list[str]]:
    """Size and formats of the files to come, and notes on programs that cannot load them."""
    adapter: Adapter = {component: deltas_of(model) for component, model in models.items()}
    family = meta_pipeline.family
    formats, notes = formats_of(adapter, naming_of(family, meta_pipeline.layout))
    tensors = formats[0].write(adapter, naming_of(family))
    size = mib(sum(t.numel() for _, t in tensors) * DTYPES[precision].itemsize)
    return f"{size} ({precision}), for {' and for '.join(f.title for f in formats)}", notes
