"""Masks of images: files beside them, or in a folder of masks; never trained as the subject."""

import re
from collections.abc import Iterable
from pathlib import Path

from sd_lora.config.sources import SourceSpec
from sd_lora.data.sources.folders import (
    FolderTree,
    existing_folder,
    has_image_extension,
    list_names,
    walk,
)
from sd_lora.data.sources.samples import printable_path
from sd_lora.errors import UsageError
from sd_lora.findings import Finding

MASK = re.compile(r"(.+?)(?:-masklabel|[-_.]mask)", re.IGNORECASE)
"""The name of a mask without its extension: OneTrainer's NAME-masklabel, or NAME_mask, NAME.mask,
NAME-mask of other programs."""

CERTAIN = re.compile(r".+-(?:mask|cond)label", re.IGNORECASE)
"""Names that OneTrainer alone gives. Others are masks only beside an image of the name: a photo may
be called in_a_mask.png."""

FOLDERS = ("mask", "masks")
"""Names of folders with the masks of the images in the folder above, in lower case."""


def is_mask_folder(folder: Path) -> bool:
    """Whether a folder holds the masks of the images in the folder above it, by its name."""
    return folder.name.lower() in FOLDERS


def masks_beside(tree: FolderTree) -> dict[Path, Path | None]:
    """Files of a tree that are no subjects, by name → the first image that each masks.

    None: an image for conditioning (OneTrainer's NAME-condlabel), or a mask without its image.
    """
    near = [
        path for folder in tree.folders if is_mask_folder(folder) for path in walk(folder).files
    ]
    images = [path for path in [*tree.files, *near] if has_image_extension(path)]
    stems: dict[Path, Path] = {}
    for path in images:
        stems.setdefault(path.with_suffix(""), path)
    found: dict[Path, Path | None] = {}
    for path in images:
        match = MASK.fullmatch(path.stem)
        image = stems.get(path.with_name(match[1])) if match else None
        if image is None and is_mask_folder(path.parent):
            names = (path.stem, match[1] if match else path.stem)
            above = (stems.get(path.parent.parent / name) for name in names)
            image = next(filter(None, above), None)
        if image is not None or CERTAIN.fullmatch(path.stem):
            found[path] = image
    return found


def masks_of(spec: SourceSpec, root: Path, tree: FolderTree) -> dict[Path, Path]:
    """Image of a source → its mask, as `spec.mask_files` or `spec.mask_folder` says.

    Puts aside the files of the tree that are no subjects, and adds findings on them.

    Raises:
        UsageError: a mask_folder that is missing, or has no mask of any image.
    """
    aside = masks_beside(tree)
    folder = existing_folder(spec.mask_folder, "mask_folder") if spec.mask_folder else None
    if folder:
        inside = folder.resolve()
        aside |= {p: None for p in tree.files if p.resolve().is_relative_to(inside)}
    tree.aside |= aside.keys()
    masks = _masks_in(folder, root, tree.images) if folder else {}
    if spec.mask_files:
        of_stem = {image.with_suffix(""): mask for mask, image in aside.items() if image}
        beside = {p: m for p in tree.images if (m := of_stem.get(p.with_suffix("")))}
        masks = beside | masks
    used = set(masks.values())
    tree.findings += (_finding(path, image) for path, image in aside.items() if path not in used)
    return masks


def _masks_in(folder: Path, root: Path, images: Iterable[Path]) -> dict[Path, Path]:
    """Image → the mask of its name in a folder, below the same subfolders or directly in it."""
    files = [path for path in walk(folder).files if has_image_extension(path)]
    of_name: dict[Path, Path] = {}
    for path in files:
        name = path.relative_to(folder).with_suffix("")
        match = MASK.fullmatch(name.name)
        of_name.setdefault(name.with_name(match[1]) if match else name, path)
        of_name[name] = path
    found = {}
    for image in images:
        name = image.relative_to(root).with_suffix("")
        mask = of_name.get(name) or of_name.get(Path(name.name))
        if mask:
            found[image] = mask
    if not found:
        names = [printable_path(path.relative_to(folder)) for path in files]
        raise UsageError(
            f"mask_folder {folder} has no mask with the name of an image in {root}: it holds "
            f"{list_names(names) or 'no images'}"
        )
    return found


def _finding(path: Path, image: Path | None) -> Finding:
    if image:
        return Finding("mask-file", printable_path(path), f"the mask of {printable_path(image)}")
    details = "a mask or an image for conditioning, by its name or place"
    return Finding("not-a-subject", printable_path(path), details)
