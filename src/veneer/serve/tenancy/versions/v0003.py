"""The ledger has a line for each part of a request's mix, sums by day and by slots, and a list of servers.

A row of before becomes the one line of its request, with the text it had as its adapter; its digest is not known.
"""

from __future__ import annotations

import time

from alembic import op
from sqlalchemy import BigInteger, Column, Float, Integer, text

from veneer.library.database import Key

revision = "0003"
down_revision = "0002"

_TOKENS, _SECONDS = ("prompt", "cached", "completion"), ("queued", "prefill", "decode")


def upgrade() -> None:
    _make()
    kept = ["server", "request", "tenant", "name", "adapter", "opened", "closed", "day", "state", "asked_prompt"]
    kept += ["asked_completion", *_TOKENS, *_SECONDS, *(f"price_{name}" for name in _TOKENS), "cost"]
    columns = ", ".join(kept)
    op.execute(
        f"INSERT INTO tenant_lines ({columns}, part, digest, strength) SELECT {columns}, 0, '', 1.0 FROM tenant_ledger"
    )
    figures = (*_TOKENS, *_SECONDS, "cost")
    counts = ", ".join(f"SUM(CASE WHEN state = '{state}' THEN 1 ELSE 0 END)" for state in ("done", "interrupted"))
    added = ", ".join(f"SUM({name})" for name in figures)
    for adapter, more in (("''", ""), ("adapter", ", adapter")):
        op.execute(
            f"INSERT INTO tenant_sums (day, tenant, adapter, done, interrupted, {', '.join(figures)}) "
            f"SELECT day, tenant, {adapter}, {counts}, {added} FROM tenant_ledger WHERE state <> 'open' "
            f"GROUP BY day, tenant{more}"
        )
    _keep_the_last_day()
    op.drop_table("tenant_ledger")
    op.create_index("ix_tenant_lines_opened", "tenant_lines", ["opened"])
    still_open = text("state = 'open'")
    op.create_index(
        "tenant_lines_open", "tenant_lines", ["server"], sqlite_where=still_open, postgresql_where=still_open
    )
    op.execute(
        "UPDATE tenant_meta SET value = '3' WHERE key = 'schema'"
    )  # veneers of before refuse what they read here


def _keep_the_last_day() -> None:
    """Limits by the day forget nothing of it."""
    here, width = op.get_context().dialect.name, 1440
    if here == "postgresql":
        slot, name = f"FLOOR(opened / {width})", "SPLIT_PART(adapter, '@', 1)"
    else:
        slot, name = f"CAST(opened / {width} AS INTEGER)", "SUBSTR(adapter, 1, INSTR(adapter || '@', '@') - 1)"
    tokens = (
        "CASE state WHEN 'done' THEN prompt + completion WHEN 'open' THEN asked_prompt + asked_completion ELSE 0 END"
    )
    for adapter, group in (("''", ""), (name, f", {name}")):
        op.execute(
            f"INSERT INTO tenant_slots (width, slot, server, tenant, adapter, requests, tokens) "
            f"SELECT {width}, {slot}, server, tenant, {adapter}, COUNT(*), SUM({tokens}) FROM tenant_ledger "
            f"WHERE opened > {time.time() - 86400 - width} GROUP BY {slot}, server, tenant{group}"
        )


def _make() -> None:
    def keys(*names: str) -> list[Column]:
        return [Column(name, Key(), primary_key=True) for name in names]

    def figures(kind: type, *names: str) -> list[Column]:
        return [Column(name, kind, nullable=False) for name in names]

    op.create_table(
        "tenant_lines",
        *keys("server", "request"),
        Column("part", Integer, primary_key=True),
        *(Column(name, Key(), nullable=False) for name in ("tenant", "name", "digest", "adapter")),
        *figures(Float, "strength", "opened"),
        Column("closed", Float),
        *(Column(name, Key(), nullable=False) for name in ("day", "state")),
        *figures(BigInteger, "asked_prompt", "asked_completion", *_TOKENS),
        *figures(Float, *_SECONDS),
        *figures(BigInteger, *(f"price_{name}" for name in _TOKENS), "cost"),
    )
    op.create_table(
        "tenant_sums",
        *keys("day", "tenant", "adapter"),
        *figures(BigInteger, "done", "interrupted", *_TOKENS),
        *figures(Float, *_SECONDS),
        Column("cost", BigInteger, nullable=False),
    )
    op.create_table(
        "tenant_slots",
        Column("width", Integer, primary_key=True, autoincrement=False),
        Column("slot", BigInteger, primary_key=True, autoincrement=False),
        *keys("server", "tenant", "adapter"),
        *figures(BigInteger, "requests", "tokens"),
    )
    op.create_table("tenant_servers", *keys("server"), Column("seen", Float, nullable=False))
