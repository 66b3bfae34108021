"""The shelf: LoRA files in opened folders, and the tools for them."""

import os
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from sd_lora.errors import UsageError
from sd_lora.report.page_images import SAMPLES
from sd_lora.studio.form import plain_words
from sd_lora.studio.images import SIDE, small
from sd_lora.studio.keeper import last_lines
from sd_lora.studio.opened import inside
from sd_lora.studio.page import action, gone, page, problem, render, studio_of
from sd_lora.tool_flags import tool_parser

DEEPEST = 3
"""Levels of folders below an opened one that are looked into."""

MOST = 500
"""Files on the shelf."""

PREVIEWS = (".png", ".preview.png", ".jpg", ".jpeg", ".webp")
"""Endings of an image beside a LoRA file that has its name, as A1111 and ComfyUI show it."""

LARGEST = 2**31
"""Bytes from which a file is taken for a model."""


@dataclass(frozen=True)
class Tool:
    """A command for LoRA files. flags: those on the page. several: whether it takes several files.
    out: whether it writes one."""

    label: str
    flags: tuple[str, ...] = ()
    several: bool = False
    out: bool = True


TOOLS = {
    "inspect": Tool("What is in it, and who reads it", out=False),
    "verify": Tool("Load it with diffusers and compare", out=False),
    "convert": Tool("Convert", ("to",)),
    "resize": Tool("Resize", ("rank",)),
    "merge": Tool("Merge", ("weights",), several=True),
}
"""Command → the tool."""

VALUES = {"to": ("diffusers", "kohya", "lycoris", "comfyui")}
"""Flag of a tool → its values, if few: the formats, whose writers would import torch here."""

SHOWN = (*TOOLS, "push", "caption")
"""Commands whose output is shown here."""


def _flags(name: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Flag of a tool on the page → its help on the command line, and its values, if few."""
    actions = [a for a in tool_parser(name)._actions if a.dest in TOOLS[name].flags]
    return {a.dest: (str(a.help), VALUES.get(a.dest, ())) for a in actions}


def files_in(folders: list[Path]) -> list[Path]:
    """LoRA files in folders: safetensors that are part of no model and no checkpoint."""
    found: dict[Path, None] = {}
    for folder in folders:
        for place, below, names in os.walk(folder):
            depth = len(Path(place).relative_to(folder).parts)
            skipped = "model_index.json" in names or Path(place).name.startswith("checkpoint-")
            below[:] = [] if skipped or depth >= DEEPEST else sorted(_open(below))
            for name in [] if skipped else sorted(names):
                path = Path(place, name)
                with suppress(OSError):
                    if path.suffix == ".safetensors" and path.stat().st_size < LARGEST:
                        found[path] = None
        if len(found) >= MOST:
            break
    return [*found][:MOST]


def _open(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(".") and name != "unverified"]


def preview_of(file: Path) -> Path | None:
    """The preview of a LoRA file: the image that has its name, or the run's newest
    sample; None without any."""
    named = [file.with_name(file.stem + ending) for ending in PREVIEWS]
    if found := next((path for path in named if path.is_file()), None):
        return found
    drawn = sorted((file.parent / SAMPLES).glob("step-*/*.png"))
    newest = [path for path in drawn if path.parent == drawn[-1].parent]
    return newest[0] if newest else None


@page
def show(request: Request) -> Response:
    """All files, and the newest answers of the tools."""
    studio = studio_of(request)
    files = files_in(studio.store.opened())
    marks = ", ".join(f"'{name}'" for name in SHOWN)
    jobs = sorted(studio.store.jobs(f"kind IN ({marks})"), key=lambda job: -job.id)
    return render(
        request, "shelf.html.j2",
        files=[(path, path.stat().st_size, preview_of(path) is not None) for path in files],
        tools=TOOLS, flags={name: _flags(name) for name in TOOLS}, jobs=jobs[:12],
        opened=studio.store.opened(),
    )  # fmt: skip


@action
def use(request: Request, form: dict[str, str]) -> Response:
    """Start a tool."""
    studio = studio_of(request)
    name = request.path_params["tool"]
    if name not in TOOLS:
        raise UsageError("there is no such tool")
    tool = TOOLS[name]
    lines = [line.strip() for line in form.get("files", "").splitlines() if line.strip()]
    files = [str(inside(studio.store, line)) for line in lines]
    if not files or (len(files) > 1 and not tool.several):
        raise UsageError("choose files" if tool.several or not files else "choose one file")
    words = [*files]
    for flag in tool.flags:
        if text := form.get(flag, "").strip():
            words += [f"--{flag}", *plain_words(flag, text)]
    if tool.out:
        out = Path(form.get("out", "").strip() or f"{Path(files[0]).stem}-{name}.safetensors").name
        words += ["--out", str(Path(files[0]).parent / out)]
    title = f"{name} {', '.join(Path(file).name for file in files)}"
    number = studio.store.add(name, title, words)
    studio.keeper.look()
    return gone(request, f"/shelf/{number}")


@page
def answer(request: Request) -> Response:
    """The output of a tool."""
    studio = studio_of(request)
    job = studio.store.job(request.path_params["number"])
    if job is None or job.kind not in SHOWN:
        return problem("there is no such answer")
    text = "\n".join(last_lines(studio.keeper.log_of(job)))
    return render(request, "shelf_answer.html.j2", job=job, text=text)


@page
def preview(request: Request) -> Response:
    """The image of a LoRA file, small."""
    store = studio_of(request).store
    found = preview_of(inside(store, request.query_params.get("file", "")))
    if found is None:
        return problem("it has no image", HTTPStatus.NOT_FOUND)
    return Response(small(inside(store, found), SIDE), media_type="image/webp")


@page
def load(request: Request) -> Response:
    """A LoRA file, to keep."""
    path = inside(studio_of(request).store, request.query_params.get("file", ""))
    if path.suffix != ".safetensors" or not path.is_file():
        return problem("there is no such LoRA file")
    return FileResponse(path, filename=path.name, media_type="application/octet-stream")


ROUTES = [
    Route("/shelf", show),
    Route("/shelf/load", load),
    Route("/shelf/preview", preview),
    Route("/shelf/{number:int}", answer),
    Route("/shelf/{tool}", use, methods=["POST"]),
]
