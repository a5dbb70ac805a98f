"""Databases as earlier veneers made them: their own tables' SQL, by the commit that made them, for each database."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine

from veneer.library.database import open_engine, write_transaction

__all__ = ["made"]


def made(where: str, name: str, *statements: str) -> Engine:
    """The tables of `name` (`tenants-d1e3e75`) at an empty address, and what `statements` put into them."""
    engine = open_engine(where, name)
    text = (Path(__file__).parent / f"{name}.{engine.dialect.name}.sql").read_text(encoding="utf-8")
    with write_transaction(engine) as c:
        for statement in (*text.split(";;\n"), *statements):
            if statement.strip():
                c.exec_driver_sql(statement)
    return engine
