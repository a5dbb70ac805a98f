"""Migrate a database's tables to the current revision.

A folder holds one Alembic script per revision (v0010.py and later), and a table in the database records the
current revision. In a new database, the current tables are created directly. A migration is one transaction
under the database's own lock: if two processes start together, only one of them migrates; if a process is
killed, the tables are unchanged.

Every later build can migrate databases of revision 0010 and later, because scripts are added but never
removed. A database from an earlier, unreleased build or from a later build is rejected with instructions."""

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
    """The tables of a database, and how they are created and migrated.

    what: the name of the database in error messages.
    scripts: the folder of the revision scripts.
    table: the table that records the revision.
    lock: the key of PostgreSQL's advisory lock.
    first: creates what a new database needs besides `tables`.
    older: instructions for a database of an unreleased build.
    private: whether to keep other users of this machine from reading the database."""

    what: str
    tables: MetaData
    scripts: Path
    table: str
    lock: int
    first: Callable[[Connection], None] = lambda connection: None
    older: str = "start a new database; adapter files stay readable"
    private: bool = False

    @property
    def revisions(self) -> list[str]:
        return sorted(path.stem[1:] for path in self.scripts.glob("v[0-9]*.py"))

    @property
    def version_table(self) -> Table:
        """Return the table that records the revision, as Alembic defines it."""
        return Table(self.table, MetaData(), Column("version_num", String(32), primary_key=True))


def append_only(connection: Connection, tables: Sequence[str], subject: str, function: str) -> None:
    """Make the database refuse updates and deletes on these tables.

    subject: the start of the error message, such as "the audit log is".
    function: the name for the function that PostgreSQL's triggers call."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(
            f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{subject} append-only'; END $$"
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
                f"BEGIN SELECT RAISE(ABORT, '{subject} append-only'); END"
            )


def migrate(engine: Engine, schema: Schema, where: str) -> None:
    """Migrate the tables to the current revision.

    Raises ConfigError, and disposes of the engine, if the database cannot be opened or is from an unreleased
    or a later build."""
    if schema.private:
        keep_private(engine)
    try:
        with reading(engine) as connection:
            present = revision(connection, schema)
        if present != schema.revisions[-1]:
            with write_transaction(engine, schema.lock) as connection:
                _migrate(connection, schema)
    except DBAPIError as error:
        engine.dispose()
        raise ConfigError(
            f"{schema.what} cannot be opened: {str(error.orig).strip()}", where=shown_url(where), fix=URL_FIX
        ) from error
    except ConfigError as error:
        engine.dispose()
        raise ConfigError(error.what, where=shown_url(where), fix=error.fix) from None


def revision(connection: Connection, schema: Schema) -> str | None:
    """Return the revision recorded in the database, or None if there is none."""
    if not inspect(connection).has_table(schema.table):
        return None
    number: str | None = connection.scalar(select(schema.version_table.c.version_num))
    return number


def _migrate(connection: Connection, schema: Schema) -> None:
    """Migrate in a transaction that holds the lock.

    Does nothing if another process migrated the database just before."""
    number, revisions = revision(connection, schema), schema.revisions
    if number == revisions[-1]:
        return
    present = set(inspect(connection).get_table_names())
    if number is None and not present & set(schema.tables.tables):
        schema.tables.create_all(connection)
        schema.first(connection)
        schema.version_table.create(connection)
        connection.execute(insert(schema.version_table), {"version_num": revisions[-1]})
    elif number in revisions:
        _run_scripts(connection, schema)
    elif number is None or number < revisions[0]:
        raise ConfigError(f"{schema.what} was written by an unreleased build of veneer", fix=schema.older)
    else:
        problem = f"{schema.what} has version {number}; this veneer supports {revisions[0]} to {revisions[-1]}"
        raise ConfigError(problem, fix="update veneer: a later version wrote it")


def _run_scripts(connection: Connection, schema: Schema) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    folders = {"script_location": Path(__file__).parent / "alembic", "version_locations": schema.scripts}
    for name, path in folders.items():
        config.set_main_option(name, str(path).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.attributes |= {"connection": connection, "version_table": schema.table}
    command.upgrade(config, "head")
