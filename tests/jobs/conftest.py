"""Fixtures: a library and its job queue, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.library.conftest import postgres, quick  # noqa: F401
from veneer.jobs.store import JobStore
from veneer.library.library import Library, open_library


@pytest.fixture(params=["sqlite", "postgresql"])
def library(request: pytest.FixtureRequest, quick: Path) -> Iterator[Library]:  # noqa: F811
    index = None if request.param == "sqlite" else request.getfixturevalue("postgres")()
    with open_library(quick / "library", index) as opened:
        yield opened


@pytest.fixture
def store(library: Library) -> JobStore:
    return JobStore(library)
