"""Databases of earlier veneers are brought up whole, once, by whoever opens them first; later ones are left alone."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import MetaData, inspect, select

from tests.old_databases import made
from veneer.errors import ConfigError
from veneer.jobs.tables import JOB_SCHEMA
from veneer.library import index as ix
from veneer.library.database import open_engine, reading, write_transaction
from veneer.library.library import open_library
from veneer.library.migrate import Schema, bring_up, revision
from veneer.serve.tenancy import store

OLD = ["index-7555cba", "tenants-d1e3e75", "tenants-f7df853"]
SAYS = {
    "index": "INSERT INTO library_meta VALUES ('schema', '1')",
    "tenants": "INSERT INTO tenant_meta VALUES ('schema', '1'), ('revision', '7')",
}


def schema_of(name: str) -> Schema:
    return ix.INDEX_SCHEMA if name.startswith("index") else store.TENANT_SCHEMA


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, quick: Path) -> str:
    return str(quick / "old.sqlite") if request.param == "sqlite" else request.getfixturevalue("postgres")()


def differences(where: str, schema: Schema) -> list[Any]:
    """Between a database and the tables that this veneer knows, as Alembic finds them."""
    engine = open_engine(where, "x")
    with reading(engine) as c:
        options = {"include_name": lambda name, kind, _: kind != "table" or name != schema.table}
        found = compare_metadata(MigrationContext.configure(c, opts=options), schema.tables)
    engine.dispose()
    return found


@pytest.mark.parametrize("name", OLD)
def test_a_database_of_each_earlier_veneer_becomes_what_this_one_makes(where: str, name: str) -> None:
    schema = schema_of(name)
    engine = made(where, name, SAYS[name.partition("-")[0]])
    assert differences(where, schema)
    bring_up(engine, schema, where)
    assert differences(where, schema) == []
    with reading(engine) as c:
        assert revision(c, schema) == schema.revisions[-1]
    engine.dispose()


@pytest.mark.parametrize("schema", [ix.INDEX_SCHEMA, store.TENANT_SCHEMA, JOB_SCHEMA], ids=["index", "tenants", "jobs"])
def test_a_new_database_has_the_same_tables_and_needs_no_script(where: str, schema: Schema) -> None:
    engine = open_engine(where, "x")
    bring_up(engine, schema, where)
    assert differences(where, schema) == []
    engine.dispose()


@pytest.mark.parametrize("old", [True, False])
def test_many_that_start_at_once_bring_it_up_once(where: str, old: bool) -> None:
    if old:
        made(where, "tenants-d1e3e75", SAYS["tenants"]).dispose()
    failed: list[BaseException] = []
    ready = threading.Barrier(6)

    def start() -> None:
        engine = open_engine(where, "x")
        try:
            ready.wait()
            bring_up(engine, store.TENANT_SCHEMA, where)
            with reading(engine) as c:
                assert revision(c, store.TENANT_SCHEMA) == store.TENANT_SCHEMA.revisions[-1]
        except BaseException as error:
            failed.append(error)
        finally:
            engine.dispose()

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert differences(where, store.TENANT_SCHEMA) == []


def test_a_database_of_a_later_veneer_is_left_alone(where: str) -> None:
    store.Store(where).close()
    engine = open_engine(where, "x")
    with write_transaction(engine) as c:
        c.exec_driver_sql("UPDATE tenant_version SET version_num = '0999'")
    engine.dispose()
    with pytest.raises(ConfigError, match=r"has version 0999; this veneer knows 0001 to .*\n.*\n.*update this one"):
        store.Store(where)


def test_a_library_of_an_earlier_veneer_opens_and_is_used(tmp_path: Path) -> None:
    index = str(tmp_path / "index.sqlite")
    made(index, "index-7555cba", SAYS["index"]).dispose()
    with open_library(tmp_path / "library", index) as library:
        assert library.search() == []
    with open_library(tmp_path / "library", index) as library:
        assert inspect(library.engine).has_table("library_version")


def test_what_shelves_are_ordered_by_is_read_out_of_old_cards(where: str) -> None:
    card = {
        "base": "org/B",
        "rank": 8,
        "metrics": {"validation_loss_before": 2.0, "validation_loss": 1.5},
        "extra": {"thumbnail": "data:image/png;base64,QUJD"},
    }
    empty = ", ".join(["''"] * 6)
    held = f"INSERT INTO library_entries VALUES ('e', 'm', '', 'peft', {empty}, 0, '{json.dumps(card)}', 'data:image')"
    engine = made(where, "index-7555cba", SAYS["index"], "INSERT INTO library_objects VALUES ('m', 1, 0, 'g')", held)
    bring_up(engine, ix.INDEX_SCHEMA, where)
    with reading(engine) as c:
        row = c.execute(select(ix.figures, ix.entries.c.words).join_from(ix.figures, ix.entries)).one()
    assert (row.rank, row.gain, row.words) == (8, -0.25, "peft org/b")
    engine.dispose()


def test_a_script_that_fails_leaves_everything_as_it_was(where: str, tmp_path: Path) -> None:
    for number, before, work in ((1, None, "pass"), (2, "0001", "op.execute('CREATE TABLE x (y INTEGER)'); 1 / 0")):
        text = f"from alembic import op\nrevision = '{number:04}'\ndown_revision = {before!r}\n"
        (tmp_path / f"v{number:04}.py").write_text(f"{text}def upgrade(): {work}\n")
    schema = Schema("x", MetaData(), tmp_path, "x_version", 1, lambda c: "0001")
    engine = open_engine(where, "x")
    with pytest.raises(ZeroDivisionError):
        bring_up(engine, schema, where)
    assert inspect(engine).get_table_names() == []
    engine.dispose()


def test_alembic_is_imported_where_something_changes_and_nowhere_else(tmp_path: Path) -> None:
    code = f"""
import sys
from veneer.library.library import open_library
for _ in range(2):
    open_library({str(tmp_path / "library")!r}).close()
assert "alembic" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
