"""The ledger: costs of mixes, exact sums, an unavailable database and a full disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import delete, func, select, update

from tests.library.conftest import postgres_server
from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyText, toy_app
from tests.serve.tenancy.conftest import Clock, new_tenant, set_price
from tests.serve.tenancy.test_tenants import ask, rows, run
from veneer.errors import ResourceError
from veneer.library.database import reading, write_transaction
from veneer.serve.access import ResolvedModel
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Usage
from veneer.serve.settings import LedgerSettings
from veneer.serve.tenancy.admin import admin_router
from veneer.serve.tenancy.entry import LedgerEntry, LedgerLine
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import Price, line_table, server_table
from veneer.serve.tenancy.tenants import Tenants

ADMIN = "an admin key of some length"

# -- cost of a mix -----------------------------------------------------------------------------------------------------


async def mixed(tenants: Tenants, request: str, took: Usage, *parts: tuple[str, float]) -> None:
    mix = tuple((f"d-{name.partition('@')[0]}", strength) for name, strength in parts)
    served = ResolvedModel(mix, "the client's text", "the client's text", adapters=tuple(name for name, _ in parts))
    async with tenants.admitted(
        Principal("tenant", "acme"), served, request=request, prompt_tokens=1, max_tokens=1
    ) as bill:
        await bill.used(took)


def test_each_part_of_a_mix_has_its_own_price(tenants: Tenants) -> None:
    set_price(tenants.store, 1_000_000, 0, 1_000_000)
    set_price(tenants.store, 1_000_000_000, 0, 1_000_000_000, adapter="big")
    tenants.store.refresh()
    took = Usage(5, 0, 3)
    run(mixed(tenants, "alone", took, ("big@1", 1.0)))
    run(mixed(tenants, "beside", took, ("big@1", 1.0), ("small@2", 1e-9)))
    run(ask(tenants, Principal("tenant", "acme"), "base", took, target="tiny"))
    rows(tenants)
    with reading(tenants.store.engine) as c:
        kept = {(r.request, r.adapter): (r.digest, r.strength, r.cost) for r in c.execute(select(line_table))}
        whole = {r["tenant"]: (r["requests"], r["prompt"], r["cost"]) for r in usage(c, by=("tenant",))}
        apart = {r["adapter"]: (r["requests"], r["prompt"], r["cost"]) for r in usage(c, by=("adapter",))}
    assert kept == {
        ("alone", "big@1"): ("d-big", 1.0, 8000),
        ("beside", "big@1"): ("d-big", 1.0, 8000),
        ("beside", "small@2"): ("d-small", 1e-9, 8),
        ("base", "tiny"): ("", 1.0, 8),
    }
    assert whole == {"acme": (3, 15, 16016)}
    assert apart == {"big@1": (2, 10, 16000), "small@2": (1, 5, 8), "tiny": (1, 5, 8)}


def test_journal_files_are_readable_only_by_the_user(tmp_path: Path) -> None:
    folder = tmp_path / "journals"
    tenants = Tenants(str(tmp_path / "tenants.sqlite"), ledger=LedgerSettings(folder=folder), watch=False)
    try:
        assert folder.stat().st_mode & 0o077 == 0
    finally:
        tenants.close()


def test_sums_are_exact_in_whole_millionths_however_requests_end(tenants: Tenants, clock: Clock) -> None:
    """The reference sums the ledger's rows in Python."""
    pick = random.Random(3)
    set_price(tenants.store, 333_333, 33_333, 777_777)
    set_price(tenants.store, 1, 999_999, 123_457, adapter="a")
    tenants.store.refresh()

    async def work() -> None:
        for n in range(120):
            parts = pick.sample([("a@1", 0.5), ("b", 1.0), ("c@3", -1.0)], pick.randrange(0, 4))
            mix = tuple((f"d-{name}", strength) for name, strength in parts)
            served = ResolvedModel(mix, "x", "tiny", adapters=tuple(name for name, _ in parts))
            clock.now += 40_000 * (pick.random() < 0.1)
            tenant = Principal("tenant", pick.choice(["acme", "globex"]))
            async with tenants.admitted(tenant, served, request=f"r{n}", prompt_tokens=9, max_tokens=9) as bill:
                if pick.random() < 0.8:
                    prompt = pick.randrange(1, 10**6)
                    await bill.used(Usage(prompt, pick.randrange(prompt), pick.randrange(10**6)))

    run(work())
    rows(tenants)
    with reading(tenants.store.engine) as c:
        every = c.execute(select(line_table)).all()
        by_day, by_adapter = usage(c, by=("day", "tenant")), usage(c, by=("adapter", "day"))
        (total,) = usage(c, by=())
    firsts = [r for r in every if r.part == 0]
    for found, source, keys in ((by_day, firsts, ("day", "tenant")), (by_adapter, every, ("adapter", "day"))):
        assert len(found) == len({tuple(getattr(r, k) for k in keys) for r in source}) > 3
        for group in found:
            same = [r for r in source if all(getattr(r, k) == group[k] for k in keys)]
            assert group["requests"] == len(same)
            assert group["interrupted"] == sum(r.state == "interrupted" for r in same)
            assert [group[k] for k in ("prompt", "cached", "completion")] == [
                sum(getattr(r, k) for r in same) for k in ("prompt", "cached", "completion")
            ]
    costs = sum(r.cost for r in every)
    assert total["cost"] == sum(r["cost"] for r in by_day) == sum(r["cost"] for r in by_adapter) == costs
    exact = 0
    for r in every:
        cost = (r.prompt - r.cached) * r.price_prompt + r.cached * r.price_cached + r.completion * r.price_completion
        exact += (cost + 500_000) // 1_000_000
    assert costs == exact


# -- retention ---------------------------------------------------------------------------------------------------------


def test_pruned_lines_keep_their_sums_and_windows(one_door: Tenants, clock: Clock) -> None:
    set_price(one_door.store, 1_000_000, 0, 1_000_000)
    one_door.store.refresh()
    for n in range(25):
        run(ask(one_door, Principal("tenant", "acme"), f"old{n}", Usage(1, 0, 1)))
    clock.now += 40 * 86400
    for n in range(3):
        run(ask(one_door, Principal("tenant", "acme"), f"new{n}", Usage(1, 0, 1)))
    rows(one_door)
    with reading(one_door.store.engine) as c:
        before = usage(c)
    assert one_door.ledger.prune(30, most=10) == 25
    assert set(rows(one_door)) == {"new0", "new1", "new2"}
    with reading(one_door.store.engine) as c:
        assert usage(c) == before
    one_door.ledger.server = "0" * 16  # read the ledger as another server would
    with write_transaction(one_door.store.engine) as c:
        c.execute(delete(line_table))  # the usage within a window must not depend on these rows
    seen = one_door.ledger.usage_of_other_servers(86400.0)
    found = [(tenant, adapter, n, tokens) for tenant, adapter, _, n, tokens in seen]
    assert found == [("acme", "", 3, 6), ("acme", "v1", 3, 6)]


def test_a_returning_server_overrides_its_interruption(where: str, quick: Path) -> None:
    lost = Tenants(where, ledger=LedgerSettings(folder=quick / "lost"), watch=False)
    other = Tenants(where, ledger=LedgerSettings(folder=quick / "other"), watch=False)

    async def work() -> None:
        served = ResolvedModel((), "tiny", "tiny")
        async with lost.admitted(Principal("tenant", "t"), served, request="a", prompt_tokens=1, max_tokens=1) as bill:
            assert lost.ledger.flush()
            other.ledger.recover()
            assert rows(other)["a"].state == "open", "`lost` was active a moment ago"
            with write_transaction(other.store.engine) as c:
                c.execute(update(server_table).values(seen=server_table.c.seen - 601))
            other.ledger.recover()
            assert rows(other)["a"].state == "interrupted"
            await bill.used(Usage(4, 0, 2))

    run(work())
    assert (rows(lost)["a"].state, rows(lost)["a"].prompt) == ("done", 4)
    with reading(other.store.engine) as c:
        (total,) = usage(c, by=())
    assert (total["requests"], total["done"], total["interrupted"], total["prompt"]) == (1, 1, 0, 4)
    for server in (lost, other):
        server.close()


@pytest.mark.parametrize("synced", [False, True])
def test_the_synced_setting_writes_usage_to_disk(quick: Path, monkeypatch: pytest.MonkeyPatch, synced: bool) -> None:
    tenants = Tenants(
        str(quick / "t.sqlite"), ledger=LedgerSettings(folder=quick / "journals", synced=synced), watch=False
    )
    synced_files: list[int] = []
    monkeypatch.setattr(os, "fsync", synced_files.append)
    run(ask(tenants, Principal("tenant", "t"), "a", Usage(1, 0, 1)))
    assert bool(synced_files) == synced
    tenants.close()


def test_two_servers_on_one_folder_leave_each_other_alone(quick: Path) -> None:
    where, kept = str(quick / "t.sqlite"), LedgerSettings(folder=quick / "journals", room=1 << 20)
    first, second = Tenants(where, ledger=kept, watch=False), Tenants(where, ledger=kept, watch=False)

    async def work() -> None:
        served = ResolvedModel((), "tiny", "tiny")
        async with first.admitted(Principal("tenant", "t"), served, request="a", prompt_tokens=1, max_tokens=1) as bill:
            assert first.ledger.flush()
            second.ledger.recover()
            assert rows(second)["a"].state == "open"
            await bill.used(Usage(1, 0, 1))

    run(work())
    assert first.ledger.flush()
    assert rows(second)["a"].state == "done"
    for server in (first, second):
        server.close()
    assert list((quick / "journals").iterdir()) == []


def test_other_files_in_the_journal_folder_are_kept(quick: Path) -> None:
    where, old = str(quick / "t.sqlite"), time.time() - 7200
    for name in ("t.sqlite", "notes.journal", "some.lock"):
        (quick / name).touch()
        os.utime(quick / name, (old, old))
    Tenants(where, ledger=LedgerSettings(folder=quick, room=1 << 20), watch=False).close()
    Tenants(where, ledger=LedgerSettings(folder=quick, room=1 << 20), watch=False).close()
    left = {path.name for path in quick.iterdir()} - {"t.sqlite-wal", "t.sqlite-shm"}
    assert left == {"t.sqlite", "notes.journal", "some.lock"}


# -- a full disk -------------------------------------------------------------------------------------------------------

FILLS = """
import asyncio, contextlib, json, os, signal, sys
from pathlib import Path
from veneer.serve.access import ResolvedModel
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Usage
from veneer.serve.settings import LedgerSettings
from veneer.serve.tenancy.tenants import Tenants

where, folder = sys.argv[1:]
tenants = Tenants(where, ledger=LedgerSettings(folder=Path(folder), room=4 << 20), watch=False)
with (Path(folder).parent / "ballast").open("wb", buffering=0) as ballast:
    with contextlib.suppress(OSError):
        while ballast.write(b"x" * 4096):
            pass

async def one(name, admitted, gate):
    served = ResolvedModel((("d" * 64, 1.0),), "x" * 500, "x", adapters=("big@1",))
    try:
        caller = Principal("tenant", "t")
        async with tenants.admitted(caller, served, request=name, prompt_tokens=1, max_tokens=1) as bill:
            admitted.append(name)
            await gate.wait()
            await bill.used(Usage(7, 0, 5))
            print(name, flush=True)
    except Refused as error:
        assert (error.status, error.code) == (503, "overloaded"), error
        assert "disk" not in error.what and "/" not in error.what
        refused.append(name)

refused = []
async def run():
    admitted, gate, running = [], asyncio.Event(), []
    for n in range(100):  # until the disk has no room for one more
        running += [asyncio.create_task(one(f"r{n}-{i}", admitted, gate)) for i in range(200)]
        while len(admitted) + len(refused) < len(running):
            await asyncio.sleep(0.005)
        if refused:
            break
    gate.set()
    await asyncio.gather(*running)
    print(json.dumps([len(admitted), len(refused)]), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(run())
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 14 MB. Yield its folder."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_loses_no_admitted_request(small_disk: Path) -> None:
    """Admit requests until the disk is full, then finish them. After a kill, the next start recovers them all."""
    folder, where = small_disk / "journals", str(small_disk / "t.sqlite")
    ran = subprocess.run([sys.executable, "-c", FILLS, where, str(folder)], capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr[-3000:]
    *answered, counts = ran.stdout.splitlines()
    admitted, refused_ = json.loads(counts)
    assert refused_ > 0
    assert len(answered) == admitted > 100
    (small_disk / "ballast").unlink()
    tenants = Tenants(where, ledger=LedgerSettings(folder=folder, room=1 << 20), watch=False)
    line = line_table.c
    with reading(tenants.store.engine) as c:
        kept = c.execute(select(line.request, line.state, line.prompt, line.completion)).all()
    assert sorted(r.request for r in kept) == sorted(answered)
    assert {(r.state, r.prompt, r.completion) for r in kept} == {("done", 7, 5)}
    tenants.close()
    assert list(folder.iterdir()) == []


def test_a_start_on_a_full_disk_states_the_needed_space(quick: Path, small_disk: Path) -> None:
    where = str(quick / "t.sqlite")
    with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
        while file.write(b"x" * 100_000):
            pass
    kept = LedgerSettings(folder=small_disk / "journals", room=4 << 20)
    with pytest.raises(ResourceError, match=r"(?s)not enough disk space for the ledger.*fix: 4 MiB of free space"):
        Tenants(where, ledger=kept, watch=False)
    assert list((small_disk / "journals").iterdir()) == []
    (small_disk / "ballast").unlink()
    Tenants(where, ledger=kept, watch=False).close()


def test_a_refused_request_fails_alone_in_its_group(quick, postgres, caplog):
    """One group of writes contains the admissions of some requests and the ends of others.

    A refused admission must not undo the recorded end of another request.
    """
    where = postgres()
    tenants = Tenants(where, ledger=LedgerSettings(folder=quick / "journals", room=128 << 10), watch=False)
    locked = psycopg.connect(where)
    locked.execute("LOCK TABLE tenant_lines")  # blocks all writes to the ledger's table
    journal, gate = tenants.ledger.journal, threading.Event()

    def entry(n: int) -> LedgerEntry:
        return LedgerEntry(f"r{n}", "t", "x" * 2000, 0.0, 1, 1, (LedgerLine("", "tiny", 1.0, Price()),))

    n = 0
    while tenants.ledger.open(entry(n)).exception(10) is None:
        n += 1
    assert n > 3
    journal.writer.put(lambda c, _: gate.wait(10))  # makes the writer collect the following writes in one group
    asked = [tenants.ledger.open(entry(1000 + i)) for i in range(3)]
    ends = [tenants.ledger.settle(f"r{i}", Usage(1, 0, 1)) for i in range(n)]
    gate.set()
    assert all(isinstance(future.exception(10), Refused) for future in asked)
    assert all(future.exception(10) is None for future in ends)
    assert "in this log alone" not in caplog.text
    assert len(journal.lines) == 2 * n
    locked.close()
    assert tenants.ledger.flush()
    tenants.close()


def test_requests_continue_while_sqlite_is_locked(quick: Path) -> None:
    tenants = Tenants(str(quick / "t.sqlite"), ledger=LedgerSettings(folder=quick / "journals"), watch=False)

    async def work() -> None:
        served, caller = ResolvedModel((), "tiny", "tiny"), Principal("tenant", "t")
        async with tenants.admitted(caller, served, request="a", prompt_tokens=1, max_tokens=1) as bill:
            locked = sqlite3.connect(quick / "t.sqlite", isolation_level=None)
            locked.execute("BEGIN IMMEDIATE")
            await ask(tenants, caller, "b", Usage(3, 0, 1))
            await bill.used(Usage(4, 0, 2))
            locked.close()

    run(work())
    assert tenants.ledger.flush()
    found = rows(tenants)
    assert {name: (r.state, r.prompt) for name, r in found.items()} == {"a": ("done", 4), "b": ("done", 3)}
    tenants.close()


# -- database outages --------------------------------------------------------------------------------------------------


def processes(url: str) -> list[int]:
    """Return the process ids of PostgreSQL's server, with the postmaster's first."""
    folder = url.partition("host=")[2].partition("&")[0]
    first = int((Path(folder) / "data" / "postmaster.pid").read_text().split()[0])
    found = [first]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == first:
                found.append(int(stat.parent.name))
        except (OSError, ValueError):
            continue
    return found


def test_requests_continue_while_postgresql_is_stopped(quick: Path, caplog: pytest.LogCaptureFixture) -> None:
    with postgres_server() as schema:
        url = schema()
        kept = LedgerSettings(folder=quick / "journals", room=128 << 10)
        tenants = Tenants(url, admin_key=ADMIN, ledger=kept, watch=True)
        key = new_tenant(tenants.store, "acme")
        served = ResolvedModel((), "tiny", "tiny")
        refusals: list[tuple[int, str, str]] = []

        async def one(name: str) -> float:
            began = time.monotonic()
            caller = await tenants.authenticate(key)
            async with tenants.admitted(caller, served, request=name, prompt_tokens=1, max_tokens=1) as bill:
                await bill.used(Usage(2, 0, 3))
            return time.monotonic() - began

        async def work() -> None:
            await one("before")
            assert tenants.ledger.flush()
            stopped = processes(url)
            for process in stopped:
                os.kill(process, signal.SIGSTOP)
            try:
                assert await one("first") < 2.0  # includes a wait of half a second for the current settings
                for n in range(20):
                    assert await one(f"r{n}") < 0.25
                assert (await tenants.authenticate(ADMIN)).can("administer")
                await asyncio.sleep(0.3)
                state = tenants.ledger_state()
                assert state.pending == 21
                assert state.lag > 0
                said = await asyncio.gather(*(_told(one(f"s{n}")) for n in range(300)))
                refusals.extend(r for r in said if r is not None)
                # the journal is bounded: its 32 pages of 4 KiB hold more than 20 requests but not all
                assert 100 < len(refusals) < 280
                assert set(refusals) == {(503, "overloaded", "usage cannot be recorded at the moment")}
                app = toy_app(
                    ToyEngine(ToyText()), ToyCatalog(), tenants, routers=[admin_router(tenants, ToyCatalog())]
                )
                headers = {"authorization": f"Bearer {ADMIN}"}
                async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
                    answer = await client.get("/admin/tenants", headers=headers, timeout=30)
                assert answer.status_code == 503
                assert answer.headers["retry-after"]
                told = answer.json()["error"]["message"]
                assert told.startswith("the tenants' database ")
                assert not [word for word in ("psycopg", "timeout", "host", "/tmp", "SELECT") if word in told]
            finally:
                for process in reversed(stopped):
                    os.kill(process, signal.SIGCONT)

        with caplog.at_level(logging.WARNING):
            asyncio.run(work())
        assert tenants.ledger.flush(20)
        assert tenants.ledger_state().pending == 0
        found = rows(tenants)
        assert {"before", "first", *(f"r{n}" for n in range(20))} <= set(found)
        assert len(found) == 22 + 300 - len(refusals)
        assert {(r.state, r.prompt, r.completion) for r in found.values()} == {("done", 2, 3)}
        with reading(tenants.store.engine) as c:
            assert c.scalar(select(func.count()).select_from(line_table)) == len(found)
            assert usage(c, by=())[0]["done"] == len(found)
        assert caplog.text.count("usage stays on this machine until the database responds") == 1
        tenants.close()


async def _told(work: Any) -> tuple[int, str, str] | None:
    try:
        await work
    except Refused as error:
        return error.status, error.code, error.what
    return None
