"""llama.cpp's surface: numbers for adapters, global scales, scales for each request."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyTenancy, ToyText, live


def complete(server: Live, prompt: Any = "Hi", **more: Any) -> Any:
    return server.post("/completion", {"prompt": prompt, "n_predict": 60, **more})


def numbers(server: Live) -> dict[str, int]:
    return {row["name"]: row["id"] for row in server.get("/lora-adapters").json()}


def test_completion(server: Live) -> None:
    found = complete(server, seed=42, temperature=0.0, cache_prompt=False).json()
    assert found["content"] == "[base] Hi"
    assert (found["stop"], found["stop_type"], found["stopping_word"], found["model"]) == (True, "eos", "", "toy")
    assert found["prompt"] == "Hi"
    assert found["tokens_predicted"] == found["timings"]["predicted_n"] > 0
    assert found["generation_settings"]["temperature"] == 0.0
    s = server.engine.seen[0].sampling
    assert (s.seed, s.top_k, s.top_p, s.min_p) == (42, 40, 0.95, 0.05)  # llama.cpp's defaults
    assert complete(server, n_predict=3).json()["stop_type"] == "limit"
    word = complete(server, "one two", stop=[" two"]).json()
    assert (word["stop_type"], word["stopping_word"], word["content"]) == ("word", " two", "[base] one")
    assert complete(server, n_predict=-1).json()["generation_settings"]["n_predict"] == 512 - 2


def test_prompts_may_mix_texts_and_tokens(server: Live) -> None:
    ids = server.engine.text.tokenizer.encode("Hi", add_special_tokens=False)
    assert complete(server, ids).json()["content"] == "[base] Hi"
    assert complete(server, ["Oh ", *ids]).json()["content"] == "[base] Oh Hi"
    assert complete(server, [99999]).status_code == 400


def test_stream(server: Live) -> None:
    events = server.events("/completion", {"prompt": "Hi all", "stream": True, "n_probs": 2, "return_tokens": True})
    assert "".join(e["content"] for e in events) == "[base] Hi all"
    assert [e["stop"] for e in events] == [False] * (len(events) - 1) + [True]
    assert len(events[0]["completion_probabilities"][0]["top_logprobs"]) == 2
    assert events[0]["tokens"]
    assert events[-1]["stop_type"] == "eos"
    failed = server.events("/completion", {"prompt": "FAIL now please", "stream": True})
    assert failed[-1]["error"]["code"] == 500


@pytest.mark.parametrize("scale", [0, 1])
def test_lora(server: Live, scale: float) -> None:
    """With scale 0 the base answers, with 1 the adapter; ids that are not in the list get 0."""
    ids = numbers(server)
    assert all(row["scale"] == 0 for row in server.get("/lora-adapters").json())
    answer = server.post("/lora-adapters", [{"id": ids["sql"], "scale": scale}])
    assert answer.json() == {"success": True}
    wanted = "[d-sql*1] Hi" if scale else "[base] Hi"
    assert complete(server).json()["content"] == wanted
    # No other surface's request changes for it.
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    assert server.post("/v1/chat/completions", chat).json()["choices"][0]["message"]["content"] == "[base] Hi"
    assert server.post("/generate", {"inputs": "Hi"}).json()["generated_text"] == "[base] Hi"
    # A request that names its adapters has just those.
    assert complete(server, lora=[]).json()["content"] == "[base] Hi"
    assert complete(server, model="polite").json()["content"] == "[d-polite*1] Hi"
    server.post("/lora-adapters", [{"id": ids["polite"], "scale": 0.5}])
    assert {r["name"]: r["scale"] for r in server.get("/lora-adapters").json()} == {"sql": 0, "polite": 0.5}
    assert complete(server).json()["content"] == "[d-polite*0.5] Hi"
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "polite"}).status_code == 200
    assert complete(server).json()["content"] == "[base] Hi"


def test_lora_per_request(server: Live) -> None:
    """Six requests at once, each with its scale, none takes another's."""
    number = numbers(server)["sql"]
    scales = [0, 0, 0.3, 0.7, 1, 1]

    def one(scale: float) -> str:
        body = {"lora": [{"id": number, "scale": scale}], "temperature": 0.0, "seed": 42, "cache_prompt": False}
        return str(complete(server, **body).json()["content"])

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(one, scales))
    assert said == [f"[d-sql*{s:g}] Hi" if s else "[base] Hi" for s in scales]
    both = [{"id": n, "scale": 0.5} for n in numbers(server).values()]
    assert complete(server, lora=both).json()["content"] == "[d-polite*0.5+d-sql*0.5] Hi"


def test_a_wrong_number(server: Live) -> None:
    for answer in (complete(server, lora=[{"id": 77, "scale": 1}]), server.post("/lora-adapters", [{"id": 77}])):
        assert answer.status_code == 404
        assert "invalid adapter id" in answer.json()["error"]["message"]
    assert server.post("/lora-adapters", [{"id": 0, "scale": 1}, {"id": 0, "scale": 2}]).status_code == 400
    assert server.post("/lora-adapters", {"id": 0}).status_code == 400
    assert complete(server, model="sql", lora=[{"id": 0, "scale": 1}]).status_code == 400


def test_numbers_are_never_given_again(server: Live) -> None:
    before = numbers(server)
    server.post("/v1/unload_lora_adapter", {"lora_name": "sql"})
    server.post("/v1/load_lora_adapter", {"lora_name": "cat", "lora_path": "lib/cat"})
    after = numbers(server)
    assert after["polite"] == before["polite"]
    assert after["cat"] not in before.values()
    assert complete(server, lora=[{"id": before["sql"], "scale": 1}]).status_code == 404


def test_a_tenant_sees_its_own_numbers_alone(text: ToyText) -> None:
    with live(ToyEngine(text), ToyCatalog(), ToyTenancy()) as server:
        everything = {r["name"]: r["id"] for r in server.get("/lora-adapters", "admin").json()}
        assert [r["name"] for r in server.get("/lora-adapters", "acme").json()] == ["sql"]
        body = {"prompt": "Hi", "n_predict": 20, "lora": [{"id": everything["polite"], "scale": 1}]}
        assert server.post("/completion", body, "acme").status_code == 404
        assert server.post("/lora-adapters", [], "acme").status_code == 403


def test_a_global_scale_acts_for_those_who_may_see_the_adapter(text: ToyText) -> None:
    with live(ToyEngine(text), ToyCatalog(), ToyTenancy()) as server:
        numbers = {r["name"]: r["id"] for r in server.get("/lora-adapters", "admin").json()}
        both = [{"id": numbers["sql"], "scale": 1}, {"id": numbers["polite"], "scale": 0.5}]
        assert server.post("/lora-adapters", both, "admin").status_code == 200
        body = {"prompt": "Hi", "n_predict": 40}
        assert server.post("/completion", body, "admin").json()["content"] == "[d-polite*0.5+d-sql*1] Hi"
        answer = server.post("/completion", body, "acme")
        assert answer.json()["content"] == "[d-sql*1] Hi"
        assert "polite" not in answer.text + str(answer.headers)


def test_the_servers_own_default_acts_on_every_surface(server: Live) -> None:
    server.service.mixes.default["sql"] = 0.5
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    assert server.post("/v1/chat/completions", chat).json()["choices"][0]["message"]["content"] == "[d-sql*0.5] Hi"
    assert server.post("/generate", {"inputs": "Hi"}).json()["generated_text"] == "[d-sql*0.5] Hi"
    server.post("/v1/unload_lora_adapter", {"lora_name": "sql"})
    assert server.post("/generate", {"inputs": "Hi"}).json()["generated_text"] == "[base] Hi"


def test_what_cannot_be_honoured(server: Live) -> None:
    for more in (
        {"mirostat": 2},
        {"grammar": "root ::= x"},
        {"typical_p": 0.5},
        {"xtc_probability": 0.5},
        {"n_predict": 0},
        {"dry_multiplier": 0.8},
        {"n_predictt": 5},
        {"logit_bias": [[5, True]]},
        {"repeat_last_n": 64},
    ):
        answer = complete(server, **more)
        assert answer.status_code == 400, more
        assert answer.json()["error"]["type"] == "invalid_request_error"
    neutral = {"mirostat": 0, "typical_p": 1.0, "dry_multiplier": 0.0, "grammar": "", "repeat_last_n": -1}
    assert complete(server, **neutral).status_code == 200
    complete(server, logit_bias=[[5, -1.5], [6, False]], json_schema={"type": "integer"})
    s = server.engine.seen[-1].sampling
    assert dict(s.logit_bias) == {5: -1.5, 6: -100.0}
    assert s.grammar == ("json_schema", '{"type": "integer"}')


def test_props(server: Live) -> None:
    found = server.get("/props").json()
    assert found["model_path"] == "toy"
    assert found["default_generation_settings"]["n_ctx"] == 512
    assert "im_start" in found["chat_template"]
