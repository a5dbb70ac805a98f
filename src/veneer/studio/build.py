"""The server extension that adds the Studio's pages under /studio.

Only this file mounts and starts NiceGUI.

Usage: `serve(settings, say, extends=[studio_of], page=WebPage(ROOT, …))`; see `serve.build.Extension`.
NiceGUI has one application per process, so a process can have only one Studio."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from veneer.errors import ConfigError, MissingExtraError
from veneer.studio.access import ROOT, StudioMiddleware, head_html, key_routes

if TYPE_CHECKING:
    from fastapi import FastAPI

    from veneer.library.library import Library
    from veneer.serve.build import Extension
    from veneer.serve.http.service import Service
    from veneer.studio.page import Studio

_log = logging.getLogger("veneer.studio")

_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><path d="M4 7h24v4H4z" fill="#b4612c"/>'
    '<path d="M4 14h24v11H4z" fill="#8d8379"/></svg>'
)
_RECONNECT = 60.0
"""Seconds within which a disconnected page can reconnect, for example after a laptop was asleep."""
_mounted = False


def check_studio() -> None:
    """Raise MissingExtraError unless NiceGUI is installed."""
    if find_spec("nicegui") is None:
        raise MissingExtraError("the Studio needs NiceGUI", extra="studio")


def studio_of(service: Service, library: Library, *, trains: bool = False) -> Extension:
    """Return the extension that adds the Studio to a server.

    trains: whether the server also runs training jobs."""
    from veneer.jobs.files import open_files
    from veneer.jobs.http.tuning import TuningQueue, sample_routes
    from veneer.jobs.store import JobStore
    from veneer.serve.build import Extension
    from veneer.studio.adapter import adapter_view
    from veneer.studio.compare import compare_view
    from veneer.studio.doctor import doctor_view
    from veneer.studio.library import library_view
    from veneer.studio.live import live_view
    from veneer.studio.objectives import objectives_view
    from veneer.studio.page import Studio, StudioView
    from veneer.studio.run import run_view
    from veneer.studio.train import train_view

    views = (
        StudioView("", "Library", "l", library_view, "read"),
        StudioView("adapter", "Adapter", "", adapter_view, "read", under=""),
        StudioView("compare", "Compare", "c", compare_view, "infer", uses_base=True),
        StudioView("train", "Train", "t", train_view, "train"),
        StudioView("run", "Run", "", run_view, "train", under="train"),
        StudioView("live", "Live", "v", live_view, "operate", uses_base=True),
        StudioView("objectives", "Objectives", "o", objectives_view, "read"),
        StudioView("doctor", "Doctor", "d", doctor_view, "read"),
    )
    jobs = JobStore(library)
    studio = Studio(service, library, jobs, views, trains)
    if trains:
        studio.queue = TuningQueue(jobs, open_files(library, quotas=service.quotas), studio.tenants)
    lifespan: list[AbstractAsyncContextManager[Any]] = []

    def mount(app: FastAPI) -> None:
        _mount(app, studio)
        app.add_middleware(StudioMiddleware, tenancy=service.tenancy, settings=service.settings)
        lifespan.append(app.router.lifespan_context(app))

    async def start() -> None:
        with warnings.catch_warnings():  # NiceGUI inspects all objects in memory, which triggers a torch warning
            warnings.simplefilter("ignore", FutureWarning)
            await lifespan[0].__aenter__()

    async def stop() -> None:
        await lifespan[0].__aexit__(None, None, None)

    # If the server trains, the training extension adds these routes.
    sample_images = [] if trains else [sample_routes(jobs)]
    routers = [key_routes(service.tenancy), *sample_images]
    return Extension(routers, unguarded=(ROOT,), start=start, stop=stop, mount=mount)


def _mount(app: FastAPI, studio: Studio) -> None:
    """Mount the Studio. Raises ConfigError for a second Studio in this process."""
    global _mounted
    if _mounted:
        raise ConfigError("this process has a Studio already", fix="one server per process")
    _mounted = True
    from nicegui import app as nicegui_app
    from nicegui import ui

    from veneer.studio.page import Frame, parse_query

    nicegui_app.config.socket_io_js_transports = ["websocket"]
    nicegui_app.config.quasar_config["loadingBar"]["skipHijack"] = True  # do not show a loading bar for each upload
    ui.add_head_html(head_html(), shared=True)
    _guard_messages()

    @ui.page("/{path:path}", title="veneer", response_timeout=60)
    async def page(request: HttpRequest, path: str) -> Response | None:
        visitor = request.scope.get("veneer.visitor")
        if visitor is None:  # the request is for an asset that does not exist
            return PlainTextResponse("not found", 404)
        address = f"{request.url.scheme}://{request.url.netloc}"
        frame = Frame(studio, visitor, request.scope.get("root_path", ""), address)
        query = parse_query(request.query_params.multi_items())
        frame.client.status_code = await frame.visit(path.strip("/"), query)
        return None

    ui.run_with(
        app,
        mount_path=ROOT,
        title="veneer",
        favicon=_ICON,
        dark=None,
        language="en-US",
        tailwind=False,
        binding_refresh_interval=None,
        reconnect_timeout=_RECONNECT,
        gzip_middleware_factory=None,
        show_welcome_message=False,
    )


def _guard_messages() -> None:
    """Stop browsers from filling the server's log.

    Errors from malformed messages are logged at debug level only, and browsers' own log lines are dropped."""
    from nicegui import core

    def guard(handler: Callable[..., Any]) -> Callable[..., Any]:
        async def handle(*args: Any) -> Any:
            try:
                answer = handler(*args)
                return await answer if inspect.isawaitable(answer) else answer
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                _log.debug("a page sent a malformed message: %r", error)
                return None

        return handle

    handlers = core.sio.handlers["/"]
    for name in ("handshake", "event", "javascript_response", "ack"):
        handlers[name] = guard(handlers[name])
    handlers["log"] = guard(lambda *_: None)
