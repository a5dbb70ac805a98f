"""A rolling upgrade over a migration: servers of two versions with one database, under load."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from tests.homes import home_with_kernels
from tests.library.conftest import postgres  # noqa: F401
from tests.serve.http.toy import free_port, wait_for
from tests.serve.whole import ROOT, Shop, asking, is_ready, prompt
from veneer.library.database import open_engine, reading
from veneer.library.migrate import revision
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import TENANT_SCHEMA, Store, line_table

MIGRATION = "src/veneer/serve/tenancy/versions/v0011.py"
CLIENTS = 4
RUN = "from veneer.cli.main import main; main()"


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


@pytest.fixture
def old_source(tmp_path: Path) -> Path:
    """Return the source of the version before the migration, from the repository's history."""
    if not (ROOT / ".git").exists():
        pytest.skip("the older version is in the repository's history: use a git clone")
    added = git("log", "--diff-filter=A", "--format=%H", "--", MIGRATION).decode().split()
    assert added, "commit the migration first"
    (tmp_path / "old").mkdir()
    with subprocess.Popen(["git", "archive", f"{added[-1]}^", "src"], cwd=ROOT, stdout=subprocess.PIPE) as archive:
        subprocess.run(["tar", "-x", "-C", str(tmp_path / "old")], stdin=archive.stdout, check=True)
    return tmp_path / "old" / "src"


@dataclass
class Load:
    """Clients behind a balancer that sends each request to a random server.

    Like a router, the balancer sends a request again if the server refused the connection, closed it without
    an answer, or answered 503. `answered`: request id -> completion tokens.
    """

    key: str
    doors: list[str]
    answered: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def client(self, seed: int) -> None:
        pick = random.Random(seed)
        while not self.ended.is_set():
            body = asking("plain", prompt(pick.randrange(3, 30), seed), pick.randrange(2, 12))
            body |= body.pop("extra_body")
            give_up = time.monotonic() + 120
            while True:
                door = pick.choice(list(self.doors))
                try:
                    head = {"Authorization": f"Bearer {self.key}"}
                    answer = httpx.post(f"{door}/v1/completions", json=body, headers=head, timeout=120)
                except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError) as error:
                    problem = repr(error)
                else:
                    if answer.status_code == 200:
                        self.answered[answer.json()["id"]] = answer.json()["usage"]["completion_tokens"]
                        break
                    problem = answer.text
                    if answer.status_code != 503:
                        self.lost.append(problem)
                        break
                if time.monotonic() > give_up:
                    self.lost.append(problem)
                    break
                time.sleep(0.05)


@contextlib.contextmanager
def door(source: Path, shop: Shop, home: Path, url: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a server of one version. Yield (process, address) when it is ready."""
    port = free_port()
    env = {"PYTHONPATH": str(source), "VENEER_HOME": str(home_with_kernels(home)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, "serve", "--base", str(shop.base_dir), "--port", str(port)]
    command += ["--library", shop.library.location, "--tenants", url, "--dtype", "float32", "--device", "cpu"]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: server.poll() is not None or is_ready(address), 240)
        assert server.poll() is None, (home / "log").read_text(errors="replace")[-3000:]
        yield server, address
        server.terminate()  # a killed server's last bills would wait in its journal for the next start
        server.wait(120)
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_a_rolling_upgrade_loses_no_request(
    shop: Shop,
    tmp_path: Path,
    old_source: Path,
    postgres: Callable[[], str],  # noqa: F811
) -> None:
    url, old = postgres(), old_source

    def old_command(*arguments: str) -> str:
        command = [sys.executable, "-c", RUN, "tenant", "--at", url, *arguments]
        env = os.environ | {"PYTHONPATH": str(old)}
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()

    def schema() -> str | None:
        engine = open_engine(url, "x")
        with reading(engine) as c:
            number = revision(c, TENANT_SCHEMA)
        engine.dispose()
        return number

    def stop(server: Any, address: str) -> None:
        load.doors.remove(address)  # as a router does once /ready fails
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) in (0, -signal.SIGTERM)

    old_command("add", "acme", "--see", "*")
    load = Load(old_command("key", "add", "acme"), [])
    assert schema() == "0010"
    enough = 30

    def more() -> None:
        before = len(load.answered)
        wait_for(lambda: len(load.answered) >= before + enough or load.lost, 240)

    with ThreadPoolExecutor(CLIENTS) as pool, contextlib.ExitStack() as stack:  # a failure ends the clients first
        stack.callback(load.ended.set)
        running = [stack.enter_context(door(old, shop, tmp_path / f"old-{n}", url)) for n in range(2)]
        load.doors += [address for _, address in running]
        clients = [pool.submit(load.client, n) for n in range(CLIENTS)]
        more()
        first = stack.enter_context(door(ROOT / "src", shop, tmp_path / "new-0", url))  # migrates under load
        assert schema() == TENANT_SCHEMA.revisions[-1] != "0010"
        load.doors.append(first[1])
        more()
        store = Store(url)  # a caller's key is no trainer's key to the older version, which knows no roles
        _, callers = manage.make_tenant_key(store, "acme", role="caller", actor="me")
        store.close()
        answers = [httpx.get(f"{at}/v1/models", headers={"Authorization": f"Bearer {callers}"}) for at in load.doors]
        assert [answer.status_code for answer in answers] == [401, 401, 200]
        stop(*running[0])
        load.doors.append(stack.enter_context(door(ROOT / "src", shop, tmp_path / "new-1", url))[1])
        more()
        stop(*running[1])
        more()
        load.ended.set()
        for each in clients:
            each.result()
    assert not load.lost
    assert len(load.answered) >= 4 * enough
    store = Store(url)

    def billed() -> dict[str, tuple[str, int]]:
        with store.reading() as c:
            rows = c.execute(select(line_table).where(line_table.c.part == 0)).all()
        assert len({row.request for row in rows}) == len(rows)
        return {row.request: (row.state, row.completion) for row in rows}

    wait_for(lambda: load.answered.keys() <= billed().keys())
    found = billed()
    assert {id: found[id] for id in load.answered} == {id: ("done", n) for id, n in load.answered.items()}
    store.close()
