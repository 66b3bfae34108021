"""Repeats by folder: how often the trainer sees the images of each, written as `[[sources]]`.

Folders keep their names: a number before one (`10_dog`) is shown as it is read, and what is changed
on the page goes into the draft of a new training.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sd_lora.config.options.run import named_after
from sd_lora.config.options.sources import FOLDER as PLACES
from sd_lora.config.sources import SourceSpec
from sd_lora.data.sources.open import NUMBERED, open_source
from sd_lora.errors import UsageError
from sd_lora.studio.form import FOLDER
from sd_lora.studio.image_set import ImageSet
from sd_lora.studio.new import DRAFT
from sd_lora.studio.opened import inside
from sd_lora.studio.page import action, gone, studio_of

MOST = 200
"""Folders of a set that are told apart."""

LARGEST = 100_000


@dataclass(frozen=True)
class Part:
    """Images of a set that are seen equally often.

    name: of their folder in the set, "." for the set's own. images: their number. repeats: of each
    in an epoch, as the folders are named; 0 of one without a number beside others. prompt: caption
    of those without one, by the folder's name; None: the run's. deep: with the folders below it.
    """

    name: str
    images: int
    repeats: int = 1
    prompt: str | None = None
    deep: bool = False


def parts_of(found: ImageSet) -> list[Part]:
    """The parts of a set whose repeats can differ: the trainer's own sources of a folder, or each
    folder with images. Images that a file of metadata above them captions stay together."""
    if numbered := _numbered(found.folder):
        parts = [
            Part(Path(str(s.path)).name, count, s.repeats, s.prompt, deep=True)
            for s, count in numbered
        ]
        tops = Counter(name.partition("/")[0] for name in found.entries if "/" in name)
        others = sorted(tops.keys() - {part.name for part in parts})
        return parts + [Part(name, tops[name], 0, deep=True) for name in others]
    counts: dict[str, int] = {}
    for entry in found.entries.values():
        if entry.place.parent != entry.path.parent:
            return [Part(".", len(found.entries), deep=True)]
        name = entry.path.parent.relative_to(found.folder).as_posix()
        counts[name] = counts.get(name, 0) + 1
    if len(counts) > MOST:
        return [Part(".", len(found.entries), deep=True)]
    return [Part(name, count) for name, count in sorted(counts.items())]


def _numbered(folder: Path) -> list[tuple[SourceSpec, int]]:
    """The numbered folders of a folder that is read as such, with their images; else none."""
    if not any(NUMBERED.fullmatch(child.name) and child.is_dir() for child in folder.iterdir()):
        return []
    try:
        sources = open_source(SourceSpec(path=str(folder)))
    except UsageError:  # a plain folder whose images have no captions
        return []
    found = [(source.spec, source.count or 0) for source in sources]
    return [] if Path(str(found[0][0].path)) == folder else found


def draft_with(
    draft: dict[str, str], folder: Path, parts: list[Part], repeats: list[int]
) -> dict[str, str]:
    """The draft of a run in which each part is seen as often as said, one number a part."""
    places = (FOLDER, "sources", "repeats", *PLACES.values())
    kept = {name: text for name, text in draft.items() if name not in places}
    if repeats == [part.repeats for part in parts]:
        return kept | {FOLDER: str(folder)}
    if [part.name for part in parts] == ["."]:
        return kept | {FOLDER: str(folder), "repeats": str(repeats[0])}
    tables = []
    for part, number in zip(parts, repeats, strict=True):
        if number:
            rows = [f"path = {json.dumps(str(folder / part.name), ensure_ascii=False)}"]
            rows += ['layout = "plain"', f"repeats = {number}"]
            rows += [] if part.deep else ["recursive = false"]
            if part.prompt:
                rows.append(f"prompt = {json.dumps(part.prompt, ensure_ascii=False)}")
            tables.append("\n".join(["[[sources]]", *rows]))
    if not tables:
        raise UsageError("no folder is left: give one of them a number above 0")
    named = {n: t for n, t in named_after(str(folder)).items() if n == "output_dir"}
    return named | kept | {"sources": "\n\n".join(tables)}


@action
def train(request: Request, form: dict[str, str]) -> Response:
    """Fill the form of a new training with the folders and their repeats."""
    studio = studio_of(request)
    folder = inside(studio.store, form.get(FOLDER, ""))
    parts = parts_of(studio.sets.of(folder))
    texts = [form.get(f"repeats {part.name}", str(part.repeats)).strip() for part in parts]
    for part, text in zip(parts, texts, strict=True):
        if not text.isdecimal() or int(text) > LARGEST:
            line = f"{part.name}: repeats are a number from 0 (left out) to {LARGEST}, not {text!r}"
            raise UsageError(line)
    draft = dict(studio.store.kept(DRAFT, {}))
    studio.store.keep(DRAFT, draft_with(draft, folder, parts, [*map(int, texts)]))
    return gone(request, "/new")


ROUTES = [Route("/images/repeats", train, methods=["POST"])]
