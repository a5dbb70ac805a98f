"""Kill servers while clients use them, then compare the ledger with the clients' records.

    python -m tests.serve.tenancy.driver load URL FOLDER KILLS SEED  kill a server under load at random times
    python -m tests.serve.tenancy.driver points URL FOLDER STRIDE    kill one scenario at every STRIDEth step
    python -m tests.serve.tenancy.driver doors URL FOLDER KILLS SEED [REDIS]    two servers, each killed at random

This is a separate program so that it can fork safely. The server writes to a socket, so clients record
exactly what was delivered before the kill. The program prints a summary and exits with code 0 if the ledger
agrees with the clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from tests.forks import expect, fork
from veneer.library.database import reading
from veneer.serve.access import ResolvedModel
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Usage
from veneer.serve.settings import LedgerSettings
from veneer.serve.tenancy import ledger as ledger_module
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import Price, tenants_at
from veneer.serve.tenancy.store import line_table as ledger
from veneer.serve.tenancy.tenants import Tenants

CLIENTS = 16
PRICE = Price(150_000, 15_000, 600_000)
PRICES = {f"{name}_price": value for name, value in asdict(PRICE).items()}


def answer(request: str) -> Usage:
    """Return the usage of a request.

    The usage depends only on the request's name, so both the server and the clients can compute it.
    """
    pick = random.Random(request)
    return Usage(pick.randrange(10, 500), pick.randrange(0, 10), pick.randrange(1, 400), 0.25, 0.5, 0.125)


def tenant_of(request: str) -> str:
    return f"t{sum(request.encode()) % 3}"


def opened(url: str, folder: Path, *, watch: bool = False, redis: str | None = None) -> Tenants:
    return Tenants(url, ledger=LedgerSettings(folder=folder / "journals", room=1 << 20), watch=watch, redis=redis)


async def serve_one(tenants: Tenants, request: str, say: Callable[[dict[str, Any]], Any], pause: float) -> None:
    """Serve a request as an HTTP route does: admit it, send tokens, bill it, and report the end."""
    took, pick = answer(request), random.Random(f"{request}-")
    served = ResolvedModel((), "support", pick.choice(["v1", "v2"]))
    caller, how = Principal("tenant", tenant_of(request)), {"request": request, "prompt_tokens": took.prompt}
    async with tenants.admitted(caller, served, **how, max_tokens=took.completion) as bill:
        for _ in range(pick.randrange(1, 4)):
            await say({"request": request, "word": "…"})
            await asyncio.sleep(pick.random() * pause)
        await bill.used(took)
        await say({"request": request, "used": [took.prompt, took.cached, took.completion]})


# -- a server under load -----------------------------------------------------------------------------------------------


def done_in(url: str) -> int:
    with tenants_at(url) as store, reading(store.engine) as c:
        return int(usage(c, by=())[0]["done"])


def server(url: str, folder: Path, socket: str, redis: str | None = None) -> None:
    async def run() -> None:
        before = done_in(url)
        tenants = opened(url, folder, watch=True, redis=redis)
        with (folder / "recovered").open("a") as file:
            file.write(f"{done_in(url) - before}\n")
        post = ledger_module.post

        # simulate a slow database, so that the last tokens are sent before the ledger's rows are written
        def slowly(*arguments: Any, **named: Any) -> int:
            time.sleep(random.random() * 0.05)
            return post(*arguments, **named)

        ledger_module.post = slowly

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async def say(line: dict[str, Any]) -> None:
                writer.write((json.dumps(line) + "\n").encode())
                await writer.drain()

            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                while request := (await reader.readline()).decode().strip():
                    try:
                        await serve_one(tenants, request, say, 0.01)
                    except Refused as error:
                        await say({"request": request, "refused": error.status})

        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        async with await asyncio.start_unix_server(connected, socket):
            await ended.wait()
        tenants.close()

    asyncio.run(run())


async def clients(
    socket: str, prefix: str, kill: Callable[[], None], seconds: float, saw: dict[str, list[Any]]
) -> None:
    """Run many clients until the server is gone. Each client sends one request after another."""

    async def client(number: int) -> None:
        with contextlib.suppress(ConnectionError, OSError):
            reader, writer = await asyncio.open_unix_connection(socket)
            for n in range(1_000_000):
                request = f"{prefix}-{number}-{n}"
                saw[request] = []
                writer.write(f"{request}\n".encode())
                while line := await reader.readline():
                    if not line.endswith(b"\n"):
                        return
                    saw[request].append(json.loads(line))
                    if "used" in saw[request][-1]:
                        break
                else:
                    return

    for _ in range(3000):
        if os.path.exists(socket):
            break
        await asyncio.sleep(0.01)
    running = [asyncio.create_task(client(n)) for n in range(CLIENTS)]
    for _ in range(3000):  # wait for the first complete response, so that slow machines get as much time under load
        if any(lines and "used" in lines[-1] for name, lines in saw.items() if name.startswith(f"{prefix}-")):
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(seconds)
    kill()
    await asyncio.wait(running, timeout=30)


def run_load(url: str, folder: Path, kills: int, seed: int) -> dict[str, int]:
    pick, saw = random.Random(seed), {}
    prepare(url, folder)
    for n in range(kills + 1):
        socket = str(folder / f"{n}.sock")
        child = fork(lambda socket=socket: server(url, folder, socket))
        last = n == kills
        end = signal.SIGTERM if last else signal.SIGKILL
        asyncio.run(clients(socket, f"{seed}-{n}", lambda: os.kill(child, end), pick.uniform(0.05, 0.6), saw))  # noqa: B023
        expect(child, killed=not last)
    from_journal = sum(map(int, (folder / "recovered").read_text().split()))
    return {"kills": kills, "from_journal": from_journal, **balance(url, [folder], saw)}


# -- two servers under load --------------------------------------------------------------------------------------------

MINUTES_LIMIT = 60
"""Requests per minute of tenant t0 in `run_doors`."""


def run_doors(url: str, folder: Path, kills: int, seed: int, redis: str | None = None) -> dict[str, int]:
    """Kill one of two servers at a time, and start it again, while clients send each request to a random one."""
    pick, saw, folders = random.Random(seed), dict[str, list[Any]](), [folder / "one", folder / "two"]
    for each in folders:
        each.mkdir()
    prepare(url, folders[0])
    with tenants_at(url) as store:
        manage.change_settings(store, "t0", {"requests_per_minute": MINUTES_LIMIT}, actor="driver")

    def start(n: int) -> subprocess.Popen[bytes]:
        (folders[n] / "socket").unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.serve.tenancy.driver", "serve", url, str(folders[n])]
        return subprocess.Popen([*command, str(folders[n] / "socket"), *([redis] if redis else [])])

    async def client(number: int, ended: asyncio.Event) -> None:
        for n in range(1_000_000):
            if ended.is_set():
                return
            request, door = f"{seed}-{number}-{n}", pick.choice(folders)
            try:
                reader, writer = await asyncio.open_unix_connection(str(door / "socket"))
            except OSError:  # the server is not there, so another request goes to another server
                await asyncio.sleep(0.01)
                continue
            saw[request] = []
            with contextlib.suppress(ConnectionError):
                writer.write(f"{request}\n".encode())
                while (line := await reader.readline()).endswith(b"\n"):
                    saw[request].append(json.loads(line))
                    if {"used", "refused"} & saw[request][-1].keys():
                        break
            writer.close()
            await asyncio.sleep(0.02)

    def answered() -> int:
        return sum("used" in lines[-1] for lines in saw.values() if lines)

    async def run() -> None:
        doors, ended = [start(0), start(1)], asyncio.Event()
        running = [asyncio.create_task(client(n, ended)) for n in range(CLIENTS)]
        for _ in range(kills):
            before = answered()
            while answered() < before + 40:  # both servers can be starting
                await asyncio.sleep(0.01)
            await asyncio.sleep(pick.uniform(0.0, 0.5))
            victim = pick.randrange(2)
            doors[victim].kill()
            doors[victim].wait()
            doors[victim] = start(victim)
        ended.set()
        await asyncio.wait(running, timeout=30)
        for each in doors:
            each.terminate()
        assert [each.wait(60) for each in doors] in ([0, 0], [0, -15], [-15, 0], [-15, -15])  # -15: still starting

    asyncio.run(run())
    refused = {request for request, lines in saw.items() if lines and "refused" in lines[-1]}
    assert all(tenant_of(request) == "t0" for request in refused), "only t0 has a limit"
    with tenants_at(url) as store, reading(store.engine) as c:
        rows = c.execute(select(ledger.c.request, ledger.c.opened).where(ledger.c.tenant == "t0")).all()
    times = sorted(row.opened for row in rows)
    most = max(sum(at - 59 < other <= at for other in times) for at in times)
    assert most <= MINUTES_LIMIT * (1 if redis else 2), f"{most} requests in a minute"
    assert not refused & {row.request for row in rows}, "a refused request was recorded"
    totals = balance(url, folders, {request: lines for request, lines in saw.items() if request not in refused})
    return {"refused": len(refused), "most": most, **totals}


# -- every step of one scenario ----------------------------------------------------------------------------------------


def dying(step: int) -> Callable[[Any], Any]:
    """Return a decorator: after `step` calls of decorated functions, the next call kills the process."""
    left = [step]

    def stepping(function: Any) -> Any:
        def stepped(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return stepped

    return stepping


def scenario(url: str, folder: Path, told: int, step: int) -> None:
    """Serve three requests in a process that is killed after `step` steps.

    A step is a write to the journal or to a client, a database statement or commit, or the removal of a file.
    """
    tenants, stepping = opened(url, folder), dying(step)
    for owner, name in ((Connection, "execute"), (Connection, "commit"), (os, "pwrite"), (os, "write"), (os, "unlink")):
        setattr(owner, name, stepping(getattr(owner, name)))

    async def say(line: dict[str, Any]) -> None:
        os.write(told, (json.dumps(line) + "\n").encode())

    async def run() -> None:
        for n in range(2):
            await serve_one(tenants, f"s{step}-{n}", say, 0.0)
        with contextlib.suppress(ZeroDivisionError):
            took = answer(f"s{step}-x")
            how = {"request": f"s{step}-x", "prompt_tokens": took.prompt, "max_tokens": 5}
            async with tenants.admitted(Principal("tenant", "t0"), ResolvedModel((), "n", "v1"), **how):
                await say({"request": f"s{step}-x", "word": "…"})
                raise ZeroDivisionError  # like a route that fails before billing

    asyncio.run(run())
    tenants.close()


def each_step(act: Callable[[int, int], object], stride: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield (step, messages sent before the kill) for each step, until a process ends without a kill."""
    for step in range(0, 10_000, stride):
        here, there = os.pipe()
        child = fork(lambda step=step, there=there: act(there, step))
        os.close(there)
        with os.fdopen(here, "rb") as pipe:
            told = [json.loads(line) for line in pipe.read().split(b"\n")[:-1]]
        _, status = os.waitpid(child, 0)
        yield step, told
        if not os.WIFSIGNALED(status):
            assert status == 0
            return
    raise AssertionError("it never came to its end")


def run_points(url: str, folder: Path, stride: int) -> dict[str, int]:
    prepare(url, folder)
    saw: dict[str, list[Any]] = {}
    steps = 0
    for steps, told in each_step(lambda pipe, step: scenario(url, folder, pipe, step), stride):
        saw |= {name: [] for name in (f"s{steps}-0", f"s{steps}-1", f"s{steps}-x")}
        for heard in told:
            saw[heard["request"]].append(heard)
    return {"steps": steps, **balance(url, [folder], saw)}


# -- comparison with the ledger ----------------------------------------------------------------------------------------


def prepare(url: str, folder: Path) -> None:
    def make() -> None:
        tenants = opened(url, folder)
        for n in range(3):
            manage.add_tenant(tenants.store, f"t{n}", actor="driver")
        manage.change_settings(tenants.store, "", PRICES, actor="driver")
        tenants.close()

    expect(fork(make), killed=False)


def balance(url: str, folders: Sequence[Path], saw: dict[str, list[Any]]) -> dict[str, int]:
    """Compare the ledger with the clients' records.

    Opens the database as a restarted server does, which settles open requests.
    """
    deadline = time.monotonic() + 10
    while True:  # PostgreSQL can take a moment to notice that the killed server's connections are gone
        servers = [opened(url, folder) for folder in folders]
        with reading(servers[0].store.engine) as c:
            rows = c.execute(select(ledger)).all()
            totals = usage(c, by=())
            by_tenant = usage(c, by=("tenant",))
        for each in servers:
            each.close()
        if not any(r.state == "open" for r in rows) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    found = {r.request: r for r in rows}
    assert len(found) == len(rows), "a request is there twice"
    assert set(found) <= set(saw), "a request that nobody made"
    finals = 0
    for request, lines in saw.items():
        row, took = found.get(request), answer(request)
        assert not lines or row is not None, f"{request}: the client had words of it, the ledger has nothing"
        if lines and "used" in lines[-1]:
            finals += 1
            assert row.state == "done", f"{request}: answered, and {row.state}"
        if row is None:
            continue
        assert row.state in ("done", "interrupted"), f"{request} is {row.state}"
        assert (row.asked_prompt, row.tenant) == (took.prompt, row.tenant if "x" in request else tenant_of(request))
        if row.state == "done":
            figures = (row.prompt, row.cached, row.completion, row.queued, row.prefill, row.decode)
            assert figures == tuple(vars(took).values())
            assert row.cost == PRICE.cost(took.prompt, took.cached, took.completion)
        else:
            assert (row.prompt, row.completion, row.cost) == (0, 0, 0)
    done = [answer(r.request) for r in rows if r.state == "done"]
    assert totals[0]["requests"] == len(rows)
    assert totals[0]["completion"] == sum(t.completion for t in done)
    assert totals[0]["cost"] == sum(PRICE.cost(t.prompt, t.cached, t.completion) for t in done)
    assert sum(r["cost"] for r in by_tenant) == totals[0]["cost"]
    assert not [p for folder in folders for p in (folder / "journals").iterdir() if p.stat().st_size], "debris"
    interrupted = sum(r.state == "interrupted" for r in rows)
    return {"answered": finals, "done": len(done), "interrupted": interrupted}


if __name__ == "__main__":
    what, url, folder, *rest = sys.argv[1:]
    if what == "serve":
        server(url, Path(folder), *rest)
    else:
        do: Any = {"load": run_load, "points": run_points, "doors": run_doors}[what]
        print(json.dumps(do(url, Path(folder), *(int(each) if each.isdigit() else each for each in rest))))
