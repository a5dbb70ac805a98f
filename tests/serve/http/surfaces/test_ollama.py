"""Ollama's routes, asked by Ollama's own Python client and with the bodies of its docs/api.md."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyTenancy, ToyText, live
from tests.serve.whole import Whole
from veneer.formats import peft
from veneer.serve.settings import HttpSettings

HI = [{"role": "user", "content": "Hi there"}]
FEW = {"num_predict": 60}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Get the weather in a given city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
AGE = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "available": {"type": "boolean"}},
    "required": ["age", "available"],
}
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)


@pytest.fixture
def client(server: Live) -> Iterator[ollama.Client]:
    with ollama.Client(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def thinker() -> Iterator[Live]:
    text = ToyText()
    text.tokenizer.chat_template = THINKING
    with live(ToyEngine(text), ToyCatalog()) as served:
        yield served


def lines(server: Live, path: str, body: Any) -> list[Any]:
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


# -- the official client -----------------------------------------------------------------------------------------------


def test_an_adapter_is_the_model(server: Live, client: ollama.Client) -> None:
    assert client.chat("sql", HI, options=FEW).message.content == "[d-sql*1] Hi there"
    assert client.chat("sql:latest", HI, options=FEW).message.content == "[d-sql*1] Hi there"
    assert client.generate("toy:sql", "Hi", options=FEW).response == "[d-sql*1] Hi"
    assert client.generate("toy:latest", "Hi", options=FEW).response == "[base] Hi"
    mixed = server.post("/api/chat", {"model": "toy", "messages": HI, "mix": ["sql:0.5", "polite"], "stream": False})
    assert mixed.json()["message"]["content"] == "[d-polite*1+d-sql*0.5] Hi there"
    for unknown in ("nobody", "nobody:latest", "sql:7b"):
        with pytest.raises(ollama.ResponseError) as error:
            client.chat(unknown, HI)
        assert error.value.status_code == 404
    assert server.post("/api/chat", {"messages": HI}).status_code == 400  # never the base in silence
    assert len(server.engine.seen) == 5


def test_latest_is_an_adapter_if_there_is_one_with_this_name(server: Live, client: ollama.Client) -> None:
    server.catalog.load("latest", "lib/cat")
    assert client.generate("toy:latest", "Hi", options=FEW).response == "[c4*1] Hi"


def test_a_stream_joins_to_the_whole_answer(client: ollama.Client) -> None:
    parts = list(client.chat("sql", HI, stream=True, options=FEW))
    whole = client.chat("sql", HI, options=FEW)
    assert "".join(p.message.content or "" for p in parts) == whole.message.content
    assert [p.done for p in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1].done_reason, parts[-1].message.content) == ("stop", "")
    for end in (parts[-1], whole):
        assert (end.prompt_eval_count, end.eval_count) == (whole.prompt_eval_count, whole.eval_count)
        assert end.prompt_eval_duration == 10_000_000  # the engine's 0.01 s, in nanoseconds
        assert end.eval_duration == 20_000_000 * (end.eval_count or 0)
        assert (end.total_duration or 0) >= (end.load_duration or 0) + (end.eval_duration or 0)


def test_asynchronous_clients(server: Live) -> None:
    async def ask() -> tuple[str, str]:
        async with ollama.AsyncClient(server.url) as client:
            whole = await client.generate("sql", "Hi", options=FEW)
            parts = [part async for part in await client.generate("sql", "Hi", stream=True, options=FEW)]
        return whole.response or "", "".join(part.response or "" for part in parts)

    assert asyncio.run(ask()) == ("[d-sql*1] Hi",) * 2


def test_tools(server: Live, client: ollama.Client) -> None:
    asked: Any = [{"role": "user", "content": "TOOL please"}]
    whole = client.chat("sql", asked, tools=[WEATHER]).message
    parts = [part.message for part in client.chat("sql", asked, tools=[WEATHER], stream=True)]
    calls = [call for part in parts for call in part.tool_calls or ()]
    assert "".join(part.content or "" for part in parts) == whole.content
    for call in (*calls, *(whole.tool_calls or ())):
        assert (call.function.name, call.function.arguments) == ("weather", {"city": "Paris"})
    assert len(calls) == 1
    # the client's own message, sent back with the tool's result
    history = [*asked, whole, {"role": "tool", "content": "11 degrees", "tool_name": "weather"}]
    assert "[d-sql*1]" in (client.chat("sql", [*history, *HI], tools=[WEATHER], options=FEW).message.content or "")


def test_formats(client: ollama.Client) -> None:
    assert json.loads(client.generate("sql", "Hi", format="json").response or "") == {"a": 1}
    found = json.loads(client.chat("sql", HI, format=AGE).message.content or "")
    assert found == {"age": 7, "available": True}
    assert client.generate("sql", "Hi", format="", options=FEW).response == "[d-sql*1] Hi"


def test_logprobs(client: ollama.Client) -> None:
    whole = client.chat("sql", HI, logprobs=True, top_logprobs=2, options=FEW)
    parts = list(client.chat("sql", HI, logprobs=True, top_logprobs=2, stream=True, options=FEW))
    told = [each for part in parts for each in part.logprobs or ()]
    assert "".join(each.token for each in told) == whole.message.content
    assert [each.token for each in told] == [each.token for each in whole.logprobs or ()]
    assert all(each.logprob == -0.5 and len(each.top_logprobs or ()) == 2 for each in told)
    assert client.chat("sql", HI, top_logprobs=2, options=FEW).logprobs is None


def test_models(server: Live, client: ollama.Client) -> None:
    assert [m.model for m in client.list().models] == ["toy", "sql", "polite"]
    shown = client.show("sql:latest")
    assert shown.capabilities == ["completion", "tools"]
    assert "tools" in (shown.template or "")
    assert (shown.details or {})["parent_model"] == "toy"
    assert server.get("/api/version").json().keys() == {"version"}
    assert server.client.head("/").status_code == 200
    with pytest.raises(ollama.ResponseError, match="nobody"):
        client.show("nobody")
    assert server.post("/api/show", {}).status_code == 400
    assert server.post("/api/show", {"name": "sql"}).status_code == 200


def test_models_of_a_server_with_files(whole: Whole) -> None:
    shop = whole.shop
    with ollama.Client(whole.url) as client:
        models = {m.model: m for m in client.list().models}
        base, plain = models["tiny"], models["plain"]
        assert 0 < (base.size or 0) < sum(f.stat().st_size for f in shop.base_dir.glob("*.safetensors"))  # no headers
        assert (plain.size or 0) >= (shop.adapters / "plain" / "adapter_model.safetensors").stat().st_size
        assert f"sha256:{plain.digest}" == peft.load_folder(shop.adapters / "plain", shop.base.model).adapter.digest()
        info = client.show("plain@1").modelinfo or {}
        assert info["general.architecture"] == "llama"
        assert info["general.parameter_count"] == sum(p.numel() for p in shop.base.model.parameters())
        assert client.generate("plain", "Hi", raw=True, options={"num_predict": 2}).eval_count == 2
        assert "plain@1" in {m.model for m in client.ps().models}


def test_ledger_counts_equal_chats(text: ToyText, monkeypatch: pytest.MonkeyPatch) -> None:
    tenancy = ToyTenancy()
    with live(ToyEngine(text), ToyCatalog(), tenancy) as server:
        body = {"model": "sql", "messages": HI}
        assert server.post("/v1/chat/completions", body | {"max_tokens": 30}, "acme").status_code == 200
        assert server.post("/api/chat", body | {"options": {"num_predict": 30}}, "acme").status_code == 200
        assert server.post("/api/chat", body | {"options": {"num_predict": 30}, "stream": False}, "acme").is_success
        counts = [(tenant, usage.prompt, usage.completion) for tenant, usage in tenancy.bills]
        assert counts == [counts[0]] * 3
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        monkeypatch.setenv("OLLAMA_API_KEY", "acme")
        with ollama.Client() as named:
            assert [m.model for m in named.list().models] == ["toy", "sql"]
        beyond = server.post("/api/chat", body | {"options": {"num_predict": 50}}, "acme")
        assert (beyond.status_code, beyond.headers["retry-after"]) == (429, "7")
        assert beyond.json() == {"error": "beyond this minute's tokens"}
        assert server.post("/api/chat", body | {"model": "polite"}, "acme").status_code == 404
        unknown = server.post("/api/chat", body, "nobody")
        assert (unknown.status_code, unknown.json()) == (401, {"error": "this key is not known"})


def test_limits_come_before_the_body_is_read(text: ToyText) -> None:
    limits = HttpSettings(max_body=1000)
    with live(ToyEngine(text), ToyCatalog(), ToyTenancy(), limits) as server:
        for path in ("/api/chat", "/api/generate", "/api/show"):
            json_type = {"content-type": "application/json"}
            keyed = json_type | {"authorization": "Bearer acme"}
            big = server.client.post(path, content=b"not JSON " * 200, headers=keyed)
            assert (big.status_code, list(big.json())) == (413, ["error"])
            stranger = server.client.post(path, content=b"not JSON", headers=json_type)
            assert (stranger.status_code, list(stranger.json())) == (401, ["error"])


# -- thinking ----------------------------------------------------------------------------------------------------------


def test_thinking(thinker: Live, client: ollama.Client) -> None:
    with ollama.Client(thinker.url) as mind:
        asked: Any = [{"role": "user", "content": "SAY:<think>two and two</think> four"}]
        whole = mind.chat("sql", asked, think=True).message
        assert (whole.thinking, whole.content) == ("two and two", "four")
        parts = [part.message for part in mind.chat("sql", asked, stream=True)]
        assert "".join(part.thinking or "" for part in parts) == "two and two"
        assert "".join(part.content or "" for part in parts) == "four"
        assert mind.show("sql").capabilities == ["completion", "thinking"]
        mind.chat("sql", HI, think=False)
        prompt = thinker.engine.text.tokenizer.decode(thinker.engine.seen[-1].prompt)
        assert prompt.endswith("<think>\n\n</think>\n\n")
    level = thinker.post("/api/chat", {"model": "sql", "messages": HI, "think": "high"})
    assert level.headers["x-veneer-ignored"] == "think level"
    with pytest.raises(ollama.ResponseError, match="does not support thinking"):
        client.chat("sql", HI, think=True)
    assert client.chat("sql", HI, think=False, options=FEW).message.content == "[d-sql*1] Hi there"


SAID = st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", '{"name": "f"}', "</tool_call>", " ", "a", "<"]))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(said=SAID)
def test_any_stream_joins_to_the_whole_answer(thinker: Live, said: list[str]) -> None:
    body = {"model": "sql", "messages": [{"role": "user", "content": f"SAY:.{''.join(said)}"}], "options": FEW}
    body["messages"][0]["content"] = f"SAY:{''.join(said)}x"
    whole = thinker.post("/api/chat", body | {"stream": False}).json()["message"]
    parts = [line["message"] for line in lines(thinker, "/api/chat", body)]
    for key in ("content", "thinking"):
        assert "".join(part.get(key, "") for part in parts) == whole.get(key, "")


# -- bodies of docs/api.md ---------------------------------------------------------------------------------------------

SKY = {"model": "sql", "prompt": "Why is the sky blue?"}
TURNS = [{"role": "user", "content": "why is the sky blue?"}]
ALL_OPTIONS = {
    "num_keep": 5, "seed": 42, "num_predict": 100, "draft_num_predict": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.0,
    "repeat_last_n": 33, "temperature": 0.8, "repeat_penalty": 1.2, "presence_penalty": 1.5, "frequency_penalty": 1.0,
    "penalize_newline": True, "stop": ["\n", "user:"], "numa": False, "num_ctx": 1024, "num_batch": 2, "num_gpu": 1,
    "main_gpu": 0, "use_mmap": True, "num_thread": 8,
}  # fmt: skip
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("generate", SKY),
        ("generate", SKY | {"stream": False}),
        ("generate", SKY | {"format": AGE, "stream": False}),
        ("generate", SKY | {"format": "json", "stream": False}),
        ("generate", {"model": "sql", "prompt": "[INST] why is the sky blue? [/INST]", "raw": True, "stream": False}),
        ("generate", SKY | {"options": {"seed": 123}}),
        ("generate", SKY | {"options": ALL_OPTIONS, "stream": False}),
        ("generate", SKY | {"system": "Be brief.", "options": None, "keep_alive": "5m"}),
        ("generate", {"model": "sql"}),
        ("generate", {"model": "sql", "keep_alive": 0}),
        ("chat", {"model": "sql", "messages": TURNS}),
        ("chat", {"model": "sql", "messages": TURNS, "tools": [WEATHER], "stream": True}),
        ("chat", {"model": "sql", "messages": TURNS, "stream": False}),
        ("chat", {"model": "sql", "messages": TURNS, "tools": [WEATHER], "stream": False}),
        ("chat", {"model": "sql", "messages": TURNS, "format": AGE, "stream": False, "options": {"temperature": 0}}),
        ("chat", {"model": "sql", "messages": [*TURNS, {"role": "assistant", "content": "Rayleigh."}, *TURNS]}),
        ("chat", {"model": "sql", "messages": [*TURNS, CALLED, {"role": "tool", "content": "11", "tool_name": "f"}]}),
        ("chat", {"model": "sql", "messages": TURNS, "options": {"seed": 101, "temperature": 0}}),
        ("chat", {"model": "sql", "messages": []}),
        ("chat", {"model": "sql", "messages": [], "keep_alive": 0}),
    ],
)  # fmt: skip
def test_the_bodies_of_the_reference(server: Live, path: str, body: dict[str, Any]) -> None:
    answer = server.post(f"/api/{path}", body)
    assert answer.status_code == 200, answer.text
    objects = [json.loads(line) for line in answer.text.splitlines()]
    kind: Any = ollama.ChatResponse if path == "chat" else ollama.GenerateResponse
    for each in objects:
        kind(**each)
        assert {"model", "created_at", "done", "message" if path == "chat" else "response"} <= each.keys()
    empty = not body.get("prompt") and not body.get("messages")
    reason = ("unload" if "keep_alive" in body else "load") if empty else "stop"
    assert (objects[-1]["done"], objects[-1]["done_reason"]) == (True, reason)
    assert (len(objects) == 1) is (empty or body.get("stream") is False)
    assert bool(server.engine.seen) is not empty


def test_options(server: Live) -> None:
    answer = server.post("/api/generate", SKY | {"options": ALL_OPTIONS, "keep_alive": 5, "truncate": True})
    sampling = server.engine.seen[0].sampling
    wanted = {"seed": 42, "max_tokens": 100, "top_k": 20, "top_p": 0.9, "min_p": 0, "temperature": 0.8}
    wanted |= {"repetition_penalty": 1.2, "presence_penalty": 1.5, "frequency_penalty": 1, "stop": ("\n", "user:")}
    assert {key: getattr(sampling, key) for key in wanted} == wanted
    unused = "draft_num_predict main_gpu num_batch num_ctx num_gpu num_keep num_thread numa penalize_newline "
    unused += "repeat_last_n use_mmap"
    named = answer.headers["x-veneer-ignored"].split(", ")
    assert sorted(named) == sorted(["keep_alive", "truncate", *unused.split()])

    server.post("/api/generate", SKY)
    sampling = server.engine.seen[1].sampling  # the defaults of api/types.go
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.8, 40, 0.9, None)
    server.post("/api/generate", SKY | {"options": {"num_predict": 100_000, "seed": -1, "top_k": 0}})
    prompt, sampling = server.engine.seen[2].prompt, server.engine.seen[2].sampling
    assert (sampling.max_tokens, sampling.seed, sampling.top_k) == (512 - len(prompt), None, 0)
    assert server.post("/api/generate", SKY | {"options": {"num_predict": 3}, "stream": False}).json()[
        "done_reason"
    ] == ("length")


def test_raw_prompts_have_no_template(server: Live) -> None:
    encode = server.engine.text.tokenizer
    server.post("/api/generate", {"model": "sql", "prompt": "Hi", "raw": True})
    assert list(server.engine.seen[0].prompt) == encode("Hi")["input_ids"]
    server.post("/api/generate", {"model": "sql", "prompt": "Hi", "system": "Be brief."})
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = encode.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert encode.decode(server.engine.seen[1].prompt) == rendered


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"options": {"temprature": 1}}, "did you mean 'temperature'"), ({"options": {"typical_p": 0.7}}, "typical_p"),
        ({"options": {"mirostat": 1}}, "mirostat"), ({"options": {"top_p": 0}}, "options.top_p"),
        ({"options": {"repeat_penalty": 0}}, "options.repeat_penalty"), ({"suffix": "    return"}, "suffix"),
        ({"template": "{{ .Prompt }}"}, "template"), ({"context": [1, 2]}, "context"), ({"images": ["aGk="]}, "text"),
        ({"format": "xml"}, "format"), ({"think": True}, "does not support thinking"), ({"steam": True}, "'stream'"),
        ({"raw": True, "system": "x"}, "system"), ({"top_logprobs": 21}, "top_logprobs"), ({"model": ""}, "model"),
        ({"prompt": "x " * 2000}, "512"), ({"_debug_render_only": True}, "_debug_render_only"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(server: Live, change: dict[str, Any], names: str) -> None:
    answer = server.post("/api/generate", SKY | change)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])
    assert names in answer.json()["error"]
    assert server.engine.seen == []


def test_errors_in_chats(server: Live, client: ollama.Client) -> None:
    seen = [{"role": "user", "content": "what is this?", "images": ["aGk="]}]
    answer = server.post("/api/chat", {"model": "sql", "messages": seen})
    assert (answer.status_code, answer.json()) == (400, {"error": "this base reads only text: leave the images out"})
    assert server.post("/api/chat", {"model": "sql", "messages": [{"role": "robot"}]}).status_code == 400
    full = server.post("/api/chat", {"model": "sql", "messages": [{"role": "user", "content": "FULL"}]})
    assert (full.status_code, full.headers["retry-after"]) == (429, "3")
    failing: Any = [{"role": "user", "content": "FAIL now please"}]
    with pytest.raises(ollama.ResponseError, match="the GPU fell off the bus") as error:
        client.chat("sql", failing)
    assert error.value.status_code == 500
    found = lines(server, "/api/chat", {"model": "sql", "messages": failing})
    assert found[-1] == {"error": "the GPU fell off the bus"}
    with pytest.raises(ollama.ResponseError, match="the GPU fell off the bus"):
        list(client.chat("sql", failing, stream=True))
    crash = lines(server, "/api/chat", {"model": "sql", "messages": [{"role": "user", "content": "CRASH"}]})
    assert "secret" not in crash[-1]["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "pull"), ("POST", "push"), ("POST", "create"), ("POST", "copy"), ("DELETE", "delete"), ("POST", "embed"),
     ("POST", "embeddings")],
)  # fmt: skip
def test_what_a_server_of_adapters_does_not_have(server: Live, method: str, path: str) -> None:
    answer = server.client.request(method, f"/api/{path}", json={"model": "llama3.2"})
    assert answer.status_code == 501
    assert "not supported: " in answer.json()["error"]  # followed by what to do
    assert "no route" in server.client.post("/api/blobs/sha256:00", json={}).json()["error"]
