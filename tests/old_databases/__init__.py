"""SQL dumps of each released revision's databases, by revision and kind of database.

Dumps are never changed or removed, because every later build must be able to read these databases."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine

from veneer.library.database import open_engine, write_transaction

__all__ = ["create_database"]


def create_database(where: str, name: str) -> Engine:
    """Create the tables of a dump, such as `tenants-0010`, in an empty database."""
    engine = open_engine(where, name)
    text = (Path(__file__).parent / f"{name}.{engine.dialect.name}.sql").read_text(encoding="utf-8")
    with write_transaction(engine) as c:
        for statement in text.split(";;\n"):
            c.exec_driver_sql(statement)
    return engine
