"""The page of a new training: the form, its checks as one types, import, and the start."""

import json
import re
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sd_lora.config.presets import preset
from sd_lora.config.rows import PRESETS
from sd_lora.config.schema import OPTIONS
from sd_lora.data.sources.crop_files import is_crop_file
from sd_lora.data.sources.folder_captions import CAPTION_EXTENSIONS
from sd_lora.data.sources.folders import has_image_extension
from sd_lora.data.sources.metadata_files import is_metadata
from sd_lora.errors import UsageError
from sd_lora.models.families import FAMILIES, detect_family
from sd_lora.studio.chooser import models_in
from sd_lora.studio.form import FOLDER, TRAINERS, imported, request_of, sections
from sd_lora.studio.keeper import last_lines
from sd_lora.studio.opened import NotOpened, inside, open_result
from sd_lora.studio.page import action, gone, page, problem, render, see, studio_of
from sd_lora.studio.store import Store

DRAFT = "draft"

UPLOAD = "/new/upload"

LARGEST_ZIP = 8 * 2**30
"""Bytes of all files in a zip at most, unpacked."""

SIDES = {"sd1": 512, "sd2": 768, "sdxl": 1024}
"""Family of base models → pixels of the sides of the squares that the largest of them was trained
on."""

TITLES = {"subject": "A subject", "character": "A character", "style": "A style"}


def _given(request: Request) -> dict[str, str]:
    """The fields of the draft, which all browsers share."""
    return dict(studio_of(request).store.kept(DRAFT, {}))


def _options(form: dict[str, str]) -> dict[str, str]:
    """The fields of a form that are options, and the folder."""
    return {name: text for name, text in form.items() if name in OPTIONS or name == FOLDER}


def _about(
    given: dict[str, str], request: Request, places: bool = False, swap: bool = True
) -> dict[str, Any]:
    """The values of the page's templates.

    places: whether paths are checked too. swap: whether the fields on the page get their marks.
    """
    store = studio_of(request).store
    asked = request_of(given, store.folder, places)
    known = asked.problems if given else {}
    return {
        "given": given,
        "asked": asked,
        "problems": known,
        "sections": sections(given, known),
        "others": [text for name, text in known.items() if name == ""],
        "purposes": {name: preset(name).title for name in PRESETS},
        "titles": TITLES,
        "families": [(FAMILIES[name], side) for name, side in SIDES.items()],
        "chosen": _family_of(given.get("pretrained_model_name_or_path", "").strip(), store),
        "swap": swap,
    }


def _family_of(model: str, store: Store) -> str:
    """The family of a base model's folder, an opened one or the project's own; "" for others, for a
    single file and a hub id, which the check reads."""
    with suppress(OSError, ValueError, UsageError, NotOpened):
        is_own = model in models_in(())  # no folder is searched: this is asked as one types
        folder = Path(model) if is_own else inside(store, model)
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        return detect_family(config).name if isinstance(config, dict) else ""
    return ""


@page
def show(request: Request) -> Response:
    """The page, as it was left."""
    given = _given(request)
    if folder := request.query_params.get(FOLDER):
        given |= {FOLDER: folder, "sources": ""}
    models = models_in(studio_of(request).store.opened())
    said = studio_of(request).store.kept("imported", "")
    about = _about(given, request, swap=False)
    return render(request, "new.html.j2", models=models, trainers=TRAINERS, said=said, **about)


@action
def look(request: Request, form: dict[str, str]) -> Response:
    """Keep the fields, and say what they amount to: the mistakes, the command, the TOML."""
    given = _options(form)
    studio_of(request).store.keep(DRAFT, given)
    return render(request, "look.html.j2", **_about(given, request))


@action
def start(request: Request, form: dict[str, str]) -> Response:
    """Put the run into the queue; with mistakes, show them instead."""
    studio = studio_of(request)
    given = _options(form)
    studio.store.keep(DRAFT, given)
    about = _about(given, request, places=True)
    asked = about["asked"]
    if asked.config is None:
        return render(request, "look.html.j2", **about)
    folder = asked.config.output_path.absolute()
    for place in (Path(given.get(FOLDER, folder)), folder):
        open_result(studio.store, place.expanduser().absolute())
    number = studio.store.add("train", folder.name, asked.words, given=given, folder=str(folder))
    studio.keeper.look()
    return gone(request, f"/runs/{number}")


@action
def forecast(request: Request, form: dict[str, str]) -> Response:
    """Check the images of the draft, and predict its memory and time, without a run."""
    studio = studio_of(request)
    given = _options(form)
    asked = request_of(given, studio.store.folder)
    if asked.unchecked:
        return render(request, "forecast.html.j2", job=None, lines=asked.unchecked)
    number = studio.store.add("check", "check", [*asked.words, "--no_page"], given=given)
    studio.keeper.look()
    return render(request, "forecast.html.j2", job=studio.store.job(number), lines=[])


@page
def forecast_of(request: Request) -> Response:
    """The output of a check that was asked for."""
    studio = studio_of(request)
    job = studio.store.job(request.path_params["number"])
    if job is None:
        return problem("there is no such check")
    lines = last_lines(studio.keeper.log_of(job))
    return render(request, "forecast.html.j2", job=job, lines=lines)


@action
def take(request: Request, form: dict[str, str]) -> Response:
    """Fill the fields from another trainer's configuration or command."""
    store = studio_of(request).store
    given, text = imported(form.get("source", ""))
    store.keep(DRAFT, given)
    store.keep("imported", text)
    return gone(request, "/new")


@action
def clear(request: Request, form: dict[str, str]) -> Response:
    """Empty all fields."""
    store = studio_of(request).store
    store.keep(DRAFT, {})
    store.keep("imported", "")
    return see("/new")


def _is_wanted(name: str) -> bool:
    """Whether a file belongs to a set of images: an image, its caption, or metadata."""
    path = Path(name)
    if path.name.startswith("."):
        return False
    caption = path.suffix.lower() in CAPTION_EXTENSIONS
    known = is_metadata(path) or is_crop_file(path)
    return caption or has_image_extension(path) or known


def _plain_parts(name: str) -> list[str]:
    """The parts of a path that a browser or a zip names, below the folder that takes it.

    Raises:
        UsageError: a path that leads out of it.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if any(part in ("..", "/") or ":" in part or "\0" in part for part in parts) or not parts:
        raise UsageError(f"{name!r} is no name of a file")
    return list(parts)


async def upload(request: Request) -> Response:
    """Take a file of a set of images, or a zip of many; answers with the folder."""
    async with request.form(max_files=1, max_fields=8) as form:
        file = form.get("file")
        name, place = str(form.get("set", "")), str(form.get("path", ""))
        if not isinstance(file, UploadFile) or not re.fullmatch(r"[\w .-]{1,80}", name):
            return problem("a file and the name of its set are needed")
        if name.startswith("."):
            return problem("the name of a set begins with a letter")
        folder = studio_of(request).store.folder / "images" / name
        try:
            await run_in_threadpool(_keep, file, place or str(file.filename), folder)
        except (UsageError, OSError, zipfile.BadZipFile, RuntimeError) as error:
            return problem(f"{file.filename}: {error}")
    return Response(str(folder), media_type="text/plain")


def _keep(file: UploadFile, name: str, folder: Path) -> None:
    """Write an uploaded file, or the files of a zip, into a folder."""
    _plain_parts(name)
    if name.lower().endswith(".zip"):
        with zipfile.ZipFile(file.file) as archive:
            members = [info for info in archive.infolist() if _is_wanted(info.filename)]
            if sum(info.file_size for info in members) > LARGEST_ZIP:
                raise UsageError(f"its files are larger than {LARGEST_ZIP} bytes together")
            for info in members:
                with archive.open(info) as source, open(_place(folder, info.filename), "wb") as to:
                    shutil.copyfileobj(source, to)
    elif _is_wanted(name):
        with open(_place(folder, name), "wb") as to:
            shutil.copyfileobj(file.file, to)
    else:
        raise UsageError("neither an image nor a caption, metadata or a zip of them")


def _place(folder: Path, name: str) -> Path:
    path = folder.joinpath(*_plain_parts(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


ROUTES = [
    Route("/new", show),
    Route("/new/look", look, methods=["POST"]),
    Route("/new/start", start, methods=["POST"]),
    Route("/new/forecast", forecast, methods=["POST"]),
    Route("/new/forecast/{number:int}", forecast_of),
    Route("/new/import", take, methods=["POST"]),
    Route("/new/clear", clear, methods=["POST"]),
    Route(UPLOAD, upload, methods=["POST"]),
]
