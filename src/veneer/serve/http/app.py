"""The application: middleware for all requests, errors in each API's format, and all routes.

`AuthMiddleware` handles each request before any route does. It assigns a request ID, checks Host, Origin and
Content-Type (421, 403, 415), determines the principal (401), refuses new work while the server is loading or
draining (503), and receives the body within limits on size and memory (413, 429) and time (408). When the
request ends, the middleware releases the request's resources.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer import __version__
from veneer.ops.cpu.memory import trim_heap
from veneer.serve.engine.admission import AdmittedRequest
from veneer.serve.http.answers import ClientLeft
from veneer.serve.http.bodies import BodyRoute, body_error, check_guarded, keys_of_bodies
from veneer.serve.http.errors import Json, answer_error, as_refused
from veneer.serve.http.guard import check_content_type, check_source, needs
from veneer.serve.http.service import Service, client_key, service_of
from veneer.serve.http.surfaces.messages import messages_routes
from veneer.serve.http.surfaces.ollama import ollama_routes
from veneer.serve.http.surfaces.openai import openai_routes
from veneer.serve.http.surfaces.responses import responses_routes
from veneer.serve.http.surfaces.tgi import tgi_routes
from veneer.serve.http.surfaces.vllm import aibrix_routes, dynamo_routes, sglang_routes, vllm_routes
from veneer.serve.http.telemetry import begin, default_traces
from veneer.serve.principal import STRANGER
from veneer.serve.quota import current_owner
from veneer.serve.request import Refused, not_ready
from veneer.serve.settings import HttpSettings

_ANONYMOUS = "?"
"""Pseudo-tenant whose shares are used by requests that need no key; no tenant can have this name."""
_ANONYMOUS_BODY = 4 << 10
"""Maximum bytes of a body on a path that needs no key, such as the sign-in form.

These bodies do not count against the shared limit, so that slow bodies from unknown clients cannot block
other requests.
"""
OPEN = ("/health", "/ping", "/ready", "/version", "/docs", "/openapi.json", "/redoc")
"""Paths that need no key."""
_NO_BASE = ("/v1/adapters", "/v1/adapter_", "/v1/files", "/v1/jobs/")
"""Prefixes of paths that already work while the base is loading, for the Studio's pages."""

_GIVEN_BACK = 1 << 20
"""Size from which a body's memory is returned to the system, because the C library would keep it."""
_LARGE_PACE = 256 << 10
"""Minimum speed of a large body in bytes per second: the time limit grows with the bytes received."""


def create_app(
    service: Service,
    *,
    routers: Sequence[APIRouter] = (),
    unguarded: Sequence[str] = (),
    large: Mapping[str, int] | None = None,
) -> FastAPI:
    """Return the application with all routes; each route reads `request.app.state.service`.

    `routers`: additional routes behind the same middleware. `unguarded`: prefixes of paths that check keys
    themselves. `large`: regular expressions of full paths -> maximum bytes, for routes that spool bodies to
    disk; those routes limit their own concurrency.
    """
    origins = service.settings.allowed_origins
    app = FastAPI(title="veneer", version=__version__, redoc_url=None)
    app.state.service, app.state.traces = service, default_traces()
    surfaces: dict[str, str] = {}
    builtin = [openai_routes, responses_routes, vllm_routes, sglang_routes, aibrix_routes, dynamo_routes, tgi_routes]
    builtin += [messages_routes, ollama_routes, _health()]
    for router in builtin:
        surfaces |= {getattr(r, "path", ""): str(router.tags[0]) for r in router.routes}
    for router in (*builtin, *routers):
        check_guarded(router)
        app.include_router(router)
    if service.engine.makes == "pictures":
        add_images(app)
    _add_error_handlers(app, surfaces)
    shared: dict[str, Any] = {"service": service, "surfaces": surfaces, "traces": app.state.traces}
    app.add_middleware(AuthMiddleware, **shared, unguarded=tuple(unguarded), large=large or {})
    if origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id", "x-veneer-ignored", "retry-after"],
        )
    return app


def add_images(app: FastAPI) -> None:
    """Add the image routes. The kind of base is known only after the base has loaded."""
    # imported late, because a text server does not need this module
    from veneer.serve.http.surfaces.images import images_routes

    check_guarded(images_routes)
    app.include_router(images_routes)
    app.openapi_schema = None


# -- middleware --------------------------------------------------------------------------------------------------------


class AuthMiddleware:
    """ASGI middleware in front of all routes.

    Sets `veneer.id`, `veneer.principal` and `veneer.admitted` in the scope. Matches routes by the scope's
    path, as the router does. `request.url` is not safe for this purpose: older Starlette versions build it
    from the Host header, which can contain another path.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        surfaces: dict[str, str],
        unguarded: tuple[str, ...],
        large: Mapping[str, int],
        traces: Any,
    ) -> None:
        self.app, self.service, self.surfaces = app, service, surfaces
        self.tracer = None if traces is None else traces.get_tracer("veneer")
        self.keyless, self.prefixes = {*OPEN, *unguarded}, tuple(f"{prefix}/" for prefix in unguarded)
        self.large = [(re.compile(path), most) for path, most in large.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["veneer.id"] = request_id = uuid.uuid4().hex

        async def send_with_request_id(message: Message) -> None:
            trail.answered(message)
            if message["type"] == "http.response.start":
                names = [b"x-request-id", *([b"request-id"] if _is_anthropic(request) else [])]
                message["headers"] = [*message.get("headers", ()), *((name, request_id.encode()) for name in names)]
            await send(message)

        request = HttpRequest(scope)
        scope["veneer.principal"] = STRANGER
        trail = begin(scope, request_id, self.tracer)
        try:
            await self._handle(scope, receive, send_with_request_id, request)
        finally:
            trail.end(scope, self.service.settings.access_log)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, request: HttpRequest) -> None:
        large = self._large(request)
        try:
            check_source(scope, self.service.settings, self.service.tenancy.keyless)
            if not (self.service.loaded or self._needs_no_key(scope["path"]) or scope["path"].startswith(_NO_BASE)):
                self.service.need_base()
            if not self._needs_no_key(scope["path"]):
                check_content_type(scope, request.headers)
            await self._enter(request, large)
        except Exception as error:
            surface = _surface(self.surfaces, request)
            refused = as_refused(error)
            if (admitted := scope.get("veneer.admitted")) is not None:
                admitted.leave()
            self.service.metrics.refused.labels(refused.code).inc()
            return await answer_error(refused, surface, scope["veneer.id"])(scope, receive, send)
        working = request.method not in ("GET", "HEAD", "OPTIONS")
        self.service.inside += working
        incoming = _Body(receive, request.scope["veneer.admitted"], self.service.settings, large)
        try:
            await self.app(scope, incoming.receive, send)
        finally:
            self.service.inside -= working
            incoming.admitted.leave()
            if incoming.received >= _GIVEN_BACK:
                asyncio.get_running_loop().run_in_executor(None, trim_heap)

    def _large(self, request: HttpRequest) -> int | None:
        """Return the size limit of a body that does not count against the memory limit, or None.

        Such a body is spooled to disk, or its path needs no key.
        """
        path = request.scope["path"]
        if self._needs_no_key(path):
            return _ANONYMOUS_BODY
        limits = self.large if request.method == "POST" else []
        return next((most for pattern, most in limits if pattern.fullmatch(path)), None)

    def _needs_no_key(self, path: str) -> bool:
        return path in self.keyless or path.startswith(self.prefixes)

    async def _enter(self, request: HttpRequest, large: int | None) -> None:
        path, service = request.scope["path"], self.service
        length = request.headers.get("content-length", "0")
        size = int(length) if length.isdigit() and len(length) < 16 else 0
        most = service.settings.max_body if large is None else large
        if size > most or len(length) >= 16:
            raise _too_large(most)
        request.scope["veneer.admitted"] = admitted = service.admission.enter(_ANONYMOUS)
        if self._needs_no_key(path):
            return
        principal = (await service.tenancy.authenticate(client_key(request))).serving(request.headers)
        request.scope["veneer.principal"] = principal
        admitted.tenant, admitted.weight = principal.scheduled_as, principal.weight
        current_owner.set(principal.tenant)
        if large is None:
            admitted.reserve("bodies", size)
        await service.catalog.fresh()
        if service.phase != ("ready" if service.loaded else "loading") and request.method == "POST":
            raise not_ready(service.phase)


class _Body:
    """An incoming request body, with limits on size and time.

    Undeclared bytes are charged as they arrive. Bodies with a `large` limit are not charged, because their
    routes spool them to disk.
    """

    def __init__(self, receive: Receive, admitted: AdmittedRequest, settings: HttpSettings, large: int | None) -> None:
        self.read, self.admitted, self.settings, self.large = receive, admitted, settings, large
        self.received, self.whole, self.begun = 0, False, 0.0

    async def receive(self) -> Message:
        if self.whole:  # the next message will report a disconnect
            return await self.read()
        self.begun = self.begun or asyncio.get_running_loop().time()
        time = self.settings.body_time + (self.received / _LARGE_PACE if self.large is not None else 0)
        try:
            async with asyncio.timeout_at(self.begun + time):
                message = await self.read()
        except TimeoutError:
            raise Refused(f"the body did not arrive within {time:g} s", status=408, code="too_slow") from None
        self.received += len(message.get("body", b""))
        most = self.settings.max_body if self.large is None else self.large
        if self.received > most:
            raise _too_large(most)
        if self.large is None and (more := self.received - self.admitted.reserved["bodies"]) > 0:
            self.admitted.reserve("bodies", more)
        self.whole = not message.get("more_body", False)
        return message


def _surface(surfaces: Mapping[str, str], request: HttpRequest) -> str:
    """Return the API whose error format a request uses. `surfaces`: path -> API."""
    path = request.scope["path"]
    if _is_anthropic(request):
        return "Anthropic"
    other = "Ollama" if path.startswith("/api/") and not path.startswith("/api/v1/") else "OpenAI"
    return surfaces.get("/v1/loras" if path.startswith("/v1/loras/") else path, other)


def _is_anthropic(request: HttpRequest) -> bool:
    """Return whether a request is for Anthropic's API. Its clients read models from the path that OpenAI's use."""
    path: str = request.scope["path"]
    if path.startswith("/v1/models"):
        return "anthropic-version" in request.headers
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def _too_large(most: int) -> Refused:
    return Refused(f"the body has more than {most:,} bytes", status=413, code="too_large")


# -- errors ------------------------------------------------------------------------------------------------------------

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 400: "invalid_request"}


def _add_error_handlers(app: FastAPI, surfaces: dict[str, str]) -> None:
    def respond(request: HttpRequest, error: Refused) -> Response:
        service_of(request).metrics.refused.labels(error.code).inc()
        return answer_error(error, _surface(surfaces, request), request.scope["veneer.id"])

    @app.exception_handler(Refused)
    @app.exception_handler(Exception)
    async def refused(request: HttpRequest, error: Exception) -> Response:
        return respond(request, as_refused(error))

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: HttpRequest, error: Any) -> Response:
        return respond(request, body_error(error.errors(), keys_of_bodies(request.scope.get("endpoint"))))

    @app.exception_handler(HTTPException)
    async def http(request: HttpRequest, error: Any) -> Response:
        path = request.scope["path"][:200]
        message = f"no route {request.method} {path}" if error.status_code == 404 else error.detail
        code = _HTTP_CODES.get(error.status_code, "invalid_request")
        answer = respond(request, Refused(str(message), status=error.status_code, code=code))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientLeft)
    @app.exception_handler(ClientDisconnect)  # before the whole body has arrived
    async def client_left(request: HttpRequest, error: Any) -> Response:
        return Response(status_code=499)


# -- health and metrics ------------------------------------------------------------------------------------------------


def _health() -> APIRouter:
    router = APIRouter(tags=["service"], route_class=BodyRoute)
    public = [needs("public")]

    @router.get(
        "/health",
        dependencies=public,
        summary="Check the engine; 503 if the engine is stuck, has ended, or fails every request.",
    )
    @router.get("/ping", dependencies=public, include_in_schema=False)
    async def health(request: HttpRequest) -> Response:
        wrong = service_of(request).engine.problem()
        return Json({"status": "failing", "reason": wrong} if wrong else {"status": "ok"}, 503 if wrong else 200)

    @router.get("/version", dependencies=public, summary="Get veneer's version.", tags=["vLLM"])
    async def version() -> Response:
        return Json({"version": __version__})

    @router.get(
        "/ready",
        dependencies=public,
        summary="Check whether the server accepts requests; 503 while loading or draining.",
    )
    async def ready(request: HttpRequest) -> Response:
        service = service_of(request)
        if service.phase == "ready" and (wrong := service.engine.problem() or service.engine.trouble()):
            return Json({"status": "failing", "reason": wrong}, status_code=503)
        return Json({"status": service.phase}, status_code=200 if service.phase == "ready" else 503)

    @router.get(
        "/metrics",
        dependencies=[needs("metrics")],
        summary="Get Prometheus metrics; needs the admin key on a server with tenants.",
    )
    async def metrics(request: HttpRequest) -> Response:
        service = service_of(request)
        text = service.metrics.text(await service.engine.metrics())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
