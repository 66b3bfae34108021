"""What a run trains on: its samples, class pictures, latents and text embeddings."""

import itertools
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sd_lora.data.cache import Latents
from sd_lora.data.images import Framing, is_picture
from sd_lora.data.sources import Source, captioned_folder, named_dataset, prompted_folder
from sd_lora.errors import UsageError
from sd_lora.models.load import Parts
from sd_lora.models.prompts import Reader
from sd_lora.seeds import seed_for, shuffled
from sd_lora.training import report
from sd_lora.training.config import TrainConfig
from sd_lora.training.sampling import draws, sample, write_picture

DTYPES = {
    "no": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""What the names of precisions mean."""


def find_samples(config: TrainConfig, seed: int) -> Source:
    """Returns the training samples that the configuration names."""
    if config.mode == "dreambooth":
        prompt = str(config.instance_prompt)
        if config.instance_data_dir:
            return prompted_folder(config.instance_data_dir, prompt, "instance_data_dir")
        return _dataset(config, prompt)
    if config.train_data_dir:
        column = str(config.caption_column)
        source = captioned_folder(config.train_data_dir, config.image_column, column)
    else:
        source = _dataset(config)
    if config.max_train_samples is not None and config.max_train_samples < len(source.samples):
        chosen = shuffled(len(source.samples), seed, "max_train_samples")
        kept = sorted(chosen[: config.max_train_samples])
        note = f"max_train_samples: {len(kept)} of {len(source.samples)} pictures are trained"
        return Source([source.samples[i] for i in kept], [*source.notes, note])
    return source


def _dataset(config: TrainConfig, prompt: str | None = None) -> Source:
    return named_dataset(
        str(config.dataset_name),
        config.dataset_config_name,
        config.cache_dir,
        config.image_column,
        config.caption_column,
        prompt,
    )


CLASS_STEPS, CLASS_GUIDANCE = 25, 7.5
"""Of the sampler for class pictures: they are kept, so quick previews must not make them worse."""


def _missing_class_pictures(folder: Path, count: int, seed: int) -> list[str]:
    """Returns the names of the pictures that fill the folder up to `count`."""
    names = {p.name for p in folder.iterdir() if is_picture(p)} if folder.is_dir() else set()
    numbered = (f"class-{seed}-{number:05}.png" for number in itertools.count())
    free = (name for name in numbered if name not in names)
    return list(itertools.islice(free, max(0, count - len(names))))


def class_samples(
    config: TrainConfig, parts: Parts, reader: Reader, accelerator: Accelerator, seed: int
) -> Source:
    """Returns the class pictures, generating with the bare base model those that are missing.

    The main process says which are missing and all share the work. A picture is written whole or
    not at all, so an interrupted run goes on where it stopped.
    """
    folder = Path(str(config.class_data_dir)).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"class_data_dir {folder} is a file, not a folder")
    missing = [_missing_class_pictures(folder, config.num_class_images, seed)]
    mine = broadcast_object_list(missing)[0][accelerator.process_index :: accelerator.num_processes]
    if missing[0] and not draws(parts):
        raise UsageError(
            f"class_data_dir {folder} lacks {len(missing[0])} of {config.num_class_images} class "
            f"pictures, and {parts.family.label} cannot draw them by itself: put them there"
        )
    if mine:
        paths = [folder / name for name in mine]
        _generate_class_pictures(config, parts, reader, accelerator, seed, paths)
    accelerator.wait_for_everyone()
    return prompted_folder(str(folder), str(config.class_prompt), "class_data_dir")


def _generate_class_pictures(
    config: TrainConfig,
    parts: Parts,
    reader: Reader,
    accelerator: Accelerator,
    seed: int,
    paths: list[Path],
) -> None:
    device = accelerator.device
    default = "fp16" if device.type == "cuda" else "fp32"
    dtype = DTYPES[config.prior_generation_precision or default]
    # autocast, not a cast of the weights: fp16 there and back would round them
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        pictures = sample(
            parts,
            reader,
            [str(config.class_prompt)] * len(paths),
            [seed_for(seed, "class picture", path.name) % 2**32 for path in paths],
            resolution=config.side,
            device=device,
            steps=CLASS_STEPS,
            guidance_scale=CLASS_GUIDANCE,
            batch_size=config.sample_batch_size,
        )
        for path in report.progress(paths, "class pictures", accelerator.is_main_process):
            write_picture(path, next(pictures))
        next(pictures, None)  # so that the parts go back where they were


def cache_latents(latents: Latents, kind: str, source: Source, accelerator: Accelerator) -> None:
    """Decodes every picture and encodes those whose crop is fixed."""
    bar = partial(report.progress, label=f"{kind} latents", main=accelerator.is_main_process)
    latents.vae.to(accelerator.device)
    latents.fill(kind, source.samples, bar)


def framing(config: TrainConfig) -> Framing:
    return Framing(
        config.side, config.center_crop, config.random_flip, config.image_interpolation_mode
    )
