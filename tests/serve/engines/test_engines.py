"""One suite for every engine, over HTTP only. A test of a capability that an engine lacks tests the refusal."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.serve.engines.capabilities import table
from tests.serve.engines.conftest import Site
from tests.serve.http.toy import wait_for

BASE = "tiny"
MESSAGES = [{"role": "user", "content": "How do I reset my password?"}]


def logprobs(answer: dict) -> list[float]:
    values: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
    return values


def test_adapters_change_completions_as_in_the_reference(site: Site) -> None:
    """The reference attaches the adapters to the model, without a server."""
    ids = list(range(20, 40))
    bias = {str(i): -100 for i in range(3)}
    for model, mix in (
        (BASE, []),
        ("plain", [("plain", 1.0)]),
        ("rs", [("rs", 1.0)]),
        ("patterns", [("patterns", 1.0)]),
    ):
        said = site.complete(model, ids, logprobs=0, logit_bias=bias)
        wanted = site.shop.wanted(mix, ids, 8)
        assert said["choices"][0]["text"] == wanted.text
        assert logprobs(said) == pytest.approx(wanted.logprobs, abs=2e-3)
        assert said["usage"]["completion_tokens"] == 8
        assert said["usage"]["prompt_tokens"] == 20


def test_a_weighted_mix_is_the_sum_of_its_adapters(site: Site) -> None:
    ids, bias = list(range(30, 50)), {str(i): -100 for i in range(3)}
    mix = [("plain", 0.5), ("patterns", -0.75)]
    wanted = site.shop.wanted(mix, ids, 8)
    body = [{"adapter": name, "strength": strength} for name, strength in mix]
    said = site.complete(BASE, ids, mix=body, logprobs=0, logit_bias=bias)
    assert logprobs(said) == pytest.approx(wanted.logprobs, abs=2e-3)


def test_names_versions_and_digests_mean_the_same_adapter(site: Site) -> None:
    texts = {site.complete(name)["choices"][0]["text"] for name in ("plain", "plain@1", f"{BASE}:plain")}
    assert len(texts) == 1
    assert site.complete("plain@1")["model"] == "plain@1"
    assert site.ask("nothing").json()["error"]["code"] == "model_not_found"


def test_chat_and_streaming_give_the_same_text(site: Site) -> None:
    body = {"model": "rs", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    whole = site.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    text, reasons = "", []
    url = f"{site.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body | {"stream": True}, headers=site.bearer("acme"), timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
                    reasons.append(choice["finish_reason"])
    assert text == whole
    assert [r for r in reasons if r] in (["length"], ["stop"])


def test_stop_texts_seeds_and_logprobs(site: Site) -> None:
    text = site.complete(BASE, max_tokens=16)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:2]
    choice = site.complete(BASE, max_tokens=16, stop=[stop])["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == text[: text.index(stop)]
    sampled = [site.complete(BASE, temperature=1.5, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2, 3)]
    assert sampled[0] == sampled[1]
    assert len(set(sampled)) > 1
    top = site.complete(BASE, logprobs=3, max_tokens=1)["choices"][0]["logprobs"]["top_logprobs"][0]
    assert len(top) >= 3


def test_a_json_schema_constrains_the_answer(site: Site) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    body = {"model": "plain", "messages": MESSAGES, "max_tokens": 200, "temperature": 0, "response_format": form}
    answer = site.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    if choice["finish_reason"] == "stop":  # a random model can add white space until the limit
        assert isinstance(json.loads(choice["message"]["content"])["on"], bool)
    else:
        assert choice["message"]["content"].lstrip().startswith("{")


def test_a_forced_tool_is_called_with_arguments_of_its_schema(site: Site) -> None:
    parameters = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tool = {
        "type": "function",
        "function": {"name": "lamp", "parameters": parameters | {"additionalProperties": False}},
    }
    body = {"model": BASE, "messages": MESSAGES, "max_tokens": 200, "temperature": 0, "tools": [tool]}
    answer = site.post(
        "/v1/chat/completions", body | {"tool_choice": {"type": "function", "function": {"name": "lamp"}}}
    )
    # the tiny base's template has no place for tools; every engine must then say so, alike
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert "tool" in answer.json()["error"]["message"]
    else:
        assert answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "lamp"


def test_tokenization(site: Site) -> None:
    tokens = site.post("/tokenize", {"model": BASE, "prompt": "The printer"}).json()["tokens"]
    assert tokens == site.shop.base.tokenizer("The printer")["input_ids"]
    assert site.post("/detokenize", {"model": BASE, "tokens": tokens}).json()["prompt"] == "The printer"


def test_load_and_unload(site: Site) -> None:
    body = {"lora_name": "again", "lora_path": site.shop.library.find("rs").digest}
    assert site.post("/v1/load_lora_adapter", body, "admin").status_code == 200
    assert site.complete("again")["choices"][0]["text"] == site.complete("rs")["choices"][0]["text"]
    assert site.post("/v1/unload_lora_adapter", {"lora_name": "again"}, "admin").status_code == 200
    assert site.ask("again").status_code == 404


@pytest.mark.parametrize(("adapter", "capability"), [("dora", "DoRA"), ("rows", "token rows")])
def test_adapters_that_an_engine_cannot_serve_are_refused_with_the_reason(
    site: Site, adapter: str, capability: str
) -> None:
    chat = {"model": adapter, "messages": MESSAGES, "max_tokens": 2}
    loading = {"lora_name": f"my-{adapter}", "lora_path": adapter}
    answers = [
        site.ask(adapter),
        site.post("/v1/chat/completions", chat),
        site.post("/v1/load_lora_adapter", loading, "admin"),
    ]
    for answer in answers:
        if not site.unless(capability, answer):
            message = answer.json()["error"]["message"]
            assert adapter in message, "the adapter's name"
            assert capability in message, "the reason"


def test_log_probabilities_of_prompts(site: Site) -> None:
    answer = site.ask(BASE, prompt_logprobs=1)
    if site.unless("log-probabilities of prompts", answer):
        assert answer.json()["choices"][0]["prompt_logprobs"][0] is None


def test_tenants_see_only_their_adapters(site: Site) -> None:
    assert site.ask("plain", tenant="globex").status_code == 404
    assert site.ask("nothing", tenant="globex").status_code == 404
    listed = {card["id"] for card in site.get("/v1/models", "globex").json()["data"]}
    assert "rs" in listed
    assert not {"plain", "dora"} & listed
    assert httpx.post(f"{site.url}/v1/completions", json={"model": BASE, "prompt": "x"}).status_code == 401


def test_limits_refuse_before_the_engine_computes(site: Site) -> None:
    statuses = [site.ask(BASE, tenant="tight", max_tokens=1).status_code for _ in range(2)]
    answer = site.ask(BASE, tenant="tight", max_tokens=1)
    assert statuses[1] == answer.status_code == 429
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(answer.headers["retry-after"]) >= 1


def usage(site: Site) -> dict[str, int]:
    rows = httpx.get(f"{site.url}/admin/usage", params={"tenant": "acme"}, headers=site.bearer("admin")).json()["usage"]
    totals: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int):
                totals[name] = totals.get(name, 0) + value
    return totals


def test_the_ledger_counts_and_prices_each_token(site: Site) -> None:
    """acme pays 1 per prompt token and 2 per token of the answer."""
    before = usage(site)
    said = site.complete("plain", list(range(60, 75)))["usage"]
    wait_for(lambda: usage(site).get("requests", 0) == before.get("requests", 0) + 1)
    after = usage(site)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert (said["prompt_tokens"], said["completion_tokens"]) == (15, 8)
    assert 15 + 2 * 8 in grown.values(), grown


def test_a_route_sends_requests_to_its_adapter(site: Site) -> None:
    body = {"route": "front", "targets": [{"adapter": "patterns", "weight": 1}]}
    answer = httpx.put(f"{site.url}/admin/routes", json=body, headers=site.bearer("admin"), timeout=60)
    assert answer.status_code == 200, answer.text
    texts = wait_for(lambda: (a := site.ask("front")).status_code == 200 and a.json()["choices"][0]["text"])
    assert texts == site.complete("patterns")["choices"][0]["text"]


def test_a_canceled_stream_ends_in_the_engine(site: Site) -> None:
    body = {"model": BASE, "prompt": "The", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{site.url}/v1/completions", json=body, headers=site.bearer("acme"), timeout=120) as got:
        next(got.iter_lines())
    wait_for(lambda: sample(site, "vllm:num_requests_running") == 0, 60)


def sample(site: Site, name: str) -> float:
    text = site.get("/metrics", "admin").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))


def test_metrics_hold_each_name_once_and_count_tokens(site: Site) -> None:
    before = sample(site, "vllm:generation_tokens_total")
    site.complete("rs", max_tokens=5)
    wait_for(lambda: sample(site, "vllm:generation_tokens_total") >= before + 5)
    text = site.get("/metrics", "admin").text
    types = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    assert "veneer:adapter_requests_total" in types
    assert ("vllm:engine_sleep_state" in types) == (site.engine == "vllm"), "a name that only vLLM has"


def test_cached_prompts_are_not_shared_between_adapters(site: Site) -> None:
    ids = [3 + i * 7 % 300 for i in range(130)]
    first = {model: site.complete(model, ids, logprobs=0) for model in (BASE, "plain", "rs")}
    again = {model: site.complete(model, ids, logprobs=0) for model in (BASE, "plain", "rs")}
    for model in first:
        assert logprobs(first[model]) == pytest.approx(logprobs(again[model]), abs=2e-3)
    if site.engine != "fleet":  # behind a router, the second request can reach the other server
        assert again["plain"]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 96
    assert first["plain"]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_page_shows_the_table() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "serving-features.md"
    assert table() in page.read_text(encoding="utf-8")
