"""A server's lifecycle: check, listen, build, drain, end.

checked     invalid settings end it here (checks.py)
listening   /health answers, /ready returns 503 loading, everything else is rejected
built       catalog, tenants, library: the Studio's pages work, /ready still returns 503 loading
loaded      base, engine, preloaded adapters; then /ready returns 200
SIGTERM     /ready returns 503 draining, new work is rejected (503, Retry-After), running answers finish
ended       once they have, or after `drain` seconds; a second signal ends at once
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.responses import HTMLResponse
from starlette.types import Receive, Scope, Send

from veneer.errors import ResourceError
from veneer.files.rights import forbid_inspection
from veneer.serve.checks import check_settings
from veneer.serve.http.connection import many_files, protocols_of
from veneer.serve.http.errors import Json, answer_error
from veneer.serve.request import not_ready
from veneer.serve.settings import ServeSettings

if TYPE_CHECKING:
    from veneer.serve.build import Application, Extend

log = logging.getLogger("veneer.serve")

_SWITCH = 0.001
"""Interpreter switch interval in seconds.

An engine step releases and reacquires the GIL at each operation; at the default 5 ms, one busy Python thread
would delay a step by a second.
"""


_WAITING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="1">
<meta name="viewport" content="width=device-width"><title>veneer</title>
<style>:root {{ color-scheme: light dark }} body {{ margin: 30vh auto; max-width: 30em; padding: 0 24px;
  font: 15px/1.55 system-ui, sans-serif; background: light-dark(#faf9f7, #16130f); color: light-dark(#211d19, #ece6df);
  overflow-wrap: anywhere }} p:not([role]) {{ color: light-dark(#6b625a, #a89d92) }}
</style><p role="status">{what}</p></html>
"""
"""Shown to people until the page is available; it reloads itself. {{ and }} are literal braces."""


@dataclass(frozen=True)
class WebPage:
    """An extension's web page; its server accepts WebSockets.

    `path`: where it is. `show`: called with its address as soon as the server listens.
    """

    path: str
    show: Callable[[str], object]


class _Front:
    """The ASGI application that listens from the start.

    It answers until the real application is built. `page`: a web page for people, or None.
    """

    def __init__(self, make_app: Callable[[], Application], page: WebPage | None = None) -> None:
        self.make_app, self.page = make_app, page
        self.built: Application | None = None
        self.failure: Exception | None = None
        self.draining = False
        self._building: asyncio.Task[None] | None = None

    @property
    def inside(self) -> int:
        return self.built.service.inside if self.built is not None else 0

    def drain(self) -> None:
        self.draining = True
        if self.built is not None:
            self.built.service.phase = "draining"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self.built is not None:
            await self.built.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1013})  # try again later
        elif scope["type"] == "http":
            phase = "draining" if self.draining else "loading"
            if scope["path"] in ("/health", "/ping"):
                await Json({"status": "ok"})(scope, receive, send)
            elif scope["path"] == "/ready":
                await Json({"status": phase}, status_code=503)(scope, receive, send)
            elif self.page and scope["method"] == "GET" and f"{scope['path']}/".startswith(f"{self.page.path}/"):
                text = _WAITING.format(what="veneer is ending." if self.draining else "veneer is starting …")
                await HTMLResponse(text, 503, {"retry-after": "1", "cache-control": "no-store"})(scope, receive, send)
            else:
                await answer_error(not_ready(phase), "OpenAI")(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._building = asyncio.create_task(self._build())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._building.cancel()
        await asyncio.gather(self._building, return_exceptions=True)
        if self.built is not None:
            await self.built.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _build(self) -> None:
        try:
            built = await asyncio.to_thread(self.make_app)
            await built.start()
            if self.draining:
                built.service.phase = "draining"
            self.built = built
            await built.load()
        except Exception as error:
            self.failure = error


class _Server(uvicorn.Server):
    """A uvicorn server that drains on the first signal.

    It ends on a second signal, or if the build fails.
    """

    def __init__(self, config: uvicorn.Config, front: _Front, drain: float) -> None:
        super().__init__(config)
        self.front, self.drain = front, drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drainer: asyncio.Task[None] | None = None

    async def serve(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.front.failure is not None

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._drainer is not None or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._drainer is None:
            self._drainer = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        log.info("draining: %d requests go on for up to %g s", self.front.inside, self.drain)
        self.front.drain()
        end = asyncio.get_running_loop().time() + self.drain
        while self.front.inside and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        self.should_exit = True


def serve(
    settings: ServeSettings,
    log: Callable[[str], None],
    make_app: Callable[[], Application] | None = None,
    extends: Sequence[Extend] = (),
    page: WebPage | None = None,
) -> None:
    """Serve until a signal.

    Raises errors in the settings before it listens, and build errors. `extends`: add parts of higher
    packages; `page`: the web page among them.
    """
    forbid_inspection()
    opened = check_settings(settings, page=page is not None) if make_app is None else None

    def build() -> Application:
        from veneer.serve.build import build  # late: the server listens before torch is imported

        return build(settings, log, opened, extends)

    try:
        _serve(settings, log, make_app or build, page)
    finally:
        if opened is not None:
            opened.close()


def _serve(
    settings: ServeSettings, log: Callable[[str], None], make_app: Callable[[], Application], page: WebPage | None
) -> None:
    front = _Front(make_app, page)
    http, ws = protocols_of(settings.http, sockets=page is not None)
    config = uvicorn.Config(
        front,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        ws=ws,
        lifespan="on",
        timeout_graceful_shutdown=2,
        timeout_keep_alive=ceil(settings.http.idle),
        http=http,
        backlog=1024,
        use_colors=False,
    )
    if not logging.getLogger().handlers:  # else the embedding process has configured logging
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("veneer").setLevel(logging.INFO)
    many_files(settings.http.connections)
    sys.setswitchinterval(_SWITCH)
    sockets = listen(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{sockets[0].getsockname()[1]}"
    log(f"listening on {address}; /ready returns 200 once the base is loaded")
    if page is not None:
        log(f"the page: {address}{page.path}/")
        page.show(f"{address}{page.path}/")
    _Server(config, front, settings.drain).run(sockets)
    if front.failure is not None:
        raise front.failure


def listen(host: str, port: int) -> list[socket.socket]:
    """A bound socket for each address of `host`, before anything is loaded.

    Raises ResourceError.
    """
    sockets: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            sockets.append(socket.socket(family, kind, protocol))
            if os.name == "posix":
                sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].bind(address)
    except (OSError, UnicodeError) as error:
        for each in sockets:
            each.close()
        why = getattr(error, "strerror", None) or str(error)
        raise ResourceError(
            f"cannot listen at {host}:{port}: {why}",
            where="--host, --port",
            fix="use another port or address, or stop the process that uses this one",
        ) from error
    return sockets
