"""The LoRA files of a run: written, verified, with a header that says how they were trained."""

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sd_lora.adapters.inject import deltas_of
from sd_lora.config.rows import Option
from sd_lora.config.schema import OPTIONS, RunConfig
from sd_lora.config.sources import KEYS
from sd_lora.formats import metadata
from sd_lora.formats.adapter_files import (
    DIFFUSERS,
    Format,
    dated,
    formats_of,
    held_by,
    write_formats,
)
from sd_lora.formats.canonical import Adapter, read_models
from sd_lora.formats.comfyui import Weights, weights_of
from sd_lora.formats.embeddings import how_to_load, verify_embeddings, write_embeddings
from sd_lora.formats.metadata import shared_name
from sd_lora.formats.names import naming_of
from sd_lora.formats.python_code import PipelineCode, loading_line, skipping_lines
from sd_lora.formats.verify import Verified, verify
from sd_lora.models.families import INPAINTING
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.new_tokens import NewTokens
from sd_lora.sampling.sampler import can_generate_images
from sd_lora.training.optimizers import optimizer_of
from sd_lora.training.output_folder import moved, take_place, unverified_folder
from sd_lora.training.plan import Plan
from sd_lora.training.processes import DTYPES
from sd_lora.training.run import Run
from sd_lora.training.samples import guidance_rescale_of, prompts_of

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")

MOST_TAGS = 1000
"""Most tags in a header, the most frequent ones: a set of 50,000 captions would fill it."""


def export(run: Run, step: int, place: Path) -> list[Verified]:
    """Write the LoRA files, and verify each by loading it into a fresh pipeline.

    They take their places when all are verified.

    Args:
        run: as it is after a step.
        step: the number of steps done.
        place: folder of the files.

    Raises:
        RunError: values that are not finite or beyond the precision, a file that could not be
            written or does not load as trained; that one stays in the folder `unverified`.
    """
    adapter = read_models(run.models)
    return write_verified(
        adapter,
        formats_of(adapter)[0],
        place,
        run.output_dir.resolve().name,
        header_of(run, adapter, step),
        run.meta_pipeline,
        file_dtype(run.config.as_dict()),
        weights_of(run.models),
    )


def write_verified(
    adapter: Adapter,
    kinds: Sequence[Format],
    place: Path,
    name: str,
    header: Mapping[str, str],
    meta_pipeline: MetaPipeline,
    dtype: torch.dtype,
    weight: Weights | None,
) -> list[Verified]:
    """Write LoRA files, and verify each; they take their places when all are verified.

    Args:
        adapter, kinds, name, dtype, weight: see `write_formats`.
        place: folder of the files.
        header: of the files; the date is added.
        meta_pipeline: the modules that they are for.

    Raises:
        RunError: see `export`.
    """
    with unverified_folder(place) as folder:
        naming = naming_of(meta_pipeline.family, meta_pipeline.layout)
        paths = write_formats(adapter, kinds, folder, name, dated(header), naming, dtype, weight)
        return moved(
            [
                verify(path, held_by(kind, adapter, weight), meta_pipeline, kind)
                for path, kind in zip(paths, kinds, strict=True)
            ]
        )


def file_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the LoRA files of a run with these options."""
    return DTYPES[settings["save_precision"]]


def header_of(run: Run, adapter: Adapter, step: int) -> dict[str, str]:
    """The header of the LoRA files after a step; a checkpoint has it too, for `sd-lora export`."""
    return metadata.build(
        adapter,
        run.parts.family,
        run.output_dir.resolve().name,
        run.prediction_type,
        record(run, step),
        facts(run, step),
    )


def export_words(run: Run, step: int, place: Path) -> list[Path]:
    """Write the new words' embeddings, a file each, and verify them by diffusers' loader.

    run, step, place: see `export`.

    Raises:
        RunError: embeddings that are not finite, or a file that does not load as trained.
    """
    tokens = run.text.tokens
    if tokens is None:
        return []
    architecture = run.parts.family.architectures[run.prediction_type]
    name = run.output_dir.resolve().name
    return write_words(tokens, place, name, record(run, step), architecture)


def write_words(
    tokens: NewTokens, place: Path, name: str, record: Mapping[str, object], architecture: str
) -> list[Path]:
    """Write new words, a file each, and verify them; see `export_words`.

    place: folder of the files. name: the run's. record: our own part of the header. architecture:
    of the base, in modelspec's words.
    """
    header = {"modelspec.architecture": f"{architecture}/textual-inversion"}
    with unverified_folder(place) as folder:
        paths = write_embeddings(tokens, folder, name, record, header)
        verify_embeddings(paths, tokens)
        return take_place(paths)


def usage(run: Run, files: Sequence[Verified], words: Sequence[Path]) -> list[str]:
    """Lines on how to use the files: by programs, then Python code that loads all and draws."""
    formats, _ = formats_of({name: deltas_of(model) for name, model in run.models.items()})
    kinds = list(zip(files, formats, strict=True))
    draws = can_generate_images(run.parts.family) and run.parts.task is not INPAINTING
    prompt = prompts_of(run)[0]
    lines = ["  " + kind.how_to_use(f.path, prompt) for f, kind in kinds if kind.use]
    loading = [loading_line(f.path) for f, kind in kinds if kind is DIFFUSERS]
    concepts = run.text.tokens.concepts if run.text.tokens else ()
    for path, concept in zip(words, concepts, strict=True):
        lines.append(f"  {path}  the word {concept.word}, verified")
        loading += how_to_load(path, concept.word, run.parts.family.text_encoders).splitlines()
    if not loading:
        return lines
    config, parts = run.config, run.parts
    code = PipelineCode(
        config.base_model,
        parts.family.pipelines[parts.task.name],
        config.hub_options,
        run.given_noise_settings,
        run.accelerator.device.type == "cuda",
        str(DTYPES[run.accelerator.mixed_precision]).removeprefix("torch."),
    )
    arguments: dict[str, object] = {}
    if rescale := guidance_rescale_of(run):
        arguments["guidance_rescale"] = rescale
    skipped = run.text.caption_encoder.clip_skip
    if skipped and parts.family.is_xl:
        arguments["clip_skip"] = skipped
    elif skipped:
        loading += skipping_lines(skipped)
    return [
        *lines,
        "  in Python:",
        "",
        *code.lines(loading, prompt if draws else None, arguments),
        "",
    ]


def record(run: Run, step: int) -> dict[str, object]:
    """Our own part of the header: everything that a repetition of the run's steps needs."""
    config = run.config
    versions = {name: version(name) for name in ("sd_lora", *_LIBRARIES)}
    return {
        "base_model": _shown(config, OPTIONS["pretrained_model_name_or_path"], config.base_model),
        "base_model_sha256": run.base_hash,
        "family": run.parts.family.name,
        "config": shared_config(config) | {"seed": run.plan.seed},
        "steps": step,
        "num_samples": run.plan.num_samples,
        "images": {kind: len(p.set.samples) for kind, p in run.images.by_kind.items()},
        "versions": versions | {"python": platform.python_version()},
    } | ({"fit": run.fit.record()} if run.fit.record() else {})


def shared_config(config: RunConfig) -> dict[str, object]:
    """The options as a LoRA file may show them: without this machine's paths, unless asked for."""
    values = config.as_dict()
    if config.metadata_paths == "full":
        return values
    if config.sources is not None:
        values["sources"] = [_shown_table(config, KEYS, table) for table in config.sources]
    return _shown_table(config, OPTIONS, values)


def _shown_table(
    config: RunConfig, rows: Mapping[str, Option], values: Mapping[str, object]
) -> dict[str, object]:
    return {
        name: _shown(config, rows[name], value)
        for name, value in values.items()
        if rows[name].in_record != "no"
    }


def _shown(config: RunConfig, row: Option, value: object) -> object:
    """An option's value as a LoRA file shows it."""
    by_name = row.in_record == "name" and config.metadata_paths == "names"
    return shared_name(value) if by_name and isinstance(value, str) else value


def facts(run: Run, step: int) -> dict[str, str]:
    """kohya's header keys about the training, as A1111 and model sites show them.

    Options with a `header` in their row are written as it says.
    """
    config, plan = run.config, run.plan
    instances, crops = run.images.instances, run.images.crop_settings
    last = run.objective.timesteps.last
    encoder = next((c for c in run.parts.family.text_encoders if c in run.models), None)
    values: dict[str, object] = {
        option.header: _shown(config, option, option.value_in_header(getattr(config, name)))
        for name, option in OPTIONS.items()
        if option.header
    }
    values |= {
        "ss_sd_model_name": Path(config.base_model).name,
        "ss_resolution": f"({crops.resolution}, {crops.resolution})",
        "ss_num_train_images": len(instances.entries),
        "ss_num_reg_images": run.images.num_class_images,
        "ss_num_epochs": max(1, round(step / plan.epochs.num_steps)),
        "ss_steps": step,
        "ss_max_train_steps": plan.num_steps,
        "ss_total_batch_size": plan.samples_per_step,
        "ss_learning_rate": config.learning_rate_of("unet"),
        "ss_unet_lr": config.learning_rate_of("unet"),
        "ss_lr_warmup_steps": config.num_warmup_steps(plan.num_steps),
        "ss_text_encoder_lr": config.learning_rate_of(encoder) if encoder else None,
        "ss_optimizer": optimizer_of(config).header,
        "ss_mixed_precision": run.accelerator.mixed_precision,
        "ss_random_crop": any(map(instances.is_random, range(len(instances.samples)))),
        "ss_bucket_info": json.dumps(_buckets(plan)) if crops.step else None,
        "ss_seed": plan.seed,
        "ss_zero_terminal_snr": run.objective.schedule.zero_terminal_snr,
        "ss_max_timestep": last if last < run.objective.schedule.num_timesteps else None,
        "modelspec.resolution": f"{crops.resolution}x{crops.resolution}",
    }
    values["ss_tag_frequency"] = json.dumps(_tags(run), ensure_ascii=False)
    # kohya writes "None" for a setting that is off; modelspec has no such word
    shown = {k: v for k, v in values.items() if v is not None or k.startswith("ss_")}
    return {key: str(value) for key, value in shown.items()}


def _buckets(plan: Plan) -> dict[str, dict[str, object]]:
    """The buckets in kohya's form."""
    rows = enumerate(plan.epochs.buckets.items())
    return {"buckets": {str(i): {"resolution": [*size], "count": n} for i, (size, n) in rows}}


def _tags(run: Run) -> dict[str, dict[str, int]]:
    """Kind of images → how often each tag between commas occurs, in kohya's form."""
    counted = {}
    for kind, images in run.images.by_kind.items():
        tags: Counter[str] = Counter()
        for sample in images.set.samples:
            for caption in sample.captions:
                tags.update(tag for part in caption.split(",") if (tag := part.strip()))
        counted[kind] = dict(tags.most_common(MOST_TAGS))
    return counted
