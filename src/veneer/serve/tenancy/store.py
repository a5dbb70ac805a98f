"""The tenants' database: its tables, and the settings kept in memory.

    tenants 1─n keys, grants            routes ─1 moves (current)           limits, prices: (tenant, adapter)
    training: price and limits of a tenant's training
    feedback_terms: which completions are stored, and how long
    answers 1─n feedback                                        forgotten: deletions, for late completions
    lines: a row for each part of each request                  shadows: the newest comparisons
    sums: totals of lines by day                                slots: usage in the last minute and day
    audit: a row per change, chained

Every change of settings increments the revision in the same transaction. Before each request, a server
queries the revision, which is one number, and rereads the settings if the revision has changed. So a revoked
key, a moved route or a lower limit applies from the next request on, in every process that uses the database.
While the database is unavailable, the last settings apply.

Patterns define which names a tenant sees:

    support      the adapter with that name, in every version (support@2, support@prod)
    support@2    that version only
    acme/*       every name with that prefix; `*` matches any text, and is the only special character
    *            every name

Patterns are only compared with names, and never become paths; names that could escape a folder are rejected
anyway. Digests (sha256:…) belong to no namespace, so only a pattern that starts with `sha256:` matches a
digest.

This module contains tables (their migrations are in `versions`) and connections. Changes are in `manage` and
`routes`, and usage is in `ledger`.
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
from veneer.serve.principal import Role
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
    Column("role", Text, nullable=False, server_default="trainer"),  # servers before 0011 insert no role
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
    Column("before", Integer),  # the move to which a rollback returns
    *columns(Float, "at"),
    *columns(Text, "who", "spec"),  # spec: JSON of targets, runs, shadow, fraction; no targets if the route is removed
)
route_table = _table("tenant_routes", *key_columns("tenant", "route"), *columns(Integer, "current"))
line_table = _table(
    "tenant_lines",
    *key_columns("server", "request"),  # a server is one run of one process
    Column("part", Integer, primary_key=True),  # index in the request's mix, from 0
    # name: the client's name for the mix; digest: "" for the base; adapter: the operator's name
    *columns(Key(), "tenant", "name", "digest", "adapter"),
    *columns(Float, "strength"),
    Column("opened", Float, nullable=False, index=True),
    Column("closed", Float),
    *columns(Key(), "day", "state"),  # day: UTC day of `opened`, such as 2026-11-25; state: open, done or interrupted
    *columns(BigInteger, "asked_prompt", "asked_completion", *_TOKENS),
    *columns(Float, *_SECONDS),
    *columns(BigInteger, *(f"price_{name}" for name in _TOKENS), "cost"),  # cost: millionths
    Index("tenant_lines_open", "server", sqlite_where=text("state = 'open'"), postgresql_where=text("state = 'open'")),
)
sum_table = _table(  # sums of closed lines by day, kept after the lines are deleted
    "tenant_sums",
    *key_columns("day", "tenant", "adapter"),  # adapter "": sums over whole requests
    *columns(BigInteger, "done", "interrupted", *_TOKENS),
    *columns(Float, *_SECONDS),
    *columns(BigInteger, "cost"),
    Index("tenant_sums_tenant", "tenant", "adapter", "day"),
    Index("tenant_sums_adapter", "adapter", "day"),
)
slot_table = _table(  # recent admissions, for limits across several servers
    "tenant_slots",
    Column("width", Integer, primary_key=True, autoincrement=False),  # in seconds; 1/60 of the window
    Column("slot", BigInteger, primary_key=True, autoincrement=False),  # opened // width
    *key_columns("server", "tenant", "adapter"),  # adapter: without version; "" for whole requests
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
    Column("first_difference", Integer),  # index of a character; NULL for equal texts
    Column("distance", Float),  # always NULL; earlier versions used it for images
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
answer_table = _table(  # completions, if the tenant allows storing them
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
    Column("up", Boolean),  # whether the thumb is up
    *columns(Text, "corrected", "rejected", nullable=True),  # JSON: a message; [[answer, choice], …]
)
deletion_table = _table("tenant_forgotten", *key_columns("tenant", "what"), *columns(Float, "at"))


# -- names and patterns ------------------------------------------------------------------------------------------------


_PATTERN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._/@:+*-]{0,199}")


def check_tenant(name: str) -> str:
    """Return `name` if it is a valid tenant name, otherwise raise ConfigError.

    A tenant's name is a valid namespace other than `all`.
    """
    with _name_errors(name, "tenant", "a tenant", "; not `all`"):
        if name == "all":
            raise ConfigError("'all' means every tenant", fix="another name")
        check_namespace(name)
    return name


def check_route_name(name: str) -> str:
    """Return `name` if it is a valid route name, otherwise raise ConfigError."""
    with _name_errors(name, "route", "a route"):
        check_name(name, cased=True)
    return name


def check_reference(text: str) -> str:
    """Return `text` if it can name an adapter, with or without a version.

    Raises ConfigError otherwise.
    """
    with _name_errors(text, "adapter", "an adapter"):
        parse_reference(text, cased=True)
    return text


@contextlib.contextmanager
def _name_errors(text: str, where: str, kind: str, note: str = "") -> Iterator[None]:
    """Replace a ConfigError raised in the block with one that says what `text` cannot name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{quoted(text)} cannot name {kind}", where=where, fix=f"{error.fix}{note}") from None


def check_pattern(pattern: str) -> str:
    """Return `pattern` if it is valid, otherwise raise ConfigError."""
    if not _PATTERN.fullmatch(pattern) or {"", ".", ".."} & set(pattern.split("/")):
        fix = "use a name, in which * matches any text"
        raise ConfigError(f"{quoted(pattern)} is not a valid pattern for names", where="adapters", fix=fix)
    return pattern


def pattern_matcher(patterns: Iterable[str], also: Iterable[str] = ()) -> Callable[[str], bool]:
    """Return a predicate: whether a name matches `patterns`, or is in `also`."""
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
"""The name that stands for all tenants, or for all adapters.

In a limit: the total over all. In a price: any tenant or adapter. In a route: all tenants.
"""
EACH = "*"
"""The tenant of a limit that applies to each tenant without its own limit."""
COMMON = "common prefixes"
"""Key of the `meta` row that lists adapters whose prompt cache all tenants share.

The row contains patterns of names.
"""

_LOCK = 0x74656E616E74  # "tenant" in ASCII: the key of PostgreSQL's advisory lock for changes of settings


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
    """A stored key. `hash` never leaves the process; it covers the role (see `keys.hash_key`)."""

    id: str
    tenant: str
    hash: str = field(repr=False)
    label: str
    created: float
    expires: float | None
    revoked: float | None
    role: Role = "trainer"

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
        """Return whether any limit applies to a window of this length."""
        word = "minute" if seconds == 60 else "day"
        return getattr(self, f"requests_per_{word}") is not None or getattr(self, f"tokens_per_{word}") is not None


@dataclass(frozen=True)
class Price:
    """Prices per million tokens, in millionths of the operator's currency.

    150_000 means 0.15 per million tokens. `cached`: for prompt tokens from the cache. `prompt`: for other
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

    `price`: price per million trained tokens, in millionths. `budget`: maximum cost per calendar month in
    UTC, in millionths. `jobs`: maximum number of concurrent jobs.
    """

    price: int = 0
    budget: int | None = None
    jobs: int | None = None


@dataclass(frozen=True)
class FeedbackTerms:
    """Which of a tenant's completions are stored, and for how many `days`.

    `names`: patterns for the requested name or a sampled adapter; empty for all completions.
    """

    days: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Route:
    """A route with weighted targets.

    `targets`: (name, weight). `runs`: (owner, number of consecutive buckets with this owner). `fraction`:
    share of requests that also go to `shadow`.
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
        """Return the tenant's own terms, or the default terms.

        A removed or disabled tenant has zero jobs. The operator, tenant "", trains for free and without
        limits.
        """
        if not tenant:
            return TrainingTerms()
        if tenant not in self.tenants or not self.tenants[tenant].enabled:
            return TrainingTerms(jobs=0)
        return self.training.get(tenant, self.training.get(ALL, TrainingTerms()))

    def price(self, tenant: str, adapter: str) -> Price:
        """Return the most specific price, or a price of 0.

        The order is: tenant and adapter, tenant, adapter, server.
        """
        scopes = ((tenant, adapter), (tenant, ALL), (ALL, adapter), (ALL, ALL))
        return next((self.prices[scope] for scope in scopes if scope in self.prices), Price())

    @cached_property
    def stores_answer(self) -> dict[str, Callable[[str], bool]]:
        """Return tenant -> predicate: whether completions for a name are stored.

        Contains only tenants that allow storage.
        """
        return {tenant: pattern_matcher(terms.names or ("*", "sha256:*")) for tenant, terms in self.feedback.items()}

    @cached_property
    def shares_cache(self) -> Callable[[str], bool]:
        """Return a predicate: whether all tenants share the prompt cache of a name.

        The name can be an adapter's or the base's.
        """
        return pattern_matcher(self.common)

    @cached_property
    def visibility(self) -> dict[str, Callable[[str], bool]]:
        """Return tenant -> predicate: whether the tenant can see a name.

        Visible names are granted to the tenant, shared with all tenants, or the tenant's own routes.
        """
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
"""Seconds that a server waits for a database statement."""


class Store:
    """The database of one server, or of several servers. Thread-safe."""

    def __init__(self, where: str, *, patience: float = PATIENCE) -> None:
        """Open a SQLite file or a postgresql:// URL; create or migrate its tables.

        `patience`: see `open_engine`. Raises ConfigError.
        """
        if ":memory:" in where or where == "sqlite://":
            raise ConfigError("tenants need a database on a disk, not in memory", where=where, fix=URL_FIX)
        self.where = where
        self.engine = open_engine(where, TENANT_SCHEMA.what, patience)
        migrate(self.engine, TENANT_SCHEMA, where)
        self.settings = TenantSettings(revision=-1)
        """The settings as of the last `refresh`."""
        self.refresh()

    def refresh(self) -> TenantSettings:
        """Return the current settings, read from the database."""
        with self.reading() as c:
            if int(c.scalar(_REVISION) or 0) == self.settings.revision:
                return self.settings
            read = _read(c)
        if read.revision > self.settings.revision:  # another thread may have stored a later state
            self.settings = read
        return read

    def reading(self) -> AbstractContextManager[Connection]:
        """Return a context manager that opens a connection for queries."""
        return reading(self.engine)

    @contextlib.contextmanager
    def change(self) -> Iterator[Connection]:
        """Run a transaction that changes settings.

        Only one such transaction runs at a time, in all processes.
        """
        with write_transaction(self.engine, _LOCK) as c:
            yield c
            raised = int(c.scalar(_REVISION) or 0) + 1
            c.execute(update(meta_table).where(meta_table.c.key == "revision").values(value=str(raised)))

    def close(self) -> None:
        self.engine.dispose()


_REVISION = select(meta_table.c.value).where(meta_table.c.key == "revision")


@contextlib.contextmanager
def tenants_at(location: str | None) -> Iterator[Store | None]:
    """Yield the tenants' database at `location`, or None.

    Without a location, yields the database in the veneer home if it exists, otherwise None. Raises
    ConfigError.
    """
    if (where := location or database_here()) is None:
        yield None
        return
    store = Store(where)
    try:
        yield store
    finally:
        store.close()


def _initialize(c: Connection) -> None:
    c.execute(insert(meta_table), {"key": "revision", "value": "0"})
    append_only(c, ("tenant_audit",), "the audit log is", "tenant_audit_fixed")


TENANT_SCHEMA = Schema(
    "the tenants' database",
    _TENANT_TABLES,
    Path(__file__).parent / "versions",
    "tenant_version",
    _LOCK,
    _initialize,
    older="keep this database for its usage records, and start a new one: veneer tenant --at ELSEWHERE add NAME",
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
    """Return the route that a row of the `moves` table describes."""
    spec = json.loads(row.spec)
    targets, runs = (tuple((str(name), int(n)) for name, n in spec[side]) for side in ("targets", "runs"))
    return Route(row.tenant, row.route, row.move, targets, runs, spec["shadow"], float(spec["fraction"]))
