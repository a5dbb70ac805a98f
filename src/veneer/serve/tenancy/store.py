"""The database of tenants, and the settings that a server holds of it in memory.

Whatever changes settings raises the revision in the same transaction. A server asks for the revision before each
request, one number, and reads the settings again when it moved: a revoked key, a moved route or a lower limit holds
from the next request on, in every process on the database. While the database is away, what was read last holds.
Knows tables (`tables` has them, `versions` how they came to be so) and connections; changes are in `manage` and
`rollouts`, what was used in `ledger`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, inspect, select, update

from veneer.errors import ConfigError, nearest
from veneer.library.database import PATIENCE, URL_FIX, open_engine, reading, write_transaction
from veneer.library.migrate import Schema, bring_up
from veneer.serve.tenancy.names import seeing
from veneer.serve.tenancy.tables import (
    APPEND_ONLY,
    LIMITS,
    TABLES,
    aliases,
    audit,
    grants,
    keys,
    limits,
    meta,
    moves,
    prices,
    shadows,
    tenants,
)

__all__ = [
    "ALL", "COMMON", "EACH", "LIMITS", "SCHEMA", "KeyRow", "Limit", "NotThere", "Price", "Route", "Settings", "Store",
    "Tenant", "aliases", "audit", "grants", "keys", "limits", "meta", "missing", "moves", "prices", "route_of",
    "shadows", "tenant_row", "tenants",
]  # fmt: skip

ALL = ""
"""In a limit: all tenants, or all adapters, together. In a price: any of them. In a route: it is everybody's."""
EACH = "*"
"""In a limit: each tenant for itself, unless it has its own limit."""
COMMON = "common prefixes"
"""The row of `meta` with the patterns of the adapters under which tenants share what was computed of prompts."""

_LOCK = 0x74656E616E74  # "tenant": the key of PostgreSQL's advisory lock for changes of settings


# -- what a server holds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tenant:
    name: str
    weight: float
    enabled: bool
    created: float
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeyRow:
    """A key as it is kept. `hash` never leaves the process."""

    id: str
    tenant: str
    hash: str = field(repr=False)
    label: str
    created: float
    expires: float | None
    revoked: float | None

    def state(self, now: float) -> str:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


@dataclass(frozen=True)
class Limit:
    """None: no limit."""

    requests_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrency: int | None = None

    def in_window(self, seconds: float) -> bool:
        """Whether anything is limited in a window so long."""
        word = "minute" if seconds == 60 else "day"
        return getattr(self, f"requests_per_{word}") is not None or getattr(self, f"tokens_per_{word}") is not None


@dataclass(frozen=True)
class Price:
    """Of a million tokens, in millionths of whatever the operator counts in: 150_000 is 0.15 for a million.
    `cached` tokens are those of the prompt that were not computed again; `prompt` is for the others."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def cost(self, prompt: int, cached: int, completion: int) -> int:
        """In millionths, rounded half up, once for a request."""
        exact = (prompt - cached) * self.prompt + cached * self.cached + completion * self.completion
        return (exact + 500_000) // 1_000_000


@dataclass(frozen=True)
class Route:
    """`targets`: (name, weight). `runs`: who owns the buckets, as (name, how many follow). `fraction` of requests also
    go to `shadow`."""

    tenant: str
    name: str
    move: int
    targets: tuple[tuple[str, int], ...]
    runs: tuple[tuple[str, int], ...]
    shadow: str | None
    fraction: float


@dataclass(frozen=True)
class Settings:
    """Everything that decides about a request, as of one revision."""

    revision: int = 0
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    keys: Mapping[str, KeyRow] = field(default_factory=dict, repr=False)
    shared: tuple[str, ...] = ()
    limits: Mapping[tuple[str, str], Limit] = field(default_factory=dict)
    prices: Mapping[tuple[str, str], Price] = field(default_factory=dict)
    routes: Mapping[tuple[str, str], Route] = field(default_factory=dict)
    common: tuple[str, ...] = ()

    def price(self, tenant: str, adapter: str) -> Price:
        """The closest: of this tenant for this adapter, of the tenant, of the adapter, of the server; else nothing."""
        for scope in ((tenant, adapter), (tenant, ALL), (ALL, adapter), (ALL, ALL)):
            if scope in self.prices:
                return self.prices[scope]
        return Price()

    @cached_property
    def in_common(self) -> Callable[[str], bool]:
        """Whether tenants share what was computed of prompts under an adapter, or the base, of that name."""
        return seeing(self.common)

    @cached_property
    def sight(self) -> dict[str, Callable[[str], bool]]:
        """Tenant -> what it sees: what was granted to it, what is shared, and its own routes."""
        own: dict[str, list[str]] = {}
        for tenant, route in self.routes:
            own.setdefault(tenant, []).append(route)
        return {t.name: seeing((*t.adapters, *self.shared), own.get(t.name, ())) for t in self.tenants.values()}


class NotThere(ConfigError):
    """Raised for a tenant, a key, a pattern or a route that is not there; `fix` names the nearest that is."""


def missing(what: str, name: str, known: Iterable[str]) -> NotThere:
    near = nearest(name, known)
    fix = f"did you mean {', '.join(near)}?" if near else None
    return NotThere(f"there is no {what} {name[:100]}", where=what, fix=fix)


def tenant_row(c: Connection, name: str) -> dict[str, Any]:
    """Raises NotThere."""
    row = c.execute(select(tenants).where(tenants.c.name == name)).first()
    if row is None:
        raise missing("tenant", name, c.scalars(select(tenants.c.name)))
    return dict(row._mapping)


class Store:
    """The database of one server, or of several. Thread-safe."""

    def __init__(self, where: str, *, patience: float = PATIENCE) -> None:
        """A SQLite file or a postgresql:// URL; tables are made where there are none, and brought up where an earlier
        veneer made them. `patience`: see `open_engine`. Raises ConfigError."""
        if ":memory:" in where or where == "sqlite://":
            raise ConfigError("tenants need a database that stays", where=where, fix=URL_FIX)
        self.where = where
        self.engine = open_engine(where, SCHEMA.what, patience)
        bring_up(self.engine, SCHEMA, where)
        self._settings = Settings(revision=-1)
        self.look()

    @property
    def settings(self) -> Settings:
        """As of the last look."""
        return self._settings

    def look(self) -> Settings:
        """The settings as they are in the database now."""
        with reading(self.engine) as c:
            if int(c.scalar(_REVISION) or 0) == self._settings.revision:
                return self._settings
        connection = self.engine.connect()
        if self.engine.dialect.name == "postgresql":  # SQLite's transactions see one state anyway
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        with connection as c:
            found = _read(c)
        if found.revision > self._settings.revision:  # another thread may have looked later and finished sooner
            self._settings = found
        return found

    @contextlib.contextmanager
    def change(self) -> Iterator[Connection]:
        """A transaction that changes settings; changes follow one another, across processes too."""
        with write_transaction(self.engine, _LOCK) as c:
            yield c
            raised = int(c.scalar(_REVISION) or 0) + 1
            c.execute(update(meta).where(meta.c.key == "revision").values(value=str(raised)))

    def close(self) -> None:
        self.engine.dispose()


_REVISION = select(meta.c.value).where(meta.c.key == "revision")


def _before(c: Connection) -> str | None:
    """The revision of tables from before it was held beside them: all of these called themselves version 1."""
    if not inspect(c).has_table(meta.name):
        return None
    said = c.scalar(select(meta.c.value).where(meta.c.key == "schema"))
    if said != "1":
        return str(said)
    return "0002" if "distance" in {column["name"] for column in inspect(c).get_columns(shadows.name)} else "0001"


def _first(c: Connection) -> None:
    # veneers from before revisions were held read `schema`, and refuse what they read
    c.execute(insert(meta), [{"key": "schema", "value": "3"}, {"key": "revision", "value": "0"}])
    for statement in APPEND_ONLY[c.dialect.name]:
        c.exec_driver_sql(statement)


SCHEMA = Schema(
    "the tenants' database", TABLES, Path(__file__).parent / "versions", "tenant_version", _LOCK, _before, _first
)


def _read(c: Connection) -> Settings:
    revision = int(c.scalar(_REVISION) or 0)
    granted: dict[str, list[str]] = {}
    for row in c.execute(select(grants).order_by(grants.c.pattern)):
        granted.setdefault(row.tenant, []).append(row.pattern)
    found = [
        Tenant(r.name, r.weight, r.enabled, r.created, tuple(granted.get(r.name, ())))
        for r in c.execute(select(tenants).order_by(tenants.c.name))
    ]
    current = select(moves).join(
        aliases,
        (aliases.c.tenant == moves.c.tenant) & (aliases.c.alias == moves.c.alias) & (aliases.c.current == moves.c.move),
    )
    pointers = [route_of(row) for row in c.execute(current.order_by(moves.c.tenant, moves.c.alias))]
    return Settings(
        revision,
        {t.name: t for t in found},
        {r.id: KeyRow(**r._mapping) for r in c.execute(select(keys).order_by(keys.c.created, keys.c.id))},
        tuple(granted.get(ALL, ())),
        {(r.tenant, r.adapter): Limit(*(r._mapping[name] for name in LIMITS)) for r in c.execute(select(limits))},
        {(r.tenant, r.adapter): Price(r.prompt, r.cached, r.completion) for r in c.execute(select(prices))},
        {(a.tenant, a.name): a for a in pointers if a.targets},
        tuple(json.loads(c.scalar(select(meta.c.value).where(meta.c.key == COMMON)) or "[]")),
    )


def route_of(row: Any) -> Route:
    """A route as one of its moves left it."""
    spec = json.loads(row.spec)
    pairs = {name: tuple((str(who), int(n)) for who, n in spec[name]) for name in ("targets", "runs")}
    return Route(
        row.tenant, row.alias, row.move, pairs["targets"], pairs["runs"], spec["shadow"], float(spec["fraction"])
    )
