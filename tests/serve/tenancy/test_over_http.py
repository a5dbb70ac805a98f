"""A server with tenants: the price of a mix does not depend on its spelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from tests.serve.tenancy.conftest import new_tenant, set_price
from tests.serve.whole import make_shop, served
from veneer.library.database import reading
from veneer.serve.settings import LedgerSettings
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import Store, line_table

ADMIN = "an-admin-key-of-some-length"


def test_every_spelling_of_a_mix_has_the_same_price(tmp_path: Path) -> None:
    """`plain` costs a thousand times the default price. The ledger stores the library's names."""
    shop, where = make_shop(tmp_path, ["plain", "rs"]), str(tmp_path / "tenants.sqlite")
    shop.library.alias("plain@1", "prod")
    digest = shop.library.find("plain").digest
    store = Store(where)
    key = new_tenant(store, "acme", ["plain", "rs", "sha256:*"])
    set_price(store, 1_000_000, 1_000_000, 1_000_000)
    set_price(store, 1_000_000_000, 1_000_000_000, 1_000_000_000, adapter="plain")
    both, dear, cheap = 8008, 8000, 8  # prices of 5 prompt tokens + 3 completion tokens
    asked: list[tuple[dict[str, Any], int]] = [
        ({"model": "plain"}, dear),
        ({"model": "plain@prod"}, dear),
        ({"model": digest}, dear),
        ({"model": "rs"}, cheap),
        ({"model": ""}, cheap),
        ({"mix": ["plain", "rs:0"]}, dear),
        ({"mix": ["plain", "rs:1e-9"]}, both),
        ({"mix": ["plain:1", {"adapter": "rs", "strength": 1}, {"adapter": "rs", "strength": -1}]}, dear),
        ({"mix": [{"adapter": "plain", "strength": 0.5}, {"adapter": "plain@1", "strength": 0.5}]}, dear),
        ({"mix": [{"adapter": "rs", "strength": 0.5}, {"adapter": digest, "strength": 0.5}]}, both),
        ({"mix": ["plain", "plain@prod:-1"]}, cheap),  # the base
    ]
    with served(shop, tenants=where, admin_key=ADMIN) as server:
        costs = []
        for body, _ in asked:
            ask = {"model": "", "prompt": [5, 6, 7, 8, 9], "max_tokens": 3, "ignore_eos": True} | body
            answer = server.http.post("/v1/completions", json=ask, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 200, answer.text
            assert server.built.service.tenancy.ledger.flush()  # type: ignore[attr-defined]
            with reading(store.engine) as c:
                total = usage(c, by=())[0]["cost"]
            costs.append(total - sum(costs))
        with reading(store.engine) as c:
            names = set(c.scalars(select(line_table.c.adapter)))
            apart = usage(c, by=("adapter",))
        series = server.http.get("/metrics", headers={"authorization": f"Bearer {ADMIN}"}).text
    assert costs == [cost for _, cost in asked]
    assert names == {"plain@1", "rs@1", server.built.service.catalog.base}
    assert sum(r["cost"] for r in apart) == sum(costs)
    for name in ("owed", "lag_seconds", "away"):
        (line,) = (line for line in series.splitlines() if line.startswith(f"veneer:ledger_{name}{{"))
        assert line.endswith(" 0.0")
    store.close()


def test_messages_are_in_the_ledger_with_the_counts_of_chat_completions(tmp_path: Path) -> None:
    shop, where = make_shop(tmp_path, ["plain"]), str(tmp_path / "tenants.sqlite")
    store = Store(where)
    key = new_tenant(store, "acme", ["plain"])
    set_price(store, 1_000_000, 1_000_000, 1_000_000)
    turns = [{"role": "user", "content": "The printer on the third floor does not answer. " * 4}]
    body: dict[str, Any] = {"model": "plain", "messages": turns, "max_tokens": 4, "temperature": 0}
    with served(shop, tenants=where, admin_key=ADMIN) as server:

        def ask(path: str) -> tuple[Any, dict[str, int]]:
            answer = server.http.post(path, json=body, headers={"x-api-key": key})
            assert answer.status_code == 200, answer.text
            assert server.built.service.tenancy.ledger.flush()  # type: ignore[attr-defined]
            with reading(store.engine) as c:
                (row,) = usage(c, by=())
            return answer.json(), {name: int(n) for name, n in row.items() if isinstance(n, int)}

        ask("/v1/chat/completions")  # fills the prefix cache
        before = ask("/v1/chat/completions")[1]
        chat, between = ask("/v1/chat/completions")
        message, after = ask("/v1/messages")
    store.close()
    assert {k: after[k] - between[k] for k in after} == {k: between[k] - before[k] for k in after}
    assert message["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    read = message["usage"]["cache_read_input_tokens"]
    assert read == chat["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert message["usage"]["input_tokens"] + read == chat["usage"]["prompt_tokens"]
    assert message["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]


@pytest.mark.parametrize("sync", [False, True])
def test_ledger_settings_reach_the_ledger(tmp_path: Path, sync: bool) -> None:
    shop, where = make_shop(tmp_path, ["plain"]), str(tmp_path / "tenants.sqlite")
    ledger = LedgerSettings(3.0, tmp_path / "here", 1 << 20, sync)
    with served(shop, tenants=where, ledger=ledger) as server:
        tenants: Any = server.built.service.tenancy
        assert tenants.keep_days == 3.0
        (file,) = (tmp_path / "here").iterdir()
        assert file.stat().st_size == 1 << 20
