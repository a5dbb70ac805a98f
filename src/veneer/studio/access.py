"""Who looks at a page, and what may come in with it.

    nobody has a key     on this machine alone: the Host has to be this machine's, or a page elsewhere that has its name
                         lead here (DNS rebinding) could read and do everything
    keys or tenants      one field asks for a key, which is kept in a cookie that scripts cannot read and that goes to
                         /studio alone; nothing is kept here. It is asked for again at each thing that a page does, so
                         that a key that is revoked opens nothing any more

`Gate` stands outside of the server's door. What a page's own pictures, downloads and uploads ask of the API goes to
/studio/api/…, where the gate turns the cookie into the key that a client would send: the API itself reads no cookies.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from urllib.parse import quote, urlsplit
from weakref import WeakKeyDictionary

from fastapi import APIRouter
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.errors import ConfigError
from veneer.serve.access import Caller, Tenancy
from veneer.serve.request import Refused

ROOT = "/studio"
_COOKIE = "veneer_studio"
_HERE = ("localhost", "127.0.0.1", "::1")
_WRONG = 1.0
"""Seconds that a wrong key waits for its answer."""
_ASSETS = f"{ROOT}/_nicegui/"
_FOR_EVER = "public, max-age=31536000, immutable"
_UNUSED = ("/fonts.css", "/quasar.unimportant.prod.css", "/quasar.important.prod.css")
"""Looks of widgets that no view has: a quarter of a megabyte that a browser would read before it paints anything."""
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'none'; "
    "object-src 'none'"
)
"""Nothing on a page can come from, or be sent, elsewhere, whatever slips into it. Vue compiles in the browser: eval."""


@dataclass(eq=False)
class Visitor:
    """Who looks at one page. `caller`: as they were when they last did something."""

    tenancy: Tenancy
    key: str | None
    caller: Caller

    async def again(self) -> Caller:
        """Raises Refused (401) for a key that is none any more."""
        self.caller = await self.tenancy.caller(self.key)
        return self.caller


VISITORS: WeakKeyDictionary[object, Visitor] = WeakKeyDictionary()
"""Of each page that is open, by its client (NiceGUI's)."""


async def _caller_with(tenancy: Tenancy, key: str | None) -> Caller | None:
    """Who has this key; None for one that opens nothing."""
    try:
        return await tenancy.caller(key)
    except Refused as error:
        if error.status != 401:
            raise
        return None


async def _is_open(tenancy: Tenancy) -> bool:
    """Whether who has no key is let in."""
    return await _caller_with(tenancy, None) is not None


async def check_reach(tenancy: Tenancy, host: str) -> None:
    """Raises ConfigError where others could reach a page that needs no key."""
    if host not in _HERE and await _is_open(tenancy):
        what = "the Studio trains and removes adapters, so where others can reach it, it needs a key"
        raise ConfigError(what, where=f"--host {host}", fix="--api-keys or --tenants; or leave --host out")


async def visitor_of(tenancy: Tenancy, request: HTTPConnection) -> Visitor | None:
    """Who sent this; None for who has to say so first. Where nobody needs a key, one that a browser has of another
    server of this machine is let be."""
    key = None if await _is_open(tenancy) else request.cookies.get(_COOKIE)
    caller = await _caller_with(tenancy, key)
    return None if caller is None else Visitor(tenancy, key, caller)


def key_routes(tenancy: Tenancy) -> APIRouter:
    """In and out: a form with a key, and a button that forgets it."""
    router = APIRouter(tags=["studio"], include_in_schema=False)

    @router.post(f"{ROOT}/enter")
    async def enter(request: HttpRequest) -> Response:
        form = await request.form(max_fields=2, max_files=0)
        key, then = str(form.get("key", "")).strip(), str(form.get("then", ""))
        then = then if then.startswith(f"{ROOT}/") else f"{ROOT}/"
        if await _caller_with(tenancy, key) is None:
            await asyncio.sleep(_WRONG)
            return RedirectResponse(f"{ROOT}/?wrong=1", 303)
        answer = RedirectResponse(then, 303)
        secure = request.url.scheme == "https"
        answer.set_cookie(_COOKIE, key, path=ROOT, httponly=True, samesite="strict", secure=secure)
        return answer

    @router.post(f"{ROOT}/leave")
    async def leave() -> Response:
        answer = RedirectResponse(f"{ROOT}/", 303)
        answer.delete_cookie(_COOKIE, path=ROOT, httponly=True, samesite="strict")
        return answer

    return router


class Gate:
    """ASGI middleware before everything, the door too."""

    def __init__(self, app: ASGIApp, tenancy: Tenancy) -> None:
        self.app, self.tenancy = app, tenancy
        self._open: bool | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] not in ("http", "websocket") or not f"{path}/".startswith(f"{ROOT}/"):
            return await self.app(scope, receive, send)
        if self._open is None:
            self._open = await _is_open(self.tenancy)
        headers = Headers(scope=scope)
        if wrong := self._refused(scope, headers):
            return await _turn_away(wrong, scope, receive, send)
        if path.startswith(f"{ROOT}/api/"):
            key = None if self._open else HTTPConnection(scope).cookies.get(_COOKIE)
            return await self.app(_with_key(scope, path.removeprefix(f"{ROOT}/api"), key), receive, send)

        if path.endswith(_UNUSED) and path.startswith(_ASSETS):
            head = {"cache-control": _FOR_EVER}
            return await Response(media_type="text/css", headers=head)(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = MutableHeaders(raw=message.setdefault("headers", []))
                given["content-security-policy"] = _POLICY
                given["x-content-type-options"] = "nosniff"
                given["referrer-policy"] = "same-origin"
                if path.startswith(_ASSETS) and message["status"] == 200 and "/dynamic_resources/" not in path:
                    given["cache-control"] = _FOR_EVER  # their version is in their path
            await send(message)

        await self.app(scope, receive, guarded if scope["type"] == "http" else send)

    def _refused(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self._open and urlsplit(f"//{host}").hostname not in _HERE:
            return 421, "veneer's Studio needs no key on this machine, so it answers to localhost and 127.0.0.1 alone"
        writes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        origin = headers.get("origin")
        if writes and origin is not None and urlsplit(origin).netloc != host:
            return 403, "this came from a page of another site"
        return None


def _with_key(scope: Scope, path: str, key: str | None) -> Scope:
    """As a client would have sent it who has that key."""
    drop = (b"cookie", b"authorization", b"x-api-key", b"api-key")
    headers = [(name, value) for name, value in scope["headers"] if name not in drop]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode("latin-1", "replace")))
    return {**scope, "path": path, "raw_path": quote(path).encode(), "headers": headers}


async def _turn_away(why: tuple[int, str], scope: Scope, receive: Receive, send: Send) -> None:
    status, text = why
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
    else:
        await PlainTextResponse(text + "\n", status)(scope, receive, send)
