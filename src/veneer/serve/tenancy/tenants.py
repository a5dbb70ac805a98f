"""`Tenants`: the tenancy of a server that has tenants.

    caller      key -> who asks, what they see, their share; settings as they are in the database at this moment
    admitted    limits (memory) -> a row in the ledger (database) -> served -> bill (journal, at once) -> row done

Limits are counted in this process. Processes that share a database tell each other through it: every second this one
reads what the others admitted in the last minute, every minute what they (and its own earlier runs) admitted in the
last day. So a window holds across processes but for what the others admit within one such look; a restart forgets
nothing. `concurrency` is of each process.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from veneer.errors import ConfigError, ResourceError
from veneer.library.database import shown_url
from veneer.models.home import veneer_home
from veneer.serve.access import Caller, Served
from veneer.serve.request import Refused, Usage
from veneer.serve.tenancy.keys import hash_key, key_id, same
from veneer.serve.tenancy.ledger import Entry, Ledger
from veneer.serve.tenancy.limits import DAY, MINUTE, Held, Limits
from veneer.serve.tenancy.names import adapter_of
from veneer.serve.tenancy.rollouts import Rollouts
from veneer.serve.tenancy.store import Price, Settings, Store

__all__ = ["Tenants", "admin_hash", "default_database"]

_log = logging.getLogger("veneer.serve.tenancy")
_NOBODY = hash_key("")  # compared with where there is no such key, so that this takes as long


def default_database() -> str:
    """Where tenants are kept unless a command says otherwise."""
    return str(veneer_home() / "tenants.sqlite")


def admin_hash(key: str) -> str:
    """The hash of an admin key that is given as itself or as `sha256:` and its hash. Raises ConfigError."""
    if key.startswith("sha256:"):
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", key):
            raise ConfigError("the admin key's hash is no sha256", fix="sha256: and 64 hexadecimal digits")
        return key.removeprefix("sha256:")
    if len(key) < 20:
        raise ConfigError("the admin key is shorter than 20 characters", fix="openssl rand -base64 32")
    return hash_key(key)


class Tenants:
    """Implements `Tenancy`. One for a process; close it when the server has drained."""

    def __init__(
        self,
        where: str,
        *,
        admin_key: str | None = None,
        journal: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        watch: bool = True,
    ) -> None:
        """`where`: a SQLite file or postgresql:// URL. `admin_key`: see `admin_hash`; None: nobody is admin. `journal`:
        a folder on a local disk, by default beside the SQLite file, or in the veneer home. `watch`: look at what other
        servers did, and at who died, in a thread."""
        self.admin_hash = None if admin_key is None else admin_hash(admin_key)
        self.store = Store(where)
        self._wall = wall
        self.limits = Limits(clock)
        self.ledger = Ledger(self.store, journal or _journal_folder(where), wall)
        self.rollouts = Rollouts(self.store, self.ledger.writer.put)
        self._looker = ThreadPoolExecutor(1, "veneer-tenants")
        self._next_look: Future[Settings] | None = None
        self._mutex, self._stop = threading.Lock(), threading.Event()
        self._look_elsewhere(MINUTE)
        self._look_elsewhere(DAY)
        self._watcher = threading.Thread(target=self._watch, name="veneer-tenants-watch", daemon=True)
        if watch:
            self._watcher.start()

    # -- who asks ------------------------------------------------------------------------------------------------------

    async def caller(self, key: str | None, user: str | None = None) -> Caller:
        """Raises Refused: unauthorized (401), overloaded (503) while the database is away."""
        settings = await self._fresh()
        if key and self.is_admin(key):
            return Caller(user=user, admin=True)
        identity = key_id(key) if key else None
        row = settings.keys.get(identity) if identity else None
        right = same(key or "", row.hash if row else _NOBODY) and row is not None
        tenant = settings.tenants.get(row.tenant) if row else None
        if not right or row is None or tenant is None or row.state(self._wall()) != "active" or not tenant.enabled:
            raise Refused(
                "no valid API key",
                status=401,
                code="unauthorized",
                fix="Authorization: Bearer vnr-…, one that is active",
            )
        return Caller(tenant.name, settings.sight[tenant.name], user, tenant.weight)

    def is_admin(self, key: str) -> bool:
        return self.admin_hash is not None and same(key, self.admin_hash)

    async def _fresh(self) -> Settings:
        """The settings, looked at after this was called. Who comes before a look begins shares it."""
        with self._mutex:
            if self._next_look is None:
                self._next_look = self._looker.submit(self._look)
            look = self._next_look
        try:
            return await asyncio.shield(asyncio.wrap_future(look))
        except SQLAlchemyError as error:
            raise _away(error) from error

    def _look(self) -> Settings:
        with self._mutex:
            self._next_look = None
        return self.store.look()

    # -- what they use -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def admitted(
        self, caller: Caller, served: Served, *, request: str, prompt_tokens: int, max_tokens: int
    ) -> AsyncIterator[_Bill]:
        """Raises Refused: rate_limited (429, with retry_after), invalid_request (400) for what no limit will ever let
        through or for an id that was there before, overloaded (503) while the database is away."""
        settings, adapter = self.store.settings, adapter_of(served.target)
        mixed = [adapter_of(name) for name in served.adapters] or [adapter]
        price = settings.price(caller.tenant, adapter)
        held = self.limits.take(settings.limits, caller.tenant, mixed, prompt_tokens, max_tokens)
        bill = _Bill(self.ledger, held, request, price)
        entry = Entry(
            request, caller.tenant, served.name, served.target, self._wall(), prompt_tokens, max_tokens, price
        )
        opened = self.ledger.open(entry)
        try:
            try:
                await asyncio.shield(asyncio.wrap_future(opened))
            except (SQLAlchemyError, ResourceError) as error:
                raise _away(error) from error
            yield bill
        finally:
            bill.end(opened)

    def note(self, who: str, what: str, subject: str, before: object = None, after: object = None) -> None:
        """A line of the audit log for what is changed elsewhere: adapter.load, adapter.unload. Waits for the disk."""
        from veneer.serve.tenancy.manage import note

        note(self.store, who, what, subject, before, after)

    # -- what others do ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        rounds = 0
        while not self._stop.wait(1.0):
            rounds += 1
            try:
                self._look_elsewhere(MINUTE)
                if rounds % 60 == 0:
                    self._look_elsewhere(DAY)
                    self.ledger.recover()
            except (SQLAlchemyError, ResourceError) as error:
                _log.warning("the tenants' database is away: %s", error)

    def _look_elsewhere(self, window: float) -> None:
        limits = self.store.settings.limits
        if limits:
            self.limits.elsewhere(limits, window, self.ledger.seen_elsewhere(window))

    def close(self) -> None:
        """Write what has come and stop; requests that are still running are interrupted in the ledger."""
        self._stop.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._looker.shutdown()
        self.ledger.close()
        self.store.close()


class _Bill:
    def __init__(self, ledger: Ledger, held: Held, request: str, price: Price) -> None:
        self._ledger, self._held, self._request, self._price = ledger, held, request, price
        self._settled: Future[None] | None = None

    def used(self, usage: Usage) -> None:
        """When this returns, the usage outlives a SIGKILL of this process. The first word holds."""
        if self._settled is not None:
            _log.warning("request %s was billed twice; the first bill holds", self._request)
            return
        self._held.used(usage.prompt + usage.completion)
        self._settled = self._ledger.settle(self._request, usage, self._price)

    def end(self, opened: Future[None]) -> None:
        """Give back what was not used."""
        self._held.end()
        if self._settled is None:
            self._held.used(0)
            if not (opened.done() and opened.exception()):
                self._settled = self._ledger.interrupt(self._request)


def _away(error: Exception) -> Refused:
    return Refused(
        f"the ledger cannot be written: {str(error).splitlines()[0]}", status=503, code="overloaded", retry_after=1.0
    )


def _journal_folder(where: str) -> Path:
    if where.startswith(("postgresql:", "postgres:")):
        return veneer_home() / "ledger" / hashlib.sha256(shown_url(where).encode()).hexdigest()[:16]
    path = Path(where.removeprefix("sqlite:///")).expanduser()
    return path.with_name(f"{path.name}-journals")
