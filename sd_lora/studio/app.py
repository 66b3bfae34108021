"""The studio as one application: its pages, its parts, its server."""

import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from sd_lora.errors import UsageError
from sd_lora.folders import disown, own
from sd_lora.studio import chooser, elsewhere, images, masks, new, repeats, runs, shelf, try_it
from sd_lora.studio.guard import LOCAL, Guard
from sd_lora.studio.keeper import Keeper
from sd_lora.studio.page import HERE, Studio, action, render, studio_of
from sd_lora.studio.progress import Watch
from sd_lora.studio.store import Store, default_folder

PORT = 8470
"""Port where none is asked for."""

UPLOADS = (new.UPLOAD,)


def home(request: Request) -> Response:
    """The first page: the runs, or where there are none a new training."""
    return RedirectResponse("/runs" if studio_of(request).store.jobs("kind = 'train'") else "/new")


@action
def another(request: Request, form: dict[str, str]) -> Response:
    """An address for another browser."""
    return render(request, "another.html.j2", address=studio_of(request).new_address())


def application(studio: Studio) -> Starlette:
    """The pages of a studio, without their guard."""
    uplot = HERE.parent / "report" / "uplot"
    app = Starlette(
        routes=[
            Route("/", home),
            Route("/another", another, methods=["POST"]),
            *chooser.ROUTES,
            *new.ROUTES,
            *elsewhere.ROUTES,
            *runs.ROUTES,
            *images.ROUTES,
            *masks.ROUTES,
            *repeats.ROUTES,
            *try_it.ROUTES,
            *shelf.ROUTES,
            Mount("/uplot", StaticFiles(directory=uplot)),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ]
    )
    app.state.studio = studio
    return app


def _secret(folder: Path) -> str:
    """The value of the cookie, which outlives the studio, so that its pages go on after it."""
    path = folder / "secret"
    with suppress(OSError):
        if text := path.read_text(encoding="ascii").strip():
            return text
    path.touch(mode=0o600)
    text = secrets.token_urlsafe(32)
    path.write_text(text, encoding="ascii")
    return text


def listening(host: str, port: int | None) -> socket.socket:
    """A socket that listens. port: None for `PORT`, or any free one where that is taken.

    Raises:
        UsageError: no such address, or a port that is taken.
    """
    for number in [port] if port is not None else [PORT, 0]:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host.strip("[]"), number), family=family)
        except OSError as error:
            reason = error.strerror or error
    raise UsageError(f"the studio cannot listen on {host} port {port or PORT}: {reason}")


def serve(
    host: str,
    port: int | None,
    opens: bool,
    say: Callable[[str], object],
    folders: Sequence[Path] = (),
    place: Path | None = None,
) -> None:
    """Serve the studio until a signal ends it.

    Args:
        host: address to listen on. port: None for the usual one.
        opens: whether a browser is opened. say: shows a line to the person who started it.
        folders: opened at the start.
        place: of the studio's own files; None for the user's.

    Raises:
        UsageError: an address that cannot be used, or a studio that runs already.
    """
    folder = place or default_folder()
    store = Store(folder)
    try:
        own(folder)
    except UsageError:
        raise UsageError(
            f"a studio with the files in {folder} is running already: use its page, or give a "
            "second one another folder in the environment variable SD_LORA_STUDIO"
        ) from None
    try:
        with listening(host, port) as sock, Keeper(store) as keeper:
            for one in folders:
                store.open(one)
            number = sock.getsockname()[1]
            studio = Studio(store, keeper, Watch(keeper))
            guard = Guard(application(studio), host, number, _secret(folder), UPLOADS)
            shown = f"[{host}]" if ":" in host and "[" not in host else host
            name = socket.gethostname() if host in ("0.0.0.0", "::") else shown  # noqa: S104
            studio.new_address = lambda: f"http://{name}:{number}/?token={guard.new_token()}"
            address = studio.new_address()
            say(f"the studio is at {address}")
            if host not in LOCAL:
                say("everyone who can read this address, or your network's traffic, can use it")
            if opens:
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
            config = uvicorn.Config(
                guard, log_config=None, access_log=False, server_header=False,
                proxy_headers=False, timeout_graceful_shutdown=2, ws="none",
            )  # fmt: skip
            uvicorn.Server(config).run([sock])
            left = store.jobs("state = 'running'")
            say(f"the studio has ended; {len(left)} of its runs go on" if left else
                "the studio has ended")  # fmt: skip
    finally:
        disown(folder)
        store.close()
