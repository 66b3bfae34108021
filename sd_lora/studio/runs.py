"""The pages of runs: the queue, and each run as it learns."""

import signal
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path

import psutil
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from sd_lora.errors import UsageError
from sd_lora.report.page_images import SAMPLES
from sd_lora.report.run_page import PAGE
from sd_lora.studio.elsewhere import about
from sd_lora.studio.form import request_of
from sd_lora.studio.keeper import ask_to_stop
from sd_lora.studio.new import DRAFT
from sd_lora.studio.page import action, gone, page, problem, render, studio_of
from sd_lora.studio.progress import has_begun
from sd_lora.studio.store import PAUSED, RUNNING, WAITING, Job
from sd_lora.training.checkpoint_folders import checkpoints, step_of
from sd_lora.training.interruption import SAMPLE_FILE


def _job(request: Request) -> Job:
    job = studio_of(request).store.job(request.path_params["number"])
    if job is None or job.kind != "train":
        raise UsageError("there is no such run: it was removed from the list")
    return job


def _part(request: Request, name: str, **values: object) -> Response:
    """A part of a page that is asked for again and again: an empty answer while it is the same."""
    response = render(request, name, **values | {"mark": ""})
    mark = sha256(bytes(response.body)).hexdigest()[:16]
    if request.query_params.get("seen") == mark:
        return Response(status_code=204)
    return render(request, name, **values | {"mark": mark})


@page
def show_all(request: Request) -> Response:
    """All runs."""
    return render(request, "runs.html.j2", **_rows(request))


@page
def rows(request: Request) -> Response:
    """The list of runs alone."""
    return _part(request, "run_list.html.j2", **_rows(request))


def _rows(request: Request) -> dict[str, object]:
    studio = studio_of(request)
    jobs = studio.store.jobs("kind = 'train'")
    order = {RUNNING: 0, WAITING: 1, PAUSED: 2}
    newest_last = sorted(jobs, key=lambda job: -job.id)
    shown = sorted(
        newest_last, key=lambda j: (order.get(j.state, 3), j.place * (j.state == WAITING))
    )
    return {"runs": [studio.watch.of(job) for job in shown], "mark": ""}


@page
def show(request: Request) -> Response:
    """A run."""
    job = _job(request)
    run = studio_of(request).watch.of(job)
    asked = request_of(job.given, studio_of(request).store.folder)
    more = _acts(job) | about(job)
    return render(request, "run.html.j2", run=run, job=job, asked=asked, **more, mark="")


def _acts(job: Job) -> dict[str, object]:
    """Facts that the buttons of a run depend on."""
    there = checkpoints(Path(job.folder))
    return {
        "saved": step_of(there[-1]) if there else 0,
        "can_save": hasattr(signal, "SIGUSR1"),
        "has_page": (Path(job.folder) / PAGE).is_file(),
    }


PARTS = {
    "state": "run_state.html.j2",
    "acts": "run_acts.html.j2",
    "samples": "run_samples.html.j2",
    "log": "run_log.html.j2",
    "files": "run_files.html.j2",
}
"""Part of a run's page that changes with the run → its template."""


@page
def part(request: Request) -> Response:
    """A part of a run's page."""
    job, name = _job(request), request.path_params["part"]
    if name not in PARTS:
        return problem("there is no such part", HTTPStatus.NOT_FOUND)
    facts = {"acts": _acts, "files": about}.get(name)
    run, more = studio_of(request).watch.of(job), facts(job) if facts else {}
    return _part(request, PARTS[name], run=run, job=job, **more)


@page
def curves(request: Request) -> Response:
    """The curves of a run, as JSON."""
    run = studio_of(request).watch.of(_job(request))
    return JSONResponse({"curves": run.curves, "over": run.job.is_over})


@page
def sample(request: Request) -> Response:
    """One of a run's sample images."""
    job, step = _job(request), request.path_params["step"]
    name = request.path_params["name"]
    path = Path(job.folder) / SAMPLES / f"step-{step:06}" / name
    real = path.resolve()
    inner = real.is_relative_to(Path(job.folder).resolve()) and real.suffix == ".png"
    if not inner or not real.is_file():
        return problem("there is no such image", HTTPStatus.NOT_FOUND)
    return FileResponse(real, media_type="image/png")


def _pause(request: Request, job: Job, form: dict[str, str]) -> None:
    """End after this step with a checkpoint, and wait to be resumed."""
    _end(request, job, "pause")


def _stop(request: Request, job: Job, form: dict[str, str]) -> None:
    """End after this step with a checkpoint; a run that waits is not started."""
    _end(request, job, "stop")


def _end(request: Request, job: Job, wish: str) -> None:
    store = studio_of(request).store
    if job.state == RUNNING:
        store.change(job.id, wish=wish)
        ask_to_stop(job)
    elif job.state in (WAITING, PAUSED):
        store.change(job.id, state=PAUSED if wish == "pause" else "stopped")


def _kill(request: Request, job: Job, form: dict[str, str]) -> None:
    """End at once, without a checkpoint."""
    studio_of(request).keeper.end_at_once(job)


def _save(request: Request, job: Job, form: dict[str, str]) -> None:
    """Save a checkpoint after this step."""
    process = studio_of(request).keeper.process(job)
    number = getattr(signal, "SIGUSR1", None)
    if process is None or number is None:
        raise UsageError("this run takes no request to save now")
    if not has_begun(job):  # the signal would end the process
        raise UsageError("its first step is not begun: there is nothing to save yet")
    with suppress(psutil.Error):
        process.send_signal(number)


def _draw(request: Request, job: Job, form: dict[str, str]) -> None:
    """Draw sample images after this step."""
    if not Path(job.folder).is_dir():
        raise UsageError("its first step is not begun: there is nothing to draw yet")
    (Path(job.folder) / SAMPLE_FILE).touch()


def _resume(request: Request, job: Job, form: dict[str, str]) -> None:
    """Go on from the newest checkpoint; from the start where there is none."""
    _again(request, job, dict(job.given))


def _extend(request: Request, job: Job, form: dict[str, str]) -> None:
    """Go on from the newest checkpoint to a later step."""
    steps = form.get("steps", "")
    there = checkpoints(Path(job.folder))
    done = step_of(there[-1]) if there else 0
    if not steps.isdecimal() or int(steps) <= done:
        raise UsageError(f"give a number of steps above {done}, which are done")
    _again(request, job, dict(job.given) | {"max_train_steps": steps})


def _again(request: Request, job: Job, given: dict[str, str]) -> None:
    if job.state in (RUNNING, WAITING):
        raise UsageError("it is running or in the queue already")
    store = studio_of(request).store
    given["resume_from_checkpoint"] = "latest-if-any"
    asked = request_of(given, store.folder)
    if asked.problems:
        raise UsageError("\n".join(asked.problems.values()))
    first = min([other.place for other in store.jobs("state = ?", WAITING)], default=job.place)
    place = min(first - 1, job.place)
    store.change(job.id, words=asked.words, given=given, state=WAITING, wish="", place=place)


def _first(request: Request, job: Job, form: dict[str, str]) -> None:
    """Put a run first in the queue."""
    store = studio_of(request).store
    places = [other.place for other in store.jobs("state = ?", WAITING)]
    store.change(job.id, place=min(places, default=job.place) - 1)


def _forget(request: Request, job: Job, form: dict[str, str]) -> None:
    """Remove a run from the list; its files stay where they are."""
    if job.state == RUNNING:
        raise UsageError("it is running: stop it first")
    studio_of(request).store.forget(job.id)


def _copy(request: Request, job: Job, form: dict[str, str]) -> None:
    """Fill the form of a new training with the options of a run."""
    given = {n: t for n, t in job.given.items() if n != "resume_from_checkpoint"}
    studio_of(request).store.keep(DRAFT, given)


ACTS: dict[str, Callable[[Request, Job, dict[str, str]], None]] = {
    "pause": _pause,
    "stop": _stop,
    "kill": _kill,
    "save": _save,
    "draw": _draw,
    "resume": _resume,
    "extend": _extend,
    "first": _first,
    "forget": _forget,
    "copy": _copy,
}
"""Name of a button → its act."""

AFTER = {"forget": "/runs", "copy": "/new"}
"""Button → the page that follows, where it is another one."""


@action
def act(request: Request, form: dict[str, str]) -> Response:
    """Do what a button says."""
    job, name = _job(request), request.path_params["act"]
    if name not in ACTS:
        raise UsageError("there is no such button")
    ACTS[name](request, job, form)
    studio_of(request).keeper.look()
    return gone(request, AFTER.get(name, f"/runs/{job.id}"))


@page
def report(request: Request) -> Response:
    """The page that a run wrote, `report.html`, to keep."""
    path = Path(_job(request).folder) / PAGE
    if not path.is_file():
        raise UsageError("the run has written no page yet")
    return FileResponse(path, filename=f"{path.parent.name}-{PAGE}", media_type="text/html")


ROUTES = [
    Route("/runs", show_all),
    Route("/runs/list", rows),
    Route("/runs/{number:int}", show),
    Route("/runs/{number:int}/curves", curves),
    Route("/runs/{number:int}/report", report),
    Route("/runs/{number:int}/{part}", part),
    Route("/runs/{number:int}/sample/{step:int}/{name}", sample),
    Route("/runs/{number:int}/{act}", act, methods=["POST"]),
]
