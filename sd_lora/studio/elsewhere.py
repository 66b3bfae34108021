"""A finished run's files in other programs: kept, converted, with their card, on the hub."""

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from sd_lora.errors import UsageError
from sd_lora.files import utf8_text
from sd_lora.hub import is_hub_id
from sd_lora.report.record import read_record
from sd_lora.studio.opened import open_result
from sd_lora.studio.page import action, gone, page, studio_of
from sd_lora.studio.store import Job
from sd_lora.training.output_folder import CARD

TARGETS = {"kohya": "For A1111, Forge, ComfyUI", "diffusers": "For diffusers"}
"""Format of `convert` → the programs that read it."""


def files_of(job: Job) -> list[str]:
    """The LoRA files that a run has written and that are there."""
    try:
        names = [str(name) for name in read_record(Path(job.folder))["files"]]
    except UsageError:
        return []
    return [name for name in names if (Path(job.folder) / name).is_file()]


def about(job: Job) -> dict[str, Any]:
    """The values of the part of a run's page: its files with their sizes, its card, the formats."""
    folder = Path(job.folder)
    kept = {name: (folder / name).stat().st_size for name in files_of(job)}
    made = {to: _converted(job, to) for to in TARGETS}
    return {
        "kept": kept,
        "card": (folder / CARD).is_file(),
        "targets": TARGETS,
        "made": {to: path.name for to, path in made.items() if path.is_file()},
    }


def _converted(job: Job, to: str) -> Path:
    return Path(job.folder) / f"{Path(job.folder).name}-{to}.safetensors"


def _run(request: Request) -> Job:
    job = studio_of(request).store.job(request.path_params["number"])
    if job is None or job.kind != "train":
        raise UsageError("there is no such run: it was removed from the list")
    return job


def _queued(request: Request, job: Job, kind: str, title: str, words: list[str]) -> Response:
    """Start a command for a run's files, and show its output."""
    studio = studio_of(request)
    open_result(studio.store, Path(job.folder))
    number = studio.store.add(kind, title, words, cwd=job.cwd)
    studio.keeper.look()
    return gone(request, f"/shelf/{number}")


@action
def convert(request: Request, form: dict[str, str]) -> Response:
    """Write a run's LoRA in the format of another program, beside its files."""
    job, to = _run(request), request.path_params["to"]
    files = files_of(job)
    if to not in TARGETS or not files:
        raise UsageError("there is no such format" if files else "the run has no LoRA files yet")
    out = _converted(job, to)
    words = [str(Path(job.folder) / files[0]), "--to", to, "--out", str(out)]
    model = job.given.get("pretrained_model_name_or_path", "")
    words += [f"--model={model}"] if model else []
    return _queued(request, job, "convert", f"convert {files[0]} to {out.name}", words)


@action
def push(request: Request, form: dict[str, str]) -> Response:
    """Upload a run's files and card to the hub, by the token of the machine's own log-in."""
    job, repo = _run(request), form.get("repo", "").strip()
    if not files_of(job):
        raise UsageError("the run has no LoRA files yet")
    if not is_hub_id(repo):
        raise UsageError("name the repository: owner/name")
    words = [job.folder, f"--repo={repo}", *(["--private"] if form.get("private") else [])]
    return _queued(request, job, "push", f"push {Path(job.folder).name} to {repo}", words)


@page
def load(request: Request) -> Response:
    """A LoRA file of a run, to keep."""
    job, name = _run(request), request.path_params["name"]
    path = Path(job.folder) / name
    known = [*files_of(job), *(_converted(job, to).name for to in TARGETS)]
    if name not in known or not path.is_file():
        raise UsageError("there is no such LoRA file")
    return FileResponse(path, filename=name, media_type="application/octet-stream")


@page
def card(request: Request) -> Response:
    """The model card of a run, as text."""
    path = Path(_run(request).folder) / CARD
    if not path.is_file():
        raise UsageError("the run has no model card")
    return Response(utf8_text(path), media_type="text/plain")


ROUTES = [
    Route("/runs/{number:int}/convert/{to}", convert, methods=["POST"]),
    Route("/runs/{number:int}/push", push, methods=["POST"]),
    Route("/runs/{number:int}/file/{name}", load),
    Route("/runs/{number:int}/card", card),
]
