"""The guard before every page: who asks, from which page, and how much; the headers of answers.

A browser sends cookies along with requests that another page makes, and a name of somebody else's
may lead to this machine (DNS rebinding). So a request needs the cookie of this studio, the name of
this machine in `Host`, and, where it comes from a page, one of this studio's own.
"""

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")
"""Names of this machine for itself."""

LARGEST = 2 * 2**20
"""Bytes of a form at most: captions of 5,000 images are about half of it."""

LARGEST_UPLOAD = 2**30
"""Bytes of one file of images, or of a zip, at most."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; "
    "base-uri 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",  # with no-referrer, forms of our own come from "null"
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Headers of every answer: nothing is loaded from elsewhere, and nobody frames a page."""

UNKNOWN = (
    "This page needs the address that `sd-lora studio` printed, and each address opens one browser."
    ' For another one, use "Address for another browser" in the studio, or start it anew.'
)


class Guard:
    """Passes on requests of the studio's own pages, and answers the others.

    Args:
        app: the pages.
        host: name or address that the studio listens on. port: its port.
        secret: value of the cookie, known to browsers that came by a one-time token.
        uploads: paths that take files of up to `LARGEST_UPLOAD` bytes.
    """

    def __init__(
        self, app: App, host: str, port: int, secret: str, uploads: tuple[str, ...] = ()
    ) -> None:
        self.app, self.host, self.port, self.secret = app, host, port, secret
        self.uploads = uploads
        self.cookie = f"sd_lora_studio_{port}"  # cookies are shared by all ports of a host
        self._tokens: set[str] = set()

    def new_token(self) -> str:
        """A token that opens one browser."""
        token = secrets.token_urlsafe(24)
        self._tokens.add(token)
        return token

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request; raises nothing of its own."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":  # no page uses a web socket
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        if token := self._token(scope):
            if token in self._tokens:
                self._tokens.discard(token)
                await _answer(send, HTTPStatus.SEE_OTHER, "", self._welcome())
                return
            if self._is_known(headers):  # the same address once more
                await _answer(send, HTTPStatus.SEE_OTHER, "", {"location": "/"})
                return
        if not self._is_known(headers):
            await _answer(send, HTTPStatus.FORBIDDEN, UNKNOWN)
            return
        await self.app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Message, headers: dict[str, str]) -> tuple[HTTPStatus, str] | None:
        """The answer to a request from elsewhere, or of too many bytes; None for others."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return HTTPStatus.FORBIDDEN, "The studio does not answer to this name."
        reads = scope["method"] in ("GET", "HEAD")
        origin = headers.get("origin", "" if reads else "none")
        site = headers.get("sec-fetch-site", "none")
        if origin not in ("", f"http://{host}") or site not in ("none", "same-origin"):
            return HTTPStatus.FORBIDDEN, "The studio takes requests of its own pages alone."
        if reads:
            return None
        length = headers.get("content-length", "")
        if "transfer-encoding" in headers or not length.isdecimal():
            return HTTPStatus.LENGTH_REQUIRED, "A request says how long it is."
        most = LARGEST_UPLOAD if scope["path"] in self.uploads else LARGEST
        if int(length) > most:
            text = f"A request of {length} bytes; {most} are the most here."
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a `Host` header names this machine."""
        name, colon, port = host.rpartition(":")
        if not colon or port != str(self.port):
            return False
        if name in LOCAL or name == self.host:
            return True
        if self.host in LOCAL:
            return False
        return name in (socket.gethostname(), socket.getfqdn()) or _is_address(name)

    def _token(self, scope: Message) -> str:
        """The token in a request's address, or ""."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        return query.get("token", [""])[0] if scope["path"] == "/" else ""

    def _is_known(self, headers: dict[str, str]) -> bool:
        """Whether a request has the cookie."""
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        given = cookie.value if cookie else ""
        return hmac.compare_digest(given.encode(), self.secret.encode())

    def _welcome(self) -> dict[str, str]:
        """The headers that give a browser its cookie."""
        cookie = f"{self.cookie}={self.secret}; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000"
        return {"location": "/", "set-cookie": cookie}


def _is_address(name: str) -> bool:
    """Whether a name is an IP address: nobody else's name can lead there."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


async def _answer(
    send: Send, status: HTTPStatus, text: str, more: dict[str, str] | None = None
) -> None:
    body = text.encode()
    headers = {"content-type": "text/plain; charset=utf-8", "content-length": str(len(body))}
    pairs = (HEADERS | headers | {"connection": "close"} | (more or {})).items()
    encoded = [(name.encode(), value.encode()) for name, value in pairs]
    await send({"type": "http.response.start", "status": int(status), "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _with_headers(send: Send) -> Send:
    """`send` that adds `HEADERS`, and lets no page be kept outside of the browser's window."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name for name, _ in message["headers"]}
            more = HEADERS | {"cache-control": "no-store"}
            pairs = ((name.encode(), value.encode()) for name, value in more.items())
            added = [pair for pair in pairs if pair[0] not in there]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sending
