"""Builds a server from its parts.

    build()    tenancy, sources, names, service -> application   fast; pages and the library then work
    load()     base -> engine -> service                         as slow as loading the base

This module decides which parts a server has, and in which order they start and stop.
"""

from __future__ import annotations

import asyncio
import gc
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI

from veneer.library.library import Library
from veneer.library.store import RemoteStore
from veneer.serve.access import KeyAccess, OpenAccess, Tenancy
from veneer.serve.checks import Opened, ServerKind, needs_no_key, open_stores, refuse_unused_options
from veneer.serve.http.app import add_images, create_app
from veneer.serve.http.prompts import TokenizedBase
from veneer.serve.http.service import Service
from veneer.serve.http.surfaces.adapters import adapter_bodies, adapter_routes
from veneer.serve.http.surfaces.feedback import feedback_routes
from veneer.serve.names.adapter_sources import AdapterSources, UnloadedBase
from veneer.serve.names.catalog import Catalog, NoAdapters
from veneer.serve.quota import FairThreads, Quotas
from veneer.serve.request import LoadingEngine
from veneer.serve.settings import ServeSettings
from veneer.serve.tenancy.admin import admin_router, tenant_router
from veneer.serve.tenancy.store import Store
from veneer.serve.tenancy.tenants import OpenTenants, Tenants

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase


async def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Application:
    """An ASGI application and its lifecycle functions.

    The functions run on the server's event loop. `start` runs before the first request. `load` makes the
    server ready while requests are already accepted. `stop` runs after draining.
    """

    app: FastAPI
    start: Callable[[], Awaitable[Any]] = _nothing
    load: Callable[[], Awaitable[Any]] = _nothing
    stop: Callable[[], Awaitable[Any]] = _nothing

    @property
    def service(self) -> Service:
        service: Service = self.app.state.service
        return service


@dataclass(frozen=True)
class Extension:
    """Parts that a higher package adds to a server.

    `routers`: routers behind the server's authentication. `large`, `unguarded`: see create_app. `start`,
    `stop`: see Application; called within the server's own `start` and `stop`. `mount`: adds parts that are
    not routers to the finished application.
    """

    routers: Sequence[APIRouter] = ()
    large: Mapping[str, int] = field(default_factory=dict)
    unguarded: Sequence[str] = ()
    start: Callable[[], Awaitable[Any]] = _nothing
    stop: Callable[[], Awaitable[Any]] = _nothing
    mount: Callable[[FastAPI], None] = lambda app: None


Extend = Callable[[Service, Library], Extension]
"""Creates an extension from a server's service and library, before the base is loaded."""


def build(
    settings: ServeSettings, log: Callable[[str], None], opened: Opened | None = None, extends: Sequence[Extend] = ()
) -> Application:
    """Build a server from `settings`, without loading the base.

    `settings`: must have passed checks.py. `opened`: the stores that the check opened. `extends`: functions
    that create extensions. Extensions start in this order and stop in reverse order. Raises ConfigError.
    """
    opened = opened or open_stores(settings)
    try:
        quotas, base = Quotas(settings.http.quotas), UnloadedBase(settings.base)
        tenancy = tenancy_of(settings, log, opened.store, quotas)
        sources = AdapterSources(base, library=opened.library, folders=settings.folders)
        catalog = Catalog(sources, lambda adapter: [], NoAdapters(), name=settings.served_name, routes=tenancy.routes)
        reader = TokenizedBase(base.name, None, 0)
        service = Service(
            LoadingEngine(), catalog, tenancy, reader, settings.http, "loading", loaded=False, shared_quotas=quotas
        )
        return _application(settings, service, opened.library, log, extends)
    except BaseException:
        opened.close()
        raise


def _load_base(settings: ServeSettings, service: Service, log: Callable[[str], None]) -> None:
    """Load the base into the service.

    Blocking. Raises loading errors, and ConfigError for options that do not apply to this kind of base."""
    from veneer.models.sources import find_base, is_image_base

    kind: ServerKind = "upstream" if settings.fleet.upstream is not None else "vllm"
    if settings.fleet.upstream is None and settings.fleet.engine != "vllm":
        kind = "pictures" if is_image_base(find_base(settings.base, say=log)) else "texts"
    refuse_unused_options(settings, kind)
    {"texts": _load_texts, "pictures": _load_pictures}.get(kind, _load_upstream)(settings, service, log)


def _load_texts(settings: ServeSettings, service: Service, log: Callable[[str], None]) -> None:
    from veneer.models.text.base import load_text
    from veneer.serve.engine.engine import TextEngine
    from veneer.serve.engine.kv_events import KvEvents

    catalog, publish = service.catalog, settings.engine
    events = None
    if publish.kv_events:
        events = KvEvents(publish.kv_events, catalog.base, port=settings.port, replay=publish.kv_replay)
    base = load_text(settings.base, dtype=settings.dtype, device=settings.device, quantize=settings.quantize, say=log)
    log(f"{base.name} in {str(base.dtype).removeprefix('torch.')} on {base.device}: {base.dtype_reason}")
    for note in base.notes:
        log(f"note: {note}")
    gc.freeze()  # so that collecting garbage after prepacking does not visit every module
    tuned = replace(settings.engine, queue=settings.http.queue)
    engine = TextEngine(base, catalog.sources.read, tuned, events=events)
    log(f"forward: {engine.runner.how}{f' ({engine.runner.why})' if engine.runner.why else ''}")
    catalog.use_base(base, engine.problems, engine.residents)
    # The engine's cache can limit the context to less than the base's.
    service.use_base(engine, _reader(base, engine.context), settings.http)


def _reader(base: TextBase, context: int) -> TokenizedBase:
    """Return a text base's tokenizer, with a description of its weight files."""
    from veneer.files.weights import tensor_table

    table, bytes_of = tensor_table(base.directory), Counter[str]()
    for each in table:
        bytes_of[each.dtype] += each.size
    facts = (base.family, sum(math.prod(each.shape) for each in table), bytes_of.most_common(1)[0][0])
    shown = (base.name, base.tokenizer, context, base.has_chat_template)
    return TokenizedBase(*shown, *facts, bytes_of.total())


def _load_pictures(settings: ServeSettings, service: Service, log: Callable[[str], None]) -> None:
    from veneer.models.image.base import load_image, readers
    from veneer.serve.pictures.engine import PictureEngine

    catalog = service.catalog
    base = load_image(settings.base, dtype=settings.dtype, device=settings.device, say=log)
    engine = PictureEngine(
        base, catalog.sources.read, max_batch=min(settings.engine.rows, 8), adapter_bytes=settings.engine.adapter_bytes
    )
    catalog.use_base(base, lambda adapter: [], engine.residents)
    (tokenizer, limit), *_ = readers(base)
    reader = TokenizedBase(base.name, getattr(tokenizer, "tokenizer", tokenizer), limit)
    limits = replace(
        settings.http, max_body=max(settings.http.max_body, 64 << 20)
    )  # bodies of image requests contain images
    service.use_base(engine, reader, limits)


def _load_upstream(settings: ServeSettings, service: Service, log: Callable[[str], None]) -> None:
    """Prepare this server's own vLLM, or connect to the upstream; either reads the same library."""
    from veneer.models.sources import find_base
    from veneer.models.text.base import text_without_weights
    from veneer.serve.fleet.mixes import Mixes, mix_folder, vllm_problems
    from veneer.serve.upstream import Upstream, UpstreamAdapters

    base, fleet, sources = text_without_weights(settings.base, say=log), settings.fleet, service.catalog.sources
    store = sources.library.store if sources.library is not None else None
    remote = store if isinstance(store, RemoteStore) else None
    limits: dict[str, Any] = {"each": fleet.mixes, "limit_bytes": fleet.mix_bytes, "days": fleet.mix_days}
    mixes = Mixes(sources.files, mix_folder(), **limits, store=remote)

    def decode(ids: Sequence[int]) -> str:
        return str(base.tokenizer.decode(ids, skip_special_tokens=False))

    def check(digest: str) -> None:
        sources.read(digest, vllm_problems)

    service.catalog.use_base(base, vllm_problems, UpstreamAdapters())
    if fleet.upstream is not None:
        engine = Upstream(fleet.upstream, mixes=mixes, key=fleet.key, decode=decode, check=check)
    else:
        from veneer.serve.vllm import Vllm, vllm_command

        assert sources.library is not None
        adapters = [sources.read_from(sources.locate(each.reference), vllm_problems) for each in settings.preload]
        rank = max((pair.rank for adapter in adapters for pair in adapter.pairs.values()), default=0)
        command = vllm_command(settings, find_base(settings.base, say=log), service.catalog.base, rank)
        engine = Vllm(command, sources.library.location, mixes=mixes, decode=decode, check=check)
    service.use_base(engine, _reader(base, base.context), settings.http)


def _application(
    settings: ServeSettings, service: Service, library: Library, log: Callable[[str], None], extends: Sequence[Extend]
) -> Application:
    """Return the application with all routes.

    Its `stop` closes the tenancy last, so that all bills are written.
    """

    def step(text: str) -> None:
        service.step = text
        log(text)

    def preload() -> None:
        for each in settings.preload:
            card = service.catalog.load(each.name, each.reference)
            step(f"adapter {card.id} from {card.root}")

    def close() -> None:
        service.catalog.close()
        staging.close()
        library.close()
        service.tenancy.close()

    staging = service.staging
    extensions = [extend(service, library) for extend in extends]

    async def start() -> None:
        limits = service.settings.quotas
        asyncio.get_running_loop().set_default_executor(FairThreads(limits.threads, limits.thread_share))
        for each in extensions:
            await each.start()

    async def load() -> None:
        await asyncio.to_thread(_load_base, settings, service, step)
        if service.engine.makes == "pictures":
            add_images(app)
        await service.engine.begin()
        await asyncio.to_thread(preload)
        service.mark_ready()

    async def stop() -> None:
        for each in reversed(extensions):
            await each.stop()
        await service.engine.end()
        await asyncio.to_thread(close)
        if app.state.traces is not None:
            await asyncio.to_thread(app.state.traces.shutdown)  # exports the last spans

    routers = operator_routes(settings, service.tenancy, service.catalog)
    routers.append(adapter_routes(library, staging, service.tenancy))
    if isinstance(service.tenancy, Tenants):
        routers += [feedback_routes(service.tenancy.answers), tenant_router(service.tenancy)]
    unguarded: list[str] = []
    large = adapter_bodies(staging)
    for each in extensions:
        routers += each.routers
        unguarded += each.unguarded
        large |= each.large
    app = create_app(service, routers=routers, unguarded=unguarded, large=large)
    for each in extensions:
        each.mount(app)
    return Application(app, start, load, stop)


def operator_routes(settings: ServeSettings, tenancy: Tenancy, catalog: Catalog) -> list[APIRouter]:
    """Return the routes under /admin if the server has tenants and an admin key."""
    if settings.admin_key is None or not isinstance(tenancy, Tenants):
        return []
    return [admin_router(tenancy, catalog)]


def tenancy_of(
    settings: ServeSettings, log: Callable[[str], None], store: Store | None, quotas: Quotas | None = None
) -> Tenancy:
    """Return the tenancy that the settings describe. `store`: the tenants' database, or None."""
    if store is None:
        if needs_no_key(settings, store):
            if not settings.here:
                at = f"{settings.host}:{settings.port}"
                log(f"note: any client that reaches {at} can use this server; see --api-keys and --tenants")
            return OpenAccess()
        return KeyAccess(settings.keys, settings.admin_key, settings.fleet.key)
    shared: dict[str, Any] = {"admin_key": settings.admin_key, "ledger": settings.ledger, "quotas": quotas}
    shared |= {"oidc": settings.oidc, "redis": settings.redis}
    if needs_no_key(settings, store):
        log(f"this machine needs no key; routes and ledger: {store.where}")
        return OpenTenants(store, **shared)
    if settings.tenants is None:
        log(f"tenants: {store.where}, so requests need a key, unless --open is set")
    if not store.settings.tenants:
        log("no tenants yet, so no keys: run veneer tenant add NAME, then veneer tenant key add NAME")
    return Tenants(store, **shared)
