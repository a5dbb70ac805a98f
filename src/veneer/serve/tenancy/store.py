"""The tables of tenants, and the settings that a server holds of them in memory.

    tenants 1─n keys, grants            aliases ─1 moves (current)          limits, prices: (tenant, adapter)
    ledger: a row a request             shadows: the newest comparisons     audit: a row a change, chained

Whatever changes settings raises the revision in the same transaction. A server asks for the revision before each
request, one number, and reads the settings again when it moved: a revoked key, a moved alias or a lower limit holds
from the next request on, in every process on the database.
Knows tables and connections; changes are in `manage` and `rollouts`, what was used in `ledger`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
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
    Table,
    Text,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

from veneer.errors import ConfigError, nearest
from veneer.library.database import URL_FIX, Key, open_engine, reading, shown_url, writing
from veneer.serve.tenancy.names import seeing

__all__ = [
    "ALL", "EACH", "LIMITS", "Alias", "KeyRow", "Limit", "NotThere", "Price", "Settings", "Store", "Tenant", "alias_of",
    "aliases", "audit", "grants", "keys", "ledger", "limits", "meta", "missing", "moves", "prices", "shadows",
    "tenant_row", "tenants",
]  # fmt: skip

SCHEMA = "1"
ALL = ""
"""In a limit: all tenants, or all adapters, together. In a price: any of them. In an alias: it is everybody's."""
EACH = "*"
"""In a limit: each tenant for itself, unless it has its own limit."""
LIMITS = ("requests_per_minute", "requests_per_day", "tokens_per_minute", "tokens_per_day", "concurrency")

_LOCK = 0x74656E616E74  # "tenant": the key of PostgreSQL's advisory lock for changes of settings
_TABLES = MetaData()


def _tenant() -> Column[Any]:
    return Column("tenant", Key(), primary_key=True)


meta = Table("tenant_meta", _TABLES, Column("key", Key(), primary_key=True), Column("value", Text, nullable=False))
tenants = Table(
    "tenants",
    _TABLES,
    Column("name", Key(), primary_key=True),
    Column("weight", Float, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("created", Float, nullable=False),  # seconds since 1970, as all times here
)
keys = Table(
    "tenant_keys",
    _TABLES,
    Column("id", Key(), primary_key=True),
    Column("tenant", Key(), ForeignKey(tenants.c.name, ondelete="CASCADE"), nullable=False, index=True),
    Column("hash", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
)
grants = Table(
    "tenant_grants",
    _TABLES,
    _tenant(),  # ALL: shared with everybody
    Column("pattern", Key(), primary_key=True),
)
limits = Table(
    "tenant_limits",
    _TABLES,
    _tenant(),
    Column("adapter", Key(), primary_key=True),
    *(Column(name, BigInteger) for name in LIMITS),
)
prices = Table(
    "tenant_prices",
    _TABLES,
    _tenant(),
    Column("adapter", Key(), primary_key=True),
    *(Column(name, BigInteger, nullable=False) for name in ("prompt", "cached", "completion")),
)
moves = Table(
    "tenant_moves",
    _TABLES,
    _tenant(),
    Column("alias", Key(), primary_key=True),
    Column("move", Integer, primary_key=True),
    Column("before", Integer),  # the move that was current when this was made: where a rollback leads
    Column("at", Float, nullable=False),
    Column("who", Text, nullable=False),
    Column("spec", Text, nullable=False),  # JSON of targets, runs, shadow, fraction; no targets: the alias is gone
)
aliases = Table(
    "tenant_aliases",
    _TABLES,
    _tenant(),
    Column("alias", Key(), primary_key=True),
    Column("current", Integer, nullable=False),
)
ledger = Table(
    "tenant_ledger",
    _TABLES,
    Column("server", Key(), primary_key=True),  # one run of one process
    Column("request", Key(), primary_key=True),
    Column("tenant", Key(), nullable=False),
    Column("name", Key(), nullable=False),  # the client's word
    Column("adapter", Key(), nullable=False),  # what answered
    Column("opened", Float, nullable=False, index=True),
    Column("closed", Float),
    Column("day", Key(), nullable=False),  # of `opened`, in UTC: 2026-11-25
    Column("state", Key(), nullable=False),  # open, done, interrupted
    Column("asked_prompt", BigInteger, nullable=False),
    Column("asked_completion", BigInteger, nullable=False),
    *(Column(name, BigInteger, nullable=False) for name in ("prompt", "cached", "completion")),
    *(Column(name, Float, nullable=False) for name in ("queued", "prefill", "decode")),
    *(Column(f"price_{name}", BigInteger, nullable=False) for name in ("prompt", "cached", "completion")),
    Column("cost", BigInteger, nullable=False),  # millionths
    Index("tenant_ledger_day", "day", "tenant", "adapter"),
    Index("tenant_ledger_open", "server", sqlite_where=text("state = 'open'"), postgresql_where=text("state = 'open'")),
)
shadows = Table(
    "tenant_shadows",
    _TABLES,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("tenant", Key(), nullable=False),
    Column("alias", Key(), nullable=False, index=True),
    Column("request", Key(), nullable=False),
    Column("target", Key(), nullable=False),
    Column("shadow", Key(), nullable=False),
    Column("same", Boolean, nullable=False),
    Column("first_difference", Integer),  # in characters; NULL where the texts are equal, and of pictures
    Column("distance", Float),  # mean difference of pixels, 0 to 1; NULL of texts
    *(Column(f"{side}_sha256", Text, nullable=False) for side in ("target", "shadow")),
    *(Column(f"{side}_tokens", Integer, nullable=False) for side in ("target", "shadow")),
    *(Column(f"{side}_seconds", Float, nullable=False) for side in ("target", "shadow")),
)
audit = Table(
    "tenant_audit",
    _TABLES,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", Text, nullable=False),
    Column("who", Text, nullable=False),
    Column("what", Key(), nullable=False),
    Column("subject", Key(), nullable=False),
    Column("before", Text, nullable=False),  # JSON
    Column("after", Text, nullable=False),  # JSON
    Column("previous", Text, nullable=False),
    Column("hash", Text, nullable=False),
)
_APPEND_ONLY = {
    "sqlite": [
        f"CREATE TRIGGER tenant_audit_no_{verb.lower()} BEFORE {verb} ON tenant_audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        for verb in ("UPDATE", "DELETE")
    ],
    "postgresql": [
        "CREATE FUNCTION tenant_audit_fixed() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$",
        "CREATE TRIGGER tenant_audit_fixed BEFORE UPDATE OR DELETE ON tenant_audit "
        "FOR EACH ROW EXECUTE FUNCTION tenant_audit_fixed()",
    ],
}


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
class Alias:
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
    aliases: Mapping[tuple[str, str], Alias] = field(default_factory=dict)

    def price(self, tenant: str, adapter: str) -> Price:
        """The closest: of this tenant for this adapter, of the tenant, of the adapter, of the server; else nothing."""
        for scope in ((tenant, adapter), (tenant, ALL), (ALL, adapter), (ALL, ALL)):
            if scope in self.prices:
                return self.prices[scope]
        return Price()

    @cached_property
    def sight(self) -> dict[str, Callable[[str], bool]]:
        """Tenant -> what it sees: what was granted to it, what is shared, and its own aliases."""
        own: dict[str, list[str]] = {}
        for tenant, alias in self.aliases:
            own.setdefault(tenant, []).append(alias)
        return {t.name: seeing((*t.adapters, *self.shared), own.get(t.name, ())) for t in self.tenants.values()}


class NotThere(ConfigError):
    """Raised for a tenant, a key, a pattern or an alias that is not there; `fix` names the nearest that is."""


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

    def __init__(self, where: str) -> None:
        """A SQLite file or a postgresql:// URL; tables are made where there are none. Raises ConfigError."""
        if ":memory:" in where or where == "sqlite://":
            raise ConfigError("tenants need a database that stays", where=where, fix=URL_FIX)
        self.where = where
        self.engine = open_engine(where, "the tenants' database")
        try:
            self._make()
        except DBAPIError as error:
            self.engine.dispose()
            raise ConfigError(
                f"the tenants' database cannot be opened: {str(error.orig).strip()}",
                where=shown_url(where),
                fix=URL_FIX,
            ) from error
        self._settings = Settings(revision=-1)
        self.look()

    def _make(self) -> None:
        found = self._schema()
        if found is None:
            with writing(self.engine, _LOCK) as c:
                _TABLES.create_all(c)
                if c.scalar(_SCHEMA_ROW) is None:
                    c.execute(insert(meta), [{"key": "schema", "value": SCHEMA}, {"key": "revision", "value": "0"}])
                    for statement in _APPEND_ONLY[c.dialect.name]:
                        c.exec_driver_sql(statement)
            found = SCHEMA
        elif found == SCHEMA and "distance" not in {c["name"] for c in inspect(self.engine).get_columns(shadows.name)}:
            with writing(self.engine, _LOCK) as c:  # databases from before pictures had shadows
                c.exec_driver_sql(f"ALTER TABLE {shadows.name} ADD COLUMN distance FLOAT")
        if found != SCHEMA:
            self.engine.dispose()
            raise ConfigError(
                f"the tenants' database has version {found}, this veneer knows {SCHEMA}", where=shown_url(self.where)
            )

    def _schema(self) -> str | None:
        try:
            with reading(self.engine) as c:
                found: str | None = c.scalar(_SCHEMA_ROW)
                return found
        except (OperationalError, ProgrammingError) as error:
            if "tenant_meta" in str(error.orig):
                return None
            raise

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
        with writing(self.engine, _LOCK) as c:
            yield c
            raised = int(c.scalar(_REVISION) or 0) + 1
            c.execute(update(meta).where(meta.c.key == "revision").values(value=str(raised)))

    def close(self) -> None:
        self.engine.dispose()


_SCHEMA_ROW = select(meta.c.value).where(meta.c.key == "schema")
_REVISION = select(meta.c.value).where(meta.c.key == "revision")


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
    pointers = [alias_of(row) for row in c.execute(current.order_by(moves.c.tenant, moves.c.alias))]
    return Settings(
        revision,
        {t.name: t for t in found},
        {r.id: KeyRow(**r._mapping) for r in c.execute(select(keys).order_by(keys.c.created, keys.c.id))},
        tuple(granted.get(ALL, ())),
        {(r.tenant, r.adapter): Limit(*(r._mapping[name] for name in LIMITS)) for r in c.execute(select(limits))},
        {(r.tenant, r.adapter): Price(r.prompt, r.cached, r.completion) for r in c.execute(select(prices))},
        {(a.tenant, a.name): a for a in pointers if a.targets},
    )


def alias_of(row: Any) -> Alias:
    """An alias as one of its moves left it."""
    spec = json.loads(row.spec)
    pairs = {name: tuple((str(who), int(n)) for who, n in spec[name]) for name in ("targets", "runs")}
    return Alias(
        row.tenant, row.alias, row.move, pairs["targets"], pairs["runs"], spec["shadow"], float(spec["fraction"])
    )
