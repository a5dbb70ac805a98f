"""Tables that change from one veneer to the next: which revision a database has, and how it comes to this one's.

A folder holds a script for each revision, v0001.py and on, which Alembic runs in their order; a table of the database
says which was the last. All of it happens in one transaction under the database's own lock, so two processes that
start at once do it once, and a kill leaves the tables as they were. A new database gets today's tables at once. One of
a revision that has no script here was made by a later veneer, and is left alone.
Knows no tables but the one that holds the revision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Column, Connection, Engine, MetaData, String, Table, insert, inspect, select
from sqlalchemy.exc import DBAPIError

from veneer.errors import ConfigError
from veneer.library.database import URL_FIX, keep_private, reading, shown_url, write_transaction


@dataclass(frozen=True)
class Schema:
    """The tables of a database. `what`: what is kept there, for errors. `scripts`: the folder of the revisions.
    `table`: holds the revision. `before`: the revision of tables from before it was held; None where there are no
    tables. `first`: what a new database needs besides `tables`. `lock`: the key of PostgreSQL's advisory lock.
    `private`: whether it holds what people wrote, so that nobody else on this machine may read it."""

    what: str
    tables: MetaData
    scripts: Path
    table: str
    lock: int
    before: Callable[[Connection], str | None]
    first: Callable[[Connection], None] = lambda connection: None
    private: bool = False

    @property
    def revisions(self) -> list[str]:
        return sorted(path.stem[1:] for path in self.scripts.glob("v[0-9]*.py"))

    @property
    def held(self) -> Table:
        """As Alembic has it."""
        return Table(self.table, MetaData(), Column("version_num", String(32), primary_key=True))


def append_only(connection: Connection, tables: Sequence[str], what: str, function: str) -> None:
    """Has the database itself refuse whatever changes or removes rows of these tables. `what`: as in "the audit log
    is"; `function`: what PostgreSQL's triggers call."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(
            f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{what} append-only'; END $$"
        )
    for table in tables:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(
                f"CREATE TRIGGER {table}_fixed BEFORE UPDATE OR DELETE ON {table} "
                f"FOR EACH ROW EXECUTE FUNCTION {function}()"
            )
            continue
        for verb in ("UPDATE", "DELETE"):
            connection.exec_driver_sql(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{what} append-only'); END"
            )


def bring_up(engine: Engine, schema: Schema, where: str) -> None:
    """Brings the tables to this veneer's revision. Raises ConfigError for a database of a later veneer, or one that
    cannot be opened; the engine is then disposed of."""
    if schema.private:
        keep_private(engine)
    try:
        with reading(engine) as connection:
            found = revision(connection, schema)
        if found != schema.revisions[-1]:
            with write_transaction(engine, schema.lock) as connection:
                _change(connection, schema)
    except DBAPIError as error:
        engine.dispose()
        raise ConfigError(
            f"{schema.what} cannot be opened: {str(error.orig).strip()}", where=shown_url(where), fix=URL_FIX
        ) from error
    except ConfigError as error:
        engine.dispose()
        raise ConfigError(error.what, where=shown_url(where), fix=error.fix) from None


def revision(connection: Connection, schema: Schema) -> str | None:
    """The revision that the database says it has; None if it has none."""
    if not inspect(connection).has_table(schema.table):
        return None
    found: str | None = connection.scalar(select(schema.held.c.version_num))
    return found


def _change(connection: Connection, schema: Schema) -> None:
    """In a transaction that holds the lock: perhaps another process has just done it."""
    said = revision(connection, schema)
    found = said or schema.before(connection)
    known = schema.revisions
    if found == known[-1] and said:
        return
    if found is None:
        schema.tables.create_all(connection)
        schema.first(connection)
        schema.held.create(connection, checkfirst=True)
        connection.execute(insert(schema.held), {"version_num": known[-1]})
    elif found not in known:
        raise ConfigError(
            f"{schema.what} has version {found}; this veneer knows {known[0]} to {known[-1]}",
            fix="a later veneer made it: update this one",
        )
    else:
        _run_scripts(connection, schema, None if said else found)


def _run_scripts(connection: Connection, schema: Schema, stamp: str | None) -> None:
    """`stamp`: the revision to begin from where the database says none."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    places = {"script_location": Path(__file__).parent / "alembic", "version_locations": schema.scripts}
    for name, path in places.items():
        config.set_main_option(name, str(path).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.attributes |= {"connection": connection, "version_table": schema.table}
    if stamp is not None:
        command.stamp(config, stamp)
    command.upgrade(config, "head")
