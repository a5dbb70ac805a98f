"""The in-memory index of names is current, and available during a database outage."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from tests.library.conftest import postgres_server
from tests.library.made import made, open_made, read_made
from veneer.library import index as ix
from veneer.library import name_index as snapshot
from veneer.library.database import reading
from veneer.library.library import Library
from veneer.library.name_index import NameIndex, Names
from veneer.library.names import parse_reference
from veneer.library.queries import find_versions


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def meaning(names: Names, reference: str) -> str | None:
    found = names.find(parse_reference(reference))
    return None if found is None else found.reference


def test_the_name_index_agrees_with_queries(library: Library, tmp_path: Path) -> None:
    for number, name in [(1, "a"), (2, "a"), (3, "a"), (1, "b"), (2, "acme/a"), (4, "acme/a"), (5, "z")]:
        library.add(made(tmp_path, number), name, describe=read_made)
    library.alias("a@1", "prod")
    library.alias("acme/a@1", "prod")
    library.remove("a@3")
    library.remove("z")
    with reading(library.engine) as c:
        entries = list(c.execute(ix.entries.select()))
    words = ["a", "a@1", "a@2", "a@3", "a@latest", "a@prod", "a@stable", "b", "b@1", "b@prod", "c", "z", "z@1"]
    words += ["acme/a", "acme/a@prod", "acme/a@2", "globex/a"]
    words += [f"sha256:{e.id[:n]}" for e in entries for n in (4, 12, 64)]
    words += [e.digest[: 7 + n] for e in entries if e.digest for n in (4, 12, 64)] + ["sha256:0000"]
    with NameIndex(library) as names:
        for word in words:
            with reading(library.engine) as c:
                wanted = find_versions(c, parse_reference(word))
            assert meaning(names.now, word) == (wanted[0].reference if len(wanted) == 1 else None), word
        listed = [v for v in library.search() if v.fingerprint]
        for base in {v.fingerprint for v in listed}:
            own = [v.reference for v in listed if v.fingerprint == base]
            assert [k.reference for k in names.now.latest(base)] == own


def test_changes_of_other_processes_are_seen_without_queries(
    library: Library, tmp_path: Path, index: str | None
) -> None:
    """SQLite shows changes at the next check, PostgreSQL with its next notification."""
    for number in (1, 2):
        library.add(made(tmp_path, number), "a", describe=read_made)

    async def now(names: NameIndex, reference: str) -> str | None:
        return meaning(await names.fresh(), reference)

    with NameIndex(library) as names, open_made(library.location, index) as other:
        asked: list[str] = []
        for turn in range(6):
            other.alias(f"a@{turn % 2 + 1}", "prod")
            wanted = f"a@{turn % 2 + 1}"
            if index is None:
                assert asyncio.run(now(names, "a@prod")) == wanted
            else:
                until(lambda w=wanted: asyncio.run(now(names, "a@prod")) == w, 1.0)
        other.remove("a@prod")
        until(lambda: asyncio.run(now(names, "a@prod")) is None, 1.0)
        event.listen(library.engine, "before_cursor_execute", lambda c, u, statement, *more: asked.append(statement))
        for _ in range(100):
            assert asyncio.run(now(names, "a")) == "a@2"
        assert asked == [], "nothing has changed"


@contextmanager
def stopped(url: str) -> Iterator[None]:
    """Suspend all PostgreSQL processes, so that connections get no response."""
    folder = re.search(r"host=([^&]+)", url)
    first = int((Path(folder[1]) / "data" / "postmaster.pid").read_text().split()[0])
    parents = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(place.parent.name)] = int(place.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    everyone = [first, *(pid for pid, parent in parents.items() if parent == first)]
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(everyone):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_known_names_resolve_while_postgresql_is_stopped(tmp_path: Path) -> None:
    with postgres_server() as schema:
        url = schema()
        with open_made(str(tmp_path / "library"), url) as library:
            library.add(made(tmp_path, 1), "a", describe=read_made)
            version = library.find("a")

            async def work(names: NameIndex) -> float:
                longest, end = 0.0, time.monotonic() + 1.5
                while time.monotonic() < end:
                    began = time.monotonic()
                    assert meaning(await names.fresh(), "a") == "a@1"
                    assert library.place("a@1", version.entry, version.format).exists()
                    longest = max(longest, time.monotonic() - began)
                    await asyncio.sleep(0.01)
                return longest

            with NameIndex(library) as names:
                with stopped(url):
                    assert asyncio.run(work(names)) < 0.25
                    began = time.monotonic()
                    assert meaning(names.refreshed(), "a") == "a@1"
                    assert time.monotonic() - began < 1.0
                library.add(made(tmp_path, 2), "a", describe=read_made)
                until(lambda: meaning(names.now, "a") == "a@2")
                assert not names.away


def test_the_name_index_survives_any_error(library: Library, tmp_path: Path, monkeypatch: Any) -> None:
    library.add(made(tmp_path, 1), "a", describe=read_made)
    with NameIndex(library) as names:
        with monkeypatch.context() as patch:

            def fails(connection: Any) -> Any:
                raise RuntimeError("whatever a driver says")

            patch.setattr(snapshot, "read", fails)
            library.add(made(tmp_path, 2), "a", describe=read_made)
            until(lambda: (names.refreshed() and names.away) is True)
            began = time.monotonic()
            assert meaning(asyncio.run(names.fresh()), "a") == "a@1"
            assert time.monotonic() - began < 0.2, "while it is away nobody waits"
        until(lambda: meaning(names.now, "a") == "a@2")
        library.add(made(tmp_path, 3), "a", describe=read_made)
        until(lambda: meaning(names.now, "a") == "a@3")
