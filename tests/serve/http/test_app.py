"""Authentication, health, metrics, tenants and shadows; no request body makes the server fail."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.http.toy import (
    Live,
    ToyCatalog,
    ToyEngine,
    ToyTenancy,
    ToyText,
    fuzzed,
    live,
    responses,
    toy_app,
    wait_for,
)
from veneer.library.library import open_library
from veneer.library.upload_stage import UploadStage
from veneer.serve.access import ModelCard, OpenAccess
from veneer.serve.http.surfaces.adapters import adapter_bodies, adapter_routes
from veneer.serve.settings import HttpSettings

CHAT: Any = {"model": "sql", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30}


def samples(text: str) -> dict[tuple[str, str], float]:
    """Parse metrics. Return (name, values of the labels that distinguish series) -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for s in family.samples:
            labels = ",".join(v for k, v in sorted(s.labels.items()) if k not in ("model_name", "engine", "le"))
            found[s.name, labels] = s.value
    return found


def test_health_and_readiness(server: Live) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").status_code == 200
    for phase, code in (("loading", "unavailable"), ("draining", "shutting_down")):
        server.service.phase = phase
        assert server.get("/health").status_code == 200
        answer = server.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": phase})
        refused = server.post("/v1/chat/completions", CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, code)
        assert refused.headers["retry-after"]
        assert server.post("/generate", {"inputs": "x"}).json()["error_type"] == code


def test_metrics_in_vllms_names(server: Live) -> None:
    for _ in range(3):
        server.post("/v1/chat/completions", CHAT)
    server.post("/v1/chat/completions", {**CHAT, "max_tokens": 2})
    server.post("/v1/chat/completions", {**CHAT, "model": "nobody"})
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = samples(answer.text)
    for name in ("running", "waiting"):
        assert found[f"vllm:num_requests_{name}", ""] == 0
    assert found["vllm:kv_cache_usage_perc", ""] == 0.25
    assert found["vllm:prompt_tokens_total", ""] == server.engine.prompt_tokens
    assert found["vllm:generation_tokens_total", ""] == server.engine.made
    assert (found["vllm:prefix_cache_hits_total", ""], found["vllm:prefix_cache_queries_total", ""]) == (3, 7)
    assert found["vllm:num_preemptions_total", ""] == 1
    assert found["vllm:request_success_total", "stop"] == 3
    assert found["vllm:request_success_total", "length"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
        assert found[f"vllm:{name}_seconds_count", ""] == 4
    assert found["vllm:request_time_per_output_token_seconds_count", ""] == 4
    assert found["vllm:inter_token_latency_seconds_count", ""] > 0
    assert found["veneer:adapter_requests_total", "sql,stop"] == 3
    assert found["veneer:adapter_generation_tokens_total", "sql"] > 0
    assert found["veneer:requests_refused_total", "model_not_found"] == 1


def test_adapters_beyond_the_cap_are_counted_as_other(text: ToyText) -> None:
    catalog = ToyCatalog()
    for n in range(20):
        catalog.adapters[f"a{n}"] = ModelCard(f"a{n}", "", "toy", 0, f"d{n}")
    with live(ToyEngine(text), catalog, settings=HttpSettings(metric_adapters=5)) as server:
        for n in range(20):
            server.post("/v1/chat/completions", {**CHAT, "model": f"a{n}"})
        for strength in (0.1, 0.2, 0.3):
            server.post("/v1/chat/completions", {**CHAT, "model": "toy", "mix": [f"a1:{strength}", "a2"]})
        found = samples(server.get("/metrics").text)
    names = {labels.split(",")[0] for name, labels in found if name == "veneer:adapter_requests_total"}
    assert names == {"a0", "a1", "a2", "a3", "a4", "other"}
    assert found["veneer:adapter_requests_total", "other,stop"] == 18


def test_metrics_list_running_and_waiting_adapters(server: Live) -> None:
    with server.client.stream(
        "POST",
        "/v1/completions",
        json={"model": "sql", "prompt": "SLOW " + "x " * 30, "max_tokens": 60, "stream": True},
    ) as slow:
        # keep a reference: garbage collection of the iterator would close the connection
        answer = slow.iter_raw()
        next(answer)
        assert 'running_lora_adapters="sql"' in server.get("/metrics").text


# -- tenants -----------------------------------------------------------------------------------------------------------


def test_keys(text: ToyText) -> None:
    with live(ToyEngine(text), ToyCatalog(), ToyTenancy()) as server:
        for path in ("/v1/chat/completions", "/generate", "/tokenize", "/nothing"):
            answer = server.post(path, {"nonsense": 1}, "wrong")
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
        assert server.client.get("/v1/models", headers={"x-api-key": "acme"}).status_code == 200


def test_a_tenant_has_its_own_models_limits_and_bill(text: ToyText) -> None:
    tenancy = ToyTenancy()
    with live(ToyEngine(text), ToyCatalog(), tenancy) as server:
        assert [m["id"] for m in server.get("/v1/models", "acme").json()["data"]] == ["toy", "sql"]
        assert server.get("/v1/models/polite", "acme").status_code == 404
        assert server.post("/v1/chat/completions", {**CHAT, "model": "polite"}, "acme").status_code == 404
        answer = server.post("/v1/chat/completions", {**CHAT, "max_tokens": 41}, "acme")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        for route in ("/v1/load_lora_adapter", "/load_lora_adapter"):
            refused = server.post(route, {"lora_name": "cat", "lora_path": "lib/cat"}, "acme")
            assert refused.status_code == 403
        ok = server.post("/v1/chat/completions", {**CHAT, "n": 1}, "acme").json()["usage"]
        tenant, bill = tenancy.bills[-1]
        assert (tenant, bill.prompt, bill.completion) == ("acme", ok["prompt_tokens"], ok["completion_tokens"])
        request = server.engine.seen[-1]
        assert (request.tenant, request.name) == ("acme", "sql")


def test_prefixes_are_separate_per_tenant_and_salt(text: ToyText) -> None:
    """Engine requests share a cache salt only if their tenant and `cache_salt` are equal."""
    with live(ToyEngine(text), ToyCatalog(), ToyTenancy()) as server:

        def salt(key: str, path: str = "/v1/chat/completions", **more: Any) -> str:
            body = dict(CHAT) if "chat" in path else {"model": "sql", "prompt": "Hi", "max_tokens": 5}
            assert server.post(path, {**body, **more}, key).status_code == 200
            return server.engine.seen[-1].salt

        assert salt("admin") == ""
        assert salt("acme") == salt("acme", "/v1/completions") != ""
        salts = [salt(key, cache_salt=own) for key in ("acme", "admin") for own in ("a", "b")]
        assert len({*salts, salt("acme"), salt("admin")}) == 6
        assert salt("acme", cache_salt="a") == salt("acme", "/v1/completions", cache_salt="a") == salts[0]
        for wrong in ("", "x" * 600, 5):
            assert server.post("/v1/chat/completions", {**CHAT, "cache_salt": wrong}, "acme").status_code == 400


def test_every_request_is_billed_once(text: ToyText) -> None:
    tenancy = ToyTenancy()
    with live(ToyEngine(text), ToyCatalog(), tenancy) as server:

        def chat(content: str, **more: Any) -> Any:
            return {**CHAT, "messages": [{"role": "user", "content": content}], **more}

        server.post("/v1/chat/completions", chat("Hi", n=3), "admin")
        _, three = tenancy.bills[-1]
        assert len(tenancy.bills) == 1
        assert three.prompt == len(server.engine.seen[0].prompt)  # one prompt for three completions
        assert three.completion == 3 * 8 or three.completion % 3 == 0
        server.post("/v1/chat/completions", chat("FAIL now please"), "admin")
        assert tenancy.bills[-1][1].completion == 3
        server.post("/v1/chat/completions", chat("FULL"), "admin")
        assert tenancy.bills[-1][1].completion == 0
        headers = {"authorization": "Bearer admin"}
        body = chat("SLOW " + "word " * 30, stream=True, max_tokens=200)
        with server.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as left:
            answer = left.iter_raw()
            next(answer)
        wait_for(lambda: len(tenancy.bills) == 4)
        assert tenancy.bills[-1][1].prompt > 0
        assert tenancy.inside == 0


def test_the_user_of_a_request_reaches_the_catalog(text: ToyText) -> None:
    users: list[str | None] = []

    class Watching(ToyCatalog):
        def resolve(self, model: str, caller: Any) -> Any:
            users.append(caller.user)
            return super().resolve(model, caller)

    with live(ToyEngine(text), Watching()) as server:
        server.post("/v1/chat/completions", {**CHAT, "user": "u-17"})
    assert users == ["u-17"]


def test_pages_of_other_origins_are_refused(text: ToyText) -> None:
    with live(ToyEngine(text), ToyCatalog(), settings=HttpSettings(allowed_origins=("https://app.example",))) as server:
        headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
        allowed = server.client.options("/v1/chat/completions", headers=headers)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"


# -- invalid bodies ----------------------------------------------------------------------------------------------------


NASTY: list[Any] = ["", "x", -1, 3, 2**70, [None], {"a": 1}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/messages": {"model": "toy", "max_tokens": 20, "messages": [{"role": "user", "content": "Hi"}]},
    "/generate": {"inputs": "Hi"},
    "/api/chat": {"model": "sql", "messages": [{"role": "user", "content": "Hi"}]},
    "/api/generate": {"model": "sql", "prompt": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5]},
    "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "lib/cat"},
}


@pytest.mark.parametrize("path", BODIES)
def test_no_value_of_any_key_makes_the_server_fail(text: ToyText, path: str) -> None:
    """Replace each key of each body with every hostile value; the other keys stay valid."""
    from veneer.serve.http.surfaces import messages, ollama, openai, tgi, vllm

    models: dict[str, Any] = {
        "/v1/chat/completions": openai.ChatBody,
        "/v1/completions": openai.CompletionBody,
        "/v1/messages": messages.MessagesBody,
        "/generate": tgi.Parameters,
        "/api/chat": ollama.Chat,
        "/api/generate": ollama.Options,
        "/tokenize": vllm.Tokenize,
        "/detokenize": vllm.Detokenize,
        "/v1/load_lora_adapter": vllm.Load,
    }
    model = models[path]
    bodies: list[Any] = [BODIES[path], *NASTY]
    for key in [*model.model_fields, *model.refused, *model.ignored]:
        for value in NASTY:
            given = {key: value}
            inside = {"/generate": "parameters", "/api/generate": "options"}.get(path)
            bodies.append({**BODIES[path], **({inside: given} if inside else given)})
    app = toy_app(ToyEngine(text), ToyCatalog())
    answers = responses(app, [{"method": "POST", "url": path, "json": body} for body in bodies])
    statuses = [answer.status_code for answer in answers]
    assert max(statuses) < 500, bodies[statuses.index(max(statuses))]
    assert 200 in statuses


@pytest.mark.slow
def test_no_body_makes_the_server_fail(text: ToyText, tmp_path: Path) -> None:
    """Schemathesis generates bodies for every route; no response is a 5xx.

    Each body is sent as generated, and again with only its required keys and at most one other key, so that
    many requests reach the engine.
    """
    statuses: dict[str, set[int]] = {}

    def ask(case: Any) -> None:
        seen = statuses.setdefault(case.path, set())
        seen.add(case.call(timeout=20).status_code)
        whole, required = case.body, ("prompt", "messages", "inputs", "lora_name", "lora_path", "tokens")
        if isinstance(whole, dict):
            for more in ["", *sorted(set(whole) - set(required))]:
                case.body = {key: value for key, value in whole.items() if key in (*required, more)}
                seen.add(case.call(timeout=20).status_code)
        assert max(seen) < 500, (case.path, case.body)

    staging = UploadStage(1 << 20)
    with (
        open_library(tmp_path) as library,
        live(
            ToyEngine(text),
            ToyCatalog(),
            routers=[adapter_routes(library, staging, OpenAccess())],
            large=adapter_bodies(staging),
        ) as server,
    ):
        fuzzed(server.url, ask)
        reached = len(server.engine.seen)
    staging.close()
    assert len(statuses) >= 20
    assert reached > 50  # 96 with schemathesis 4.32; the number of generated cases depends on its version


def test_the_openapi_description_is_complete(server: Live) -> None:
    wanted = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/load_lora_adapter"}
    wanted |= {
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/generate",
        "/generate_stream",
        "/tokenize",
        "/metrics",
        "/ready",
    }
    assert wanted <= {*server.get("/openapi.json").json()["paths"]}
    assert not re.search(r"/home|/work", server.get("/openapi.json").text)


def test_health_and_readiness_report_engine_problems(server: Live) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    server.engine.problem = lambda: "the engine's thread has ended"  # type: ignore[method-assign]
    for path in ("/health", "/ready"):
        answer = server.get(path)
        assert (answer.status_code, answer.json()["status"]) == (503, "failing")
        assert answer.json()["reason"] == "the engine's thread has ended"
    server.engine.problem = lambda: ""  # type: ignore[method-assign]
    server.engine.trouble = lambda: "no replica answers"  # type: ignore[method-assign]
    assert server.get("/health").status_code == 200
    assert (server.get("/ready").status_code, server.get("/ready").json()["reason"]) == (503, "no replica answers")
