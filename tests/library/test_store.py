"""Stores that do not respond."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from veneer.errors import AdapterError, ConfigError, UnavailableError
from veneer.library import store, transfer
from veneer.library.library import open_library


@pytest.fixture
def silent_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start an S3 server that accepts connections and never responds."""
    pytest.importorskip("s3fs", reason="pip install s3fs")
    server = socket.create_server(("127.0.0.1", 0), backlog=128)
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    names = {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}
    for name, value in names.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(store, "S3_SECONDS", 0.05)
    yield
    server.close()


def test_an_unresponsive_s3_is_unavailable(silent_s3: None, tmp_path: Path) -> None:
    """By default, the S3 client would wait for 25 minutes."""
    begun = time.monotonic()
    with pytest.raises(UnavailableError, match="cannot be used now"):
        store.open_store("s3://bucket/library").size("library.json")
    with open_library(tmp_path / "library") as library, pytest.raises(AdapterError, match="cannot be used"):
        transfer.pull(library, "s3://bucket/support")
    assert time.monotonic() - begun < 15


def test_a_missing_bucket_is_named(s3: str) -> None:
    with pytest.raises(ConfigError, match="bucket does not exist"):
        open_library("s3://no-such-bucket/library")
