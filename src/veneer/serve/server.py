"""A server's lifecycle: check, listen, build, drain, end.

checked     invalid settings end the process here (checks.py)
listening   clients can connect, and wait a few seconds
built       catalog, tenants, library: /health answers, the Studio's pages work, /ready returns 503 loading
loaded      base, engine, preloaded adapters; then /ready returns 200
SIGTERM     /ready returns 503 draining, new work is rejected (503, Retry-After), running requests finish
ended       once running requests have finished, or after `drain` seconds; a second signal ends it at once
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import uvicorn

from veneer.errors import ResourceError
from veneer.files.rights import forbid_inspection
from veneer.serve.checks import check_settings
from veneer.serve.engines import with_engine
from veneer.serve.http.connection import protocols_of, raise_file_limit
from veneer.serve.http.telemetry import add_ids
from veneer.serve.settings import ServeSettings

if TYPE_CHECKING:
    from veneer.serve.build import Application, Extend

log = logging.getLogger("veneer.serve")

_BACKLOG = 1024
_SWITCH = 0.001
"""Interpreter switch interval in seconds.

An engine step releases and reacquires the GIL at each operation. At the default of 5 ms, one busy Python
thread would delay a step by a second.
"""


@dataclass(frozen=True)
class WebPage:
    """An extension's web page. With a page, the server accepts WebSockets.

    `path`: the page's path. `show`: called in a thread, with the page's URL, once the server answers.
    """

    path: str
    show: Callable[[str], object]


class _Server(uvicorn.Server):
    """A uvicorn server that loads the base in the background, and drains on a signal.

    The server ends at once on a second signal, and if loading fails. `show`: called once the server answers.
    """

    def __init__(self, config: uvicorn.Config, built: Application, drain: float, show: Callable[[], object]) -> None:
        super().__init__(config)
        self.built, self.drain, self.show = built, drain, show
        self.failure: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loading: asyncio.Task[None] | None = None
        self._drainer: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await self.built.start()
        await super().startup(sockets)
        self._loading = asyncio.create_task(self._load())
        await asyncio.to_thread(self.show)

    async def shutdown(self, sockets: Any = None) -> None:
        await super().shutdown(sockets)
        assert self._loading is not None
        self._loading.cancel()
        await asyncio.gather(self._loading, return_exceptions=True)
        await self.built.stop()

    async def _load(self) -> None:
        try:
            await self.built.load()
        except Exception as error:
            self.failure = error
        finally:
            gc.freeze()  # modules and the base live as long as the process
            gc.enable()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.failure is not None

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._drainer is not None or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._drainer is None:
            self._drainer = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        service = self.built.service
        log.info("draining: %d requests can run for up to %g s more", service.inside, self.drain)
        service.phase = "draining"
        end = asyncio.get_running_loop().time() + self.drain
        while service.inside and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        self.should_exit = True


def serve(
    settings: ServeSettings,
    log: Callable[[str], None],
    make_app: Callable[[], Application] | None = None,
    extends: Sequence[Extend] = (),
    page: WebPage | None = None,
) -> None:
    """Serve until a signal arrives.

    `extends`: functions that create extensions, such as the Studio. `page`: the web page, if an extension has
    one. Raises errors in the settings before the server listens, and build errors afterwards.
    """
    forbid_inspection()
    settings = with_engine(settings, log) if make_app is None else settings
    opened = check_settings(settings, page=page is not None) if make_app is None else None

    def build() -> Application:
        from veneer.serve.build import build  # imports torch, so only after the settings are checked

        return build(settings, log, opened, extends)

    try:
        _serve(settings, log, make_app or build, page)
    finally:
        if opened is not None:
            opened.close()


def _serve(
    settings: ServeSettings, log: Callable[[str], None], make_app: Callable[[], Application], page: WebPage | None
) -> None:
    if not logging.getLogger().handlers:  # otherwise the embedding process has configured logging
        handler = logging.StreamHandler()
        handler.addFilter(add_ids)
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s%(ids)s", handlers=[handler])
    logging.getLogger("veneer").setLevel(logging.INFO)
    raise_file_limit(settings.http.connections)
    sys.setswitchinterval(_SWITCH)
    sockets = listen(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{sockets[0].getsockname()[1]}"
    log(f"listening on {address}; /ready returns 200 once the base is loaded")

    def show() -> None:
        if page is not None:
            log(f"the page: {address}{page.path}/")
            page.show(f"{address}{page.path}/")

    gc.disable()  # until the base is loaded; collections would take a sixth of the time
    try:
        built = make_app()
        http, ws = protocols_of(settings.http, sockets=page is not None)
        config = uvicorn.Config(
            built.app,
            host=settings.host,
            port=settings.port,
            log_level="warning",
            ws=ws,
            lifespan="off",
            timeout_graceful_shutdown=2,
            timeout_keep_alive=ceil(settings.http.idle),
            http=http,
            backlog=_BACKLOG,
            use_colors=False,
        )
        server = _Server(config, built, settings.drain, show)
        server.run(sockets)
    finally:
        gc.enable()  # the server can end before it loads the base
        for each in sockets:
            each.close()
    if server.failure is not None:
        raise server.failure


def listen(host: str, port: int) -> list[socket.socket]:
    """Return a listening socket for each address of `host`.

    Called before anything is loaded; clients can connect at once, and wait until the server answers. Raises
    ResourceError.
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
            sockets[-1].listen(_BACKLOG)
    except (OSError, UnicodeError) as error:
        for each in sockets:
            each.close()
        why = getattr(error, "strerror", None) or str(error)
        message = f"cannot listen at {host}:{port}: {why}"
        fix = "use another port or address, or stop the process that uses this one"
        raise ResourceError(message, where="--host, --port", fix=fix) from error
    return sockets
