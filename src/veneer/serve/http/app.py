"""The application: one door for all requests, errors in each surface's own form, and the routes of every surface.

The door comes before everything: it numbers the request, establishes who asks (401), turns new work away while the
server is loading or draining (503), and takes the body in: no more of it than there is room for (413, 429), and no
slower than it may come (408). What the request holds of the server's room it gives back at the end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import typing
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer import __version__
from veneer.serve.access import Catalog, OpenAccess, Tenancy
from veneer.serve.engine.admission import Place
from veneer.serve.http.bodies import LARGE
from veneer.serve.http.errors import Json, answer_error, as_refused, from_validation
from veneer.serve.http.fields import Body
from veneer.serve.http.house import House, HttpSettings, ShadowAnswer, client_key, house_of, need_admin
from veneer.serve.http.prompts import Prompts, Text
from veneer.serve.http.running import ClientLeft
from veneer.serve.http.surfaces import llama_cpp, openai, tgi, vllm
from veneer.serve.request import Engine, Refused

__all__ = ["create_app"]

STRANGERS = "?"
"""Whose the requests are that need no key, where room is shared out; no tenant can have this name."""
OPEN = ("/health", "/ping", "/ready", "/version", "/docs", "/openapi.json", "/redoc")
"""Paths that need no key."""

_SHADOWS = logging.getLogger("veneer.serve.shadow")


def create_app(
    engine: Engine,
    catalog: Catalog,
    tenancy: Tenancy | None,
    base: Text,
    images: APIRouter | None = None,
    settings: HttpSettings | None = None,
    *,
    routers: Sequence[APIRouter] = (),
    unguarded: Sequence[str] = (),
    on_shadow: Callable[[ShadowAnswer], None] | None = None,
    on_change: Callable[[str, str, object], None] | None = None,
    lifespan: Any = None,
) -> FastAPI:
    """All surfaces over one engine.

    `tenancy` None: no keys, no limits. `base`: a TextBase, or what `Text` says of one. `images`, `routers`: further
    routes behind the same door; they find `request.app.state.house`. `unguarded`: prefixes of paths that look after
    their own keys. The app's `state.house.phase` is ready; a server that drains sets it."""
    chosen = settings or HttpSettings()
    house = House(engine, catalog, tenancy or OpenAccess(), Prompts(base), chosen, on_shadow or _log_shadow)
    if on_change is not None:
        house.on_change = on_change
    app = FastAPI(title="veneer", version=__version__, lifespan=lifespan, redoc_url=None)
    app.state.house = house
    surfaces: dict[str, str] = {}
    for router in (openai.router, vllm.router, vllm.sglang, tgi.router, llama_cpp.router, _service()):
        surfaces |= {getattr(r, "path", ""): str(router.tags[0]) for r in router.routes}
        app.include_router(router)
    for router in (*([images] if images is not None else []), *routers):
        app.include_router(router)
    _tell_errors(app, surfaces)
    app.add_middleware(Door, house=house, surfaces=surfaces, unguarded=tuple(unguarded))
    if chosen.cors:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware, allow_origins=list(chosen.cors), allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id", "x-veneer-ignored", "retry-after"],
        )  # fmt: skip
    return app


def _log_shadow(answer: ShadowAnswer) -> None:
    record: dict[str, Any] = {
        "request": answer.request, "tenant": answer.tenant, "name": answer.name, "shadow": answer.shadow,
        "same": None if answer.error else answer.sent == answer.answer, "error": answer.error,
    }  # fmt: skip
    if answer.distance is None:
        record |= {"sent_characters": len(answer.sent), "shadow_characters": len(answer.answer)}
    else:
        record["distance"] = answer.distance
    _SHADOWS.info(json.dumps(record))


# -- the door ----------------------------------------------------------------------------------------------------------


class Door:
    """ASGI middleware. What it establishes is in the scope: `veneer.id` and `veneer.caller`."""

    def __init__(self, app: ASGIApp, house: House, surfaces: dict[str, str], unguarded: tuple[str, ...]) -> None:
        self.app, self.house, self.surfaces, self.unguarded = app, house, surfaces, unguarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["veneer.id"] = number = uuid.uuid4().hex

        async def numbered(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        request = HttpRequest(scope)
        try:
            await self._enter(request)
        except Exception as error:
            surface = self.surfaces.get(request.url.path, "OpenAI")
            refused = as_refused(error)
            if (place := scope.get("veneer.place")) is not None:
                place.leave()
            self.house.metrics.refused.labels(refused.code).inc()
            return await answer_error(refused, surface)(scope, receive, numbered)
        working = request.method not in ("GET", "HEAD", "OPTIONS")
        self.house.inside += working
        incoming = _Body(receive, request.scope["veneer.place"], self.house.settings)
        try:
            await self.app(scope, incoming.receive, numbered)
        finally:
            self.house.inside -= working
            incoming.place.leave()
            if incoming.seen >= LARGE:
                self.house.tidy()

    async def _enter(self, request: HttpRequest) -> None:
        path, house = request.url.path, self.house
        length = request.headers.get("content-length", "0")
        size = int(length) if length.isdigit() and len(length) < 16 else 0
        if size > house.settings.max_body or len(length) >= 16:
            raise _too_large(house.settings.max_body)
        request.scope["veneer.place"] = place = house.admission.enter(STRANGERS)
        if path in OPEN or path.startswith(tuple(f"{prefix}/" for prefix in self.unguarded)) or path in self.unguarded:
            place.take("bodies", size)
            return
        request.scope["veneer.caller"] = caller = await house.tenancy.caller(client_key(request))
        place.tenant, place.weight = caller.tenant, caller.weight
        place.take("bodies", size)
        await house.fresh()
        if house.phase != "ready" and request.method == "POST":
            raise Refused(f"the server is {house.phase}", status=503, code="shutting_down", retry_after=5.0)


class _Body:
    """A body as it comes: counted, and in time. What its head did not announce is taken when it is here."""

    def __init__(self, receive: Receive, place: Place, settings: HttpSettings) -> None:
        self.read, self.place, self.settings = receive, place, settings
        self.seen, self.whole, self.end = 0, False, 0.0

    async def receive(self) -> Message:
        if self.whole:  # what comes now is that the client has left
            return await self.read()
        now = asyncio.get_running_loop().time()
        self.end = self.end or now + self.settings.body_time
        try:
            async with asyncio.timeout_at(self.end):
                message = await self.read()
        except TimeoutError:
            raise Refused(
                f"the body did not come within {self.settings.body_time:g} s", status=408, code="too_slow"
            ) from None
        self.seen += len(message.get("body", b""))
        if self.seen > self.settings.max_body:
            raise _too_large(self.settings.max_body)
        if (more := self.seen - self.place.held["bodies"]) > 0:
            self.place.take("bodies", more)
        self.whole = not message.get("more_body", False)
        return message


def _too_large(most: int) -> Refused:
    return Refused(f"the body has more than {most:,} bytes", status=413, code="too_large")


# -- errors ------------------------------------------------------------------------------------------------------------

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 400: "invalid_request"}


def _tell_errors(app: FastAPI, surfaces: dict[str, str]) -> None:
    def tell(request: HttpRequest, error: Refused) -> Response:
        house_of(request).metrics.refused.labels(error.code).inc()
        return answer_error(error, surfaces.get(request.url.path, "OpenAI"))

    async def refused(request: HttpRequest, error: Any) -> Response:
        return tell(request, error)

    async def invalid_body(request: HttpRequest, error: Any) -> Response:
        return tell(request, from_validation(error.errors(), _known(request.scope.get("endpoint"))))

    async def http(request: HttpRequest, error: Any) -> Response:
        what = (
            f"there is no route {request.method} {request.url.path[:200]}" if error.status_code == 404 else error.detail
        )
        code = _HTTP_CODES.get(error.status_code, "invalid_request")
        answer = tell(request, Refused(str(what), status=error.status_code, code=code))
        answer.headers.update(error.headers or {})
        return answer

    async def left(request: HttpRequest, error: Any) -> Response:
        return Response(status_code=499)

    async def unexpected(request: HttpRequest, error: Exception) -> Response:
        return tell(request, as_refused(error))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid_body)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientLeft, left)
    app.add_exception_handler(Exception, unexpected)


def _known(endpoint: Any) -> list[str]:
    """Every key that a route's body may have, for the nearest name of one that it may not."""
    try:
        kinds = typing.get_type_hints(endpoint).values()
    except (NameError, TypeError):
        return []
    return sorted(set(_keys(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))))


def _keys(models: Iterable[type[BaseModel]]) -> Iterable[str]:
    for model in models:
        for name, about in model.model_fields.items():
            yield about.alias or name
            inner = about.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _keys([inner])
        if issubclass(model, Body):
            yield from (*model.ignored, *model.refused)


# -- health and metrics ------------------------------------------------------------------------------------------------


def _service() -> APIRouter:
    router = APIRouter(tags=["service"])

    @router.get("/health", summary="The engine works; 503 where it is stuck, has ended, or fails at everything.")
    @router.get("/ping", include_in_schema=False)
    async def health(request: HttpRequest) -> Response:
        wrong = house_of(request).problem()
        return Json({"status": "failing", "reason": wrong} if wrong else {"status": "ok"}, 503 if wrong else 200)

    @router.get("/ready", summary="Requests are taken; 503 while loading or draining.")
    async def ready(request: HttpRequest) -> Response:
        house = house_of(request)
        if house.phase == "ready" and (wrong := house.trouble()):
            return Json({"status": "failing", "reason": wrong}, status_code=503)
        return Json({"status": house.phase}, status_code=200 if house.phase == "ready" else 503)

    @router.get("/metrics", summary="For Prometheus; with tenants, an operator's key is needed.")
    async def metrics(request: HttpRequest) -> Response:
        need_admin(request)
        return Response(house_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
