"""Routers read this server's metrics, models and cache events as they read vLLM's."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import zmq

from tests.serve.conformance.consumers import (
    Endpoint,
    KvIndex,
    engine_stats,
    lora_affinity,
    lora_load_state,
    samples,
)
from tests.serve.http.toy import free_port, wait_for
from tests.serve.whole import Shop, Whole, prompt, served, slowed
from veneer.serve.engine.cache import CacheEvent
from veneer.serve.engine.kv_events import KvEvents
from veneer.serve.request import cache_root

NAMES = ("plain", "rs", "patterns")


def scrape(whole: Whole) -> Endpoint:
    return Endpoint.scrape(whole.http.get("/metrics").text)


def running(whole: Whole, model: str, left: ExitStack) -> None:
    """Start a long request, and return when its first token is here."""
    body = {"model": model, "prompt": prompt(8), "max_tokens": 2000, "stream": True, "ignore_eos": True}
    answer = left.enter_context(whole.http.stream("POST", "/v1/completions", json=body))
    lines = answer.iter_lines()
    next(lines)
    left.callback(lines.close)


@pytest.fixture(scope="module")
def sizes(whole: Whole) -> dict[str, int]:
    for name in NAMES:
        whole.ask(name, prompt(8), 1)
    resident = whole.engine.residents.resident()
    return {name: resident[whole.shop.library.find(name).digest].bytes for name in NAMES}


def test_affinity_scores_of_idle_busy_queued_and_full_servers(shop: Shop, sizes: dict[str, int]) -> None:
    room = sizes["rs"] + sizes["patterns"]
    assert sizes["plain"] <= room
    with served(shop, adapter_bytes=room) as whole, slowed(whole.engine, 0.02):
        assert lora_affinity(scrape(whole), "plain") == 0.8
        with ExitStack() as left:
            running(whole, "rs", left)
            assert lora_affinity(scrape(whole), "rs") == 1.0
            running(whole, "patterns", left)
            queued = threading.Thread(target=whole.ask, args=("plain", prompt(8), 1))
            queued.start()
            wait_for(lambda: scrape(whole).waiting == {"plain"})
            full = scrape(whole)
            assert (full.active, full.slots) == ({"rs", "patterns"}, 2)
            assert [lora_affinity(full, name) for name in ("rs", "plain", "dora")] == [1.0, 0.6, 0.0]
            assert [lora_load_state(full, name) for name in ("rs", "plain")] == [1.0, 0.0]
        queued.join(60)
        assert not queued.is_alive()
        whole.idle()
        assert scrape(whole).active == set()


def test_residency_has_the_names_that_clients_send(whole: Whole, sizes: dict[str, int]) -> None:
    """An adapter at rest is still listed; a name that no client has sent is the server's own."""
    whole.shop.library.alias("rs", "prod")
    whole.ask("rs@prod", prompt(8), 1)
    assert whole.load("loaded", "plain").status_code == 200
    endpoint = scrape(whole)
    assert {"rs@prod", "rs", "patterns", "plain", "loaded"} <= endpoint.resident.keys()
    assert set(endpoint.resident.values()) == {"gpu"}
    assert endpoint.loaded == len(whole.engine.residents.resident()) < endpoint.slots
    assert lora_load_state(endpoint, "rs@prod") == 1.0
    assert lora_load_state(endpoint, "dora") == 0.6
    assert whole.unload("loaded").status_code == 200


def test_mixes_are_no_names_of_adapters(whole: Whole) -> None:
    whole.http.post("/v1/completions", json={"mix": ["plain:0.5", "rs"], "prompt": "Hi", "max_tokens": 1})
    assert not [name for name in scrape(whole).resident if ":" in name or "+" in name]


def test_the_number_of_residency_series_is_bounded() -> None:
    from veneer.serve.http.metrics import Meter, Metrics
    from veneer.serve.names.adapter_cache import ResidentAdapter
    from veneer.serve.request import EngineStats, Usage

    resident = [(f"n{i}", ResidentAdapter(f"sha256:{i}", 1, 0)) for i in range(5000)]
    metrics = Metrics("base", lambda: EngineStats(adapters=5000, adapter_slots=6000), resident=lambda: resident)
    for i in range(5000):
        Meter(metrics, f"alias{i}", f"alias{i}", ((f"sha256:{i}", 1.0),)).end("stop", Usage(1, 0, 1))
    loaded = [s for s in samples(metrics.text().decode()) if s.name == "vllm:lora_adapter_loaded"]
    assert len(loaded) == 1000


def test_queue_and_cache_as_llm_d_reads_them(whole: Whole) -> None:
    whole.idle()
    with slowed(whole.engine), ExitStack() as left:
        running(whole, whole.built.service.catalog.base, left)
        endpoint = scrape(whole)
        assert (endpoint.running_requests, endpoint.waiting_requests) == (1, 0)
        assert 0 < endpoint.cache_use <= 1
        assert (endpoint.block_size, endpoint.blocks) == (whole.engine.cache.block, whole.engine.cache.size)
        assert endpoint.active == set()
    whole.idle()
    assert scrape(whole).cache_use == 0


def test_production_stack_reads_vllms_old_names(whole: Whole) -> None:
    whole.ask("plain", prompt(40, 5), 1)
    whole.ask("plain", prompt(40, 5), 1)
    found = engine_stats(whole.http.get("/metrics").text)
    engine = whole.engine.stats()
    assert found == {
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "vllm:gpu_cache_usage_perc": 0,
        "vllm:gpu_prefix_cache_hit_rate": engine.prefix_hits / engine.prefix_lookups,
        "vllm:gpu_prefix_cache_hits_total": engine.prefix_hits,
        "vllm:gpu_prefix_cache_queries_total": engine.prefix_lookups,
    }
    assert engine.prefix_hits


def test_rendered_tokens_are_the_prompts_tokens(whole: Whole) -> None:
    """As vLLM's render routes: a router computes a prompt's blocks from these tokens."""
    text = {"model": "plain", "prompt": ["Hello there", "Bye"], "max_tokens": 3, "temperature": 0.5}
    rendered = whole.http.post("/v1/completions/render", json=text).json()
    tokens = [
        whole.http.post("/tokenize", json={"model": "plain", "prompt": each}).json()["tokens"]
        for each in text["prompt"]
    ]
    assert [each["token_ids"] for each in rendered] == tokens
    assert len({each["request_id"] for each in rendered}) == 2
    assert whole.http.post("/v1/completions/render", json=text | {"prompt": ["a"] * 65}).status_code == 400
    assert {each["model"] for each in rendered} == {"plain"}
    assert rendered[0]["sampling_params"].items() >= {"max_tokens": 3, "temperature": 0.5, "n": 1}.items()
    chat = {"model": "plain", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    rendered = whole.http.post("/v1/chat/completions/render", json=chat).json()
    answered = whole.http.post("/v1/chat/completions", json=chat).json()
    assert len(rendered["token_ids"]) == answered["usage"]["prompt_tokens"]
    conversation = {key: chat[key] for key in ("model", "messages")}
    assert rendered["token_ids"] == whole.http.post("/tokenize", json=conversation).json()["tokens"]
    assert whole.http.post("/v1/completions/render", json=text | {"model": "nobody"}).status_code == 404


# -- cache events ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def announced(shop: Shop) -> Iterator[tuple[Whole, str, str]]:
    """A server with a small cache that publishes events, and its two addresses."""
    live, replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    with served(shop, cache_bytes=1 << 18, kv_events=live, kv_replay=replay, context=512) as whole:
        yield whole, live, replay


def replayed(address: str, first: int = 0) -> list[tuple[bytes, int, bytes]]:
    """Ask for a replay as llm-d's subscriber does. Return (topic, number, message) of each batch."""
    with zmq.Context.instance().socket(zmq.DEALER) as dealer:
        dealer.connect(address)
        dealer.send_multipart([b"", first.to_bytes(8, "big")])
        batches = []
        while True:
            assert dealer.poll(60_000)
            empty, topic, number, message = dealer.recv_multipart()
            assert empty == b""
            if not message:
                dealer.close(linger=0)
                return batches
            batches.append((topic, int.from_bytes(number, "big"), message))


def index_of(address: str) -> KvIndex:
    index = KvIndex()
    for topic, _, message in replayed(address):
        index.process(topic, message)
    return index


def found_blocks(whole: Whole, model: str, ids: list[int]) -> int:
    """Return how many full blocks of a prompt the cache itself finds."""
    digest = () if model == whole.built.service.catalog.base else ((whole.shop.library.find(model).digest, 1.0),)
    cache = whole.engine.cache
    table = cache.open(cache_root(digest), [*ids, 0])
    count = len(table.keys)
    cache.close(table)
    return count


def test_an_index_built_from_events_equals_the_cache(announced: tuple[Whole, str, str]) -> None:
    """Prompts share prefixes, and the cache is too small for all of them, so blocks are evicted."""
    whole, _, replay = announced
    base, size = whole.built.service.catalog.base, whole.engine.cache.block
    rng = random.Random(3)
    stems = [prompt(size * 4, seed) for seed in range(3)]
    asked: list[tuple[str, list[int]]] = []
    for seed in range(60):
        model = rng.choice([base, "plain", "rs"])
        ids = rng.choice(stems)[: size * rng.randint(1, 4)] + prompt(rng.randint(1, size * 3), 100 + seed)
        asked.append((model, ids))
        whole.ask(model, ids, 2)
    whole.idle()
    assert whole.engine.cache.available == whole.engine.cache.size

    def same() -> bool:
        index = index_of(replay)
        return all(index.cached_blocks(ids, model, size) == found_blocks(whole, model, ids) for model, ids in asked)

    wait_for(same, 60)
    messages = b"".join(message for _, _, message in replayed(replay))
    assert b"BlockRemoved" in messages
    assert sum(found_blocks(whole, model, ids) for model, ids in asked) > 0


def test_an_index_predicts_the_cached_tokens_of_a_request(announced: tuple[Whole, str, str]) -> None:
    whole, _, replay = announced
    size = whole.engine.cache.block
    ids = prompt(size * 3 + 5, 77)
    whole.ask("plain", ids, 1)
    wait_for(lambda: index_of(replay).cached_blocks(ids, "plain", size) == 3, 60)
    assert index_of(replay).cached_blocks(ids, "rs", size) == 0
    assert whole.ask("plain", ids, 1).cached // size == 3


def test_mixes_and_salted_requests_are_not_announced(announced: tuple[Whole, str, str]) -> None:
    whole, _, replay = announced
    for seed, more in enumerate(({"mix": ["plain:0.5", "rs"]}, {"mix": ["plain"]}, {"model": "rs", "cache_salt": "x"})):
        ids = prompt(whole.engine.cache.block * 2, 300 + seed)
        answer = whole.http.post("/v1/completions", json={"prompt": ids, "max_tokens": 1, **more})
        assert answer.status_code == 200, answer.text
    marker = prompt(whole.engine.cache.block, 400)  # once this block is here, so is all before it
    whole.ask("rs", [*marker, 5], 1)
    wait_for(lambda: index_of(replay).cached_blocks(marker, "rs", whole.engine.cache.block) == 1, 60)
    tokens = {tuple(e["token_ids"]) for _, _, m in replayed(replay) for e in events(m) if e["type"] == "BlockStored"}
    for seed in range(3):
        ids = tuple(prompt(whole.engine.cache.block * 2, 300 + seed))
        assert not any(each[: len(ids)] == ids for each in tokens)


def events(message: bytes) -> list[dict[str, Any]]:
    import msgpack

    unpacked: list[dict[str, Any]] = msgpack.unpackb(message)[1]
    return unpacked


def test_live_events_continue_the_replay(announced: tuple[Whole, str, str]) -> None:
    whole, live, replay = announced
    with zmq.Context.instance().socket(zmq.SUB) as subscriber:
        subscriber.connect(live)
        subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@")
        seeds = iter(range(1000, 10_000))

        def heard() -> bool:
            whole.ask("plain", prompt(40, next(seeds)), 1)
            return bool(subscriber.poll(200))

        wait_for(heard, 60)
        topic, number, message = subscriber.recv_multipart()
        at = int.from_bytes(number, "big")
        assert replayed(replay, at)[0] == (topic, at, message)


def test_lost_events_clear_the_routers_index() -> None:
    """Publishing never blocks: with a full queue, routers learn that nothing is cached."""
    replay = f"tcp://127.0.0.1:{free_port()}"
    publisher = KvEvents(f"tcp://127.0.0.1:{free_port()}", "m", port=1, replay=replay, queue=1)
    try:
        for i in range(20_000):
            publisher.put(CacheEvent("stored", [i.to_bytes(32, "big")], None, [i], "m"))

        def cleared() -> bool:
            return any(e["type"] == "AllBlocksCleared" for _, _, m in replayed(replay) for e in events(m))

        wait_for(cleared, 60)
    finally:
        publisher.stop()


def test_an_address_in_use_is_refused() -> None:
    from veneer.errors import ConfigError

    address = f"tcp://127.0.0.1:{free_port()}"
    publisher = KvEvents(address, "m", port=1)
    try:
        with pytest.raises(ConfigError, match="cannot listen"):
            KvEvents(address, "m", port=1)
    finally:
        publisher.stop()


def test_json_of_the_models_has_parents(whole: Whole) -> None:
    cards = json.loads(whole.http.get("/v1/models").text)["data"]
    base = whole.built.service.catalog.base
    assert [card["id"] for card in cards if card["parent"] is None] == [base]
    assert {card["parent"] for card in cards} == {None, base}


ADDED = {"no_stop_trim": False, "ignore_eos": False, "skip_special_tokens": True, "return_hidden_states": False}
ADDED_TO_CHATS = {"separate_reasoning": True, "stream_reasoning": True, "include_reasoning": True, "logprobs": False}
"""Fields that vllm-router 0.1.17 adds to each body (vllm-project/router src/protocols/spec.rs)."""


def test_bodies_with_the_fields_that_vllm_router_adds_are_accepted(whole: Whole) -> None:
    completion = {"model": "plain", "prompt": prompt(4), "max_tokens": 1, **ADDED, "echo": False}
    assert whole.http.post("/v1/completions", json=completion).status_code == 200
    messages = [{"role": "user", "content": "a"}]
    chat = {"model": "plain", "messages": messages, **ADDED, **ADDED_TO_CHATS, "continue_final_message": False}
    for path in ("/v1/chat/completions", "/v1/chat/completions/render"):
        answer = whole.http.post(path, json=chat | {"max_tokens": 1})
        assert answer.status_code == 200, answer.text
    for key in ("no_stop_trim", "return_hidden_states"):
        refused = whole.http.post("/v1/completions", json=completion | {key: True})
        assert refused.status_code == 400
        assert key in refused.text
