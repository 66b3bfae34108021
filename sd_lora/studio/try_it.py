"""The page on which LoRA files are tried: a grid of prompts, strengths and files, by `sample`."""

import secrets
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from sd_lora.config.sample_prompts import read_prompts, with_seeds
from sd_lora.errors import UsageError
from sd_lora.formats.file_names import name_of
from sd_lora.report.record import read_record
from sd_lora.studio.form import plain_words
from sd_lora.studio.keeper import last_lines
from sd_lora.studio.opened import inside
from sd_lora.studio.page import Studio, action, page, problem, render, see, studio_of
from sd_lora.studio.store import Job
from sd_lora.tool_flags import sample_parser
from sd_lora.training.checkpoint_folders import checkpoints

SHEET, TRIES = "sheet.png", "tries"

FIELDS = {
    "strengths": ("Strengths", "0 0.5 1", "a row each; 0 is the base model alone"),
    "seeds": ("Seeds", "0", "a column each for every prompt; the noise is the same in all rows"),
    "beside_strength": ("Strengths beside", "1", "of all files beside, or one each"),
    "steps": ("Steps", "25", "of DPM-Solver++"),
    "guidance": ("Guidance", "7.5", "classifier-free guidance"),
    "size": ("Size", "", "512 or 768x512; the model's own if not given"),
    "negative": ("Negative prompt", "", "none if not given"),
}
"""Flag of `sample` → label, value at first, help."""

SEVERAL = ("strengths", "seeds", "beside_strength")
"""Flags that take several words."""


@dataclass(frozen=True)
class Grid:
    """The single images of a grid that is drawn: rows of `columns` images each.

    files: names of its LoRA files. strengths: from low to high. rows: of each file, the number of
    its row at each strength. base: the number of the row without a file, None without one.
    """

    files: tuple[str, ...]
    strengths: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    columns: tuple[str, ...]
    base: int | None


def grid_of(job: Job) -> Grid | None:
    """The images of a grid, where several of them can be compared; None for others, and for one
    that is not drawn whole."""
    asked = sample_parser().parse(job.words)
    files, strengths = list(asked.lora or ()), sorted(set(asked.strengths))
    base = 0 if 0 in strengths else None
    others = [strength for strength in dict.fromkeys(asked.strengths) if strength]
    first = 0 if base is None else 1
    rows = tuple(
        tuple(0 if not s else first + n * len(others) + others.index(s) for s in strengths)
        for n in range(len(files))
    )
    try:
        prompts = read_prompts(job.given.get("prompts", "") + "\n")
    except UsageError:  # of a version that took each line as it was
        return None
    columns = tuple(
        f"{one.prompt}, seed {one.seed}" if len(asked.seeds) > 1 else one.prompt
        for one in with_seeds(prompts, asked.seeds)
    )
    count = (first + len(files) * len(others)) * len(columns)
    if len(files) * len(strengths) < 2 or not _image(job, count - 1).is_file():
        return None
    return Grid(tuple(map(name_of, files)), tuple(f"{s:g}" for s in strengths), rows, columns, base)


def _image(job: Job, number: int) -> Path:
    """A single image of a grid, as `sample --images` names it."""
    return Path(job.folder) / f"{number:05}.png"


def _runs(studio: Studio) -> list[Job]:
    """Runs with something to try, the newest first."""
    jobs = sorted(studio.store.jobs("kind = 'train'"), key=lambda job: -job.id)
    return [job for job in jobs if _files_of(job)]


def _files_of(job: Job) -> list[Path]:
    """The LoRA files and checkpoints of a run, the finished file first."""
    folder = Path(job.folder)
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.name.endswith("_kohya"))
    in_between = sorted(folder.glob("lora-[0-9]*/pytorch_lora_weights.safetensors"))
    return [*files[:1], *reversed(in_between), *reversed(checkpoints(folder))]


@page
def show(request: Request) -> Response:
    """The form, and the grids that were drawn."""
    studio = studio_of(request)
    kept = dict(studio.store.kept("try", {}))
    runs = _runs(studio)
    number = request.query_params.get("run", "")
    job = next((run for run in runs if str(run.id) == number), None)
    given = {"model": "", "lora": "", "beside": "", "prompts": ""} | kept
    if job is not None:
        given |= _of_run(job)
    elif file := request.query_params.get("lora"):
        given["lora"] = str(inside(studio.store, file))
    tries = sorted(studio.store.jobs("kind = 'sample'"), key=lambda one: -one.id)
    return render(
        request, "try.html.j2", given=given, fields=FIELDS, runs=runs, job=job, tries=tries[:30],
        files=_files_of(job) if job else [], usage=_usage(job), last=_last_lines(studio, tries),
        grid_of=grid_of,
    )  # fmt: skip


def _of_run(job: Job) -> dict[str, str]:
    prompt = job.given.get("validation_prompt") or job.given.get("instance_prompt", "")
    model = job.given.get("pretrained_model_name_or_path", "")
    return {"model": model, "lora": "\n".join(map(str, _files_of(job)[:1])), "prompts": prompt}


def _usage(job: Job | None) -> list[str]:
    """The lines by which a run says how its files are used."""
    if job is None:
        return []
    try:
        return [str(line) for line in read_record(Path(job.folder))["usage"]]
    except UsageError:
        return []


def _last_lines(studio: Studio, tries: list[Job]) -> dict[int, str]:
    """Job → the last line of its output, of those without a sheet."""
    lines = {one.id: last_lines(studio.keeper.log_of(one), 4000) for one in tries[:30]}
    return {number: found[-1] if found else "" for number, found in lines.items()}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


@action
def draw(request: Request, form: dict[str, str]) -> Response:
    """Put a grid into the queue."""
    studio = studio_of(request)
    studio.store.keep("try", form)
    loras = [str(inside(studio.store, path)) for path in _lines(form.get("lora", ""))]
    prompts = _lines(form.get("prompts", ""))
    if not prompts or not form.get("model"):
        raise UsageError("give a model and a prompt")
    read_prompts(form["prompts"] + "\n")  # raises for mistakes in them
    folder = studio.store.folder / TRIES / secrets.token_hex(6)
    words = ["--model", form["model"], "--out", str(folder / SHEET), "--images", str(folder)]
    words += ["--lora", *loras] if loras else []
    beside = [str(inside(studio.store, path)) for path in _lines(form.get("beside", ""))]
    words += ["--beside", *beside, "--beside_together"] if beside else []
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    words += ["--prompts", str(folder / "prompts.txt")]
    for name in FIELDS:
        needless = name == "beside_strength" and not beside
        if (text := form.get(name, "").strip()) and not needless:
            several = name in SEVERAL
            words += [f"--{name}", *plain_words(name, text)] if several else [f"--{name}={text}"]
    asked = sample_parser().parse(words)  # raises for a wrong number
    if len(asked.beside_strength) not in (1, len(beside)):
        raise UsageError("give one strength for all files beside, or one each")
    title = ", ".join(prompts)[:80]
    studio.store.add("sample", title, words, given=form, folder=str(folder))
    studio.keeper.look()
    return see("/try")


def _try(request: Request) -> Job:
    job = studio_of(request).store.job(request.path_params["number"])
    if job is None or job.kind != "sample":
        raise UsageError("there is no such grid")
    return job


@page
def one(request: Request) -> Response:
    """A grid, or its progress."""
    job = _try(request)
    studio = studio_of(request)
    last = _last_lines(studio, [job])
    return render(request, "try_one.html.j2", one=job, last=last, grid_of=grid_of)


@page
def image(request: Request) -> Response:
    """A single image of a grid."""
    path = _image(_try(request), request.path_params["image"])
    if not path.is_file():
        return problem("there is no such image", HTTPStatus.NOT_FOUND)
    return FileResponse(path, media_type="image/png")


@page
def sheet(request: Request) -> Response:
    """The grid as a file."""
    path = Path(_try(request).folder) / SHEET
    if not path.is_file():
        return problem("it is not drawn yet", HTTPStatus.NOT_FOUND)
    name = f"sd_lora-{request.path_params['number']}.png"
    loads = "load" in request.query_params
    return FileResponse(path, media_type="image/png", filename=name if loads else None)


@action
def forget(request: Request, form: dict[str, str]) -> Response:
    """End a grid that is being drawn, or remove one from the list."""
    studio, job = studio_of(request), _try(request)
    studio.keeper.end_at_once(job)
    studio.store.forget(job.id)
    return see("/try")


ROUTES = [
    Route("/try", show),
    Route("/try", draw, methods=["POST"]),
    Route("/try/{number:int}", one),
    Route("/try/{number:int}/sheet", sheet),
    Route("/try/{number:int}/image/{image:int}", image),
    Route("/try/{number:int}/forget", forget, methods=["POST"]),
]
