"""Sign-in and access control of the Studio.

    without keys         the Studio can be opened only from this machine (serve.http.guard defines the
                         accepted Hosts)
    keys or tenants      a form asks for a key and stores it in a cookie, which scripts cannot read and which
                         the browser sends only to /studio; the server stores nothing. Each action on a page
                         checks the key again, so a revoked key stops working at once

`StudioMiddleware` runs before the server's `AuthMiddleware`. Without a key, a request gets only the sign-in
form, as static HTML. A WebSocket is refused unless a page with the same key is open. A page's images,
downloads and uploads go through /studio/api/…, where the middleware converts the cookie to an API key,
because the API reads no cookies."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from importlib.resources import files
from urllib.parse import parse_qs, quote
from weakref import WeakKeyDictionary

from fastapi import APIRouter
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.serve.access import Tenancy
from veneer.serve.engine.admission import SharedQuantity
from veneer.serve.http.bodies import BodyRoute
from veneer.serve.http.guard import check_source, needs
from veneer.serve.principal import Principal
from veneer.serve.quota import current_owner
from veneer.serve.request import Refused
from veneer.serve.settings import HttpSettings
from veneer.train.report.page import escaping, palette

ROOT = "/studio"
_COOKIE = "veneer_studio"
_DELAY = 1.0
"""Delay, in seconds, before the response to a wrong key."""
_WAITING, _CONCURRENT = 32, 2
"""Maximum number of pages waiting to be rendered, and of pages rendered concurrently."""
_PAGES, _SOCKETS = 200, 4
"""Maximum open pages per key, and sockets per page (two can overlap during a reconnect)."""
_ASSETS, _SOCKET = f"{ROOT}/_nicegui/", f"{ROOT}/_nicegui_ws"
_IMMUTABLE = "public, max-age=31536000, immutable"
_UNUSED = ("/fonts.css", "/quasar.unimportant.prod.css", "/quasar.important.prod.css")
"""Stylesheets that the Studio does not use; without them the first paint loads 250 kB less."""
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'none'; "
    "object-src 'none'"
)
"""Content Security Policy: a page can contact only this server, even if code is injected into the page.

Vue compiles templates in the browser, which requires 'unsafe-eval'."""


@dataclass(eq=False)
class Visitor:
    """The visitor of one page.

    principal: the principal as of the last action.
    sockets: number of open sockets of the page."""

    tenancy: Tenancy
    key: str | None
    principal: Principal
    sockets: int = 0

    def same_as(self, other: Visitor) -> bool:
        """Return whether both visitors are the same tenant or have the same key."""
        own_tenant, other_tenant = self.principal.tenant, other.principal.tenant
        return own_tenant == other_tenant if own_tenant or other_tenant else self.key == other.key

    async def authenticate(self) -> Principal:
        """Check the key again and return the current principal. Raises Refused (401)."""
        self.principal = await self.tenancy.authenticate(self.key)
        return self.principal


VISITORS: WeakKeyDictionary[object, Visitor] = WeakKeyDictionary()
"""Maps the NiceGUI client of each open page to its visitor."""


async def _principal_of(tenancy: Tenancy, key: str | None) -> Principal | None:
    """Return the principal of a key; None for an invalid key."""
    try:
        return await tenancy.authenticate(key)
    except Refused as error:
        if error.status != 401:
            raise
        return None


async def _visitor_of(tenancy: Tenancy, request: HTTPConnection) -> Visitor | None:
    """Return the visitor of a request; None if the visitor must sign in.

    A server without keys ignores the cookie, because another server on this machine can have set it."""
    key = None if tenancy.keyless else request.cookies.get(_COOKIE)
    principal = await _principal_of(tenancy, key)
    return None if principal is None else Visitor(tenancy, key, principal)


def key_routes(tenancy: Tenancy) -> APIRouter:
    """Return the routes for signing in and out."""
    router = APIRouter(tags=["studio"], include_in_schema=False, route_class=BodyRoute, dependencies=[needs("public")])

    @router.post(f"{ROOT}/enter")
    async def enter(request: HttpRequest) -> Response:
        form = await request.form(max_fields=2, max_files=0)
        key, then = str(form.get("key", "")).strip(), str(form.get("then", ""))
        then = then if then.startswith(f"{ROOT}/") else f"{ROOT}/"
        if await _principal_of(tenancy, key) is None:
            await asyncio.sleep(_DELAY)
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


class StudioMiddleware:
    """ASGI middleware for /studio, which runs before `AuthMiddleware` and all others.

    settings: the accepted Hosts and Origins."""

    def __init__(self, app: ASGIApp, tenancy: Tenancy, settings: HttpSettings) -> None:
        self.app, self.tenancy, self.settings = app, tenancy, settings
        self.pages, self.rendering = SharedQuantity("pages", _WAITING), asyncio.Semaphore(_CONCURRENT)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] not in ("http", "websocket") or not f"{path}/".startswith(f"{ROOT}/"):
            return await self.app(scope, receive, send)
        try:
            check_source(scope, self.settings, self.tenancy.keyless)
            await self._enter(path, scope, receive, send)
        except Refused as error:
            await _send_refusal(error, scope, receive, send)

    async def _enter(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send)
        elif path.startswith(_SOCKET):
            raise Refused("pages can connect only with WebSockets", status=403, code="forbidden")
        elif path.startswith(f"{ROOT}/api/"):
            inner = path.removeprefix(f"{ROOT}/api")
            if f"{inner}/".startswith(f"{ROOT}/"):
                raise Refused(f"the API has no routes under {ROOT}", status=404, code="not_found")
            key = None if self.tenancy.keyless else HTTPConnection(scope).cookies.get(_COOKIE)
            await self.app(_with_key(scope, inner, key), receive, send)
        elif path.startswith(_ASSETS):
            if await _visitor_of(self.tenancy, HTTPConnection(scope)) is None:
                raise Refused("sign in first", status=401, code="unauthorized")
            if path.endswith(_UNUSED):
                head = {"cache-control": _IMMUTABLE}
                return await Response(media_type="text/css", headers=head)(scope, receive, send)
            await self.app(scope, receive, _guarded(send, path))
        elif path in (f"{ROOT}/enter", f"{ROOT}/leave"):
            await self.app(scope, receive, _guarded(send, path))
        else:
            await self._page(scope, receive, _guarded(send, path))

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Render a page. Few pages are rendered concurrently, because rendering blocks the event loop."""
        visitor = await _visitor_of(self.tenancy, HTTPConnection(scope))
        if visitor is None:
            return await _sign_in(scope)(scope, receive, send)
        if sum(visitor.same_as(other) for other in VISITORS.values()) >= _PAGES:
            text = f"this key has {_PAGES} pages open, or had them open within the last minute"
            raise Refused(text, status=429, code="overloaded", retry_after=5.0, fix="close some pages")
        principal = visitor.principal
        current_owner.set(principal.tenant)
        self.pages.take(principal.tenant, principal.weight, 1)
        try:
            async with self.rendering:
                await self.app({**scope, "veneer.visitor": visitor}, receive, send)
        finally:
            self.pages.give(principal.tenant, 1)

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Accept a page's socket.

        Raises Refused (403) if the page already has `_SOCKETS` sockets, or if the socket's client id belongs
        to no open page with the same key."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        id = query.get("client_id", [""])[0]
        page = next((each for client, each in VISITORS.items() if getattr(client, "id", None) == id), None)
        visitor = await _visitor_of(self.tenancy, HTTPConnection(scope))
        if page is None or visitor is None or not visitor.same_as(page) or page.sockets >= _SOCKETS:
            raise Refused("a socket needs an open, signed-in page", status=403, code="forbidden")
        page.sockets += 1
        try:
            await self.app(scope, receive, send)
        finally:
            page.sockets -= 1


def _guarded(send: Send, path: str) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            headers["content-security-policy"] = _POLICY
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "same-origin"
            if path.startswith(_ASSETS) and message["status"] == 200 and "/dynamic_resources/" not in path:
                headers["cache-control"] = _IMMUTABLE  # the path of an asset contains its version
        await send(message)

    return guarded


def _sign_in(scope: Scope) -> Response:
    """Return the sign-in form as static HTML; the server stores nothing for it."""
    path, query = scope["path"], scope["query_string"].decode("latin-1")
    wrong = "wrong" in parse_qs(query, keep_blank_values=True)
    then = path + (f"?{query}" if query and not wrong else "")
    form = escaping("veneer.studio", "templates").get_template("enter.html.j2")
    text = form.render(action=f"{ROOT}/enter", then=then, wrong=wrong)
    page = f'<!doctype html><html lang="en">{head_html()}{text}</html>'
    return HTMLResponse(page, headers={"cache-control": "no-store"})


def head_html() -> str:
    """Return the end of every page's <head>: theme script, colors and styles.

    The script sets the theme before the first paint."""
    css = palette() + (files("veneer.studio") / "studio.css").read_text(encoding="utf-8")
    theme = 'document.documentElement.dataset.theme = localStorage.getItem("veneer-theme") || "";'
    return f"<script>{theme}</script>\n<style>{css}</style>"


def _with_key(scope: Scope, path: str, key: str | None) -> Scope:
    """Return the scope of an API request for `path` with a key, made from a Studio request's scope."""
    drop = (b"cookie", b"authorization", b"x-api-key", b"api-key")
    headers = [(name, value) for name, value in scope["headers"] if name not in drop]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode("latin-1", "replace")))
    return {**scope, "path": path, "raw_path": quote(path).encode(), "headers": headers}


async def _send_refusal(refusal: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
    else:
        head = {"retry-after": f"{refusal.retry_after:.0f}"} if refusal.retry_after else {}
        text = f"{refusal.what} ({refusal.fix})" if refusal.fix else refusal.what
        await PlainTextResponse(f"{text}\n", refusal.status, head)(scope, receive, send)
