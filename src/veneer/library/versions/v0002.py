"""What shelves are ordered and counted by: rank and gain, out of the cards; what the last look at an adapter found.
A free search no longer looks through the bytes of a card's picture."""

from __future__ import annotations

import json

from alembic import op
from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    String,
    Text,
    bindparam,
    column,
    select,
    table,
    update,
)

from veneer.library.database import Key
from veneer.library.describe import AdapterDescription

revision = "0002"
down_revision = "0001"

_SOME = 500


def upgrade() -> None:
    def of_entry() -> Column[str]:
        return Column("entry", Key(), ForeignKey("library_entries.id", ondelete="CASCADE"), primary_key=True)

    figures = op.create_table(
        "library_figures", of_entry(), Column("rank", Integer, nullable=False), Column("gain", Float)
    )
    op.create_table(
        "library_checks",
        of_entry(),
        Column("name", Key(), primary_key=True),
        Column("ok", Boolean),
        Column("detail", Text, nullable=False),
        Column("at", String, nullable=False),
    )
    entries = table("library_entries", *(column(n) for n in ("id", "format", "card", "words")))
    connection, e = op.get_bind(), entries.c
    ids = connection.scalars(select(e.id)).all()
    for at in range(0, len(ids), _SOME):
        rows = connection.execute(select(e.id, e.format, e.card).where(e.id.in_(ids[at : at + _SOME]))).all()
        said = {row.id: AdapterDescription("", row.format, json.loads(row.card)) for row in rows}
        op.bulk_insert(figures, [{"entry": id, **about.figures()} for id, about in said.items()])
        words = [{"entry": id, "words": about.columns(0)["words"]} for id, about in said.items()]
        put = update(entries).where(e.id == bindparam("entry")).values(words=bindparam("words"))
        connection.execute(put, words)
