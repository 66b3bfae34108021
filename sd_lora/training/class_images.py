"""Class images for prior preservation; the base model generates the missing ones."""

import itertools
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sd_lora.config.options.dreambooth import ClassImages, generated_name
from sd_lora.config.wildcards import Pick
from sd_lora.data.images.decode import is_image
from sd_lora.data.sources.folders import list_names, walk
from sd_lora.data.sources.samples import printable_path
from sd_lora.errors import UsageError
from sd_lora.files import write_whole
from sd_lora.models.caption_encoder import CaptionEncoder
from sd_lora.models.families import Family
from sd_lora.models.load import Parts
from sd_lora.models.noise_scheduler import usual_rescale
from sd_lora.report.events import Listener, tracked
from sd_lora.report.sheets import write_image
from sd_lora.sampling.parameters import Parameters
from sd_lora.sampling.sampler import can_generate_images, sample
from sd_lora.seeds import seed_for, shuffled
from sd_lora.training.processes import DTYPES

CLASS_STEPS, CLASS_GUIDANCE = 25, 7.5
"""Sampler steps and guidance of class images: they are kept, so fast settings of the sample images
must not apply to them."""


def has_class_images(wanted: ClassImages) -> bool:
    """Whether the folder of class images exists and holds images.

    Raises:
        UsageError: a file in its place, or no permission.
    """
    wanted.check_folder()
    return wanted.folder.is_dir() and any(map(is_image, wanted.folder.iterdir()))


def check_class_images(wanted: ClassImages, there: int, family: Family) -> None:
    """Raise UsageError for class images that lie in subfolders, where they are not read, while the
    base model would draw others; and for missing ones that it cannot draw.

    there: number of usable class images.
    """
    missing = wanted.count - there
    if missing > 0:
        _refuse_subfolders(wanted, there)
    if missing > 0 and not can_generate_images(family):
        raise UsageError(
            f"class_data_dir {wanted.folder} lacks {missing} of {wanted.count} class images, and "
            f"{family.label} cannot draw images alone: put them there"
        )


def _refuse_subfolders(wanted: ClassImages, there: int) -> None:
    if not wanted.folder.is_dir():
        return
    folders = walk(wanted.folder, recursive=False).folders
    counts = {printable_path(path): len(walk(path).images) for path in folders}
    found = [f"{path}: {count}" for path, count in counts.items() if count]
    if found:
        raise UsageError(
            f"class_data_dir {wanted.folder} has {there} of {wanted.count} class images, and "
            f"others lie in its subfolders, which are not read ({list_names(found)} images): give "
            "one of these folders, move the images up, or move the subfolders away. Nothing has "
            "been drawn yet"
        )


def numbered(seed: int, number: int) -> Pick:
    """The choice of the image of a number. Of k options of a wildcard, each k images have all, in
    an order of their own."""

    def pick(options: list[str], what: str) -> str:
        turn, at = divmod(number, len(options))
        return options[shuffled(len(options), seed, "class prompt", what, turn)[at]]

    return pick


def _free_names(folder: Path, count: int, seed: int) -> list[str]:
    """Unused names for `count` more images of a folder."""
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    numbered = (generated_name(seed, number) for number in itertools.count())
    return list(itertools.islice((name for name in numbered if name not in names), count))


def fill_class_folder(
    wanted: ClassImages,
    there: int,
    parts: Parts,
    caption_encoder: CaptionEncoder,
    resolution: int,
    accelerator: Accelerator,
    seed: int,
    emit: Listener,
) -> None:
    """Generate the missing class images with the bare base model.

    The main process names them, and all processes share the work. An image is written whole or not
    at all, so an interrupted run continues where it stopped. there: number of usable class images.
    resolution: side in pixels.
    """
    check_class_images(wanted, there, parts.family)
    missing = [_free_names(wanted.folder, max(0, wanted.count - there), seed)]
    mine = broadcast_object_list(missing)[0][accelerator.process_index :: accelerator.num_processes]
    if mine:
        paths = [wanted.folder / name for name in mine]
        _generate_class_images(
            wanted, parts, caption_encoder, resolution, accelerator, seed, paths, emit
        )
    accelerator.wait_for_everyone()


def _generate_class_images(
    wanted: ClassImages,
    parts: Parts,
    caption_encoder: CaptionEncoder,
    resolution: int,
    accelerator: Accelerator,
    seed: int,
    paths: list[Path],
    emit: Listener,
) -> None:
    device = accelerator.device
    default = "fp16" if device.type == "cuda" else "fp32"
    dtype = DTYPES[wanted.precision or default]
    drawn = [
        Parameters(
            wanted.wording(numbered(seed, int(path.stem.rsplit("-")[-1]))),
            seed_for(seed, "class picture", path.name) % 2**32,
            CLASS_STEPS,
            CLASS_GUIDANCE,
            (resolution, resolution),
            wanted.base_model,
            clip_skip=caption_encoder.clip_skip,
            guidance_rescale=usual_rescale(parts.scheduler),
        )
        for path in paths
    ]
    # autocast, not a cast of the weights: fp16 there and back would round them
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        images = sample(
            parts,
            caption_encoder,
            [parameters.prompt for parameters in drawn],
            [parameters.seed for parameters in drawn],
            size=(resolution, resolution),
            device=device,
            steps=CLASS_STEPS,
            guidance_scale=CLASS_GUIDANCE,
            batch_size=wanted.batch_size,
        )
        named = list(zip(paths, drawn, strict=True))
        for path, parameters in tracked(named, emit, "class images", len(paths)):
            if wanted.keeps_prompts:  # first: an image without its caption would not be trained
                write_whole(path.with_suffix(".txt"), parameters.prompt.encode())
            write_image(path, next(images), [parameters])
        next(images, None)  # ends the sampler, which puts the models back on their devices
