"""The Studio's requests equal those over HTTP in tokens, limits, cost and stored completions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest

from tests.serve.whole import Whole, make_shop, served
from veneer.library.database import reading
from veneer.serve.http.answers import TextAnswer, finite_logprob
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Token
from veneer.serve.tenancy import manage, routes
from veneer.serve.tenancy.ledger import usage
from veneer.studio.ask import TextRequest, ask_texts

OPERATOR = Principal("operator")
MESSAGES = [{"role": "user", "content": "Say something about doors."}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("asking")
    shop = make_shop(folder, ["plain", "rs"])
    with served(shop, tenants=str(folder / "tenants.sqlite"), open=True) as server:
        yield server


def ask(whole: Whole, caller: Principal = OPERATOR, **asked: Any) -> list[TextAnswer]:
    async def all_of_it() -> list[TextAnswer]:
        answers = [TextAnswer() for _ in range(asked.get("n", 1))]
        async with aclosing(ask_texts(whole.built.service, caller, TextRequest(MESSAGES, **asked))) as events:
            async for i, event in events:
                answers[i].add(event)
        behind = asyncio.all_tasks() - {asyncio.current_task()}  # the shadow's task, which continues after the response
        await asyncio.gather(*behind)
        return answers

    return asyncio.run(all_of_it())


def refused(whole: Whole, caller: Principal = OPERATOR, **asked: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        ask(whole, caller, **asked)
    return caught.value


def test_the_answers_are_those_of_a_chat_completion(whole: Whole) -> None:
    for mix in ((), (("plain", 1.0),), (("plain", 0.4), ("rs", -0.3))):
        own = ask(whole, mix=mix, n=3, seed=7, temperature=0.8, max_tokens=6, logprobs=2)
        body = {"messages": MESSAGES, "n": 3, "seed": 7, "temperature": 0.8, "max_tokens": 6}
        body |= {"mix": [f"{name}:{s}" for name, s in mix], "logprobs": True, "top_logprobs": 2}
        answer = whole.http.post("/v1/chat/completions", json=body).json()
        for choice, mine in zip(answer["choices"], own, strict=True):
            assert choice["message"]["content"] == mine.text
            theirs = [each["logprob"] for each in choice["logprobs"]["content"]]
            seen = [finite_logprob(t.logprob) for t in mine.tokens if not (t.special and not t.text)]
            assert theirs == pytest.approx(seen, abs=1e-4)
            assert all(len(token.top) == 2 for token in mine.tokens)


def test_answers_are_billed_and_kept_by_id(whole: Whole) -> None:
    tenants: Any = whole.built.service.tenancy
    store = tenants.store
    manage.change_settings(store, "", {"feedback_days": 1.0}, actor="me")
    routes.set_route(store, "support", [("plain", 1)], shadow="rs", actor="me")
    store.refresh()
    first = TextRequest(MESSAGES).id
    with reading(store.engine) as c:
        before = sum(row["requests"] for row in usage(c, by=()))
    (answer,) = ask(whole, mix=[("support", 1.0)], max_tokens=4, id=first)
    assert tenants.ledger.flush()
    with reading(store.engine) as c:
        after = sum(row["requests"] for row in usage(c, by=()))
    assert after > before
    said = whole.http.post("/v1/feedback", json={"id": first, "corrected": "A door opens."})
    assert said.status_code == 200, said.text
    (row,) = whole.http.get("/v1/feedback/rows?kind=preference").text.splitlines()
    assert "A door opens." in row
    with reading(store.engine) as c:
        assert routes.shadow_log(c, route="support") == [], "a trial has no shadow"
    assert answer.finished.usage.completion == len(answer.tokens) <= 4
    manage.change_settings(store, "", {"feedback_days": None}, actor="me")


def test_the_studio_has_no_more_rights_than_a_client(whole: Whole) -> None:
    tenants: Any = whole.built.service.tenancy
    nobody = Principal("tenant", "acme", sees=lambda name: name == "plain")
    assert refused(whole, nobody, mix=[("rs", 0.5)]).status == 404
    assert refused(whole, n=1_000).param == "n"
    assert refused(whole, temperature=-1.0).status == 400
    assert refused(whole, max_tokens=1 << 20).param == "max_tokens"
    manage.add_tenant(tenants.store, "acme", adapters=["plain"], actor="me")
    manage.change_settings(tenants.store, "acme", {"requests_per_minute": 1}, actor="me")
    tenants.store.refresh()
    assert len(ask(whole, nobody, mix=[("plain", 1.0)], max_tokens=2)) == 1
    assert refused(whole, nobody, mix=[("plain", 1.0)], max_tokens=2).status == 429
    whole.built.service.phase = "draining"
    try:
        assert refused(whole).status == 503
    finally:
        whole.built.service.phase = "ready"


def test_loaded_adapters_are_listed_by_their_names(whole: Whole) -> None:
    ask(whole, mix=[("plain", 1.0)], max_tokens=1)
    ask(whole, mix=[("rs", 0.5)], max_tokens=1)
    whole.idle()
    found = whole.built.service.catalog.in_memory()
    assert [name for name, _ in found] == ["rs@1", "plain@1"], "the last used first"
    stats = whole.engine.residents.stats()
    assert (sum(each.bytes for _, each in found), len(found)) == (stats.bytes, stats.adapters)
    assert not any(each.leases for _, each in found)


def test_closing_a_stream_cancels_and_releases_everything(whole: Whole) -> None:
    async def first_token() -> None:
        asked = TextRequest(MESSAGES, [("plain", 0.5)], n=2, max_tokens=500)
        async with aclosing(ask_texts(whole.built.service, OPERATOR, asked)) as events:
            async for _, event in events:
                if isinstance(event, Token):
                    return

    asyncio.run(first_token())
    whole.idle()
    assert not any(share.in_use for share in whole.built.service.admission.shares.values())
