"""Databases of every revision since 0010 are migrated once.

Databases of unreleased builds and of later builds are refused."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, MetaData, inspect

from tests.old_databases import create_database
from veneer.errors import ConfigError
from veneer.jobs.tables import JOB_SCHEMA
from veneer.library.database import open_engine, reading, write_transaction
from veneer.library.index import INDEX_SCHEMA
from veneer.library.library import open_library
from veneer.library.migrate import Schema, migrate, revision
from veneer.serve.tenancy.store import TENANT_SCHEMA, Store

SCHEMAS = {"index": INDEX_SCHEMA, "tenants": TENANT_SCHEMA, "jobs": JOB_SCHEMA}


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, quick: Path) -> str:
    return str(quick / "old.sqlite") if request.param == "sqlite" else request.getfixturevalue("postgres")()


def differences(engine: Engine, schema: Schema) -> list[Any]:
    """Return how a database differs from this build's tables, as Alembic reports it."""
    with reading(engine) as c:
        options = {"include_name": lambda name, kind, _: kind != "table" or name != schema.table}
        return list(compare_metadata(MigrationContext.configure(c, opts=options), schema.tables))


@pytest.mark.parametrize("name", ["index-0010", "tenants-0010"])
def test_a_database_of_each_revision_becomes_current(where: str, name: str) -> None:
    schema = SCHEMAS[name.partition("-")[0]]
    engine = create_database(where, name)
    migrate(engine, schema, where)
    assert differences(engine, schema) == []
    with reading(engine) as c:
        assert revision(c, schema) == schema.revisions[-1]
    engine.dispose()


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_new_database_has_the_current_tables(where: str, name: str) -> None:
    engine = open_engine(where, "x")
    migrate(engine, SCHEMAS[name], where)
    assert differences(engine, SCHEMAS[name]) == []
    engine.dispose()


def test_processes_that_start_together_migrate_once(where: str) -> None:
    failed: list[BaseException] = []
    ready = threading.Barrier(6)

    def start() -> None:
        engine = open_engine(where, "x")
        try:
            ready.wait()
            migrate(engine, TENANT_SCHEMA, where)
            assert differences(engine, TENANT_SCHEMA) == []
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


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE tenant_version SET version_num = '0999'", r"has version 0999; this veneer supports 0010 to .*update"),
        ("UPDATE tenant_version SET version_num = '0005'", r"unreleased build.*start a new one"),
        ("DROP TABLE tenant_version", r"unreleased build.*start a new one"),
    ],
)
def test_a_database_of_an_unreleased_or_later_build_is_refused(where: str, statement: str, message: str) -> None:
    Store(where).close()
    engine = open_engine(where, "x")
    with write_transaction(engine) as c:
        c.exec_driver_sql(statement)
    engine.dispose()
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        Store(where)


def test_an_index_of_an_unreleased_build_can_be_rebuilt(tmp_path: Path) -> None:
    index = tmp_path / "index.sqlite"
    engine = open_engine(str(index), "x")
    with write_transaction(engine) as c:
        c.exec_driver_sql("CREATE TABLE library_meta (key TEXT, value TEXT)")
    engine.dispose()
    with pytest.raises(ConfigError, match=r"(?s)the index was written by an unreleased build.*verify --rebuild"):
        open_library(tmp_path / "library", str(index))
    index.unlink()
    with open_library(tmp_path / "library", str(index)) as library:
        assert library.search() == []


def test_failed_migration_leaves_the_database_unchanged(where: str, tmp_path: Path) -> None:
    for number, before, work in ((10, None, "pass"), (11, "0010", "op.execute('CREATE TABLE x (y INTEGER)'); 1 / 0")):
        text = f"from alembic import op\nrevision = '{number:04}'\ndown_revision = {before!r}\n"
        (tmp_path / f"v{number:04}.py").write_text(f"{text}def upgrade(): {work}\n")
    engine = open_engine(where, "x")
    with write_transaction(engine) as c:
        c.exec_driver_sql("CREATE TABLE x_version (version_num VARCHAR(32) PRIMARY KEY)")
        c.exec_driver_sql("INSERT INTO x_version VALUES ('0010')")
    with pytest.raises(ZeroDivisionError):
        migrate(engine, Schema("x", MetaData(), tmp_path, "x_version", 1), where)
    assert inspect(engine).get_table_names() == ["x_version"]
    engine.dispose()


def test_alembic_is_imported_only_to_run_a_script(tmp_path: Path) -> None:
    code = f"""
import sys
from veneer.library.library import open_library
for _ in range(2):
    open_library({str(tmp_path / "library")!r}).close()
assert "alembic" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
