"""The page of `rlhf label` over HTTP: one file without any other asset, and the three things that it asks.

A page of another site can neither read what is shown here nor send anything (`Guard`); whatever a text holds is shown
as text, and would not run if it were not (`HEADERS`).
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_tasks.errors import UserError
from rlhf_tasks.label_desk import Desk

PAGE = Path(__file__).with_name("label.html").read_text(encoding="utf-8")
LONGEST_REQUEST = 10_000
"""Bytes that a request may have: a name, a digest and a choice are a few hundred."""


def application(desk: Desk, host: str) -> Starlette:
    """The page and the three things that it asks."""

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE)

    async def state(request: Request) -> Response:
        return await _answer(desk.state, request.query_params.get("rater"))

    async def judge(request: Request) -> Response:
        said = await _fields(request)
        return await _answer(desk.judge, said.get("rater"), said.get("pair"), said.get("choice"))

    async def undo(request: Request) -> Response:
        return await _answer(desk.undo, (await _fields(request)).get("rater"))

    routes = [
        Route("/", page),
        Route("/state", state),
        Route("/judge", judge, methods=["POST"]),
        Route("/undo", undo, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, host=host)])


async def _fields(request: Request) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        found = await request.json()
        return found if isinstance(found, dict) else {}
    return {}


async def _answer(ask: Callable[..., dict[str, Any]], *arguments: object) -> Response:
    try:
        return JSONResponse(await run_in_threadpool(ask, *arguments))
    except UserError as error:
        return JSONResponse({"error": str(error)}, 400)


class Guard:
    """Lets in what comes from the page itself.

    A name of somebody else's that was made to point here (DNS rebinding) is in `Host`: only IP addresses, this
    machine's own name and the one that was asked for are known. A page of another site that sends something here says
    so in `Origin`, and cannot send JSON unasked.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        refused = self._refused(scope["method"], Headers(scope=scope))
        app = PlainTextResponse(refused, 403) if refused else self.app
        await app(scope, receive, _with_headers(send))

    def _refused(self, method: str, headers: Headers) -> str:
        host = headers.get("host", "")
        if not self._is_known(host):
            return f"Host: found {host!r}, expected the address that `rlhf label` printed"
        if method != "POST":
            return ""
        if headers.get("origin", "").partition("://")[2] != host:
            return "Origin: expected this page's own"
        if headers.get("content-type", "").partition(";")[0] != "application/json":
            return "Content-Type: expected application/json"
        length = headers.get("content-length", "")
        return "" if length.isdecimal() and int(length) <= LONGEST_REQUEST else "expected a short request"

    def _is_known(self, host: str) -> bool:
        with suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""
            if name in self._names:
                return True
            ipaddress.ip_address(name)
            return True
        return False


def _with_headers(send: Send) -> Callable[[Message], Awaitable[None]]:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return sending


def _allowed(tag: str) -> str:
    """The digest of the page's own script or style: no other one runs, whatever a text may hold."""
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_allowed('script')}; style-src {_allowed('style')}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
