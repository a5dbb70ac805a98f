"""The index: what is in the library, in SQLite or PostgreSQL, through SQLAlchemy.

    names 1─n versions n─1 entries 1─n files n─1 objects        names 1─n aliases ─1 versions        versions 1─n tags
                           entries 1─n triggers, parents, checks          entries 1─1 figures

An entry is content (a manifest); a version gives it a name and a number. An object is a file of the store, the manifest
itself included. Every write transaction holds the one write lock of the index (SQLite's own, an advisory lock in
PostgreSQL), so writes follow one another, and what is said of them in `library` and `upkeep` can be read as a sequence.
Knows tables and connections; what is done with them is in `library` and `upkeep`.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    delete,
    insert,
    select,
    update,
)

from veneer.library import database
from veneer.library.database import Key, open_engine
from veneer.library.migrate import Schema, migrate

CHANNEL = "veneer_library_names"
"""Where PostgreSQL is told that names have changed."""
CONDEMNED = ""
"""The generation of an object that garbage collection is about to delete."""

_LOCK = 0x76656E656572  # "veneer": the key of PostgreSQL's advisory lock

_INDEX_TABLES = MetaData()

_meta = Table(
    "library_meta", _INDEX_TABLES, Column("key", Key(), primary_key=True), Column("value", Text, nullable=False)
)
objects = Table(
    "library_objects",
    _INDEX_TABLES,
    Column("path", Key(), primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("touched", Float, nullable=False),  # when someone last said that it is needed; seconds since 1970
    Column("generation", String, nullable=False),  # changes when the object may have been deleted in between
)
entries = Table(
    "library_entries",
    _INDEX_TABLES,
    Column("id", Key(), primary_key=True),  # the sha256 of the manifest, hexadecimal
    Column("manifest", Key(), ForeignKey(objects.c.path), nullable=False, index=True),
    Column("digest", Key(), nullable=False, index=True),  # of the adapter, "sha256:…", "" where nobody can read it
    Column("format", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("base", Key(), nullable=False, index=True),
    Column("base_name", Key(), nullable=False, index=True),  # the last part of `base` in lower case
    Column("fingerprint", Key(), nullable=False, index=True),
    Column("licence", String, nullable=False),
    Column("created", String, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("card", Text, nullable=False),  # JSON
    Column("words", Text, nullable=False),  # what a free search looks through, in lower case
)
figures = Table(  # a row for each entry; beside it, for what comes after a card in a row is far from its beginning
    "library_figures",
    _INDEX_TABLES,
    Column("entry", Key(), ForeignKey(entries.c.id, ondelete="CASCADE"), primary_key=True),
    Column("rank", Integer, nullable=False),  # 0 where pairs have several, or there are none
    Column("gain", Float),  # `describe.Gain.share`
)
files = Table(
    "library_files",
    _INDEX_TABLES,
    Column("entry", Key(), ForeignKey(entries.c.id, ondelete="CASCADE"), primary_key=True),
    Column("name", Key(), primary_key=True),
    Column("object", Key(), ForeignKey(objects.c.path), nullable=False, index=True),
    Column("sha256", String, nullable=False),
    Column("size", BigInteger, nullable=False),
)
triggers = Table(
    "library_triggers",
    _INDEX_TABLES,
    Column("entry", Key(), ForeignKey(entries.c.id, ondelete="CASCADE"), primary_key=True),
    Column("word", Key(), primary_key=True),
    Column("lower", Key(), nullable=False, index=True),
)
checks = Table(  # what was found when somebody last looked at the content
    "library_checks",
    _INDEX_TABLES,
    Column("entry", Key(), ForeignKey(entries.c.id, ondelete="CASCADE"), primary_key=True),
    Column("name", Key(), primary_key=True),
    Column("ok", Boolean),  # NULL where it could not be looked at
    Column("detail", Text, nullable=False),
    Column("at", String, nullable=False),
)
parents = Table(
    "library_parents",
    _INDEX_TABLES,
    Column("entry", Key(), ForeignKey(entries.c.id, ondelete="CASCADE"), primary_key=True),
    Column("parent", Key(), primary_key=True, index=True),
)
names = Table(
    "library_names",
    _INDEX_TABLES,
    Column("name", Key(), primary_key=True),
    Column("latest", Integer),  # NULL where all versions were removed
    Column("next", Integer, nullable=False),  # numbers of removed versions do not come back
)
versions = Table(
    "library_versions",
    _INDEX_TABLES,
    Column("name", Key(), ForeignKey(names.c.name), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("entry", Key(), ForeignKey(entries.c.id), nullable=False, index=True),
    Column("added", String, nullable=False),
    Column("source", String, nullable=False),
)
name_aliases = Table(
    "library_aliases",
    _INDEX_TABLES,
    Column("name", Key(), primary_key=True),
    Column("alias", Key(), primary_key=True),
    Column("version", Integer, nullable=False),
    ForeignKeyConstraint(["name", "version"], [versions.c.name, versions.c.version]),
    Index("library_aliases_version", "name", "version"),
)
tags = Table(
    "library_tags",
    _INDEX_TABLES,
    Column("name", Key(), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("tag", Key(), primary_key=True),
    ForeignKeyConstraint(["name", "version"], [versions.c.name, versions.c.version], ondelete="CASCADE"),
    Index("library_tags_tag", "tag"),
)


def connect(where: str) -> Engine:
    """The index in a SQLite file, or behind a URL such as postgresql://user@host/database; its tables are made if they
    are not there. Raises ConfigError for a URL that leads nowhere, MissingExtraError without psycopg."""
    engine = open_engine(where, "an index")
    migrate(engine, INDEX_SCHEMA, where)
    return engine


INDEX_SCHEMA = Schema(
    "the index",
    _INDEX_TABLES,
    Path(__file__).parent / "versions",
    "library_version",
    _LOCK,
    older="move it away, then `veneer library verify --rebuild` makes it again from the adapters' files",
)


@contextlib.contextmanager
def index_transaction(engine: Engine) -> Iterator[Connection]:
    """A transaction that holds the index's one write lock from its start: committed at the end, or not at all.

    Raises ResourceError if the lock cannot be had within two minutes."""
    with database.write_transaction(engine, _LOCK) as connection:
        yield connection


def identity(connection: Connection) -> str | None:
    """The id that ties the index to its store; None for a new index."""
    found: str | None = connection.scalar(select(_meta.c.value).where(_meta.c.key == "store"))
    return found


def identify(connection: Connection, store: str) -> None:
    """Ties the index to a store."""
    connection.execute(delete(_meta).where(_meta.c.key == "store"))
    connection.execute(insert(_meta), {"key": "store", "value": store})


def changed(connection: Connection) -> None:
    """Announces, in the transaction that changes names, that they have changed: snapshots elsewhere read them again."""
    here = _meta.c.key == "revision"
    revision = int(connection.scalar(select(_meta.c.value).where(here)) or 0) + 1
    connection.execute(delete(_meta).where(here))
    connection.execute(insert(_meta), {"key": "revision", "value": str(revision)})
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"NOTIFY {CHANNEL}")


def claim(connection: Connection, sizes: Mapping[str, int]) -> dict[str, str]:
    """Marks objects as needed from now on, in a write transaction. Returns path -> generation: as long as an object
    keeps its generation it was not deleted since."""
    now, out = time.time(), {}
    for path, size in sorted(sizes.items()):
        row = connection.execute(select(objects.c.generation).where(objects.c.path == path)).first()
        generation = secrets.token_hex(8) if row is None or row.generation == CONDEMNED else str(row.generation)
        values = {"size": size, "touched": now, "generation": generation}
        if row is None:
            connection.execute(insert(objects), {"path": path, **values})
        else:
            connection.execute(update(objects).where(objects.c.path == path).values(**values))
        out[path] = generation
    return out


def clear(connection: Connection) -> None:
    """Empties every table but the one that says to which store the index belongs."""
    for table in reversed(_INDEX_TABLES.sorted_tables):
        if table is not _meta:
            connection.execute(delete(table))


def many(connection: Connection, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
    """Inserts any number of rows, also none."""
    listed = [dict(r) for r in rows]
    if listed:
        connection.execute(insert(table), listed)
