"""A folder of images as the page shows it: captions, where they are kept, and their edits.

Images are never changed. A caption is written where it was read: into the text file beside its
image, or into its line of `metadata.jsonl`; other files of metadata are read alone. A crop by hand
is written into `crops.json` beside its image.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from sd_lora.config.sources import SourceSpec
from sd_lora.data.images.hand_crops import HandCrop
from sd_lora.data.sources.crop_files import crops_of, write_crops
from sd_lora.data.sources.folder_captions import CAPTION_EXTENSIONS, find_captions
from sd_lora.data.sources.folders import FolderTree, existing_folder, walk
from sd_lora.data.sources.mask_files import masks_beside
from sd_lora.data.sources.metadata_files import is_metadata
from sd_lora.errors import UsageError
from sd_lora.files import utf8_text, write_whole

FRESH = 20.0
"""Seconds for which a listed folder is taken as it was, but for the studio's own edits."""

SEPARATOR = ","

AT_ONCE = 16
"""Files that are written at once."""


@dataclass(frozen=True)
class Entry:
    """An image of a set. name: its path in the folder. caption: None without one. place: the file
    that holds it, or will. hand_crop: its crop by hand, None without. mask:
    its file, None without."""

    name: str
    path: Path
    caption: str | None
    place: Path
    hand_crop: HandCrop | None = None
    mask: Path | None = None

    @property
    def tags(self) -> list[str]:
        """The parts of its caption between commas."""
        return [tag.strip() for tag in (self.caption or "").split(SEPARATOR) if tag.strip()]


@dataclass
class ImageSet:
    """The images of a folder, by name, and the time at which they were listed."""

    folder: Path
    entries: dict[str, Entry]
    listed: float = field(default_factory=time.monotonic)

    def tags(self, most: int) -> list[tuple[str, int]]:
        """The most frequent tags, with the number of images that have each."""
        counts = Counter(tag for entry in self.entries.values() for tag in {*entry.tags})
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]


def read_set(folder: Path) -> ImageSet:
    """List a folder and read its captions.

    Raises:
        UsageError: no folder, no images, or metadata or crops that cannot be read.
    """
    root = existing_folder(str(folder), "folder")
    tree = walk(root)
    masks = _masks(tree)
    if not tree.images:
        raise UsageError(f"{folder} holds no images")
    crops = crops_of(tree)
    metadata = [path for path in tree.files if is_metadata(path)]
    found = find_captions(SourceSpec(path=str(root), prompt=""), root, tree, "folder")
    beside = {path for path in tree.files if path.suffix.lower() in CAPTION_EXTENSIONS}
    entries = {}
    for path in tree.images:
        name = path.relative_to(root).as_posix()
        texts = () if path in found.missing else found.captions.get(path, ())
        place = _sidecar(path, beside)
        if metadata:
            place = next((file for file in metadata if path.is_relative_to(file.parent)), place)
        caption = "\n".join(texts) if texts else None
        entries[name] = Entry(name, path, caption, place, crops.get(path), masks.get(path))
    return ImageSet(root, entries)


def _masks(tree: FolderTree) -> dict[Path, Path]:
    """Image → its mask, by name as a run finds it; puts the masks of a tree aside."""
    aside = masks_beside(tree)
    tree.aside |= aside.keys()
    of_stem = {image.with_suffix(""): mask for mask, image in aside.items() if image}
    return {p: mask for p in tree.images if (mask := of_stem.get(p.with_suffix("")))}


def _sidecar(image: Path, beside: set[Path]) -> Path:
    """The text file of an image; of several the one that a run reads."""
    own = [image.with_suffix(ending) for ending in CAPTION_EXTENSIONS]
    return next((path for path in own if path in beside), own[0])


class Sets:
    """Listed folders, for all pages of one studio."""

    def __init__(self) -> None:
        self._sets: dict[Path, ImageSet] = {}
        self._lock = threading.Lock()

    def of(self, folder: Path, anew: bool = False) -> ImageSet:
        """The images of a folder; see `read_set`. anew: whether it is listed again in any case."""
        with self._lock:
            found = self._sets.get(folder)
            if anew or found is None or time.monotonic() - found.listed > FRESH:
                found = self._sets[folder] = read_set(folder)
            return found

    def write(self, folder: Path, captions: Mapping[str, str]) -> dict[str, str]:
        """Write captions of images; returns those of before.

        Raises:
            UsageError: no such image, or captions in a file that is read alone.
            RunError: a file that cannot be written.
        """
        found = self.of(folder)
        with self._lock:
            if absent := [name for name in captions if name not in found.entries]:
                raise UsageError(f"there is no image {absent[0]} in {folder}: look again")
            changed = {name: text for name, text in captions.items() if text != _now(found, name)}
            before = {name: _now(found, name) for name in changed}
            places = {
                place: {found.entries[name]: changed[name] for name in names}
                for place, names in by_place(found, changed).items()
            }
            with ThreadPoolExecutor(AT_ONCE) as threads:  # a disk takes its time for each file
                list(threads.map(_write_place, places.keys(), places.values()))
            for name, text in changed.items():
                found.entries[name] = replace(found.entries[name], caption=text)
            found.listed = time.monotonic()
            return before

    def crop(self, folder: Path, name: str, chosen: HandCrop | None) -> None:
        """Write the crop of an image, None: cropped as the run says.

        Raises:
            UsageError: no such image, or a file of crops that cannot be read.
            RunError: a file that cannot be written.
        """
        found = self.of(folder)
        with self._lock:
            if name not in found.entries:
                raise UsageError(f"there is no image {name} in {folder}: look again")
            path = found.entries[name].path
            write_crops(path.parent, {path.name: chosen})
            found.entries[name] = replace(found.entries[name], hand_crop=chosen)

    def change_mask(
        self, folder: Path, name: str, write: Callable[[Entry], Path | None]
    ) -> Path | None:
        """Write the mask of an image; returns its file, None where there is none now.

        write: does it for an entry. Raises: what it raises, and UsageError for no such image.
        """
        found = self.of(folder)
        with self._lock:
            if name not in found.entries:
                raise UsageError(f"there is no image {name} in {folder}: look again")
            entry = found.entries[name]
            place = write(entry)
            found.entries[name] = replace(entry, mask=place)
            return place


def _now(found: ImageSet, name: str) -> str:
    return found.entries[name].caption or ""


def by_place(found: ImageSet, names: Iterable[str]) -> dict[Path, list[str]]:
    """File → the images whose captions it holds, or will.

    Raises:
        UsageError: a file that is read alone.
    """
    places: dict[Path, list[str]] = {}
    for name in names:
        places.setdefault(found.entries[name].place, []).append(name)
    if other := [p for p in places if p.suffix not in (*CAPTION_EXTENSIONS, ".jsonl")]:
        raise UsageError(f"the captions are in {other[0]}, which is read alone: edit it by hand")
    return places


def _write_place(place: Path, captions: Mapping[Entry, str]) -> None:
    """Write the captions of images whose captions one file holds."""
    if place.suffix == ".jsonl":
        _write_rows(place, captions)
        return
    for text in captions.values():  # images that share a text file share their caption
        write_whole(place, text.encode())


def _write_rows(place: Path, captions: Mapping[Entry, str]) -> None:
    """Change the lines of a file of metadata whose images are named, and no other byte."""
    lines = utf8_text(place).split("\n")
    wanted = {entry.path.relative_to(place.parent).as_posix(): t for entry, t in captions.items()}
    for number, line in enumerate(lines):
        row = json.loads(line) if line.strip() else {}
        text = wanted.pop(row.get("file_name", ""), None) if isinstance(row, dict) else None
        if text is not None:
            if not isinstance(row.get("text"), str):
                raise UsageError(f"{place}, line {number + 1} has no single text: edit it by hand")
            lines[number] = json.dumps(row | {"text": text}, ensure_ascii=False)
    added = [{"file_name": name, "text": text} for name, text in wanted.items()]
    while lines and not lines[-1].strip():
        lines.pop()
    lines += [json.dumps(row, ensure_ascii=False) for row in added]
    write_whole(place, ("\n".join(lines) + "\n").encode())


def _replaced(entry: Entry, find: str, text: str) -> str:
    return (entry.caption or "").replace(find, text)


def _prefixed(entry: Entry, find: str, text: str) -> str:
    caption = entry.caption or ""
    return caption if caption.startswith(text) else text + caption


def _suffixed(entry: Entry, find: str, text: str) -> str:
    caption = entry.caption or ""
    return caption if caption.endswith(text) else caption + text


def _without(entry: Entry, find: str, text: str) -> str:
    """The caption without a tag."""
    if find not in entry.tags:
        return entry.caption or ""
    return ", ".join(tag for tag in entry.tags if tag != find)


def _first(entry: Entry, find: str, text: str) -> str:
    """The caption with a tag before the others."""
    if find not in entry.tags:
        return entry.caption or ""
    return ", ".join([find, *(tag for tag in entry.tags if tag != find)])


BULK: dict[str, tuple[str, Callable[[Entry, str, str], str]]] = {
    "replace": ("find and replace", _replaced),
    "prefix": ("put before", _prefixed),
    "suffix": ("put behind", _suffixed),
    "remove": ("remove the tag", _without),
    "first": ("move the tag to the front", _first),
}
"""Name of an edit of many captions → its words on the page, and the new caption of an entry."""


def edited(name: str, entries: Iterable[Entry], find: str, text: str) -> dict[str, str]:
    """Image → its new caption, of those that an edit changes.

    Raises:
        UsageError: no such edit, or nothing to find.
    """
    if name not in BULK:
        raise UsageError("there is no such edit")
    if not (find if name in ("replace", "remove", "first") else text):
        raise UsageError("give the words")
    edit = BULK[name][1]
    new = {entry.name: edit(entry, find, text) for entry in entries}
    return {e.name: new[e.name] for e in entries if new[e.name] != (e.caption or "")}
