"""`veneer serve` as a process with tenants: after a kill under load, it restarts with a balanced ledger."""

from __future__ import annotations

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from sqlalchemy import select

from tests.forks import Forked
from tests.serve.http.toy import wait_for
from tests.serve.tenancy.conftest import new_tenant, set_price
from tests.serve.whole import Shop, asking, process, prompt, said
from veneer.library.database import reading
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import Price, line_table
from veneer.serve.tenancy.tenants import Tenants

PRICE = Price(150_000, 15_000, 600_000)
CLIENTS = 6


@dataclass
class Seen:
    """What the clients received.

    `answered`: complete responses, request id -> (prompt, completion) tokens. `begun`: ids of streams with at
    least one event. `broken`: number of clients whose connection broke.
    """

    answered: dict[str, tuple[int, int]] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)
    broken: int = 0


def tenants_of(folder: Path) -> tuple[str, str]:
    """Create a database with one tenant. Return (database URL, tenant's key)."""
    url = str(folder / "tenants.sqlite")
    tenants = Tenants(url, watch=False)
    key = new_tenant(tenants.store, "acme", ["*"])
    set_price(tenants.store, *astuple(PRICE))
    tenants.close()
    return url, key


def client(address: str, key: str, seed: int, seen: Seen) -> None:
    """Send requests one after another, some of them streamed, until the server is gone."""
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
    """Put load on the server, then kill it `seconds` after each client has had about one response."""
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
    """Compare the ledger with the clients' responses. Return the number of rows per state."""
    tenants = Tenants(url, watch=False)
    rows: list[Any] = []

    def settled() -> bool:  # the server writes to its database with a short delay
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
    assert seen.begun <= set(found)  # a request has a row before its first token is sent
    states = {"done": 0, "interrupted": 0}
    for row in rows:
        states[row.state] += 1  # raises KeyError if the request is still open
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
    with process(shop, tmp_path, url) as (server, address):
        under_load(address, key, seen, 1, server, 0.3)
    assert server.returncode == -signal.SIGKILL
    with process(shop, tmp_path, url) as (server, address):
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as api:
            for name in ("plain", "dora"):
                answer = api.completions.create(**asking(name, prompt(20)))
                seen.answered[answer.id] = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
                assert said(answer).same(shop.wanted([(name, 1.0)], prompt(20), 12))
        states = balance(url, seen)
        assert states["done"] >= len(seen.answered) > CLIENTS
        assert states["interrupted"] > 0
        assert seen.broken == CLIENTS
