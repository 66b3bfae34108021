"""Open a source: a folder, kohya's numbered folders, or a `datasets` set."""

import dataclasses
import re
from functools import partial
from pathlib import Path

from sd_lora.config.sources import SourceSpec
from sd_lora.data.images.decode import read_file
from sd_lora.data.sources.crop_files import crops_of, is_crop_file
from sd_lora.data.sources.datasets_hub import open_dataset
from sd_lora.data.sources.folder_captions import (
    CAPTION_EXTENSIONS,
    FolderCaptions,
    caption_extensions,
    find_captions,
)
from sd_lora.data.sources.folders import (
    FolderTree,
    existing_folder,
    has_image_extension,
    list_names,
    walk,
)
from sd_lora.data.sources.mask_files import masks_of
from sd_lora.data.sources.metadata_files import is_metadata
from sd_lora.data.sources.samples import Mask, Sample, Source, printable_path
from sd_lora.errors import UsageError
from sd_lora.findings import Finding
from sd_lora.folders import RUN_LOG

__all__ = ["Sample", "Source", "open_source"]

NUMBERED = re.compile(r"(\d+)_(.+)", re.DOTALL)
"""kohya's folder names: repeats of its images in an epoch, and their caption."""


MANY_REPEATS = 1000
"""From here on, the number is more likely a year or a part of a name than repeats."""


def open_source(spec: SourceSpec) -> list[Source]:
    """Open the sources of a specification: one, or one a numbered folder.

    Folders are listed and captions are read; images are not. Files that are not trained, or not
    as intended, are in the findings.

    Raises:
        UsageError: a folder or set that is missing or has no images or captions, a missing
            column, or an unreadable row of metadata.
    """
    if spec.dataset is not None:
        return [open_dataset(spec)]
    name = spec.label or "source"
    root = existing_folder(str(spec.path), name)
    if (root / RUN_LOG).is_file():
        raise UsageError(f"{name} {root} is the output folder of a run: its images are samples")
    top = walk(root, recursive=False)
    if spec.layout == "kohya" or (spec.layout == "auto" and _is_kohya(top, spec)):
        return _numbered_folders(spec, root, top, name)
    tree = walk(root) if spec.recursive else top
    if spec.layout == "auto":
        tree.findings += _unread_numbers(root, tree)
    return [_folder_source(spec, root, tree, name)]


def has_captions(folder: str) -> bool:
    """Whether the images of a folder have captions: files beside them, metadata, or numbered
    folders; raises UsageError for a folder that is missing or unreadable."""
    root = existing_folder(folder, "folder")
    tree, stems = walk(root), {path.with_suffix("") for path in walk(root).images}
    return (
        any(NUMBERED.fullmatch(child.name) for child in root.iterdir() if child.is_dir())
        or any(map(is_metadata, tree.files))
        or any(
            path.suffix.lower() in CAPTION_EXTENSIONS and path.with_suffix("") in stems
            for path in tree.files
        )
    )


def _is_kohya(top: FolderTree, spec: SourceSpec) -> bool:
    """Whether a folder holds numbered folders, and nothing else to train."""
    has_metadata = spec.metadata_file or any(map(is_metadata, top.files))
    numbered = any(NUMBERED.fullmatch(folder.name) for folder in top.folders)
    captioned = spec.prompt is not None or spec.captions == "filename"
    stems = {
        path.with_name(path.name[: -len(extension)])
        for path in top.files
        for extension in caption_extensions(spec)
        if path.name.lower().endswith(extension)
    }
    captioned |= any(path.with_suffix("") in stems for path in top.images)
    return numbered and not has_metadata and not (top.images and captioned)


def _folder_source(spec: SourceSpec, root: Path, tree: FolderTree, name: str) -> Source:
    masks = masks_of(spec, root, tree)
    crops = crops_of(tree)
    findings = list(tree.findings)
    if tree.hidden:
        details = f"{len(tree.hidden)} hidden files and folders: {list_names(tree.hidden)}"
        findings.append(Finding("hidden", printable_path(root), details))
    found: FolderCaptions = find_captions(spec, root, tree, name)
    known = set(found.captions) | tree.aside
    findings += _subfolder_findings(root, tree, found, known)
    samples = [
        Sample(
            *_file(path),
            captions,
            spec,
            mask=Mask(*_file(masks[path])) if path in masks else None,
            hand_crop=crops.get(path),
        )
        for path, captions in sorted(found.captions.items())
    ]
    if spec.mask_files or spec.mask_folder:
        findings += (Finding("no-mask", sample.name) for sample in samples if not sample.mask)
    return Source(spec, partial(iter, samples), findings + found.findings, len(samples))


def _file(path: Path) -> tuple[str, partial[bytes]]:
    """The name of a file in messages, and the reader of its bytes."""
    return printable_path(path), partial(read_file, path)


def _numbered_folders(spec: SourceSpec, root: Path, top: FolderTree, name: str) -> list[Source]:
    """One source a `<repeats>_<class tokens>` folder."""
    findings = list(top.findings)
    sources = []
    for folder in top.folders:
        match, tree = NUMBERED.fullmatch(folder.name), walk(folder, spec.recursive)
        repeats, count = int(match[1]) if match else 0, len(tree.images)
        if not match or not repeats or not count:
            findings += [*tree.findings, _skipped_folder(folder, match, count)]
            continue
        numbered = dataclasses.replace(
            spec,
            path=str(folder),
            layout="plain",
            repeats=repeats * spec.repeats,
            prompt=spec.prompt if spec.captions == "prompt" and spec.prompt else match[2],
            label=f"{spec.label}/{folder.name}" if spec.label else "",
        )
        sources.append(_folder_source(numbered, folder, tree, str(folder)))
        if repeats >= MANY_REPEATS:
            details = f"each image is trained {repeats} times an epoch, as the folder's name says"
            findings.append(Finding("many-repeats", printable_path(folder), details))
    for path in top.files:
        if has_image_extension(path):
            findings.append(Finding("outside-folders", printable_path(path)))
        elif is_crop_file(path):
            details = "beside the numbered folders: it belongs beside the images that it names"
            findings.append(Finding("orphan-crop", printable_path(path), details))
    if not sources:
        names = [printable_path(Path(folder.name)) for folder in top.folders]
        raise UsageError(
            f"{name} {root} has no numbered folders with images, for example 10_sks dog (10 times "
            f"an epoch, with the caption sks dog): it has {list_names(names) or 'no folders'}"
        )
    sources[0].findings[:0] = findings
    return sources


def _skipped_folder(folder: Path, match: re.Match[str] | None, count: int) -> Finding:
    name, images = printable_path(folder), _images(count)
    if not count:
        return Finding("folder-without-images", name)
    if match:
        return Finding("no-repeats", name, f"0 repeats for its {images}")
    details = f"{images} not trained: rename the folder, for example to 1_"
    return Finding("folder-without-number", name, details + printable_path(Path(folder.name)))


def _images(count: int) -> str:
    return f"{count} {'image' if count == 1 else 'images'}"


def _subfolder_findings(
    root: Path, tree: FolderTree, found: FolderCaptions, known: set[Path]
) -> list[Finding]:
    """Findings on subfolders that are not read. known: images that are trained, or named."""
    findings, unread = [], 0
    for folder in tree.folders:
        name = printable_path(folder)
        if (folder / RUN_LOG).is_file():
            findings.append(Finding("run-folder", name))
            continue
        images = walk(folder).images
        count = sum(path not in known for path in images)
        unread += count
        if count:
            findings.append(Finding("subfolder", name, f"a folder with {_images(count)}"))
        elif not images:
            findings.append(Finding("folder-without-images", name))
    if unread > len(found.captions):
        trained = _images(len(found.captions))
        details = f"{trained} of the folder itself, and {unread} in its subfolders are not trained"
        findings.append(Finding("more-in-subfolders", printable_path(root), details))
    return findings


def _unread_numbers(root: Path, tree: FolderTree) -> list[Finding]:
    """Findings on numbered folders in a tree that is read as a plain one."""
    folders = {
        folder
        for path in tree.images
        for folder in path.parents
        if folder.is_relative_to(root) and folder != root and NUMBERED.fullmatch(folder.name)
    }
    return [Finding("number-not-read", printable_path(folder)) for folder in sorted(folders)]
