"""`veneer serve` as a process with tenants: after a kill under load it starts again with a balanced ledger; at a
signal to stop it finishes running requests."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import select

from tests.forks import Forked
from tests.homes import home_with_kernels
from tests.serve.http.toy import free_port, wait_for
from tests.serve.tenancy.conftest import set_price
from tests.serve.whole import Shop, asking, make_shop, prompt, said
from veneer.library.database import reading
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import Price, line_table
from veneer.serve.tenancy.tenants import Tenants

ROOT = Path(__file__).resolve().parents[2]
PRICE = Price(150_000, 15_000, 600_000)
CLIENTS = 6


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return make_shop(tmp_path_factory.mktemp("shop"), ["plain", "dora"])


@dataclass
class Seen:
    """What clients saw. `answered`: whole answers, id -> (prompt, completion) tokens; `begun`: streams of which they
    had a word; `broken`: clients whose connection broke."""

    answered: dict[str, tuple[int, int]] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)
    broken: int = 0


def tenants_of(folder: Path) -> tuple[str, str]:
    """(the database, a key)"""
    url = str(folder / "tenants.sqlite")
    tenants = Tenants(url, watch=False)
    manage.add_tenant(tenants.store, "acme", adapters=["*"], actor="test")
    set_price(tenants.store, *astuple(PRICE))
    _, key = manage.make_tenant_key(tenants.store, "acme", actor="test")
    tenants.close()
    return url, key


@contextmanager
def process(shop: Shop, url: str, home: Path) -> Iterator[tuple[Forked, str]]:
    """A server that is ready, and its address."""
    port = free_port()
    own = {"PYTHONPATH": str(ROOT / "src"), "VENEER_HOME": str(home_with_kernels(home)), "OMP_NUM_THREADS": "1"}
    command = [
        "-c",
        "from veneer.cli.main import main; main()",
        "serve",
        "--base",
        str(shop.base_dir),
        "--port",
        str(port),
        "--library",
        shop.library.location,
        "--tenants",
        url,
        "--cache-memory",
        "16M",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--config",
        str(home / "server.yaml"),
    ]
    (home / "server.yaml").write_text("drain_seconds: 120", encoding="utf-8")
    server = Forked(command, env=os.environ | own, log=home / "log")
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: server.poll() is not None or is_ready(address), 120)
        assert server.poll() is None, (home / "log").read_text()[-3000:]
        yield server, address
    finally:
        server.kill()
        server.wait()


def is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready").status_code == 200
    except httpx.TransportError:
        return False


def client(address: str, key: str, seed: int, seen: Seen) -> None:
    """Asks one thing after another, streamed or whole, until the server is gone."""
    pick = random.Random(seed)
    with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60) as api:
        while True:
            asked = asking(pick.choice(["plain", "dora", "tiny"]), prompt(pick.randrange(3, 40), seed), 60)
            try:
                if pick.random() < 0.4:
                    answer = api.completions.create(**asked)
                    seen.answered[answer.id] = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
                    continue
                ended: Any = None
                for chunk in api.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
                    seen.begun.add(chunk.id)
                    ended = chunk.usage or ended
                if ended is None:
                    raise httpx.RemoteProtocolError("the stream broke off")
                seen.answered[chunk.id] = (ended.prompt_tokens, ended.completion_tokens)
            except (openai.APIConnectionError, httpx.TransportError):
                seen.broken += 1
                return


def under_load(address: str, key: str, seen: Seen, seed: int, server: Forked, seconds: float) -> None:
    """The server is killed some `seconds` after every client has had an answer or so."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        before = len(seen.answered)
        running = [pool.submit(client, address, key, seed + n, seen) for n in range(CLIENTS)]
        try:
            wait_for(lambda: len(seen.answered) > before + CLIENTS, 60)
            time.sleep(seconds)
        finally:
            server.kill()
        for each in running:
            each.result()
        server.wait()


def balance(url: str, seen: Seen) -> dict[str, int]:
    """Compare the ledger with the clients' answers; returns the number of rows per state."""
    tenants = Tenants(url, watch=False)
    rows: list[Any] = []

    def settled() -> bool:  # a running server updates its database soon
        with reading(tenants.store.engine) as c:
            rows[:] = c.execute(select(line_table)).all()
        done = {row.request for row in rows if row.state == "done"}
        return set(seen.answered) <= done and all(row.state != "open" for row in rows)

    wait_for(settled, 10)
    with reading(tenants.store.engine) as c:
        (total,) = usage(c, by=())
    tenants.close()
    found = {row.request: row for row in rows}
    assert len(found) == len(rows), "a request is there twice"
    for request, took in seen.answered.items():
        assert found[request].state == "done", request
        assert (found[request].prompt, found[request].completion) == took
    assert seen.begun <= set(found)  # no word went out before its row was there
    states = {"done": 0, "interrupted": 0}
    for row in rows:
        states[row.state] += 1  # KeyError for one that is still open
        if row.state == "interrupted":
            assert row.request not in seen.answered
            assert (row.prompt, row.completion, row.cost) == (0, 0, 0)
        else:
            assert row.cost == PRICE.cost(row.prompt, row.cached, row.completion)
    assert total["requests"] == len(rows)
    assert total["completion"] == sum(row.completion for row in rows)
    assert total["cost"] == sum(row.cost for row in rows)
    return states


def test_after_a_kill_the_ledger_balances(shop: Shop, tmp_path: Path) -> None:
    url, key = tenants_of(tmp_path)
    seen = Seen()
    with process(shop, url, tmp_path) as (server, address):
        under_load(address, key, seen, 1, server, 0.3)
    assert server.returncode == -signal.SIGKILL
    with process(shop, url, tmp_path) as (server, address):
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as api:
            for name in ("plain", "dora"):
                answer = api.completions.create(**asking(name, prompt(20)))
                seen.answered[answer.id] = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
                assert said(answer).same(shop.wanted([(name, 1.0)], prompt(20), 12))
        states = balance(url, seen)
        assert states["done"] >= len(seen.answered) > CLIENTS
        assert states["interrupted"] > 0
        assert seen.broken == CLIENTS
        drains(server, address, key, seen)
    assert balance(url, seen)["interrupted"] == states["interrupted"]


def drains(server: Forked, address: str, key: str, seen: Seen) -> None:
    """SIGTERM under load: streams that run end whole, new requests are 503, and the exit code is 0."""
    begun = threading.Semaphore(0)
    lengths: list[int] = []

    def stream(seed: int) -> None:
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60) as api:
            asked = asking("plain", prompt(9, seed), 400)
            tokens, reason = 0, None
            for chunk in api.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
                for choice in chunk.choices:
                    tokens += len(choice.logprobs.token_logprobs) if choice.logprobs else 0
                    reason = choice.finish_reason or reason
                if tokens == 1:
                    begun.release()
                if chunk.usage:
                    seen.answered[chunk.id] = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            assert reason == "length"
            lengths.append(tokens)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stream, seed) for seed in range(4)]
        for _ in running:
            assert begun.acquire(timeout=60)
        server.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=address, headers={"authorization": f"Bearer {key}"}) as other:
            wait_for(lambda: other.get("/ready").json() == {"status": "draining"})
            refused = other.post("/v1/completions", json={"model": "plain", "prompt": "Hi"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert refused.headers["retry-after"]
        assert not all(each.done() for each in running)
        for each in running:
            each.result()
    assert lengths == [400] * 4
    assert server.wait(60) == 0


@pytest.mark.slow
def test_killed_again_and_again(shop: Shop, tmp_path: Path) -> None:
    url, key = tenants_of(tmp_path)
    seen, pick = Seen(), random.Random(3)
    for n in range(6):
        with process(shop, url, tmp_path) as (server, address):
            under_load(address, key, seen, 100 * n, server, pick.random())
    states = balance(url, seen)
    assert states["done"] >= len(seen.answered)
    assert seen.broken == 6 * CLIENTS
