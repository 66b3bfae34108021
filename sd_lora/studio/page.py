"""The base of all pages of the studio: templates, answers, errors for people."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import wraps
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

import sd_lora
from sd_lora.data.check.page import template_at
from sd_lora.errors import RunError, UsageError
from sd_lora.report.summary import duration
from sd_lora.studio.image_set import Sets
from sd_lora.studio.keeper import Keeper
from sd_lora.studio.opened import NotOpened, relative
from sd_lora.studio.progress import Watch
from sd_lora.studio.store import RUNNING, WAITING, Store

HERE = Path(__file__).parent
TEMPLATES = HERE / "templates"

PAGES = {
    "/new": "New training",
    "/runs": "Runs",
    "/images": "Images",
    "/try": "Try it",
    "/shelf": "Shelf",
}
"""Address → name of the pages, in the order of the navigation."""


@dataclass
class Studio:
    """The studio's parts, for its pages.

    new_address: a function that gives another browser one. reports: the newest check of images.
    """

    store: Store
    keeper: Keeper
    watch: Watch
    sets: Sets = field(default_factory=Sets)
    reports: dict[str, Any] = field(default_factory=dict)
    new_address: Callable[[], str] = lambda: ""


def studio_of(request: Request) -> Studio:
    """The studio that a request is for."""
    found: Studio = request.app.state.studio
    return found


def render(request: Request, name: str, **values: Any) -> HTMLResponse:
    """A page, or a part of one, from a template."""
    studio = studio_of(request)
    at_work = studio.store.jobs("kind = 'train' AND state IN (?, ?)", RUNNING, WAITING)
    text = template_at(TEMPLATES / name).render(
        pages=PAGES,
        here="/" + request.url.path.strip("/").partition("/")[0],
        version=sd_lora.__version__,
        at_work=len(at_work),
        duration=duration,
        shown=lambda path: relative(studio.store, Path(path)),
        **values,
    )
    return HTMLResponse(text)


def see(address: str) -> RedirectResponse:
    """Go on to another page."""
    return RedirectResponse(address, HTTPStatus.SEE_OTHER)


def gone(request: Request, address: str) -> Response:
    """Go on to another page, also where htmx asked."""
    if "hx-request" in request.headers:
        return Response(headers={"hx-redirect": address})
    return see(address)


def problem(text: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> PlainTextResponse:
    """A refusal, which pages show as a message."""
    return PlainTextResponse(text, status)


Page = Callable[[Request], Response]
Action = Callable[[Request, dict[str, str]], Response]


ERRORS = (UsageError, RunError, OSError)
"""Errors for people; a file may go or change while a page is made."""


def page(work: Page) -> Page:
    """A page whose errors for people are answers. It runs in a thread beside the others."""

    @wraps(work)
    def answering(request: Request) -> Response:
        try:
            return work(request)
        except ERRORS as error:
            return _refused(error)

    return answering


def action(work: Action) -> Callable[[Request], Awaitable[Response]]:
    """The same for a form: the work gets its fields that are filled in."""

    @wraps(work)
    async def answering(request: Request) -> Response:
        try:
            async with request.form() as form:
                return await run_in_threadpool(work, request, _texts(form))
        except ERRORS as error:
            return _refused(error)

    return answering


def _refused(error: Exception) -> PlainTextResponse:
    not_there = isinstance(error, NotOpened)
    return problem(str(error), HTTPStatus.NOT_FOUND if not_there else HTTPStatus.BAD_REQUEST)


def _texts(form: FormData) -> dict[str, str]:
    pairs = form.multi_items()
    return {name: value for name, value in pairs if isinstance(value, str) and value.strip()}
