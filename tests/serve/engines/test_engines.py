"""One suite for every engine, over HTTP only. A test of a capability that an engine lacks tests the refusal."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.engines.capabilities import CAPABILITIES, needs, table
from tests.serve.engines.conftest import Site, vllm_processes
from tests.serve.http.toy import wait_for
from tests.serve.test_engine_choice import running

BASE = "tiny"
MESSAGES = [{"role": "user", "content": "How do I reset my password?"}]


def logprobs(answer: dict) -> list[float]:
    values: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
    return values


@needs("completions and chat of base and adapters")
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


@needs("weighted mixes")
def test_a_weighted_mix_is_the_sum_of_its_adapters(site: Site) -> None:
    ids, bias = list(range(30, 50)), {str(i): -100 for i in range(3)}
    mix = [("plain", 0.5), ("patterns", -0.75)]
    wanted = site.shop.wanted(mix, ids, 8)
    body = [{"adapter": name, "strength": strength} for name, strength in mix]
    said = site.complete(BASE, ids, mix=body, logprobs=0, logit_bias=bias)
    assert logprobs(said) == pytest.approx(wanted.logprobs, abs=2e-3)


@needs("completions and chat of base and adapters", "weighted mixes")
def test_requests_at_once_are_answered_as_alone(site: Site) -> None:
    """Base, adapters and mixes share steps."""
    mix = [{"adapter": "plain", "strength": 0.75}, {"adapter": "patterns", "strength": -0.5}]
    asked: list[dict[str, Any]] = [{"model": name} for name in (BASE, "plain", "rs", "patterns")]
    asked += [{"model": BASE, "mix": mix}]
    alone = [logprobs(site.complete(**each, logprobs=0)) for each in asked]
    with ThreadPoolExecutor(2 * len(asked)) as threads:
        together = list(threads.map(lambda each: logprobs(site.complete(**each, logprobs=0)), asked * 2))
    for one, other in zip(together, alone * 2, strict=True):
        assert one == pytest.approx(other, abs=2e-3)
    assert len({tuple(each) for each in alone}) == len(asked)


@needs("names, versions, aliases and digests")
def test_names_versions_and_digests_mean_the_same_adapter(site: Site) -> None:
    digest = site.shop.library.find("plain").digest
    texts = {site.complete(name)["choices"][0]["text"] for name in ("plain", "plain@1", f"{BASE}:plain", digest)}
    assert len(texts) == 1
    assert site.complete("plain@1")["model"] == "plain@1"
    assert site.ask("nothing").json()["error"]["code"] == "model_not_found"


@needs("names, versions, aliases and digests")
def test_a_moved_alias_means_the_other_version(site: Site) -> None:
    library, adapters = site.shop.library, site.shop.adapters
    wanted = {name: site.complete(name)["choices"][0]["text"] for name in ("plain", "rs")}
    for version, name in enumerate(wanted, 1):
        library.add(adapters / name, "moving")
        library.alias(f"moving@{version}", "prod")
        wait_for(lambda: site.ask("moving@prod").status_code == 200, 60)
        wait_for(lambda: site.complete("moving@prod")["choices"][0]["text"] == wanted[name], 60)  # noqa: B023
    assert wanted["plain"] != wanted["rs"]
    assert site.complete("moving@1")["choices"][0]["text"] == wanted["plain"]


@needs("completions and chat of base and adapters", "streaming and cancellation")
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


@needs("stop strings, seeds, logprobs, logit bias")
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


def without_space(site: Site) -> dict[str, int]:
    """Return a logit bias against white space, which JSON allows and a random model can repeat until the limit."""
    decode = site.shop.base.tokenizer.decode
    texts = {token: decode([token]) for token in range(site.shop.base.model.config.vocab_size)}
    return {str(token): -100 for token, text in texts.items() if any(map(str.isspace, text))}


SWITCH = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "room": {"enum": ["hall", "attic"]}},
    "required": ["on", "room"],
    "additionalProperties": False,
}


def is_switch(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"on", "room"} and isinstance(value["on"], bool) and value["room"] in ("hall", "attic")


@needs("JSON schema")
def test_a_json_schema_constrains_the_answer(site: Site) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SWITCH, "strict": True}}
    body = {"model": "plain", "messages": MESSAGES, "max_tokens": 200, "temperature": 0, "response_format": form}
    answer = site.post("/v1/chat/completions", body | {"logit_bias": without_space(site)})
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert is_switch(choice["message"]["content"])


@needs("tools")
def test_a_forced_tool_is_called_with_arguments_of_its_schema(site: Site) -> None:
    tools = [{"type": "function", "function": {"name": n, "parameters": SWITCH}} for n in ("lamp", "heater")]
    body = {"model": "plain", "messages": MESSAGES, "max_tokens": 200, "temperature": 0, "tools": tools}
    body |= {"tool_choice": {"type": "function", "function": {"name": "lamp"}}, "logit_bias": without_space(site)}
    answer = site.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "lamp"
    assert is_switch(call["function"]["arguments"])
    assert choice["finish_reason"] in ("tool_calls", "stop")


@needs("tokenization")
def test_tokenization(site: Site) -> None:
    tokens = site.post("/tokenize", {"model": BASE, "prompt": "The printer"}).json()["tokens"]
    assert tokens == site.shop.base.tokenizer("The printer")["input_ids"]
    assert site.post("/detokenize", {"model": BASE, "tokens": tokens}).json()["prompt"] == "The printer"


@needs("load and unload")
def test_load_and_unload(site: Site) -> None:
    body = {"lora_name": "again", "lora_path": site.shop.library.find("rs").digest}
    assert site.post("/v1/load_lora_adapter", body, "admin").status_code == 200
    assert site.complete("again")["choices"][0]["text"] == site.complete("rs")["choices"][0]["text"]
    assert site.post("/v1/unload_lora_adapter", {"lora_name": "again"}, "admin").status_code == 200
    assert site.ask("again").status_code == 404


@needs("DoRA", "token rows", "full copies", "biases", "classification heads")
@pytest.mark.parametrize(
    ("adapter", "capability", "reason"),
    [
        ("dora", "DoRA", "DoRA"),
        ("rows", "token rows", "token rows"),
        ("copies", "full copies", "full copies"),
        ("biases", "biases", "bias"),
        ("heads", "classification heads", "score"),
    ],
)
def test_an_adapter_has_its_full_effect_or_is_refused_by_name(
    site: Site, adapter: str, capability: str, reason: str
) -> None:
    ids, bias = list(range(20, 40)), {str(i): -100 for i in range(3)}
    said = site.ask(adapter, ids, logprobs=0, logit_bias=bias)
    others = [
        site.post("/v1/chat/completions", {"model": adapter, "messages": MESSAGES, "max_tokens": 2}),
        site.ask(BASE, mix=[{"adapter": "plain", "strength": 0.5}, {"adapter": adapter, "strength": 1.0}]),
        site.post("/v1/load_lora_adapter", {"lora_name": f"my-{adapter}", "lora_path": adapter}, "admin"),
    ]
    if site.unless(capability, said):
        wanted = site.shop.wanted([(adapter, 1.0)], ids, 8)
        assert logprobs(said.json()) == pytest.approx(wanted.logprobs, abs=2e-3)
    for answer in (said, *others):
        if not site.unless(capability, answer):
            message = answer.json()["error"]["message"]
            assert f"{adapter}@1" in message
            assert reason in message


@needs("weighted mixes")
def test_a_strength_of_full_copies_is_refused(site: Site) -> None:
    """Weights that replace the base's weights have no strength."""
    answer = site.ask(BASE, mix=[{"adapter": "plain", "strength": 0.5}, {"adapter": "copies", "strength": 0.5}])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "adapter_unusable"
    assert "copies" in answer.json()["error"]["message"]


@needs("ranks above 64 (`--max-lora-rank`)")
def test_a_rank_above_the_engines_limit_is_refused_by_name(site: Site) -> None:
    """Only vLLM itself knows its limit, so the refusal comes with the first request."""
    ids = list(range(20, 40))
    said = site.ask("wide", ids, logprobs=0, logit_bias={str(i): -100 for i in range(3)})
    if site.unless("ranks above 64 (`--max-lora-rank`)", said):
        assert logprobs(said.json()) == pytest.approx(site.shop.wanted([("wide", 1.0)], ids, 8).logprobs, abs=2e-3)
    else:
        message = said.json()["error"]["message"]
        assert "wide" in message
        assert "--max-lora-rank" in message


@needs("activated LoRA (aLoRA)")
def test_activated_lora_is_refused_when_it_is_uploaded(site: Site) -> None:
    """No engine gets an aLoRA, because no library accepts one."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        for path in (site.shop.adapters / "alora").iterdir():
            opened.write(path, f"alora/{path.name}")
    headers = {"Content-Type": "application/octet-stream", **site.bearer("acme")}
    url, query = f"{site.url}/v1/adapters", {"name": "acme/alora", "filename": "alora.zip"}
    answer = httpx.post(url, params=query, content=archive.getvalue(), headers=headers, timeout=120)
    assert not site.unless("activated LoRA (aLoRA)", answer)
    assert "alora_invocation_tokens" in answer.json()["error"]["message"]
    assert site.ask("acme/alora").json()["error"]["code"] == "model_not_found"


@needs("log-probabilities of prompts")
def test_log_probabilities_of_prompts(site: Site) -> None:
    answer = site.ask(BASE, prompt_logprobs=1)
    if site.unless("log-probabilities of prompts", answer):
        assert answer.json()["choices"][0]["prompt_logprobs"][0] is None


@needs("tenants, limits, ledger, hidden names")
def test_tenants_see_only_their_adapters(site: Site) -> None:
    assert site.ask("plain", tenant="globex").status_code == 404
    assert site.ask("nothing", tenant="globex").status_code == 404
    assert site.ask(site.shop.library.find("plain").digest, tenant="globex").status_code == 404
    listed = {card["id"] for card in site.get("/v1/models", "globex").json()["data"]}
    assert "rs" in listed
    assert not {"plain", "dora"} & listed
    assert httpx.post(f"{site.url}/v1/completions", json={"model": BASE, "prompt": "x"}).status_code == 401


@needs("tenants, limits, ledger, hidden names")
def test_limits_refuse_before_the_engine_computes(site: Site) -> None:
    statuses = [site.ask(BASE, tenant="tight", max_tokens=1).status_code for _ in range(2)]
    answer = site.ask(BASE, tenant="tight", max_tokens=1)
    assert statuses[1] == answer.status_code == 429
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(answer.headers["retry-after"]) >= 1


def usage(site: Site, tenant: str = "acme") -> Counter[tuple[str, str]]:
    """Return (adapter, figure) -> the tenant's total, and ("", figure) for all adapters.

    The ledger posts requests in order, so acme's earlier requests are counted once a later one of globex is."""
    if tenant == "acme":
        before = usage(site, "globex")["", "done"]
        site.complete("rs", tenant="globex", max_tokens=1)
        wait_for(lambda: usage(site, "globex")["", "done"] > before, 120)
    totals: Counter[tuple[str, str]] = Counter()
    for by in ("adapter", "tenant"):
        query = {"tenant": tenant, "by": by}
        answer = httpx.get(f"{site.url}/admin/usage", params=query, headers=site.bearer("admin"), timeout=120)
        for row in answer.json()["usage"]:
            totals.update({(row.get("adapter", ""), k): v for k, v in row.items() if isinstance(v, int)})
    return totals


@needs("tenants, limits, ledger, hidden names")
def test_the_ledger_counts_and_prices_each_token(site: Site) -> None:
    """acme pays 1 per prompt token, 0 per cached token and 2 per token of the answer; a refusal costs nothing."""
    before, others = usage(site), usage(site, "tight")
    ids = [200 + i % 90 for i in range(40)]
    said = [site.complete("plain", ids)["usage"] for _ in range(2)]
    assert site.ask("nothing", ids).status_code == 404
    assert site.ask("heads", ids).status_code == 400
    assert [(each["prompt_tokens"], each["completion_tokens"]) for each in said] == [(40, 8)] * 2
    cached = sum(each["prompt_tokens_details"]["cached_tokens"] for each in said)
    figures = {"requests": 2, "done": 2, "prompt": 80, "completion": 16, "cached": cached}
    figures["cost"] = (80 - cached) * 1 + 16 * 2
    grown = usage(site) - before
    assert {name: grown["plain@1", name] for name in figures} == figures
    totals = figures | {"requests": 3, "done": 3}  # the refused adapter's request has no tokens
    assert {name: grown["", name] for name in figures} == totals
    assert usage(site, "tight") == others


@needs("streaming and cancellation")
def test_a_client_that_leaves_pays_only_for_computed_tokens(site: Site) -> None:
    before, limit = usage(site), 4000 if site.engine == "embedded" else 500
    body = {"model": "rs", "prompt": [5, 6, 7], "max_tokens": limit, "temperature": 0, "ignore_eos": True}
    url = f"{site.url}/v1/completions"
    with httpx.stream("POST", url, json=body | {"stream": True}, headers=site.bearer("acme"), timeout=120) as answer:
        assert next(answer.iter_lines()).startswith("data: {")
    wait_for(lambda: usage(site)["", "done"] > before["", "done"], 120)
    grown = usage(site) - before
    assert 1 <= grown["rs@1", "completion"] < limit
    assert grown["", "cost"] == 3 - grown["", "cached"] + 2 * grown["", "completion"]
    wait_for(lambda: sample(site, "vllm:num_requests_running") == 0, 120)


def set_route(site: Site, **body: Any) -> None:
    answer = httpx.put(f"{site.url}/admin/routes", json=body, headers=site.bearer("admin"), timeout=60)
    assert answer.status_code == 200, answer.text
    wait_for(lambda: site.ask(body["route"], max_tokens=1).status_code == 200)


@needs("routes and shadows")
def test_a_route_sends_requests_to_its_adapter(site: Site) -> None:
    set_route(site, route="front", targets=[{"adapter": "patterns", "weight": 1}])
    assert site.complete("front")["choices"][0]["text"] == site.complete("patterns")["choices"][0]["text"]


@needs("routes and shadows")
def test_a_shadow_answers_too_but_only_for_comparison(site: Site) -> None:
    set_route(site, route="compared", targets=[{"adapter": "patterns", "weight": 1}], shadow="rs")
    before = usage(site)
    texts = {name: site.complete(name, [9, 8, 7])["choices"][0]["text"] for name in ("compared", "rs", "patterns")}
    assert texts["compared"] == texts["patterns"] != texts["rs"]

    def comparison() -> Any:
        answer = httpx.get(f"{site.url}/admin/shadows?route=compared", headers=site.bearer("admin"), timeout=60)
        return next((row for row in answer.json()["comparisons"] if row["shadow_tokens"] == 8), None)

    row = wait_for(comparison, 120)
    assert (row["shadow"], row["target"], row["tenant"], row["same"]) == ("rs", "patterns", "acme", False)
    for side in ("shadow", "target"):
        assert row[f"{side}_sha256"] == hashlib.sha256(texts[row[side]].encode()).hexdigest()
    grown = usage(site) - before
    assert (grown["", "requests"], grown["rs@1", "requests"]) == (3, 1), "no tenant pays for a shadow"


def sample(site: Site, name: str) -> float:
    text = site.get("/metrics", "admin").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))


@needs("metrics")
def test_metrics_hold_each_name_once_and_count_tokens(site: Site) -> None:
    before = sample(site, "vllm:generation_tokens_total")
    site.complete("rs", max_tokens=5)
    wait_for(lambda: sample(site, "vllm:generation_tokens_total") >= before + 5)
    text = site.get("/metrics", "admin").text
    types = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    assert "veneer:adapter_requests_total" in types
    assert ("vllm:engine_sleep_state" in types) == (site.engine == "vllm"), "a name that only vLLM has"


@needs("separate prefix caches of adapters")
def test_cached_prompts_are_not_shared_between_adapters(site: Site) -> None:
    ids = [3 + i * 7 % 300 for i in range(130)]
    first = {model: site.complete(model, ids, logprobs=0) for model in (BASE, "plain", "rs")}
    again = {model: site.complete(model, ids, logprobs=0) for model in (BASE, "plain", "rs")}
    for model in first:
        assert logprobs(first[model]) == pytest.approx(logprobs(again[model]), abs=2e-3)
    if site.engine != "fleet":  # behind a router, the second request can reach the other server
        assert again["plain"]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 96
    assert first["plain"]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("site", [pytest.param("vllm", marks=pytest.mark.peers)], indirect=True)
def test_a_killed_vllm_is_restarted_and_serves_the_same_names(site: Site) -> None:
    text = site.complete("rs")["choices"][0]["text"]
    (pid,) = vllm_processes(site.shop)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not running(pid), 60)
    refused: list[httpx.Response] = []

    def served() -> bool:
        answer = site.ask("rs")
        if answer.status_code != 200:
            refused.append(answer)
            return False
        return bool(answer.json()["choices"][0]["text"] == text)

    wait_for(served, 600)
    assert {answer.status_code for answer in refused} == {503}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert len(vllm_processes(site.shop)) == 1
    wait_for(lambda: site.get("/ready").status_code == 200, 60)
    assert "vllm:engine_sleep_state" in site.get("/metrics", "admin").text


def test_the_page_shows_the_table() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "serving-features.md"
    assert table() in page.read_text(encoding="utf-8")


def test_each_capability_of_the_table_has_a_test() -> None:
    assert not [name for name, each in CAPABILITIES.items() if not each.tests]
