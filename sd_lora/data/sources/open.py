"""Where samples come from: folders, kohya's numbered folders, and `datasets` sets."""

import dataclasses
import re
from functools import partial
from pathlib import Path

from sd_lora.config.sources import SourceSpec
from sd_lora.data.images.decode import read_file
from sd_lora.data.sources.datasets_hub import open_set
from sd_lora.data.sources.folder_captions import FolderCaptions, caption_images, extensions_of
from sd_lora.data.sources.folders import Tree, existing_folder, looks_like_image, names, walk
from sd_lora.data.sources.metadata_files import TABLES
from sd_lora.data.sources.samples import Sample, Source, shown
from sd_lora.errors import UsageError
from sd_lora.findings import Finding

__all__ = ["Sample", "Source", "open_source"]

NUMBERED = re.compile(r"(\d+)_(.+)", re.DOTALL)
"""kohya's names of folders: how often its images are seen in an epoch, and their caption."""


MANY = 1000
"""Repeats that are more likely a year or a number of something else."""


def open_source(spec: SourceSpec) -> list[Source]:
    """Returns the sources that a specification names: one, or one for each of kohya's folders.

    A folder is read whole, with its captions, but for the images themselves. Whatever in it is
    not trained, or not as meant, is in the findings.

    Raises:
        UsageError: nothing can be trained: a folder or set that is missing or has no images or
            captions, a column that is not there, a row of metadata that cannot be read.
    """
    if spec.dataset is not None:
        return [open_set(spec)]
    what = spec.label or "source"
    root = existing_folder(str(spec.path), what)
    top = walk(root, recursive=False)
    if spec.layout == "kohya" or (spec.layout == "auto" and _is_kohya(top, spec)):
        return _numbered_folders(spec, root, top, what)
    tree = walk(root) if spec.recursive else top
    if spec.layout == "auto":
        tree.findings += _numbers_not_read(root, tree)
    return [_folder_source(spec, root, tree, what)]


def _is_kohya(top: Tree, spec: SourceSpec) -> bool:
    """Whether a folder is one of numbered folders: nothing beside these can be trained."""
    has_table = spec.metadata_file or any(path.name in TABLES for path in top.files)
    numbered = any(NUMBERED.fullmatch(folder.name) for folder in top.folders)
    beside = spec.prompt is not None or spec.captions == "filename"
    stems = {
        path.with_name(path.name[: -len(extension)])
        for path in top.files
        for extension in extensions_of(spec)
        if path.name.lower().endswith(extension)
    }
    beside |= any(path.with_suffix("") in stems for path in top.images)
    return numbered and not has_table and not (top.images and beside)


def _folder_source(spec: SourceSpec, root: Path, tree: Tree, what: str) -> Source:
    findings = list(tree.findings)
    if tree.hidden:
        text = f"{len(tree.hidden)} hidden files and folders are not read: {names(tree.hidden)}"
        findings.append(Finding("note", "hidden", shown(root), text))
    found: FolderCaptions = caption_images(spec, root, tree, what)
    findings += (_unread_folder(folder, set(found.captions)) for folder in tree.folders)
    samples = [
        Sample(shown(path), partial(read_file, path), captions, spec)
        for path, captions in sorted(found.captions.items())
    ]
    return Source(spec, partial(iter, samples), findings + found.findings, len(samples))


def _numbered_folders(spec: SourceSpec, root: Path, top: Tree, what: str) -> list[Source]:
    """Returns a source for each `<repeats>_<class tokens>` folder."""
    findings = list(top.findings)
    sources = []
    for folder in top.folders:
        match, tree = NUMBERED.fullmatch(folder.name), walk(folder, spec.recursive)
        count = len(tree.images)
        if not match or not int(match[1]) or not count:
            findings += [*tree.findings, _not_numbered(folder, match, count)]
            continue
        own = dataclasses.replace(
            spec,
            path=str(folder),
            layout="plain",
            repeats=int(match[1]) * spec.repeats,
            prompt=spec.prompt if spec.captions == "prompt" and spec.prompt else match[2],
            label=f"{spec.label}/{folder.name}" if spec.label else "",
        )
        sources.append(_folder_source(own, folder, tree, str(folder)))
        if int(match[1]) >= MANY:
            text = (
                f"its images are seen {int(match[1])} times an epoch, as its name says: if that "
                "is a date or the like, rename it, or take --data_layout plain"
            )
            findings.append(Finding("warning", "many-repeats", shown(folder), text))
    for path in top.files:
        if looks_like_image(path):
            text = "lies beside the numbered folders; move it into one of them"
            findings.append(Finding("left out", "outside-folders", shown(path), text))
    if not sources:
        has = names([shown(Path(folder.name)) for folder in top.folders]) or "no folders"
        raise UsageError(
            f"{what} {root} has no folders such as 10_sks dog with images (10 times an epoch, "
            f"the caption is sks dog): it has {has}"
        )
    sources[0].findings[:0] = findings
    return sources


def _not_numbered(folder: Path, match: re.Match[str] | None, count: int) -> Finding:
    images = f"{count} {'image' if count == 1 else 'images'}"
    if not count:
        text = "holds no images"
    elif match:
        text = f"its {images} are to be seen 0 times an epoch, so they are not trained"
    else:
        text = f"{images} not trained: call the folder 1_{shown(Path(folder.name))}, say"
    code = "no-repeats" if match else "folder-without-number"
    return Finding("left out" if count else "note", code, shown(folder), text)


def _unread_folder(folder: Path, trained: set[Path]) -> Finding:
    count = sum(path not in trained for path in walk(folder).images)
    text = f"a folder: its {count} images are not read"
    return Finding("left out" if count else "note", "subfolder", shown(folder), text)


def _numbers_not_read(root: Path, tree: Tree) -> list[Finding]:
    folders = {
        folder
        for path in tree.images
        for folder in path.parents
        if folder.is_relative_to(root) and folder != root and NUMBERED.fullmatch(folder.name)
    }
    text = (
        "named like kohya's folders, whose number says how often images are seen; it says "
        f"nothing here. Give the folder that it lies in as the source instead of {shown(root)}, or "
        "--data_layout kohya where other images or metadata lie beside it"
    )
    return [Finding("warning", "number-not-read", shown(f), text) for f in sorted(folders)]
