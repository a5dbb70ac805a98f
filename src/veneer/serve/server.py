"""A whole server from its settings: what is built, in which order it opens, and how it ends.

    listening   /health answers, /ready says 503 loading, everything else is turned away
    built       base, engine, catalog, tenants, adapters to preload; then /ready says 200
    SIGTERM     /ready says 503 draining, new work is turned away (503, Retry-After), running answers end
    ended       when they have, or after `drain` seconds; a second signal ends at once

`build` is the one place that knows which parts there are.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import re
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import uvicorn
from starlette.types import Receive, Scope, Send

from veneer.errors import ConfigError, ResourceError
from veneer.serve.access import Caller, OpenAccess, Tenancy
from veneer.serve.http.connection import connection_of, many_files
from veneer.serve.http.errors import Json, answer_error
from veneer.serve.http.house import House, HttpSettings, ShadowAnswer
from veneer.serve.request import EngineStats, Event, Refused, Request
from veneer.serve.tenancy.keys import admin_hash, default_database, same

if TYPE_CHECKING:
    from veneer.library.library import Library
    from veneer.serve.names.catalog import LocalCatalog
    from veneer.serve.pictures.engine import PictureEngine

__all__ = [
    "Built",
    "Front",
    "Keys",
    "Preload",
    "ServeSettings",
    "build",
    "bytes_of",
    "keys_of",
    "listen",
    "parse_preload",
    "serve",
]

log = logging.getLogger("veneer.serve")

SWITCH = 0.001
"""Seconds after which a thread that computes in Python gives the interpreter to one that waits for it. A step gives it
up and takes it back at each of its operations; at the usual 5 ms it would wait for a second beside one such thread."""


@dataclass(frozen=True)
class Preload:
    """An adapter to load before the server is ready. `strength`: what requests that name no adapter get of it."""

    name: str
    reference: str
    strength: float | None = None


@dataclass(frozen=True)
class ServeSettings:
    """`rows`: requests at once; `cache_bytes`: of keys and values; `adapter_bytes`: of adapters in memory, which is the
    only limit to how many are loaded. `folders`: where load requests may name files. `ledger_…`: see
    `tenancy.tenants.LedgerSettings`. `tenants`: a database of tenants; without it `keys` are all the server's keys;
    without these it is the tenants.sqlite of the veneer home, if there is one, unless the server is to be `open`; and
    else nobody needs a key. `upstreams`: servers that do the work, with `upstream_key` as their bearer token; the base
    is then read for its names and its tokenizer alone, and of the mixes that clients make of strengths each tenant has
    at most `mixes` there, all together `mix_bytes` on disk. `drain`: seconds."""

    base: str
    host: str = "127.0.0.1"
    port: int = 8000
    library: str | None = None
    preload: tuple[Preload, ...] = ()
    pin: bool = False
    folders: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    admin_key: str | None = None
    tenants: str | None = None
    open: bool = False
    ledger_days: float = 400.0
    ledger_room: int = 32 << 20
    ledger_folder: str | None = None
    ledger_synced: bool = False
    rows: int = 32
    cache_bytes: int = 1 << 30
    adapter_bytes: int = 1 << 30
    weights: Literal["dense", "int8", "int4"] = "dense"
    batch_invariant: bool = False
    dtype: str = "auto"
    device: str = "auto"
    upstreams: tuple[str, ...] = ()
    upstream_key: str | None = None
    mixes: int = 64
    mix_bytes: int = 16 << 30
    drain: float = 30.0
    http: HttpSettings = field(default_factory=HttpSettings)


async def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Built:
    """An application and what goes with it: `start` on the server's loop before it is ready, `stop` after the drain."""

    app: Any
    start: Callable[[], Awaitable[Any]] = _nothing
    stop: Callable[[], Awaitable[Any]] = _nothing

    @property
    def house(self) -> House:
        house: House = self.app.state.house
        return house


_PRELOAD = re.compile(r"(?P<name>[^=]+?)(=(?P<reference>.+?))?(:(?P<strength>[-+]?[0-9.]+(e[-+]?[0-9]+)?))?", re.I)


def parse_preload(text: str) -> Preload:
    """NAME[=REFERENCE][:STRENGTH]. Raises ConfigError."""
    found = _PRELOAD.fullmatch(text)
    if not found:
        raise ConfigError(f"{text!r} names no adapter", where="--adapter", fix="NAME, NAME=REFERENCE or NAME:0.8")
    name, strength = found["name"], found["strength"]
    try:
        return Preload(name, found["reference"] or name, None if strength is None else float(strength))
    except ValueError:
        raise ConfigError(f"{strength!r} is no strength", where=f"--adapter {text}", fix="a number, as 0.8") from None


# -- keys --------------------------------------------------------------------------------------------------------------


class Keys(OpenAccess):
    """Some keys that see everything, and one, given as itself or by its hash, that may also change the server; no
    limits, no ledger."""

    def __init__(self, keys: Sequence[str], admin_key: str | None = None) -> None:
        self.keys = [key.encode() for key in keys]
        self.admin_hash = admin_hash(admin_key) if admin_key else None

    async def caller(self, key: str | None, user: str | None = None) -> Caller:
        given = (key or "").encode("utf-8", "replace")
        admin = self.admin_hash is not None and same(key or "", self.admin_hash)
        known = [hmac.compare_digest(given, each) for each in self.keys]
        if not key or not (admin or any(known)):
            raise Refused("no valid API key", status=401, code="unauthorized", fix="Authorization: Bearer KEY")
        return Caller(user=user, admin=admin)


# -- building ----------------------------------------------------------------------------------------------------------


def build(settings: ServeSettings, say: Callable[[str], None]) -> Built:
    """Everything that `settings` ask for. Blocks while the base loads."""
    from veneer.models.sources import find_base, is_image_base

    if settings.upstreams:
        _computed_here(settings, "the servers of --upstream compute")
        return _build_fleet(settings, say)
    if is_image_base(find_base(settings.base, say=say)):
        _computed_here(settings, "this base draws pictures")
        return _build_pictures(settings, say)
    return _build_text(settings, say)


def _computed_here(settings: ServeSettings, why: str) -> None:
    """Raises ConfigError for what only the engine of texts can keep to."""
    asked = {"--weights": settings.weights != "dense", "--batch-invariant": settings.batch_invariant}
    for option in [option for option, given in asked.items() if given]:
        raise ConfigError(f"{option} is for texts that are computed here, and {why}", where=option, fix="leave it out")


def _build_text(settings: ServeSettings, say: Callable[[str], None]) -> Built:
    from veneer.library.library import open_library
    from veneer.models.text.base import load_text
    from veneer.serve.engine.engine import EngineSettings, TextEngine
    from veneer.serve.http.app import create_app
    from veneer.serve.names.catalog import LocalCatalog
    from veneer.serve.names.shelf import Shelf

    tenancy, routers, rollouts = _tenancy(settings, say)
    base = load_text(settings.base, dtype=settings.dtype, device=settings.device, say=say)
    say(f"{base.name} in {str(base.dtype).removeprefix('torch.')} on {base.device}: {base.dtype_reason}")
    library = open_library(settings.library)
    sizes = EngineSettings(
        rows=settings.rows,
        cache_bytes=settings.cache_bytes,
        adapter_bytes=settings.adapter_bytes,
        weights=settings.weights,
        batch_invariant=settings.batch_invariant,
        queue=settings.http.queue,
    )
    shelf = Shelf(base, library=library, folders=settings.folders)
    engine = TextEngine(base, shelf.read, sizes)
    say(f"forward: {engine.runner.how}{f' ({engine.runner.why})' if engine.runner.why else ''}")
    catalog = LocalCatalog(shelf, engine.problems, engine.residents, rollouts=rollouts)
    engine.start()
    text = replace(base, context=engine.context)  # the engine's cache may hold less than the base could take
    app = create_app(engine, catalog, tenancy, text, settings=settings.http, **_operator(tenancy, routers))
    _preload(settings, app.state.house, say)

    async def stop() -> None:
        await asyncio.to_thread(engine.stop)
        await asyncio.to_thread(_close, catalog, library, tenancy)

    return Built(app, stop=stop)


class _NoText:
    """The text engine of a server that draws: text is refused, by name; its counts are those of the one that draws."""

    def __init__(self, pictures: PictureEngine) -> None:
        self.pictures = pictures

    async def events(self, request: Request) -> AsyncIterator[Event]:
        raise Refused(
            "this server draws pictures", status=400, code="invalid_request", fix="ask /v1/images/generations"
        )
        yield  # an iterator, as the protocol has it

    def problem(self) -> str:
        return self.pictures.problem()

    def stats(self) -> EngineStats:
        s, memory = self.pictures.stats(), self.pictures.residents.stats()
        return EngineStats(
            s.running, s.waiting, 0.0, 0, 0, 0, s.steps, 0, 0, memory.adapters, memory.bytes, memory.evictions
        )


@dataclass(frozen=True)
class _Caption:
    """What text surfaces ask of a base, answered by the first text encoder of one that draws."""

    name: str
    tokenizer: Any
    context: int
    has_chat_template: bool = False


def _build_pictures(settings: ServeSettings, say: Callable[[str], None]) -> Built:
    from veneer.library.library import open_library
    from veneer.models.image.base import load_image, readers
    from veneer.serve.http.app import create_app
    from veneer.serve.http.surfaces.images import router
    from veneer.serve.names.catalog import LocalCatalog
    from veneer.serve.names.shelf import Shelf
    from veneer.serve.pictures.engine import PictureEngine

    tenancy, routers, rollouts = _tenancy(settings, say)
    base = load_image(settings.base, dtype=settings.dtype, device=settings.device, say=say)
    library = open_library(settings.library)
    shelf = Shelf(base, library=library, folders=settings.folders)
    engine = PictureEngine(base, shelf.read, max_batch=min(settings.rows, 8), adapter_bytes=settings.adapter_bytes)
    catalog = LocalCatalog(shelf, lambda adapter: [], engine.residents, rollouts=rollouts)
    (tokenizer, limit), *_ = readers(base)
    caption = _Caption(base.name, getattr(tokenizer, "tokenizer", tokenizer), limit)
    limits = replace(settings.http, max_body=max(settings.http.max_body, 64 << 20))
    images = router(engine, catalog, tenancy, max_body=limits.max_body, stall=limits.stall)
    app = create_app(_NoText(engine), catalog, tenancy, caption, images, limits, **_operator(tenancy, routers))
    _preload(settings, app.state.house, say)

    async def stop() -> None:
        await asyncio.to_thread(engine.close)
        await asyncio.to_thread(_close, catalog, library, tenancy)

    return Built(app, stop=stop)


def _build_fleet(settings: ServeSettings, say: Callable[[str], None]) -> Built:
    """The same front door before servers that run elsewhere. They read the library's files by the same paths."""
    from veneer.library.library import open_library
    from veneer.models.home import veneer_home
    from veneer.models.text.base import text_without_weights
    from veneer.serve.fleet.fleet import Fleet, FleetAdapters
    from veneer.serve.fleet.servable import problems
    from veneer.serve.http.app import create_app
    from veneer.serve.names.catalog import LocalCatalog
    from veneer.serve.names.shelf import Shelf

    if settings.folders:
        raise ConfigError("replicas read the library, not folders", where="--allow-folder", fix="veneer library add")
    tenancy, routers, rollouts = _tenancy(settings, say)
    base, library = text_without_weights(settings.base, say=say), open_library(settings.library)
    shelf = Shelf(base, library=library)
    fleet = Fleet(
        settings.upstreams, files=shelf.files, cache=veneer_home() / "cache" / "served",
        key=settings.upstream_key,
        mixes=settings.mixes, cache_bytes=settings.mix_bytes,
        decode=lambda ids: str(base.tokenizer.decode(ids, skip_special_tokens=False)),
    )  # fmt: skip
    catalog = LocalCatalog(shelf, problems, FleetAdapters(fleet), rollouts=rollouts)
    app = create_app(fleet, catalog, tenancy, base, settings=settings.http, **_operator(tenancy, routers))

    async def start() -> None:
        await fleet.__aenter__()
        await asyncio.to_thread(_preload, settings, app.state.house, say)

    async def stop() -> None:
        await fleet.__aexit__(None, None, None)
        await asyncio.to_thread(_close, catalog, library, tenancy)

    return Built(app, start, stop)


def _operator(tenancy: Tenancy, routers: list[Any]) -> dict[str, Any]:
    """What an application with tenants has besides: its operator's routes, the log of shadows, the audit log."""
    more: dict[str, Any] = {"routers": routers, "unguarded": ("/admin",) if routers else ()}
    note, rollouts = getattr(tenancy, "note", None), getattr(tenancy, "rollouts", None)
    if note is not None and rollouts is not None:
        more["on_change"] = lambda what, name, after: note("operator", what, name, None, after)

        def keep(answer: ShadowAnswer) -> None:
            if answer.error:  # nothing was compared: the log of shadows has that it failed, this one why
                log.warning(
                    "the shadow %s of %s failed (%s): %s", answer.shadow, answer.name, answer.request, answer.error
                )
            sides = [(answer.target, answer.sent, answer.sent_usage), (answer.shadow, answer.answer, answer.usage)]
            target, shadow = ((name, text, u.completion, u.prefill + u.decode) for name, text, u in sides)
            rollouts.log_shadow(
                answer.name, request=answer.request, tenant=answer.tenant, target=target, shadow=shadow,
                distance=answer.distance, failed=bool(answer.error),
            )  # fmt: skip

        more["on_shadow"] = keep
    return more


def _close(catalog: LocalCatalog, library: Library, tenancy: Tenancy) -> None:
    catalog.close()
    library.close()
    if (close := getattr(tenancy, "close", None)) is not None:
        close()


def _tenancy(settings: ServeSettings, say: Callable[[str], None]) -> tuple[Tenancy, list[Any], Any]:
    """(tenancy, routers for its operator, its routes)."""
    place = settings.tenants
    if place is None and not settings.keys and not settings.open:
        place = default_database() if Path(default_database()).is_file() else None
        if place is not None:
            say(f"tenants: {place}, so requests need a key; --open serves whoever asks")
    if place is None:
        if not settings.keys and (settings.open or settings.admin_key is None):
            if settings.host not in ("127.0.0.1", "localhost", "::1"):
                at = f"{settings.host}:{settings.port}"
                say(f"note: whoever reaches {at} may ask, and load adapters; --api-keys or --tenants closes that")
            return OpenAccess(), [], None
        return Keys(settings.keys, settings.admin_key), [], None
    from veneer.serve.tenancy.admin import admin_router
    from veneer.serve.tenancy.tenants import LedgerSettings, Tenants

    folder = None if settings.ledger_folder is None else Path(settings.ledger_folder)
    kept = LedgerSettings(
        days=settings.ledger_days, folder=folder, room=settings.ledger_room, synced=settings.ledger_synced
    )
    tenants = Tenants(place, admin_key=settings.admin_key, ledger=kept)
    if not tenants.store.settings.tenants:
        say("there are no tenants yet, so nobody has a key: veneer tenant add NAME, then veneer tenant key add NAME")
    return tenants, [admin_router(tenants)] if settings.admin_key else [], tenants.rollouts


def _preload(settings: ServeSettings, house: House, say: Callable[[str], None]) -> None:
    for each in settings.preload:
        card = house.catalog.load(each.name, each.reference, pinned=settings.pin)
        say(f"adapter {card.id} from {card.root}")
        if each.strength is not None:
            house.default[card.id] = house.loras.scales[card.id] = each.strength
            say(f"requests that name no adapter get {card.id} at strength {each.strength:g}")


# -- running -----------------------------------------------------------------------------------------------------------


class Front:
    """The ASGI application that listens from the first moment: until the real one is built it says so."""

    def __init__(self, make: Callable[[], Built], failed: Callable[[BaseException], None]) -> None:
        self.make, self.failed = make, failed
        self.built: Built | None = None
        self.draining = False
        self._building: asyncio.Task[None] | None = None

    @property
    def inside(self) -> int:
        return self.built.house.inside if self.built is not None else 0

    def drain(self) -> None:
        self.draining = True
        if self.built is not None:
            self.built.house.phase = "draining"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self.built is not None:
            await self.built.app(scope, receive, send)
        elif scope["type"] == "http":
            phase = "draining" if self.draining else "loading"
            if scope["path"] in ("/health", "/ping"):
                await Json({"status": "ok"})(scope, receive, send)
            elif scope["path"] == "/ready":
                await Json({"status": phase}, status_code=503)(scope, receive, send)
            else:
                error = Refused(f"the server is {phase}", status=503, code="shutting_down", retry_after=5.0)
                await answer_error(error, "OpenAI")(scope, receive, send)

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
            built = await asyncio.to_thread(self.make)
            await built.start()
        except Exception as error:
            self.failed(error)
            return
        if self.draining:
            built.house.phase = "draining"
        self.built = built


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, drain: float) -> None:
        super().__init__(config)
        self.drain = drain
        self.front: Front | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drainer: asyncio.Task[None] | None = None

    async def serve(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._drainer is not None or self._loop is None or self.front is None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._drainer is None:
            self._drainer = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        assert self.front is not None
        log.info("draining: %d requests go on for up to %g s", self.front.inside, self.drain)
        self.front.drain()
        end = asyncio.get_running_loop().time() + self.drain
        while self.front.inside and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        self.should_exit = True


def serve(settings: ServeSettings, say: Callable[[str], None], make: Callable[[], Built] | None = None) -> None:
    """Serve until a signal says to stop. Raises what kept the server from being built."""
    errors: list[BaseException] = []

    def failed(error: BaseException) -> None:
        errors.append(error)
        server.should_exit = True

    front = Front(make or (lambda: build(settings, say)), failed)
    config = uvicorn.Config(
        front, host=settings.host, port=settings.port, log_level="warning", ws="none", lifespan="on",
        timeout_graceful_shutdown=2, timeout_keep_alive=ceil(settings.http.idle), http=connection_of(settings.http),
        backlog=1024, use_colors=False,
    )  # fmt: skip
    if not logging.getLogger().handlers:  # else the process that serves has its own way to log
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("veneer").setLevel(logging.INFO)
    server = _Server(config, settings.drain)
    server.front = front
    many_files(settings.http.connections)
    sys.setswitchinterval(SWITCH)
    sockets = listen(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    say(f"listening on http://{host}:{sockets[0].getsockname()[1]}; /ready says when the base is loaded")
    server.run(sockets)
    if errors:
        raise errors[0]


def listen(host: str, port: int) -> list[socket.socket]:
    """A bound socket for each address that `host` stands for, before anything is loaded. Raises ResourceError."""
    made: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            made.append(socket.socket(family, kind, protocol))
            if os.name == "posix":
                made[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made[-1].bind(address)
    except (OSError, UnicodeError) as error:
        for each in made:
            each.close()
        why = getattr(error, "strerror", None) or str(error)
        raise ResourceError(
            f"cannot listen at {host}:{port}: {why}",
            where="--host, --port",
            fix="another port or address, or end what has it",
        ) from error
    return made


def bytes_of(text: str, where: str) -> int:
    """A size as people write it: 512M, 2G, 1.5GB. Raises ConfigError."""
    found = re.fullmatch(r"([0-9.]+)\s*([kmgt]?)i?b?", text.strip(), re.I)
    try:
        assert found is not None
        return int(float(found[1]) * 1024 ** " kmgt".index(found[2].lower() or " "))
    except (AssertionError, ValueError):
        raise ConfigError(f"{text!r} is no size", where=where, fix="as 512M or 2G") from None


def keys_of(file: Path) -> list[str]:
    """Keys of a file, a line each; lines that begin with # are comments. Raises ConfigError."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the keys: {error}", where=str(file)) from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or min(map(len, keys)) < 16:
        raise ConfigError("a key has fewer than 16 characters, or there is none", where=str(file))
    return keys
