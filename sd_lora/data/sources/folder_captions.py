"""Which caption each image of a folder has: from metadata, text files, names, or a prompt."""

import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from sd_lora.config.sources import SourceSpec
from sd_lora.data.sources.folders import Tree, looks_like_image, names
from sd_lora.data.sources.metadata_files import TABLES, Row, read_table, text_of
from sd_lora.data.sources.samples import EMPTY_CAPTION, NO_CAPTION, filled, has_empty, shown
from sd_lora.errors import UsageError
from sd_lora.findings import Finding, Level

SIDECARS = (".txt", ".caption")

COUNTER = re.compile(r"(?:[\s_-]*\(\d+\)|(?:^|[\s_-]+)\d+)+$")
"""The end of a file's name that only counts: `_0012`, ` 12`, ` (3)`, or the whole of `0012`."""


@dataclass
class FolderCaptions:
    """captions: of the images that are trained, at least one each. used: files that were read for
    them. missing: images without a caption, and why."""

    captions: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    missing: dict[Path, str] = field(default_factory=dict)
    used: set[Path] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)

    def note(self, level: Level, code: str, path: Path, text: str) -> None:
        self.findings.append(Finding(level, code, shown(path), text))


def caption_images(spec: SourceSpec, root: Path, tree: Tree, what: str) -> FolderCaptions:
    """Returns the captions of a folder's images, found as `spec.captions` says.

    "metadata": its rows name the images. "sidecar": a text file beside each. "filename": the
    name without its extension and without a counter at its end, `_` read as a space: red_car_0012
    and "red car (3)" are "red car". "prompt": spec.prompt. "auto": metadata if there is any, else
    sidecars. Where an image has none, or an empty one, spec.prompt is its caption.

    Raises:
        UsageError: no images, or no caption for any of them; what `read_table` raises.
    """
    tables = [path for path in tree.files if path.name in TABLES]
    if spec.metadata_file:
        tables = [Path(spec.metadata_file).expanduser()]
    by_table = spec.captions == "metadata" or (spec.captions == "auto" and bool(tables))
    by_table = by_table and spec.caption_column is not None
    if not tree.images and not (by_table and tables):
        raise _no_images(root, tree, what)
    if by_table:
        found = _from_tables(spec, root, tree, tables)
    elif spec.captions in ("auto", "sidecar", "metadata"):
        found = _from_sidecars(spec, tree)
    elif spec.captions == "filename":
        found = FolderCaptions({path: (caption_of_name(path),) for path in tree.images})
    else:
        found = FolderCaptions(missing=dict.fromkeys(tree.images, "has no caption"))
    unread = any(f.level == "left out" for f in found.findings)
    if not (by_table or found.captions or unread) and spec.prompt is None:
        raise _no_captions(spec, tree, what)
    _fill_in(found, spec.prompt)
    if not found.captions:
        lines = [f.line() for f in found.findings if f.level == "left out"]
        raise UsageError(f"{what} {root} has no image to train:\n  " + "\n  ".join(lines[:5]))
    _name_others(found, spec, tree)
    return found


def caption_of_name(path: Path) -> str:
    return COUNTER.sub("", path.stem).replace("_", " ").strip(" -")


def _no_images(root: Path, tree: Tree, what: str) -> UsageError:
    found = [shown(path.relative_to(root)) for path in (*tree.files, *tree.folders)]
    found += [f"{finding.line()}" for finding in tree.findings] + tree.hidden
    has = f"it holds {names(found)}" if found else "it is empty"
    return UsageError(f"{what} {root} holds no images: {has}")


def _no_captions(spec: SourceSpec, tree: Tree, what: str) -> UsageError:
    first = tree.images[0]
    extension = extensions_of(spec)[0]
    others = [p.name for p in tree.files if p.suffix.lower() in SIDECARS]
    hint = ""
    if spec.caption_extension and others:
        hint = f"; caption_extension {spec.caption_extension} fits none of {names(others)}"
    return UsageError(
        f"{what} {spec.path} has images and no captions: give it a metadata.jsonl with lines "
        f'like {{"file_name": "{shown(Path(first.name))}", "{spec.caption_column or "text"}": '
        f'"a photo of …"}}, or a {shown(Path(first.stem))}{extension} beside each image, or '
        f"say one for all by --caption_default{hint}"
    )


def _fill_in(found: FolderCaptions, prompt: str | None) -> None:
    """Gives the prompt to images without words; without a prompt, those without a caption go."""
    for path, reason in found.missing.items():
        if prompt is None:
            found.note("left out", "missing-caption", path, f"{reason}. {NO_CAPTION}")
        else:
            found.captions[path] = (prompt,)
    for path, captions in found.captions.items():
        if path not in found.missing and has_empty(captions):
            found.note("warning", "empty-caption", path, EMPTY_CAPTION)
            found.captions[path] = filled(captions, prompt)


def _name_others(found: FolderCaptions, spec: SourceSpec, tree: Tree) -> None:
    """Names the files of the folder that are neither images nor were read for them."""
    stems = {path.with_suffix("") for path in tree.images}
    extensions = (*extensions_of(spec), *SIDECARS)
    for path in tree.files:
        if looks_like_image(path) or path in found.used or path in found.captions:
            continue
        extension = next((e for e in extensions if path.name.lower().endswith(e)), "")
        if path.name in TABLES:
            text = f"not read, for captions come from {spec.captions}"
            found.note("note", "metadata-ignored", path, text)
        elif extension and path.with_name(path.name[: -len(extension)]) in stems:
            text = "a caption beside its image; not read, for captions come from elsewhere"
            found.note("note", "sidecar-ignored", path, text)
        else:
            found.note("note", "not-a-image", path, "not an image; not read")


def _key(path: Path, folders: dict[Path, Path]) -> tuple[Path, str]:
    """Returns what tells files apart where links lead to a folder by several paths."""
    if path.parent not in folders:
        folders[path.parent] = path.parent.resolve()
    return folders[path.parent], path.name


def _from_tables(spec: SourceSpec, root: Path, tree: Tree, tables: list[Path]) -> FolderCaptions:
    if not tables:
        raise UsageError(
            f"{spec.where} has no {' or '.join(TABLES)}, and captions = metadata asks for one"
        )
    found, folders = FolderCaptions(used=set(tables)), dict[Path, Path]()
    listed = {_key(path, folders): path for path in tree.files}
    # kohya's tools name images without their extension
    stems: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for key, path in listed.items():
        if looks_like_image(path):
            stems[key[0], path.stem].append(path)
    rows: dict[Path, list[Row]] = defaultdict(list)
    inside = root.resolve()
    for table in tables:
        base = root if spec.metadata_file else table.parent
        for row in read_table(table, spec):
            key = _key(base / row.name, folders)
            called = stems.get(key, []) if key not in listed else []
            path = listed.get(key) or (called[0] if called else key[0] / key[1])
            if len(called) > 1:
                alike = names([shown(Path(p.name)) for p in called])
                text = f"{row.where} may mean any of {alike}: it is taken for the first"
                found.note("warning", "stem-clash", path, text)
            if path.is_relative_to(inside):  # hidden, or in a folder that is not read
                path = root / path.relative_to(inside)
            if os.path.isfile(path):
                rows[path].append(row)
                continue
            text = f"{row.where} names it, and it is not there"
            found.note("left out", "missing-image", base / row.name, text)
    for path, named in rows.items():
        captions = tuple(caption for row in named for caption in row.captions)
        if len(named) > 1:
            lines = " and ".join(row.where for row in named)
            found.note("warning", "named-twice", path, f"{lines} name it: its captions take turns")
        if not path.is_relative_to(root):
            text = f"{named[0].where} names it, outside of {shown(root)}"
            found.note("note", "outside-folder", path, text)
        if captions:
            found.captions[path] = captions
        else:
            found.missing[path] = f"{named[0].where} has no caption for it"
    tables_named = names([shown(table) for table in tables])
    reason = f"no row of {tables_named} names it"
    found.missing |= {path: reason for path in tree.images if path not in rows}
    return found


def extensions_of(spec: SourceSpec) -> tuple[str, ...]:
    """Returns the ends of the names of caption files, in lower case."""
    if spec.caption_extension is None:
        return SIDECARS
    return ("." + spec.caption_extension.lower().lstrip("."),)


def _from_sidecars(spec: SourceSpec, tree: Tree) -> FolderCaptions:
    found, extensions = FolderCaptions(), extensions_of(spec)
    sidecars: dict[Path, list[Path]] = defaultdict(list)  # path without extension → its texts
    for extension in extensions:
        for path in tree.files:
            if path.name.lower().endswith(extension) and len(path.name) > len(extension):
                sidecars[path.with_name(path.name[: -len(extension)])].append(path)
    images: dict[Path, list[Path]] = defaultdict(list)
    for path in tree.images:
        images[path.with_suffix("")].append(path)
    for stem, paths in images.items():
        texts = sidecars.pop(stem, [])
        if not texts:
            reason = f"has no {' or '.join(shown(stem) + e for e in extensions)}"
            found.missing |= dict.fromkeys(paths, reason)
            continue
        _read_sidecar(found, paths, texts)
    for texts in sidecars.values():
        for path in texts:
            found.used.add(path)
            text = "a caption without an image of its name; not read"
            found.note("warning", "orphan-caption", path, text)
    return found


def _read_sidecar(found: FolderCaptions, images: list[Path], texts: list[Path]) -> None:
    """Gives the first of the texts to the images of its name."""
    first, *others = texts
    found.used |= set(texts)
    for path in others:
        found.note("warning", "second-caption", path, f"not read, for {first.name} is")
    if len(images) > 1:
        same = " and ".join(shown(Path(path.name)) for path in images)
        text = f"{same} share the caption in {shown(Path(first.name))}; rename them if they differ"
        found.note("warning", "stem-clash", images[0], text)
    try:
        caption = text_of(first).strip()
    except UsageError as error:
        for path in images:
            code = "non-utf8-caption" if "UTF-8" in str(error) else "unreadable-caption"
            found.note("left out", code, path, f"its caption: {error}")
        return
    found.captions |= dict.fromkeys(images, (caption,))
