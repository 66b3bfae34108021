"""Captions of a folder's images: from metadata, text files, file names, or a prompt."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from sd_lora.config.options.dreambooth import is_generated
from sd_lora.config.rows import SUBJECT_FOLDER
from sd_lora.config.sources import SourceSpec
from sd_lora.data.sources.crop_files import is_crop_file
from sd_lora.data.sources.folders import FolderTree, has_image_extension, list_names
from sd_lora.data.sources.metadata_files import (
    METADATA_NAMES,
    MetadataRow,
    is_metadata,
    read_metadata,
    read_text,
)
from sd_lora.data.sources.samples import fill_empty_captions, has_empty_caption, printable_path
from sd_lora.errors import UsageError
from sd_lora.files import LARGEST_TEXT
from sd_lora.findings import Finding

T = TypeVar("T")

CAPTION_EXTENSIONS = (".txt", ".caption")

COUNTER = re.compile(r"(?:[\s_-]*\(\d+\)|(?:^|[\s_-]+)\d+)+$")
"""A counter at the end of a file name: `_0012`, ` 12`, ` (3)`, or the whole of `0012`."""


@dataclass
class FolderCaptions:
    """Captions of a folder's images.

    captions: image → at least one caption.
    missing: image without a caption → reason.
    used: caption and metadata files that were read.
    """

    captions: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    missing: dict[Path, str] = field(default_factory=dict)
    used: set[Path] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)

    def add_finding(self, code: str, path: Path, details: str = "") -> None:
        """Add a finding on a file."""
        self.findings.append(Finding(code, printable_path(path), details))


def find_captions(
    spec: SourceSpec, root: Path, tree: FolderTree, source_name: str
) -> FolderCaptions:
    """Find the captions of a folder's images as `spec.captions` says.

    "metadata": rows name the images. "sidecar": a text file beside each image. "filename": the
    name without extension and counter, `_` read as a space: red_car_0012 and "red car (3)" are
    "red car". "prompt": spec.prompt. "auto": metadata if the folder has any, else sidecars.
    spec.prompt replaces missing and empty captions.

    Raises:
        UsageError: no images, no caption for any image, or an error of `read_metadata`.
    """
    metadata = list(filter(is_metadata, tree.files))
    if spec.metadata_file:
        metadata = [Path(spec.metadata_file).expanduser()]
    from_metadata = spec.captions == "metadata" or (spec.captions == "auto" and bool(metadata))
    from_metadata = from_metadata and spec.caption_column is not None
    if not tree.images and not (from_metadata and metadata):
        raise _no_images_error(root, tree, source_name)
    if from_metadata:
        found = _from_metadata(spec, root, tree, metadata)
    elif spec.captions in ("auto", "sidecar", "metadata"):
        found = _from_sidecars(spec, tree)
    elif spec.captions == "filename":
        found = FolderCaptions({path: (caption_of_name(path),) for path in tree.images})
    else:
        found = FolderCaptions(missing=dict.fromkeys(tree.images, "no caption"))
    if spec.kind == "class":
        _read_generated(found, spec, tree)
    unreadable = any(f.level == "left out" for f in found.findings)
    if not (from_metadata or found.captions or unreadable) and spec.prompt is None:
        raise _no_captions_error(spec, tree, source_name)
    if source_name in SUBJECT_FOLDER and spec.captions != "prompt":
        _compare_with_prompt(found, root, spec.prompt or "")
    _apply_prompt(found, spec.prompt)
    if not found.captions:
        lines = [f.line() for f in found.findings if f.level == "left out"]
        raise UsageError(
            f"{source_name} {root} has no image to train:\n  " + "\n  ".join(lines[:5])
        )
    _report_other_files(found, spec, tree)
    return found


def _compare_with_prompt(found: FolderCaptions, root: Path, prompt: str) -> None:
    """Add findings on images of the subject that have no caption, and on words of its prompt that
    no caption has."""
    if found.missing:
        count, reason = len(found.missing), next(iter(found.missing.values()))
        details = f"{count} of {count + len(found.captions)} images have no caption ({reason})"
        found.add_finding("prompt-for-rest", root, details)
    said = {word for texts in found.captions.values() for text in texts for word in _words(text)}
    if found.captions and (nowhere := [word for word in _words(prompt) if word not in said]):
        found.add_finding("words-nowhere", root, f"no caption has: {', '.join(nowhere)}")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _read_generated(found: FolderCaptions, spec: SourceSpec, tree: FolderTree) -> None:
    """Give class images that were generated the captions that were written with them."""
    stems = {path.with_suffix("") for path in found.missing if is_generated(path.name)}
    alone = replace(tree, files=[file for file in tree.files if file.with_suffix("") in stems])
    beside = _from_sidecars(replace(spec, caption_extension=None), alone)
    for path, captions in beside.captions.items():
        found.captions[path] = captions
        del found.missing[path]
    found.used |= beside.used


def caption_of_name(path: Path) -> str:
    """A file name as a caption, without its extension and counter."""
    return COUNTER.sub("", path.stem).replace("_", " ").strip(" -")


def _no_images_error(root: Path, tree: FolderTree, source_name: str) -> UsageError:
    found = [printable_path(path.relative_to(root)) for path in (*tree.files, *tree.folders)]
    found += [f"{finding.line()}" for finding in tree.findings] + tree.hidden
    content = f"it holds {list_names(found)}" if found else "it is empty"
    return UsageError(f"{source_name} {root} holds no images: {content}")


def _no_captions_error(spec: SourceSpec, tree: FolderTree, source_name: str) -> UsageError:
    first = tree.images[0]
    extension = caption_extensions(spec)[0]
    others = [p.name for p in tree.files if p.suffix.lower() in CAPTION_EXTENSIONS]
    hint, one_for_all = "", "--caption_default"
    if spec.kind == "class":
        one_for_all = "a prompt without wildcards"
    if spec.caption_extension and others:
        hint = f"; caption_extension {spec.caption_extension} fits none of {list_names(others)}"
    return UsageError(
        f"{source_name} {spec.path} has images but no captions: add a metadata.jsonl with lines "
        f'like {{"file_name": "{printable_path(Path(first.name))}", '
        f'"{spec.caption_column or "text"}": "a photo of …"}}, or a '
        f"{printable_path(Path(first.stem))}{extension} beside each image, or "
        f"give one caption for all with {one_for_all}{hint}"
    )


def _apply_prompt(found: FolderCaptions, prompt: str | None) -> None:
    """Give the prompt to images without a caption or with an empty one.

    Without a prompt, images without a caption are left out.
    """
    for path, reason in found.missing.items():
        if prompt is None:
            found.add_finding("missing-caption", path, reason)
        else:
            found.captions[path] = (prompt,)
    for path, captions in found.captions.items():
        if path not in found.missing and has_empty_caption(captions):
            found.add_finding("empty-caption", path)
            found.captions[path] = fill_empty_captions(captions, prompt)


def _report_other_files(found: FolderCaptions, spec: SourceSpec, tree: FolderTree) -> None:
    """Add findings on files that are neither images nor read for them."""
    stems = {path.with_suffix("") for path in tree.images}
    extensions = (*caption_extensions(spec), *CAPTION_EXTENSIONS)
    for path in tree.files:
        if has_image_extension(path) or path in found.used or path in found.captions:
            continue
        if is_crop_file(path):
            continue
        extension = next((e for e in extensions if path.name.lower().endswith(e)), "")
        if is_metadata(path):
            found.add_finding("metadata-ignored", path, f"captions come from {spec.captions}")
        elif extension and path.with_name(path.name[: -len(extension)]) in stems:
            found.add_finding("sidecar-ignored", path)
        else:
            found.add_finding("other-file", path, "not an image")


def _file_key(path: Path, folders: dict[Path, Path]) -> tuple[Path, str]:
    """(real folder, file name): the same for a file reached by several links.

    folders: path → real path of the folders resolved before.
    """
    if path.parent not in folders:
        folders[path.parent] = path.parent.resolve()
    return folders[path.parent], path.name


def _composed(path: Path) -> Path:
    """A path in composed Unicode form (NFC): macOS' tools write é as e and an accent (NFD)."""
    return Path(unicodedata.normalize("NFC", str(path)))


def _with_other_forms(
    found: Mapping[tuple[Path, str], T],
) -> Callable[[tuple[Path, str]], T | None]:
    """A look-up by `_file_key` that takes the other Unicode form of a name where its own is not
    there."""
    forms = {_composed(folder / name): value for (folder, name), value in found.items()}
    return lambda key: found.get(key) or forms.get(_composed(key[0] / key[1]))


def _rows_by_image(
    spec: SourceSpec, root: Path, tree: FolderTree, metadata: list[Path], found: FolderCaptions
) -> dict[Path, list[MetadataRow]]:
    """Existing image → rows that name it; adds findings on the other rows."""
    folders = dict[Path, Path]()
    listed = {_file_key(path, folders): path for path in tree.files}
    # kohya's tools name images without their extension
    by_stem: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for key, path in listed.items():
        if has_image_extension(path):
            by_stem[key[0], path.stem].append(path)
    image_named, images_of_stem = _with_other_forms(listed), _with_other_forms(by_stem)
    rows: dict[Path, list[MetadataRow]] = defaultdict(list)
    inside = root.resolve()
    for file in metadata:
        base = root if spec.metadata_file else file.parent
        for row in read_metadata(file, spec):
            key = _file_key(base / row.name, folders)
            if "\\" in row.name and not os.path.isfile(base / row.name):  # written on Windows
                key = _file_key(base / row.name.replace("\\", "/"), folders)
            named = image_named(key)
            same_stem = [] if named else images_of_stem(key) or []
            path = named or (same_stem[0] if same_stem else key[0] / key[1])
            if len(same_stem) > 1:
                candidates = list_names([printable_path(Path(p.name)) for p in same_stem])
                details = f"{row.where} may mean any of {candidates}: the first is taken"
                found.add_finding("stem-clash", path, details)
            if path.is_relative_to(inside):  # hidden, or in a folder that is not read
                path = root / path.relative_to(inside)
            if path in tree.aside:
                continue
            if os.path.isfile(path):
                rows[path].append(row)
                continue
            found.add_finding("missing-image", base / row.name, f"{row.where} names it")
    return rows


def _from_metadata(
    spec: SourceSpec, root: Path, tree: FolderTree, metadata: list[Path]
) -> FolderCaptions:
    if not metadata:
        raise UsageError(
            f"{spec.where} has no {' or '.join(METADATA_NAMES)}, and captions = metadata needs one"
        )
    found = FolderCaptions(used=set(metadata))
    rows = _rows_by_image(spec, root, tree, metadata, found)
    for path, of_image in rows.items():
        captions = tuple(caption for row in of_image for caption in row.captions)
        if len(of_image) > 1:
            lines = " and ".join(row.where for row in of_image)
            found.add_finding("named-twice", path, f"{lines} name it")
        if not path.is_relative_to(root):
            details = f"{of_image[0].where} names it, outside of {printable_path(root)}"
            found.add_finding("outside-folder", path, details)
        if captions:
            found.captions[path] = captions
        else:
            found.missing[path] = f"{of_image[0].where} has no caption for it"
    reason = f"no row of {list_names([printable_path(file) for file in metadata])} names it"
    found.missing |= {path: reason for path in tree.images if path not in rows}
    return found


def caption_extensions(spec: SourceSpec) -> tuple[str, ...]:
    """Endings of caption files, in lower case, the preferred one first."""
    if spec.caption_extension is None:
        return CAPTION_EXTENSIONS
    return ("." + spec.caption_extension.lower().lstrip("."),)


def _from_sidecars(spec: SourceSpec, tree: FolderTree) -> FolderCaptions:
    found, extensions = FolderCaptions(), caption_extensions(spec)
    sidecars: dict[Path, list[Path]] = defaultdict(list)  # path without extension → caption files
    for extension in extensions:
        for path in tree.files:
            if path.name.lower().endswith(extension) and len(path.name) > len(extension):
                sidecars[path.with_name(path.name[: -len(extension)])].append(path)
    images: dict[Path, list[Path]] = defaultdict(list)
    for path in tree.images:
        images[path.with_suffix("")].append(path)
    forms = {_composed(stem): stem for stem in sidecars if stem not in images}
    for stem, same_stem in images.items():
        files = sidecars.pop(stem, []) or sidecars.pop(forms.get(_composed(stem), stem), [])
        if files:
            _read_sidecar(found, same_stem, files)
            continue
        reason = f"no {' or '.join(printable_path(stem) + e for e in extensions)}"
        found.missing |= dict.fromkeys(same_stem, reason)
    for files in sidecars.values():
        for path in files:
            found.used.add(path)
            # written first, its image is drawn when the run goes on
            if not is_generated(path.with_suffix(".png").name):
                found.add_finding("orphan-caption", path)
    return found


def _read_sidecar(found: FolderCaptions, images: list[Path], files: list[Path]) -> None:
    """Give the first caption file to all images of its name."""
    first, *others = files
    found.used |= set(files)
    for path in others:
        found.add_finding("second-caption", path, f"{printable_path(Path(first.name))} is read")
    if len(images) > 1:
        same = " and ".join(printable_path(Path(path.name)) for path in images)
        details = f"{same} share the caption in {printable_path(Path(first.name))}"
        found.add_finding("stem-clash", images[0], details)
    try:
        caption = read_text(first, LARGEST_TEXT).strip()
    except UsageError as error:
        for path in images:
            code = "non-utf8-caption" if "UTF-8" in str(error) else "unreadable-caption"
            found.add_finding(code, path, f"its caption: {error}")
        return
    found.captions |= dict.fromkeys(images, (caption,))
