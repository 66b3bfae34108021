"""Choosing a folder or a model, among those that the user opened."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sd_lora.data.sources.folders import has_image_extension
from sd_lora.embedded import BASE, SUBJECT, sample_data
from sd_lora.studio.opened import inside, open_folder
from sd_lora.studio.page import action, page, render, studio_of

MOST = 500
"""Entries of a folder that are shown."""

KINDS = {
    "folder": "folders of images",
    "model": "base models",
    "file": "LoRA files",
}
"""Things that are chosen."""

EMBEDDED = {
    "folder": (SUBJECT, "sample images: eight of one monster"),
    "model": (BASE, "the embedded base: images of 64 pixels, learns in minutes on a CPU"),
}
"""Kind → a part of a clone's sample data, and its words."""

WEIGHTS = (".safetensors", ".ckpt")


def models_in(folders: Sequence[Path]) -> list[str]:
    """Base models in opened folders and the folders in them: pipelines and large checkpoints."""
    clone = sample_data()
    found = [str(clone / BASE)] if clone else []
    for folder in folders:
        for place in [folder, *_children(folder)]:
            with suppress(OSError):
                if (place / "model_index.json").is_file():
                    found.append(str(place))
                elif place.suffix in WEIGHTS and place.stat().st_size > 2**30:
                    found.append(str(place))
    return list(dict.fromkeys(found))


def embedded_of(kind: str) -> dict[str, object] | None:
    """The path and the words of sample data of a kind; None without any."""
    clone = sample_data()
    if clone is None or kind not in EMBEDDED:
        return None
    place, words = EMBEDDED[kind]
    return {"path": clone / place, "words": words}


def _children(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    return []


def _listed(folder: Path, kind: str) -> list[dict[str, object]]:
    """The entries of a folder that can be chosen, or gone into."""
    rows: list[dict[str, object]] = []
    for path in _children(folder)[:MOST]:
        with suppress(OSError):
            if path.is_dir():
                is_model = (path / "model_index.json").is_file()
                images = _count_images(path) if kind == "folder" else 0
                note = "a model" if is_model else f"{images} images" if images else ""
                takes = is_model if kind == "model" else kind == "folder"
                rows.append({"path": path, "folder": True, "takes": takes, "note": note})
            elif kind in ("model", "file") and path.suffix.lower() in WEIGHTS:
                size = f"{path.stat().st_size / 2**20:.0f} MiB"
                rows.append({"path": path, "folder": False, "takes": True, "note": size})
    return rows


def _count_images(folder: Path) -> int:
    return sum(has_image_extension(path) for path in _children(folder)[:MOST])


@page
def choose(request: Request) -> Response:
    """The entries of an opened folder, or the opened folders themselves."""
    store = studio_of(request).store
    at, kind = request.query_params.get("at", ""), request.query_params.get("kind", "folder")
    field = request.query_params.get("field", "folder")
    place = inside(store, at) if at else None
    rows = _listed(place, kind) if place and place.is_dir() else []
    above = place.parent if place and place not in store.opened() else None
    return render(
        request, "chooser.html.j2", place=place, above=above, rows=rows, kind=kind, field=field,
        kinds=KINDS, opened=store.opened(), problem="", embedded=embedded_of(kind),
    )  # fmt: skip


@action
def open_place(request: Request, form: dict[str, str]) -> Response:
    """Open a folder that the user named, and show its entries."""
    store = studio_of(request).store
    kind, field = form.get("kind", "folder"), form.get("field", "folder")
    place, wrong = None, ""
    try:
        place = open_folder(store, form.get("path", ""))
    except ValueError as error:
        wrong = str(error)
    rows = _listed(place, kind) if place else []
    return render(
        request, "chooser.html.j2", place=place, above=None, rows=rows, kind=kind, field=field,
        kinds=KINDS, opened=store.opened(), problem=wrong, embedded=embedded_of(kind),
    )  # fmt: skip


ROUTES = [Route("/choose", choose), Route("/choose/open", open_place, methods=["POST"])]
