"""The tables of tenants.

    tenants 1─n keys, grants            aliases ─1 moves (current)          limits, prices: (tenant, adapter)
    lines: a row for each part of each request                             shadows: the newest comparisons
    sums: lines by day      slots: of the last minute and day               audit: a row a change, chained

Knows nothing of what they mean; `versions` has how they came to be so.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    text,
)

from veneer.library.database import Key

__all__ = [
    "APPEND_ONLY", "LIMITS", "TABLES", "aliases", "audit", "grants", "keys", "limits", "lines", "meta", "moves",
    "prices", "servers", "shadows", "slots", "sums", "tenants",
]  # fmt: skip

LIMITS = ("requests_per_minute", "requests_per_day", "tokens_per_minute", "tokens_per_day", "concurrency")
TABLES = MetaData()


def _tenant() -> Column[Any]:
    return Column("tenant", Key(), primary_key=True)


meta = Table("tenant_meta", TABLES, Column("key", Key(), primary_key=True), Column("value", Text, nullable=False))
tenants = Table(
    "tenants",
    TABLES,
    Column("name", Key(), primary_key=True),
    Column("weight", Float, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("created", Float, nullable=False),  # seconds since 1970, as all times here
)
keys = Table(
    "tenant_keys",
    TABLES,
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
    TABLES,
    _tenant(),  # ALL: shared with everybody
    Column("pattern", Key(), primary_key=True),
)
limits = Table(
    "tenant_limits",
    TABLES,
    _tenant(),
    Column("adapter", Key(), primary_key=True),
    *(Column(name, BigInteger) for name in LIMITS),
)
prices = Table(
    "tenant_prices",
    TABLES,
    _tenant(),
    Column("adapter", Key(), primary_key=True),
    *(Column(name, BigInteger, nullable=False) for name in ("prompt", "cached", "completion")),
)
moves = Table(
    "tenant_moves",
    TABLES,
    _tenant(),
    Column("alias", Key(), primary_key=True),
    Column("move", Integer, primary_key=True),
    Column("before", Integer),  # the move that was current when this was made: where a rollback leads
    Column("at", Float, nullable=False),
    Column("who", Text, nullable=False),
    Column("spec", Text, nullable=False),  # JSON of targets, runs, shadow, fraction; no targets: the route is gone
)
aliases = Table(
    "tenant_aliases",
    TABLES,
    _tenant(),
    Column("alias", Key(), primary_key=True),
    Column("current", Integer, nullable=False),
)
lines = Table(
    "tenant_lines",
    TABLES,
    Column("server", Key(), primary_key=True),  # one run of one process
    Column("request", Key(), primary_key=True),
    Column("part", Integer, primary_key=True),  # of the request's mix, from 0
    Column("tenant", Key(), nullable=False),
    Column("name", Key(), nullable=False),  # the client's word
    Column("digest", Key(), nullable=False),  # of the part; "" for the base
    Column("adapter", Key(), nullable=False),  # what the operator calls it
    Column("strength", Float, nullable=False),
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
    Index("tenant_lines_open", "server", sqlite_where=text("state = 'open'"), postgresql_where=text("state = 'open'")),
)
sums = Table(
    "tenant_sums",  # lines that are closed, by day; kept when the lines are gone
    TABLES,
    Column("day", Key(), primary_key=True),
    _tenant(),
    Column("adapter", Key(), primary_key=True),  # "": whole requests, whatever their mixes
    *(Column(name, BigInteger, nullable=False) for name in ("done", "interrupted", "prompt", "cached", "completion")),
    *(Column(name, Float, nullable=False) for name in ("queued", "prefill", "decode")),
    Column("cost", BigInteger, nullable=False),
)
slots = Table(
    "tenant_slots",  # what was admitted lately, for limits that hold over several servers
    TABLES,
    Column("width", Integer, primary_key=True, autoincrement=False),  # seconds: a sixtieth of a window
    Column("slot", BigInteger, primary_key=True, autoincrement=False),  # opened // width
    Column("server", Key(), primary_key=True),
    _tenant(),
    Column("adapter", Key(), primary_key=True),  # without its version; "": whole requests
    Column("requests", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)
servers = Table(
    "tenant_servers",  # who is there
    TABLES,
    Column("server", Key(), primary_key=True),
    Column("seen", Float, nullable=False),  # seconds since 1970 by the database's clock
)
shadows = Table(
    "tenant_shadows",
    TABLES,
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
    TABLES,
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
APPEND_ONLY = {
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
