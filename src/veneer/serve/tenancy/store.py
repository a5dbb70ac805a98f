"""The tenants' database: its tables, and the settings that a server keeps in memory.

    tenants 1─n keys, grants            routes ─1 moves (current)           limits, prices: (tenant, adapter)
    training: price and limits of a tenant's training
    feedback_terms: which completions are stored, and how long
    answers 1─n feedback                                        forgotten: deletions, for late completions
    lines: a row for each part of each request                  shadows: the newest comparisons
    sums: lines by day      slots: of the last minute and day   audit: a row per change, chained

Every change of settings increments the revision in the same transaction. A server queries the revision, one
number, before each request and rereads the settings if the revision changed: a revoked key, a moved route or
a lower limit applies from the next request on, in every process that uses the database. While the database is
unavailable, the last settings apply.

Patterns define which names a tenant sees:

    support      the adapter of that name, every version of it (support@2, support@prod)
    support@2    that version only
    acme/*       every name with that prefix; `*` matches any text, and is the only special character
    *            every name

Patterns are only compared with names and never become paths; names that could escape a folder are rejected
anyway. Digests (sha256:…) belong to no namespace, so only a pattern that contains `sha256:` matches them.

This module contains tables (their migrations are in `versions`) and connections; changes are in `manage` and
`routes`, usage is in `ledger`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Select,
    Table,
    Text,
    insert,
    select,
    text,
    update,
)

from veneer.errors import ConfigError, nearest, quoted
from veneer.library.database import (
    PATIENCE,
    URL_FIX,
    Key,
    columns,
    key_columns,
    open_engine,
    reading,
    write_transaction,
)
from veneer.library.migrate import Schema, append_only, migrate
from veneer.library.names import check_name, check_namespace, name_of, parse_reference
from veneer.serve.tenancy.keys import database_here

# -- tables ------------------------------------------------------------------------------------------------------------


LIMITS = ("requests_per_minute", "requests_per_day", "tokens_per_minute", "tokens_per_day", "concurrency")
_TENANT_TABLES = MetaData()
_TOKENS, _SECONDS = ("prompt", "cached", "completion"), ("queued", "prefill", "decode")


def _table(name: str, *columns: Any) -> Table:
    return Table(name, _TENANT_TABLES, *columns)


# Times are in seconds since 1970; tenant ALL means all tenants.
meta_table = _table("tenant_meta", *key_columns("key"), *columns(Text, "value"))
tenant_table = _table(
    "tenants", *key_columns("name"), *columns(Float, "weight"), *columns(Boolean, "enabled"), *columns(Float, "created")
)
key_table = _table(
    "tenant_keys",
    *key_columns("id"),
    Column("tenant", Key(), ForeignKey(tenant_table.c.name, ondelete="CASCADE"), nullable=False, index=True),
    *columns(Text, "hash", "label"),
    *columns(Float, "created"),
    *columns(Float, "expires", "revoked", nullable=True),
)
grant_table = _table("tenant_grants", *key_columns("tenant", "pattern"))
limit_table = _table("tenant_limits", *key_columns("tenant", "adapter"), *columns(BigInteger, *LIMITS, nullable=True))
price_table = _table("tenant_prices", *key_columns("tenant", "adapter"), *columns(BigInteger, *_TOKENS))
training_table = _table(
    "tenant_training",
    *key_columns("tenant"),
    *columns(BigInteger, "price"),
    *columns(BigInteger, "budget", "jobs", nullable=True),
)
move_table = _table(
    "tenant_moves",
    *key_columns("tenant", "route"),
    Column("move", Integer, primary_key=True),
    Column("before", Integer),  # the previously current move, to which a rollback returns
    *columns(Float, "at"),
    *columns(Text, "who", "spec"),  # spec: JSON of targets, runs, shadow, fraction; no targets: the route is removed
)
route_table = _table("tenant_routes", *key_columns("tenant", "route"), *columns(Integer, "current"))
line_table = _table(
    "tenant_lines",
    *key_columns("server", "request"),  # a server is one run of one process
    Column("part", Integer, primary_key=True),  # index in the request's mix, from 0
    # name: the client's name; digest: of the part, "" for the base; adapter: the operator's name
    *columns(Key(), "tenant", "name", "digest", "adapter"),
    *columns(Float, "strength"),
    Column("opened", Float, nullable=False, index=True),
    Column("closed", Float),
    *columns(Key(), "day", "state"),  # UTC day of `opened`, such as 2026-11-25; open, done, interrupted
    *columns(BigInteger, "asked_prompt", "asked_completion", *_TOKENS),
    *columns(Float, *_SECONDS),
    *columns(BigInteger, *(f"price_{name}" for name in _TOKENS), "cost"),  # cost: millionths
    Index("tenant_lines_open", "server", sqlite_where=text("state = 'open'"), postgresql_where=text("state = 'open'")),
)
sum_table = _table(  # closed lines by day; they stay after the lines are deleted
    "tenant_sums",
    *key_columns("day", "tenant", "adapter"),  # adapter "": whole requests of any mix
    *columns(BigInteger, "done", "interrupted", *_TOKENS),
    *columns(Float, *_SECONDS),
    *columns(BigInteger, "cost"),
)
slot_table = _table(  # recent admissions, for limits across several servers
    "tenant_slots",
    Column("width", Integer, primary_key=True, autoincrement=False),  # seconds: 1/60 of a window
    Column("slot", BigInteger, primary_key=True, autoincrement=False),  # opened // width
    *key_columns("server", "tenant", "adapter"),  # adapter without version; "": whole requests
    *columns(BigInteger, "requests", "tokens"),
)
server_table = _table("tenant_servers", *key_columns("server"), *columns(Float, "seen"))  # time by the database's clock
shadow_table = _table(
    "tenant_shadows",
    Column("id", Integer, primary_key=True, autoincrement=True),
    *columns(Float, "at"),
    *columns(Key(), "tenant"),
    Column("route", Key(), nullable=False, index=True),
    *columns(Key(), "request", "target", "shadow"),
    *columns(Boolean, "same"),
    Column("first_difference", Integer),  # in characters; NULL for equal texts
    Column("distance", Float),  # NULL; earlier versions compared images
    *columns(Text, "target_sha256", "shadow_sha256"),
    *columns(Integer, "target_tokens", "shadow_tokens"),
    *columns(Float, "target_seconds", "shadow_seconds"),
)
audit_table = _table(
    "tenant_audit",
    Column("number", Integer, primary_key=True, autoincrement=False),
    *columns(Text, "at", "who"),
    *columns(Key(), "what", "subject"),
    *columns(Text, "before", "after", "previous", "hash"),  # before, after: JSON
)
feedback_terms_table = _table(
    "tenant_feedback_terms",
    *key_columns("tenant"),
    *columns(Float, "days"),
    *columns(Text, "names"),  # names: JSON
)
answer_table = _table(  # completions that a tenant allows to be stored
    "tenant_answers",
    *key_columns("tenant", "id"),
    *columns(Float, "at"),
    Column("expires", Float, nullable=False, index=True),
    *columns(Key(), "whose", "name"),  # whose: hash of the request's user, or ""
    *columns(Text, "adapters", "asked", "choices"),  # JSON: names; messages and tools; assistant messages
    Index("tenant_answers_whose", "tenant", "whose"),
)
feedback_table = _table(
    "tenant_feedback",
    *key_columns("tenant", "answer"),
    Column("choice", Integer, primary_key=True, autoincrement=False),
    *columns(Float, "at"),
    Column("up", Boolean),  # thumb up or down
    *columns(Text, "corrected", "rejected", nullable=True),  # JSON: a message; [[answer, choice], …]
)
deletion_table = _table("tenant_forgotten", *key_columns("tenant", "what"), *columns(Float, "at"))


# -- names and patterns ------------------------------------------------------------------------------------------------


_PATTERN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._/@:+*-]{0,199}")


def check_tenant(name: str) -> str:
    """Return a valid tenant name (a valid namespace). Raises ConfigError."""
    with _naming(name, "tenant", "a tenant", "; not `all`"):
        if name == "all":
            raise ConfigError("'all' means every tenant", fix="another name")
        check_namespace(name)
    return name


def check_route_name(name: str) -> str:
    """Return a valid route name. Raises ConfigError."""
    with _naming(name, "route", "a route"):
        check_name(name, cased=True)
    return name


def check_reference(text: str) -> str:
    """Return a text that names an adapter, with or without a version. Raises ConfigError."""
    with _naming(text, "adapter", "an adapter"):
        parse_reference(text, cased=True)
    return text


@contextlib.contextmanager
def _naming(text: str, where: str, kind: str, note: str = "") -> Iterator[None]:
    """Say in the block's ConfigError what `text` cannot name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{quoted(text)} cannot name {kind}", where=where, fix=f"{error.fix}{note}") from None


def check_pattern(pattern: str) -> str:
    """Return a valid pattern. Raises ConfigError."""
    if not _PATTERN.fullmatch(pattern) or {"", ".", ".."} & set(pattern.split("/")):
        fix = "a name, and * for any text"
        raise ConfigError(f"{quoted(pattern)} is not a pattern of names", where="adapters", fix=fix)
    return pattern


def pattern_matcher(patterns: Iterable[str], also: Iterable[str] = ()) -> Callable[[str], bool]:
    """Return a predicate: whether a name matches one of `patterns` or is in `also`."""
    exact = frozenset(also)
    regexes = {pattern: ".*".join(map(re.escape, pattern.split("*"))) for pattern in patterns}
    of_digests = _any_of(regex for pattern, regex in regexes.items() if pattern.startswith("sha256:"))
    of_names = _any_of(regex for pattern, regex in regexes.items() if not pattern.startswith("sha256:"))

    def sees(name: str) -> bool:
        if name in exact:
            return True
        if name.startswith("sha256:"):
            return of_digests.fullmatch(name) is not None
        return any(of_names.fullmatch(n) is not None for n in {name, name_of(name)})

    return sees


def _any_of(regexes: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{regex})" for regex in regexes) or r"(?!)")


ALL = ""
"""In a limit: the total over all tenants or adapters.

In a price: any tenant or adapter. In a route: all tenants."""
EACH = "*"
"""In a limit: each tenant without a limit of its own."""
COMMON = "common prefixes"
"""Key of the `meta` row with the patterns of adapters whose prompt cache tenants share."""

_LOCK = 0x74656E616E74  # "tenant": the key of PostgreSQL's advisory lock for changes of settings


# -- in-memory settings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tenant:
    name: str
    weight: float
    enabled: bool
    created: float
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeyRow:
    """A stored key. `hash` never leaves the process."""

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
    """The limits of one scope; None for no limit."""

    requests_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrency: int | None = None

    def in_window(self, seconds: float) -> bool:
        """Return whether there is a limit over a window of that length."""
        word = "minute" if seconds == 60 else "day"
        return getattr(self, f"requests_per_{word}") is not None or getattr(self, f"tokens_per_{word}") is not None


@dataclass(frozen=True)
class Price:
    """Price per million tokens, in millionths of the operator's currency.

    150_000 means 0.15 per million tokens. `cached`: for prompt tokens from the cache; `prompt`: for other
    prompt tokens.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def cost(self, prompt: int, cached: int, completion: int) -> int:
        """Return the cost of these tokens in millionths, rounded half up."""
        exact = (prompt - cached) * self.prompt + cached * self.cached + completion * self.completion
        return (exact + 500_000) // 1_000_000


@dataclass(frozen=True)
class TrainingTerms:
    """Price and limits of a tenant's training; None for no limit.

    `price`: per million trained tokens; `budget`: per calendar month in UTC; both in millionths. `jobs`:
    maximum number of concurrent jobs.
    """

    price: int = 0
    budget: int | None = None
    jobs: int | None = None


@dataclass(frozen=True)
class FeedbackTerms:
    """Which of a tenant's completions are stored, and for how many `days`.

    `names`: patterns of requested names or sampled adapters; empty for all.
    """

    days: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Route:
    """A route with weighted targets.

    `targets`: (name, weight). `runs`: owners of buckets, as (name, number of consecutive buckets).
    `fraction`: share of requests that also go to `shadow`.
    """

    tenant: str
    name: str
    move: int
    targets: tuple[tuple[str, int], ...]
    runs: tuple[tuple[str, int], ...]
    shadow: str | None
    fraction: float


@dataclass(frozen=True)
class TenantSettings:
    """All settings that affect requests, at one revision."""

    revision: int = 0
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    keys: Mapping[str, KeyRow] = field(default_factory=dict, repr=False)
    shared: tuple[str, ...] = ()
    limits: Mapping[tuple[str, str], Limit] = field(default_factory=dict)
    prices: Mapping[tuple[str, str], Price] = field(default_factory=dict)
    routes: Mapping[tuple[str, str], Route] = field(default_factory=dict)
    common: tuple[str, ...] = ()
    training: Mapping[str, TrainingTerms] = field(default_factory=dict)
    feedback: Mapping[str, FeedbackTerms] = field(default_factory=dict)

    def training_terms(self, tenant: str) -> TrainingTerms:
        """Return the tenant's own terms, or the default.

        A removed or disabled tenant has zero jobs. The operator, tenant "", trains without a price.
        """
        if not tenant:
            return TrainingTerms()
        if tenant not in self.tenants or not self.tenants[tenant].enabled:
            return TrainingTerms(jobs=0)
        return self.training.get(tenant, self.training.get(ALL, TrainingTerms()))

    def price(self, tenant: str, adapter: str) -> Price:
        """Return the most specific price (tenant and adapter, tenant, adapter, server), or 0."""
        scopes = ((tenant, adapter), (tenant, ALL), (ALL, adapter), (ALL, ALL))
        return next((self.prices[scope] for scope in scopes if scope in self.prices), Price())

    @cached_property
    def stores_answer(self) -> dict[str, Callable[[str], bool]]:
        """Return tenant -> predicate of names whose completions are stored, for tenants that allow any."""
        return {tenant: pattern_matcher(terms.names or ("*", "sha256:*")) for tenant, terms in self.feedback.items()}

    @cached_property
    def shares_cache(self) -> Callable[[str], bool]:
        """Return a predicate: whether tenants share the prompt cache of a name (an adapter, or the base)."""
        return pattern_matcher(self.common)

    @cached_property
    def visibility(self) -> dict[str, Callable[[str], bool]]:
        """Return tenant -> predicate of visible names: granted, shared, or the tenant's own routes."""
        own: dict[str, list[str]] = {}
        for tenant, route in self.routes:
            own.setdefault(tenant, []).append(route)
        tenants = self.tenants.values()
        return {t.name: pattern_matcher((*t.adapters, *self.shared), own.get(t.name, ())) for t in tenants}


class UnknownName(ConfigError):
    """Raised for an unknown tenant, key, pattern or route. `fix` suggests the nearest known name."""


def unknown_name(kind: str, name: str, names: Iterable[str]) -> UnknownName:
    suggestions = nearest(name, names)
    fix = f"did you mean {', '.join(suggestions)}?" if suggestions else None
    return UnknownName(f"there is no {kind} {name[:100]}", where=kind, fix=fix)


def tenant_row(c: Connection, name: str) -> dict[str, Any]:
    """Return a tenant's row. Raises UnknownName."""
    row = c.execute(select(tenant_table).where(tenant_table.c.name == name)).first()
    if row is None:
        raise unknown_name("tenant", name, c.scalars(select(tenant_table.c.name)))
    return dict(row._mapping)


SERVING_PATIENCE = 5.0
"""Seconds after which a server gives up on a statement."""


class Store:
    """The database of one server, or of several. Thread-safe."""

    def __init__(self, where: str, *, patience: float = PATIENCE) -> None:
        """Open a SQLite file or a postgresql:// URL, and create or migrate its tables. Raises ConfigError.

        patience: see `open_engine`
        """
        if ":memory:" in where or where == "sqlite://":
            raise ConfigError("tenants need a database on a disk, not in memory", where=where, fix=URL_FIX)
        self.where = where
        self.engine = open_engine(where, TENANT_SCHEMA.what, patience)
        migrate(self.engine, TENANT_SCHEMA, where)
        self._settings = TenantSettings(revision=-1)
        self.refresh()

    @property
    def settings(self) -> TenantSettings:
        """Return the settings as of the last `refresh`."""
        return self._settings

    def refresh(self) -> TenantSettings:
        """Read the database's current settings and return them."""
        with self.reading() as c:
            if int(c.scalar(_REVISION) or 0) == self._settings.revision:
                return self._settings
            read = _read(c)
        if read.revision > self._settings.revision:  # another thread can already have read a later state
            self._settings = read
        return read

    def reading(self) -> AbstractContextManager[Connection]:
        """Return a connection for queries."""
        return reading(self.engine)

    @contextlib.contextmanager
    def change(self) -> Iterator[Connection]:
        """Run a transaction that changes settings. Changes are serialized, also across processes."""
        with write_transaction(self.engine, _LOCK) as c:
            yield c
            raised = int(c.scalar(_REVISION) or 0) + 1
            c.execute(update(meta_table).where(meta_table.c.key == "revision").values(value=str(raised)))

    def close(self) -> None:
        self.engine.dispose()


_REVISION = select(meta_table.c.value).where(meta_table.c.key == "revision")


@contextlib.contextmanager
def tenants_at(location: str | None) -> Iterator[Store | None]:
    """Open the named tenants' database, or the veneer home's if it exists; otherwise yield None.

    Raises ConfigError."""
    if (where := location or database_here()) is None:
        yield None
        return
    store = Store(where)
    try:
        yield store
    finally:
        store.close()


def _first(c: Connection) -> None:
    c.execute(insert(meta_table), {"key": "revision", "value": "0"})
    append_only(c, ("tenant_audit",), "the audit log is", "tenant_audit_fixed")


TENANT_SCHEMA = Schema(
    "the tenants' database",
    _TENANT_TABLES,
    Path(__file__).parent / "versions",
    "tenant_version",
    _LOCK,
    _first,
    older="keep this one for its usage and start a new one: veneer tenant --at ELSEWHERE add NAME",
    private=True,
)


def _read(c: Connection) -> TenantSettings:
    def rows(table: Table, *order: str) -> list[Any]:
        return [*c.execute(select(table).order_by(*(table.c[name] for name in order)))]

    granted: dict[str, list[str]] = {}
    for r in rows(grant_table, "pattern"):
        granted.setdefault(r.tenant, []).append(r.pattern)
    tenants = rows(tenant_table, "name")
    moves = current_moves().order_by(move_table.c.tenant, move_table.c.route)
    routes = [route_of(row) for row in c.execute(moves)]
    common = c.scalar(select(meta_table.c.value).where(meta_table.c.key == COMMON))
    return TenantSettings(
        int(c.scalar(_REVISION) or 0),
        {r.name: Tenant(**r._mapping, adapters=tuple(granted.get(r.name, ()))) for r in tenants},
        {r.id: KeyRow(**r._mapping) for r in rows(key_table, "created", "id")},
        tuple(granted.get(ALL, ())),
        {(r.tenant, r.adapter): Limit(*(r._mapping[name] for name in LIMITS)) for r in rows(limit_table)},
        {(r.tenant, r.adapter): Price(r.prompt, r.cached, r.completion) for r in rows(price_table)},
        {(route.tenant, route.name): route for route in routes if route.targets},
        tuple(json.loads(common or "[]")),
        {r.tenant: TrainingTerms(r.price, r.budget, r.jobs) for r in rows(training_table)},
        {r.tenant: FeedbackTerms(r.days, tuple(json.loads(r.names))) for r in rows(feedback_terms_table)},
    )


def current_moves() -> Select[Any]:
    """Return a query for the current move of each route."""
    m, a = move_table.c, route_table.c
    return select(move_table).join(route_table, (a.tenant == m.tenant) & (a.route == m.route) & (a.current == m.move))


def route_of(row: Any) -> Route:
    """Return the route at one of the route's revisions."""
    spec = json.loads(row.spec)
    targets, runs = (tuple((str(name), int(n)) for name, n in spec[side]) for side in ("targets", "runs"))
    return Route(row.tenant, row.route, row.move, targets, runs, spec["shadow"], float(spec["fraction"]))
