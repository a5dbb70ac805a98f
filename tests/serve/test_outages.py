"""If a database, a store or a disk is unavailable, the client gets a 503 without details."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from tests.library.conftest import quick  # noqa: F401
from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyText, responses, toy_app
from tests.serve.saved_adapters import Make, of, reason, refused, saved
from veneer.errors import AdapterError, ResourceError, UnavailableError
from veneer.library.library import open_library
from veneer.library.maintenance import gc
from veneer.models.text.base import TextBase
from veneer.serve.principal import Principal
from veneer.serve.request import Refused
from veneer.serve.tenancy.admin import admin_router
from veneer.serve.tenancy.tenants import Tenants
from veneer.serve.transient import internal_error, is_transient

SECRET = "s3.secret-host.internal:9000/bucket, /var/run/postgresql/.s.PGSQL.5432"
ADMIN = "an-admin-key-of-some-length"
OPERATOR = Principal("operator")


def assert_details_withheld(refused: Refused, log: str) -> None:
    """Assert that the client's error is generic and contains the id of the driver's error in the log."""
    assert (refused.status, refused.code) == (503, "unavailable")
    assert refused.retry_after
    assert "secret-host" not in str(refused)
    assert "PGSQL" not in str(refused)
    (number,) = re.findall(r"\b[0-9a-f]{8}\b", str(refused.fix))
    assert any(number in line and "secret-host" in line for line in log.splitlines())


@pytest.fixture
def elsewhere(base: TextBase, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Yield a library in a remote store, and the digest of its one adapter."""
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    digest = saved(base, folder / "a")
    with open_library(f"memory://{tmp_path.name}", str(tmp_path / "index.sqlite")) as library:
        library.add(folder / "a", "support")
        yield library, digest
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize(
    "error", [OSError(SECRET), RuntimeError(SECRET), PermissionError(SECRET), TimeoutError(SECRET)]
)
def test_a_failed_first_read_of_an_adapter_is_retried(make, elsewhere, error, caplog, monkeypatch):
    library, digest = elsewhere
    catalog = make(library=library)
    assert catalog.resolve("support", OPERATOR).mix == of(digest)

    def fails(*a: Any, **k: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(library.store.fs, "open", fails)
        assert_details_withheld(refused(lambda: catalog.sources.read(digest, catalog.problems)), caplog.text)
        assert_details_withheld(refused(lambda: catalog.load("mine", "support")), caplog.text)
    assert catalog.sources.read(digest, catalog.problems).digest() == digest
    assert catalog.load("mine", "support").digest == digest


def test_lost_or_changed_files_are_server_errors(make: Make, elsewhere: Any, caplog: pytest.LogCaptureFixture) -> None:
    library, digest = elsewhere
    catalog = make(library=library)
    catalog.resolve("support", OPERATOR)
    files = library.store.fs.store
    for path, change in [(p, c) for p in list(files) if "/blobs/" in p for c in ("other bytes", "gone")]:
        data = files.pop(path) if change == "gone" else None
        if data is None:
            kept = library.store.fs.cat_file(path)
            library.store.fs.pipe_file(path, bytes(len(kept)))
        error = refused(lambda: catalog.sources.read(digest, catalog.problems))
        assert (reason(error), error.status) == ("damaged", 503)
        assert "memory" not in str(error)
        assert "blobs" not in str(error)


def test_a_removed_adapter_is_404_and_not_an_outage(make: Make, elsewhere: Any) -> None:
    """A running request can still read its adapter while the files exist; new requests cannot name it."""
    library, digest = elsewhere
    catalog = make(library=library)
    catalog.resolve("support", OPERATOR)
    library.remove("support")
    assert refused(lambda: catalog.resolve("support", OPERATOR)).status == 404
    assert catalog.sources.read(digest, catalog.problems).digest() == digest
    gc(library, grace=-1)
    error = refused(lambda: catalog.sources.read(digest, catalog.problems))
    assert (reason(error), error.status) == ("not_found", 404)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.ENOMEM, errno.EACCES])
def test_a_failing_disk_is_not_the_adapters_error(make, base, folder, number, caplog, monkeypatch):
    saved(base, folder / "a")
    catalog = make()

    def fails(*a: Any, **k: Any) -> Any:
        try:
            raise OSError(number, SECRET)
        except OSError as error:  # adapter readers wrap the OSError of an unreadable file in an AdapterError
            raise AdapterError(f"cannot be read: {error}") from error

    monkeypatch.setattr("veneer.serve.names.adapter_sources.load_adapter", fails)
    assert_details_withheld(refused(lambda: catalog.load("x", "a")), caplog.text)


def test_errors_that_count_as_outages() -> None:
    for error in (UnavailableError("x"), ResourceError("x"), MemoryError(), ConnectionRefusedError(), TimeoutError()):
        assert is_transient(error)
        assert internal_error("it", error).status == 503
    for other in (AdapterError("x"), FileNotFoundError("x"), ValueError("x"), KeyError("x")):
        assert not is_transient(other)
        assert (internal_error("it", other).status, internal_error("it", other).code) == (500, "internal")


def test_a_damaged_database_is_an_outage(tmp_path: Path) -> None:
    def failed(file: Path, statement: str) -> SQLAlchemyError:
        engine = create_engine(f"sqlite:///{file}")
        with pytest.raises(SQLAlchemyError) as caught, engine.begin() as connection:
            connection.execute(text(statement))
        engine.dispose()
        return caught.value

    garbage, cut, whole = (tmp_path / f"{name}.sqlite" for name in ("garbage", "cut", "whole"))
    garbage.write_bytes(b"garbage!" * 4096)
    engine = create_engine(f"sqlite:///{whole}")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE kept (a TEXT UNIQUE)"))
        connection.execute(text("INSERT INTO kept VALUES ('x')"))
    engine.dispose()
    cut.write_bytes(whole.read_bytes()[:4096] + b"\xff" * 8192)  # overwrite all pages except the first
    for file in (garbage, cut):
        error = failed(file, "SELECT * FROM kept")
        assert is_transient(error), error
        assert internal_error("it", error).status == 503
    assert not is_transient(failed(whole, "INSERT INTO kept VALUES ('x')"))


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tenants(quick: Path) -> Any:  # noqa: F811
    opened = Tenants(str(quick / "tenants.sqlite"), admin_key=ADMIN, watch=False)
    yield opened
    opened.close()


def served(tenants: Tenants) -> FastAPI:
    routers = [admin_router(tenants, ToyCatalog())]
    return toy_app(ToyEngine(ToyText()), ToyCatalog(), tenants, routers=routers)


def ask(app: FastAPI, path: str, key: str = "vnr-nobody") -> httpx.Response:
    request = {"method": "GET", "url": path, "headers": {"Authorization": f"Bearer {key}"}}
    return responses(app, [request], raise_app_exceptions=False)[0]


def away(*a: Any, **k: Any) -> Any:
    raise OperationalError("SELECT value FROM tenant_meta", {}, Exception(SECRET))


def told(answer: httpx.Response, log: str) -> None:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "unavailable"
    assert not any(word in answer.text for word in ("secret-host", "PGSQL", "SELECT", "tenant_meta"))
    (number,) = re.findall(r"\b[0-9a-f]{8}\b", answer.json()["error"]["message"])
    assert any(number in line and "secret-host" in line for line in log.splitlines())


def test_unauthenticated_requests_learn_nothing_of_an_outage(tenants, monkeypatch, caplog):
    app = served(tenants)
    assert ask(app, "/v1/models").status_code == 401
    monkeypatch.setattr(tenants.store, "refresh", away)
    for path in ("/v1/models", "/metrics"):
        answer = ask(app, path, key="vnr-aaaaaaaaaa-never-seen-before")  # the cached settings are used
        assert answer.status_code == 401
        assert not any(word in answer.text for word in ("secret-host", "PGSQL", "SELECT", "tenant_meta"))
    assert "secret-host" in caplog.text


@pytest.mark.parametrize("error", [away, None])
def test_operator_routes_are_503_during_an_outage(tenants, error, monkeypatch, caplog):
    def locked(*a: Any, **k: Any) -> Any:
        raise ResourceError(f"another process has been writing to {SECRET}", fix="use PostgreSQL")

    app = served(tenants)
    monkeypatch.setattr(tenants.store, "refresh", error or locked)
    told(ask(app, "/admin/tenants", ADMIN), caplog.text)
    # cached settings are used if reading failed because of a database error
    assert ask(app, "/admin/tenants", "no key").status_code == (401 if error else 503)


def test_an_internal_error_is_500_with_a_logged_id(tenants, monkeypatch, caplog):
    app = served(tenants)

    def broken(*a: Any, **k: Any) -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(app.state.service.catalog, "models", broken)
    monkeypatch.setattr(tenants.store, "refresh", broken)
    for path in ("/v1/models", "/admin/tenants"):
        answer = ask(app, path, ADMIN)
        assert answer.status_code == 500
        assert "secret-host" not in answer.text
        (number,) = re.findall(r"\b[0-9a-f]{8}\b", answer.json()["error"]["message"])
        assert number in caplog.text
