"""A server with an upstream in front of the embedded engine, which answers as vLLM does.

The expected answers are computed without a server: see tests/serve/whole.py.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.serve.http.toy import wait_for
from tests.serve.tenancy.conftest import new_tenant
from tests.serve.whole import NO_SPECIAL, TOLERANCE, Shop, Whole, asking, process, prompt, served
from veneer.serve.fleet.mixes import Mixes
from veneer.serve.request import DigestMix, Finished, Request, Sampling, Started, Token, make_mix, served_name
from veneer.serve.settings import FleetSettings
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store
from veneer.serve.upstream import Upstream

IDS = prompt(17)
BIAS = {int(k): float(v) for k, v in NO_SPECIAL.items()}


def digest(shop: Shop, name: str) -> str:
    return shop.library.find(name).digest


def mix_of(shop: Shop, **strengths: float) -> DigestMix:
    return make_mix([(digest(shop, name), strength) for name, strength in strengths.items()])


def ask(whole: Whole, tmp_path, mix: DigestMix, **more: Any) -> list[Any]:
    sampling = Sampling(**{"max_tokens": 12, "temperature": 0.0, "logprobs": 2, "ignore_eos": True} | more)
    sampling = Sampling(**{**vars(sampling), "logit_bias": BIAS})
    request = Request(tuple(IDS), sampling, mix, tenant="acme", salt="s", user="ann")

    async def work() -> list[Any]:
        mixes = Mixes(whole.shop.library.resolve, tmp_path / "mixes")
        door = Upstream(whole.url, mixes=mixes, decode=whole.shop.base.tokenizer.decode, key="secret")
        await door.begin()
        try:
            return [event async for event in door.events(request)]
        finally:
            await door.end()

    return asyncio.run(work())


@pytest.mark.parametrize("mix", [{}, {"plain": 1.0}, {"patterns": 1.0}, {"plain": 0.5, "rs": -0.75}, {"rs": 2.0}])
def test_the_embedded_engine_answers_a_door_like_the_reference(whole, shop, tmp_path, mix):
    wanted = shop.wanted(tuple(mix.items()), IDS, 12)
    started, *tokens, last = ask(whole, tmp_path, mix_of(shop, **mix))
    assert isinstance(started, Started)
    assert isinstance(last, Finished)
    assert "".join(t.text for t in tokens) + last.text == wanted.text
    with_ids = [t for t in tokens if isinstance(t, Token) and t.id >= 0]
    assert len(with_ids) == last.usage.completion == 12
    assert (last.reason, last.usage.prompt) == ("length", len(IDS))
    for token, expected in zip(with_ids, wanted.logprobs, strict=True):
        assert token.logprob == pytest.approx(expected, abs=10 * TOLERANCE)
        assert len(token.top) == 2
        assert token.id in [id for id, _, _ in token.top]


def test_the_embedded_engine_lists_the_name_that_the_door_sends(whole, shop, tmp_path):
    ask(whole, tmp_path, mix := mix_of(shop, plain=1.0))
    cards = {card["id"]: card for card in httpx.get(f"{whole.url}/v1/models").json()["data"]}
    card = cards[served_name(mix)]
    assert (card["parent"], card["digest"], card["root"]) == ("tiny", digest(shop, "plain"), "plain@1")
    assert served_name(mix) in httpx.get(f"{whole.url}/metrics").text


def test_the_embedded_engine_refuses_a_mix_under_a_name_that_is_not_its_own(whole, shop):
    mix = [{"adapter": digest(shop, "plain"), "strength": 0.5}]
    body = {"model": "veneer-mix-" + "0" * 32, "prompt": [5], "mix": mix}
    answer = httpx.post(f"{whole.url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "mix" in answer.json()["error"]["message"]
    unknown = httpx.post(f"{whole.url}/v1/completions", json={"model": "veneer-" + "0" * 64, "prompt": [5]})
    assert unknown.status_code == 404


def test_token_ids_and_logprobs_have_vllms_form(whole, shop):
    """As vllm/entrypoints/openai/completion/serving.py: ids beside the text, `token_id:N` in logprobs."""
    body = {"model": "plain", "prompt": IDS, "max_tokens": 5, "temperature": 0, "logprobs": 1}
    body |= {"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True}
    choice = httpx.post(f"{whole.url}/v1/completions", json=body).json()["choices"][0]
    assert choice["prompt_token_ids"] == IDS
    assert choice["logprobs"]["tokens"] == [f"token_id:{id}" for id in choice["token_ids"]]
    assert len(choice["token_ids"]) == 5
    assert all(re.fullmatch(r"token_id:\d+", key) for top in choice["logprobs"]["top_logprobs"] for key in top)
    assert shop.base.tokenizer.decode(choice["token_ids"], skip_special_tokens=True) == choice["text"]
    chat = {"model": "plain", "messages": [{"role": "user", "content": "a"}], "return_token_ids": True}
    assert httpx.post(f"{whole.url}/v1/chat/completions", json=chat).status_code == 400


def test_messages_through_a_door_are_those_of_the_engine(shop: Shop, tmp_path: Path) -> None:
    key, place = "door-0123456789abcdef", str(tmp_path / "tenants.sqlite")
    with ExitStack() as stack:
        engine = stack.enter_context(served(shop, keys=(key,), fleet=FleetSettings(key=key)))
        stack.callback((store := Store(place)).close)
        tenant = new_tenant(store, "acme", ["*"])
        door = process(shop, tmp_path / "door", place, "--upstream", engine.url, own=(), VENEER_UPSTREAM_KEY=key)
        servers = {engine.url: key, stack.enter_context(door)[1]: tenant}
        answers = []
        for url, own in servers.items():
            client = stack.enter_context(anthropic.Anthropic(base_url=url, api_key=own, max_retries=0))
            for model, more in (("plain", {}), ("tiny", {"mix": ["plain:0.5", "rs:-0.75"]})):
                asked: dict[str, Any] = {"messages": [{"role": "user", "content": "The printer"}], "max_tokens": 12}
                asked |= {"model": model, "extra_body": {"temperature": 0, **more}}
                with client.messages.stream(**asked) as stream:
                    streamed = stream.get_final_message()
                answer = client.messages.create(**asked)
                assert streamed.content[0].text == answer.content[0].text
                prompt_tokens = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
                answers.append((answer.content[0].text, answer.stop_reason, prompt_tokens, answer.usage.output_tokens))
    assert answers[:2] == answers[2:]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_two_doors_share_an_engine_by_tenant(shop: Shop, tmp_path: Path, weight: float) -> None:
    """A tenant that floods through both doors has one share; another tenant's first token comes at once.

    In order, without a clock: B's first token comes before any of A's completions ends, although A's fill all slots
    and the queue. In counts: B holds its part of the slots. With a share for each door, A would have two; without
    shares, B would wait for A.
    """
    key, place, rows = "door-0123456789abcdef", str(tmp_path / "tenants.sqlite"), 8
    with ExitStack() as stack:
        engine = stack.enter_context(served(shop, rows=rows, keys=(key,), fleet=FleetSettings(key=key)))
        stack.callback((store := Store(place)).close)
        keys = {name: new_tenant(store, name, ["*"]) for name in "ab"}
        manage.change_settings(store, "b", {"weight": weight}, actor="me")
        doors = []
        for n in range(2):
            door = process(
                shop, tmp_path / f"door-{n}", place, "--upstream", engine.url, own=(), VENEER_UPSTREAM_KEY=key
            )
            doors.append(stack.enter_context(door)[1])
        first, ended = asyncio.Event(), Counter[str]()

        async def stream(door: int, tenant: str) -> None:
            body = asking("tiny", prompt(9, door), 2000, stream=True, temperature=1.0) | {"n": 2 * rows}
            async with openai.AsyncOpenAI(base_url=f"{doors[door]}/v1", api_key=keys[tenant]) as client:
                async for chunk in await client.completions.create(**body):
                    ended[tenant] += sum(choice.finish_reason is not None for choice in chunk.choices)
                    if tenant == "b":
                        first.set()

        def slots() -> list[int]:
            return sorted(Counter(each.request.tenant for each in list(engine.engine.scheduler.running)).values())

        async def work() -> None:
            streams = [asyncio.create_task(stream(door, "a")) for door in range(2)]
            try:
                await asyncio.to_thread(wait_for, lambda: engine.engine.stats().waiting == 3 * rows, 120)
                assert slots() == [rows]
                streams.append(asyncio.create_task(stream(1, "b")))
                await asyncio.wait_for(first.wait(), 120)
                assert ended["a"] == 0
                share = rows * weight / (1 + weight)
                await asyncio.to_thread(wait_for, lambda: slots() == sorted([share, rows - share]), 120)
            finally:
                for each in streams:
                    each.cancel()
                await asyncio.gather(*streams, return_exceptions=True)

        asyncio.run(work())
