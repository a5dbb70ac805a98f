"""The tenancy of a server with tenants.

`Tenants` needs keys; `OpenTenants` accepts requests without a key.

    authenticate  key -> principal, visible names, share; from the current settings in the database
    admitted      limits (memory) -> ledger -> served -> bill (ledger)

Each process counts usage in memory. Processes that share a Redis server also count there, exactly. Processes
that share only a database exchange their usage through the database: each process reads other processes'
usage of the last minute and their running requests every second, and usage of the last day (including its own
earlier runs) every minute. So a limit covers all processes, except for requests that other processes admit
between two reads, and a restart loses no usage.

While the database is unavailable, requests continue: keys, names and limits are those that were read last,
windows count this process only, and the journal stores ledger entries. Changes of settings apply once the
database is available again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from veneer.errors import ResourceError
from veneer.library.database import shown_url
from veneer.library.names import name_of
from veneer.models.home import veneer_home
from veneer.serve.access import TRIALS, LedgerState, ResolvedModel, ShadowAnswer, StoreAnswer, Tenancy
from veneer.serve.principal import Principal, Role
from veneer.serve.quota import Quotas
from veneer.serve.request import Refused, Usage
from veneer.serve.settings import LedgerSettings, OidcSettings
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.entry import LedgerEntry, LedgerLine
from veneer.serve.tenancy.feedback import StoredAnswers
from veneer.serve.tenancy.keys import admin_hash, hash_key, key_id, matches_hash
from veneer.serve.tenancy.ledger import Ledger
from veneer.serve.tenancy.limits import DAY, MINUTE, LimitHold, Limits
from veneer.serve.tenancy.oidc import OidcUsers, is_token, token_refused
from veneer.serve.tenancy.redis_limits import LEASE, RedisLimits
from veneer.serve.tenancy.routes import TenantRoutes
from veneer.serve.tenancy.store import SERVING_PATIENCE, Price, Store, Tenant, TenantSettings

_log = logging.getLogger("veneer.serve.tenancy")
_FRESH_SECONDS = 0.5
"""Seconds that a request waits for fresh settings before it uses the old settings."""
_NOBODY = hash_key("")  # compared with unknown keys, so that checking them takes as long as checking known keys


class Tenants(Tenancy):
    """The tenancy of a server whose requests need keys.

    One per process. Close it after the server has drained.
    """

    def __init__(
        self,
        where: str | Store,
        *,
        admin_key: str | None = None,
        ledger: LedgerSettings | None = None,
        quotas: Quotas | None = None,
        oidc: OidcSettings | None = None,
        redis: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        watch: bool = True,
    ) -> None:
        """Open the database and start background work. Raises ConfigError, ResourceError.

        `where`: a SQLite file, a postgresql:// URL, or an open store, which is closed with this object.
        `admin_key`: see `admin_hash`; None for no admin. `quotas`: limits for each tenant. `oidc`: the issuer of
        tokens; `redis`: URL of the Redis server that counts limits for all servers. `watch`: in a background
        thread, read other servers' usage and settle the requests of dead servers.
        """
        ledger = ledger or LedgerSettings()
        self.admin_hash = None if admin_key is None else admin_hash(admin_key)
        self.store = Store(where, patience=SERVING_PATIENCE) if isinstance(where, str) else where
        self._wall, self.keep_days = wall, ledger.days
        self.oidc = None if oidc is None else OidcUsers(oidc)
        self.limits = Limits(clock, None if redis is None else RedisLimits(redis))
        folder = ledger.folder or _journal_folder(self.store.where)
        try:
            self.ledger = Ledger(self.store, folder, wall, synced=ledger.synced, room=ledger.room)
        except BaseException:
            self.store.close()
            raise
        self.answers = StoredAnswers(self.store, self.ledger.writer, wall, quotas)
        self.routes: TenantRoutes = TenantRoutes(self.store, self.ledger.writer.put)
        self._refresher = ThreadPoolExecutor(1, "veneer-tenants")
        self._next_refresh: Future[TenantSettings] | None = None
        self._unavailable = False
        self._mutex, self._stop = threading.Lock(), threading.Event()
        self.count_other_servers(MINUTE)
        self.count_other_servers(DAY)
        self._watcher = threading.Thread(target=self._watch, name="veneer-tenants-watch", daemon=True)
        if watch:
            self._watcher.start()

    # -- principals ----------------------------------------------------------------------------------------------------

    async def authenticate(self, key: str | None, user: str | None = None) -> Principal:
        """Return the principal of a key. Raises Refused (unauthorized, 401)."""
        settings = await self._fresh()
        if key and self.admin_hash is not None and matches_hash(key, self.admin_hash):
            return Principal("operator", user=user)
        if key and self.oidc is not None and is_token(key):
            signed = await self.oidc.user(key)
            tenant = settings.tenants.get(signed.tenant)
            if tenant is None or not tenant.enabled:
                raise token_refused("the token's tenant is unknown or disabled on this server")
            return _principal(settings, tenant, user, signed.roles, f"oidc:{signed.subject}")
        id = key_id(key) if key else None
        row = settings.keys.get(id) if id else None
        matches = matches_hash(key or "", *((row.hash, row.role) if row else (_NOBODY,))) and row is not None
        tenant = settings.tenants.get(row.tenant) if row else None
        if not matches or row is None or tenant is None or row.state(self._wall()) != "active" or not tenant.enabled:
            fix = "send Authorization: Bearer vnr-…, with an active key"
            raise Refused("no valid API key", status=401, code="unauthorized", fix=fix)
        return _principal(settings, tenant, user, (row.role,), f"key:{row.id}")

    async def _fresh(self) -> TenantSettings:
        """Return settings that were read after this call started.

        Concurrent calls share one read. If the database does not answer in time, the call returns the last
        settings, and later calls return the last settings at once until the database answers again.
        """
        with self._mutex:
            if self._next_refresh is None:
                self._next_refresh = self._refresher.submit(self._refresh)
            refresh = self._next_refresh
        if self._unavailable:
            return self.store.settings
        try:
            async with asyncio.timeout(_FRESH_SECONDS):
                return await asyncio.shield(asyncio.wrap_future(refresh))
        except SQLAlchemyError:
            pass  # logged by `_refresh`
        except TimeoutError:
            self._log_unavailable("no answer")
        return self.store.settings

    def _refresh(self) -> TenantSettings:
        with self._mutex:
            self._next_refresh = None
        try:
            settings = self.store.refresh()
        except SQLAlchemyError as error:
            self._log_unavailable(error)
            raise
        self._unavailable = False
        return settings

    def _log_unavailable(self, error: object) -> None:
        if not self._unavailable:
            _log.warning("the tenants' database does not respond; using the settings that were read last: %s", error)
        self._unavailable = True

    def cache_scope(self, principal: Principal, model: ResolvedModel) -> str:
        """Return a request's cache scope: the tenant, or "" for the shared cache.

        The cache is shared if tenants share the cache of every part of the mix. By default, tenants have
        separate caches, because a cache hit reveals that somebody sent the same prompt.
        """
        common = self.store.settings.shares_cache
        return "" if all(common(name) for _, name, _ in model.parts()) else principal.tenant

    # -- usage ---------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def admitted(
        self, principal: Principal, model: ResolvedModel, *, request: str, prompt_tokens: int, max_tokens: int
    ) -> AsyncIterator[_Bill]:
        """Check and count a request's usage, record the admission, and run the block.

        The block runs the request. Raises Refused: rate_limited (429, with retry_after), invalid_request
        (400) for a request that exceeds a limit by itself or has a duplicate id, overloaded (503) if the
        ledger cannot store more.
        """
        settings = self.store.settings
        training = Price(settings.training_terms(principal.tenant).price) if model.trained else None
        lines = tuple(
            LedgerLine(digest, name, strength, training or settings.price(principal.tenant, name_of(name)))
            for digest, name, strength in model.parts()
        )
        names = [name_of(line.adapter) for line in lines]
        asked = (settings.limits, principal.tenant, names, prompt_tokens, max_tokens)
        reserved = await self.limits.reserve(*asked)
        tenant = TRIALS if model.trial and principal.kind != "tenant" else principal.tenant
        entry = LedgerEntry(request, tenant, model.name, self._wall(), prompt_tokens, max_tokens, lines)
        opened = self.ledger.open(entry)
        bill = _Bill(self.ledger, reserved, request)
        try:
            await asyncio.shield(asyncio.wrap_future(opened))
            yield bill
        finally:
            bill.end(opened)

    def log_change(self, actor: str, action: str, subject: str, before: object = None, after: object = None) -> None:
        """Write an audit entry for a change that other code makes, such as adapter.load.

        Blocking.
        """
        manage.log_change(self.store, actor, action, subject, before, after)

    def grant_namespace(self, tenant: str) -> None:
        """Grant a tenant its own namespace. Blocking.

        Only the first call for a tenant changes anything and writes an audit entry.
        """
        if f"{tenant}/*" not in manage.get_tenant(self.store, tenant).adapters:
            manage.grant_namespace(self.store, tenant, actor="jobs")

    def keeping(self, principal: Principal, model: ResolvedModel, request: str) -> StoreAnswer | None:
        return self.answers.keeping(principal, model, request)

    def record_shadow(self, answer: ShadowAnswer) -> None:
        self.routes.record_shadow(answer)

    # -- other servers -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        rounds = 0
        while not self._stop.wait(1.0):
            rounds += 1
            try:
                if self.limits.redis is not None:
                    self.limits.redis.beat()
                self.count_other_servers(MINUTE)
                if rounds % (LEASE // 3) == 0:
                    self.ledger.beat()
                if rounds % 60 == 0:
                    self.count_other_servers(DAY)
                    self.ledger.recover()
                if rounds % 600 == 60:
                    self.answers.sweep()
                if rounds % 3600 == 60:
                    self.ledger.prune(self.keep_days)
            except (SQLAlchemyError, ResourceError) as error:
                self._log_unavailable(error)

    def count_other_servers(self, window: float) -> None:
        """Count the usage of other servers in the last `window` seconds.

        The other servers include earlier runs of this server.
        """
        limits = self.store.settings.limits
        named = {adapter for (_, adapter), limit in limits.items() if limit.in_window(window)}
        if named or self.limits.counters:
            used = self.ledger.usage_of_other_servers(window, named) if named else ()
            self.limits.set_other_servers(limits, window, used)
        if window == MINUTE and any(limit.concurrency is not None for limit in limits.values()):
            self.limits.set_running_elsewhere(limits, self.ledger.running_on_other_servers(LEASE))

    def ledger_state(self) -> LedgerState:
        """Return how far the ledger is behind, for metrics."""
        return self.ledger.state()

    def close(self) -> None:
        """Write pending entries and stop. Running requests are recorded as interrupted."""
        self._stop.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._refresher.shutdown()
        self.ledger.close()
        if self.limits.redis is not None:
            self.limits.redis.close()
        self.store.close()


class OpenTenants(Tenants):
    """The tenancy of a server that only this machine can reach.

    A request without a key is accepted and can see everything. So routes, shadows, feedback and the ledger
    work before any tenant exists.
    """

    keyless = True

    async def authenticate(self, key: str | None, user: str | None = None) -> Principal:
        """Return the tenant of a tenant's key, or the open principal for any other text.

        Other text counts as no key, because some clients require a key and send a dummy. Raises Refused
        (unauthorized, 401) for an invalid tenant key.
        """
        if key and (key_id(key) is not None or (self.oidc is not None and is_token(key))):
            return await super().authenticate(key, user)
        await self._fresh()
        return Principal("open", user=user)


def _principal(
    settings: TenantSettings, tenant: Tenant, user: str | None, roles: tuple[Role, ...], identity: str
) -> Principal:
    return Principal("tenant", tenant.name, settings.visibility[tenant.name], user, tenant.weight, roles, identity)


class _Bill:
    def __init__(self, ledger: Ledger, hold: LimitHold, request: str) -> None:
        self._ledger, self._held, self._request = ledger, hold, request
        self._settled: Future[None] | None = None

    def used(self, usage: Usage) -> Awaitable[None]:
        """Record the usage; only the first call counts.

        The awaitable completes once the usage would survive this process.
        """
        if self._settled is not None:
            _log.warning("request %s was billed twice; only the first bill counts", self._request)
        else:
            self._held.used(usage.prompt + usage.completion)
            self._settled = self._ledger.settle(self._request, usage)
        return asyncio.shield(asyncio.wrap_future(self._settled))

    def end(self, opened: Future[None]) -> None:
        """Release the unused reservation."""
        self._held.end()
        if self._settled is None:
            self._held.used(0)
            if not (opened.done() and opened.exception()):
                self._settled = self._ledger.settle(self._request, None)


def _journal_folder(where: str) -> Path:
    if where.startswith(("postgresql:", "postgres:")):
        return veneer_home() / "ledger" / hashlib.sha256(shown_url(where).encode()).hexdigest()[:16]
    path = Path(where.removeprefix("sqlite:///")).expanduser()
    return path.with_name(f"{path.name}-ledger")
