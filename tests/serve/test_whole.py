"""Completions of a whole server equal those of single requests and of PEFT."""

from __future__ import annotations

import json
from typing import Any

from tests.serve.whole import KINDS, Shop, Whole, asking, prompt, served
from veneer.core.adapter import Adapter
from veneer.formats import peft
from veneer.serve.settings import HttpSettings


def test_a_mixed_batch_equals_separate_requests_and_peft(whole: Whole, shop: Shop) -> None:
    work = [(name, prompt(n, n)) for n, name in zip((3, 16, 40, 17, 90), KINDS, strict=True)]
    alone = [whole.ask(name, ids) for name, ids in work]
    by_peft = [shop.by_peft([(name, 1.0)], ids, 12) for name, ids in work]
    base = [("tiny", prompt(n, n)) for n in (5, 33)]
    crowd = whole.together([asking(name, ids) for name, ids in [*work, *base, *work]])
    for i in range(len(work)):
        assert alone[i].same(by_peft[i]), work[i][0]
        assert crowd[i].same(by_peft[i]), work[i][0]
        assert crowd[len(work) + len(base) + i].same(by_peft[i]), work[i][0]
    for got, (_, ids) in zip(crowd[len(work) :], base, strict=False):
        assert got.same(shop.wanted([], ids, 12))
    others = [shop.wanted([], ids, 12) for _, ids in work]
    assert not any(a.same(b) for a, b in zip(by_peft, others, strict=True))  # each adapter has its own effect
    whole.idle()


def read(shop: Shop, name: str) -> Adapter:
    return peft.read_folder(shop.adapters / name, shop.base.model)


def mixed(parts: dict[str, float], ids: list[int], **more: Any) -> dict[str, Any]:
    return asking("tiny", ids, **more, extra_body={"mix": [f"{name}:{strength}" for name, strength in parts.items()]})


def test_mixes_equal_core_and_peft(whole: Whole, shop: Shop) -> None:
    exact = [{"plain": 0.7, "rs": -0.5}, {"plain": 1.0, "patterns": 1.5}, {"plain": 0.25}]
    others = [{"rs": 0.25}, {"plain": 0.5, "dora": 1.0}, {"dora": -0.6}, {"rows": 0.5, "rs": 0.5}]
    others.append({"plain": 1.0, "dora": 0.0})
    ids = prompt(21)
    got = whole.together([mixed(parts, ids) for parts in exact + others])
    for parts, answer in zip(exact, got, strict=False):
        assert answer.same(shop.by_peft(list(parts.items()), ids, 12)), parts
    for parts, answer in zip(others, got[len(exact) :], strict=True):
        assert answer.same(shop.wanted([(name, s) for name, s in parts.items() if s], ids, 12)), parts
    whole.idle()


def test_the_engine_queue_equals_the_servers_queue(shop: Shop) -> None:
    """The engine's queue is as long as the server's, so it never refuses a request that the server admitted."""
    with served(shop, http=HttpSettings(queue=3000)) as whole:
        assert whole.engine.settings.queue == whole.built.service.admission.shares["answers"].total == 3000


def test_answers_with_token_ids_state_what_sampled_them(whole: Whole, shop: Shop) -> None:
    """The ids give back the text, each id has a log-probability, and the digests are those of the library."""
    digest = {model.id: model.digest for model in whole.client.models.list().data}["plain"]  # type: ignore[attr-defined]
    ids, tokenizer = prompt(20), shop.base.tokenizer
    for mix, adapters in (("plain", [[digest, 1.0]]), ("tiny", []), ("plain:0.5", [[digest, 0.5]])):
        asked = {
            "prompt": ids,
            "max_tokens": 12,
            "temperature": 0.7,
            "seed": 3,
            "logprobs": 0,
            "return_token_ids": True,
        }
        asked |= {"mix": [mix]} if ":" in mix else {"model": mix}
        answer = whole.http.post("/v1/completions", json=asked).json()
        (choice,) = answer["choices"]
        assert answer["sampled_by"] == {"base": shop.base.fingerprint, "adapters": adapters}
        assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"]
        assert tokenizer.decode(choice["token_ids"], skip_special_tokens=True) == choice["text"]
        logprobs = choice["logprobs"]["token_logprobs"]
        assert len(logprobs) == len(choice["sampling_logprobs"]) == len(choice["token_ids"])
        assert logprobs != choice["sampling_logprobs"]  # at temperature 0.7
        chunks = whole.http.post("/v1/completions", json=asked | {"stream": True}).text.split("\n\n")
        pieces = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks if chunk.startswith("data: {")]
        streamed = [id for piece in pieces for each in piece["choices"] for id in each.get("token_ids", [])]
        assert streamed == choice["token_ids"]
        assert pieces[0]["sampled_by"] == answer["sampled_by"]
    plain = whole.http.post("/v1/completions", json={"model": "plain", "prompt": ids}).json()
    assert "sampled_by" not in plain
    assert "token_ids" not in plain["choices"][0]
    whole.idle()


def test_answers_with_token_ids_include_the_end(whole: Whole, shop: Shop) -> None:
    """The stop token is part of the sampled tokens, but not of the text."""
    end = shop.base.stop_ids[0]
    asked = {"model": "plain", "prompt": prompt(20), "logprobs": 0, "logit_bias": {str(end): 100}}
    (choice,) = whole.http.post("/v1/completions", json=asked | {"return_token_ids": True}).json()["choices"]
    assert (choice["token_ids"], choice["text"], choice["finish_reason"]) == ([end], "", "stop")
    assert len(choice["logprobs"]["token_logprobs"]) == 1
    whole.idle()
