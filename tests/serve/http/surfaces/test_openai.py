"""The OpenAI routes, called by OpenAI's client on a live server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyText, live, wait_for
from veneer.serve.settings import HttpSettings

HELLO: Any = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, content: str, **options: Any) -> Any:
    options = {"model": "toy", **options}
    return client.chat.completions.create(messages=[{"role": "user", "content": content}], **options)


def test_chat(client: openai.OpenAI, server: Live) -> None:
    answer = ask(client, "Hello there")
    assert answer.object == "chat.completion"
    assert answer.model == "toy"
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "[base] Hello there")
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens // 2
    assert server.engine.seen[0].sampling.temperature == 1.0
    assert answer._request_id  # the client fills this attribute from the x-request-id header


@pytest.mark.parametrize(
    ("model", "digest"), [("sql", "d-sql"), ("toy:sql", "d-sql"), ("stable", "d-sql"), ("toy", "base"), ("", "base")]
)
def test_model_names_a_base_an_adapter_or_both(client: openai.OpenAI, model: str, digest: str) -> None:
    answer = ask(client, "Hi", model=model)
    wanted = "[base] Hi" if digest == "base" else f"[{digest}*1] Hi"
    assert answer.choices[0].message.content == wanted
    assert answer.model == (model or "toy")  # the response repeats the model name that the client sent


@pytest.mark.parametrize(
    "mix", [[{"adapter": "sql", "strength": 0.8}, {"adapter": "polite", "strength": -0.5}], ["sql:0.8", "polite:-0.5"]]
)
def test_mix(client: openai.OpenAI, mix: Any) -> None:
    answer = ask(client, "Hi", extra_body={"mix": mix})
    assert answer.choices[0].message.content == "[d-polite*-0.5+d-sql*0.8] Hi"


def test_an_unknown_name_is_404_and_never_the_base(client: openai.OpenAI, server: Live) -> None:
    for options in (
        {"model": "nobody"},
        {"model": "toy:nobody"},
        {"model": "../../etc/passwd"},
        {"extra_body": {"mix": ["sql", "nobody"]}},
        {"extra_body": {"lora_path": "nobody"}},
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(client, "Hi", **options)
        assert refused.value.code == "model_not_found"
    assert server.engine.seen == []


def test_two_ways_to_name_adapters_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="model, mix"):
        ask(client, "Hi", model="sql", extra_body={"mix": ["polite"]})


def test_an_adapter_in_model_overrides_lora_path(client: openai.OpenAI) -> None:
    assert ask(client, "Hi", extra_body={"lora_path": "sql"}).choices[0].message.content == "[d-sql*1] Hi"
    answer = ask(client, "Hi", model="toy:polite", extra_body={"lora_path": "sql"})
    assert answer.choices[0].message.content == "[d-polite*1] Hi"


# -- streams -----------------------------------------------------------------------------------------------------------


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(ask(client, "Hello", model="sql", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "[d-sql*1] Hello"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert all(c.choices[0].finish_reason is None for c in chunks[:-2])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1
    assert {c.object for c in chunks} == {"chat.completion.chunk"}


def test_raw_stream_is_what_clients_parse(server: Live) -> None:
    body = {"model": "toy", "messages": HELLO, "stream": True}
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["cache-control"] == "no-cache"
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2])
    first = json.loads(lines[0][6:])
    assert "usage" not in first
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]


def test_streamed_and_whole_answers_are_equal(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "n": 2, "seed": 3}
    whole = ask(client, "Grüße 🎉 SEED", **options)
    texts, tokens = ["", ""], [[], []]
    for chunk in ask(client, "Grüße 🎉 SEED", stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs:
                tokens[choice.index] += [t.token for t in choice.logprobs.content]
    assert texts == [c.message.content for c in whole.choices]
    assert texts[0].endswith("seed 3")
    assert texts[1].endswith("seed 4")
    assert tokens == [[t.token for t in c.logprobs.content] for c in whole.choices]
    joined = b"".join(bytes(t.bytes) for t in whole.choices[0].logprobs.content)
    assert joined.decode() == texts[0]  # bytes are exact even if a token is only part of a character


def test_a_client_that_disconnects_cancels_its_request(client: openai.OpenAI, server: Live) -> None:
    stream = ask(client, "SLOW " + "word " * 20, stream=True)
    for n, _ in enumerate(stream):
        if n == 2:
            break
    stream.close()
    wait_for(lambda: server.engine.cancelled)
    assert server.engine.running == 0
    body = {"model": "toy", "messages": [{"role": "user", "content": "SLOW " + "word " * 40}]}
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/chat/completions", timeout=0.3, json=body)
    wait_for(lambda: len(server.engine.cancelled) == 2)
    series = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="toy"} 2.0'
    wait_for(lambda: series in server.get("/metrics").text)


def test_an_error_in_mid_stream_is_an_event(client: openai.OpenAI, server: Live) -> None:
    with pytest.raises(openai.APIError, match="fell off the bus"):
        list(ask(client, "FAIL now please", stream=True))
    events = server.events(
        "/v1/chat/completions", {"model": "toy", "stream": True, "messages": [{"role": "user", "content": "CRASH now"}]}
    )
    assert events[-1] == "[DONE]"
    assert events[-2]["error"]["code"] == "internal"
    assert "secret" not in json.dumps(events)


def test_errors_before_a_stream_have_an_http_status(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client, "FULL", stream=stream)
        assert refused.value.code == "overloaded"
        assert refused.value.response.headers["retry-after"] == "3"


def test_an_internal_error_is_500_without_details(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as refused:
        ask(client, "CRASH")
    assert "secret" not in str(refused.value)
    with pytest.raises(openai.InternalServerError, match="fell off the bus"):
        ask(client, "FAIL now please")


def test_a_slow_reader_does_not_delay_others(text: ToyText) -> None:
    """Although the client stops reading, the server reads the whole completion from the engine at once. It closes
    the stream after the timeout."""
    with live(ToyEngine(text), ToyCatalog(), settings=HttpSettings(stall=0.5)) as server:
        body = {"model": "toy", "prompt": "SAY:" + "x" * 400, "max_tokens": 400, "n": 8, "stream": True, "logprobs": 20}
        with server.client.stream("POST", "/v1/completions", json=body) as stalled:
            chunks = stalled.iter_raw(64)
            next(chunks)
            wait_for(lambda: server.engine.running == 0)
            assert server.post("/v1/completions", {"model": "toy", "prompt": "quick"}).status_code == 200
    assert server.engine.cancelled == []


# -- settings ----------------------------------------------------------------------------------------------------------


def test_every_setting_reaches_the_engine(client: openai.OpenAI, server: Live) -> None:
    own = {"temperature": 0.3, "top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.2, "seed": 7}
    own |= {"stop": ["§"], "logit_bias": {"5": -100}, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 3}
    vllms = {"top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True}
    ask(client, "Hi", **own, extra_body=vllms | {"stop_token_ids": [11]})
    s = server.engine.seen[0].sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (0.3, 0.9, 40, 0.1)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (s.seed, s.stop, s.stop_ids, s.ignore_eos) == (7, ("§",), (11,), True)
    assert (s.max_tokens, s.min_tokens, s.logprobs, dict(s.logit_bias)) == (9, 2, 3, {5: -100.0})


def test_an_answer_can_fill_the_context_by_default(client: openai.OpenAI, server: Live) -> None:
    ask(client, "Hi")
    request = server.engine.seen[0]
    assert request.sampling.max_tokens == 512 - len(request.prompt)
    client.completions.create(model="toy", prompt="Hi")
    assert server.engine.seen[1].sampling.max_tokens == 16


def test_stop_and_length(client: openai.OpenAI) -> None:
    stopped = ask(client, "one two three", stop=" two").choices[0]
    assert (stopped.message.content, stopped.finish_reason, stopped.stop_reason) == ("[base] one", "stop", " two")
    cut = ask(client, "one two three", max_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 3


INTEGER = {"type": "integer"}
SCHEMA = ("json_schema", '{"type": "integer"}')


@pytest.mark.parametrize(
    ("extra", "grammar"),
    [
        ({"response_format": {"type": "json_object"}}, ("json_object", "")),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": INTEGER}}}, SCHEMA),
        ({"structured_outputs": {"json": INTEGER}}, SCHEMA),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, SCHEMA),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
        ({"structured_outputs": {"choice": ["yes.", "no"]}}, ("regex", r"(yes\.|no)")),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_response_formats_become_grammars(client: openai.OpenAI, server: Live, extra: Any, grammar: Any) -> None:
    ask(client, "Hi", extra_body=extra)
    assert server.engine.seen[0].sampling.grammar == grammar


def test_the_openai_clients_parse_method_works(client: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class Weather(BaseModel):
        city: str
        degrees: int

    answer = client.chat.completions.parse(model="toy", messages=HELLO, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="text", degrees=7)


def test_messages_in_parts_and_roles(client: openai.OpenAI, server: Live) -> None:
    parts: Any = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    client.chat.completions.create(model="toy", messages=messages)
    said = server.engine.text.tokenizer.decode(server.engine.seen[0].prompt)
    assert said == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:…"}}]}]
    with pytest.raises(openai.BadRequestError, match="supports only text"):
        client.chat.completions.create(model="toy", messages=image)


# -- completions -------------------------------------------------------------------------------------------------------


def test_completions_accept_every_form_of_prompt(client: openai.OpenAI, server: Live) -> None:
    ids = server.engine.text.tokenizer.encode("Hi all", add_special_tokens=False)
    for prompt, wanted in {"text": "Hi all", "texts": ["Hi all", "Bye"], "ids": ids, "lists": [ids, ids]}.items():
        answer = client.completions.create(model="sql", prompt=wanted, max_tokens=50)
        texts = [c.text for c in answer.choices]
        assert texts[0] == "[d-sql*1] Hi all", prompt
        assert len(texts) == (2 if prompt in ("texts", "lists") else 1)
        assert [c.index for c in answer.choices] == list(range(len(texts)))


def test_echo_n_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="toy", prompt=["Hi", "Bye"], n=2, echo=True, max_tokens=50)
    assert [c.text for c in answer.choices] == ["Hi[base] Hi"] * 2 + ["Bye[base] Bye"] * 2
    ids: Any = [5, 6, 7]
    echoed = client.completions.create(model="toy", prompt=ids, echo=True, max_tokens=1).choices[0].text
    assert len(echoed) >= 3
    answer = client.completions.create(model="toy", prompt="Hi", logprobs=2, max_tokens=50)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens or []) == answer.choices[0].text
    assert (found.text_offset or [])[:2] == [0, len((found.tokens or [""])[0])]
    assert (found.token_logprobs or [])[0] == -0.5
    assert all(len(top) >= 1 for top in found.top_logprobs or [])


@pytest.mark.parametrize("words", ["Hi", "Good morning to you"])
def test_echo_includes_the_prompts_logprobs(client: openai.OpenAI, words: str) -> None:
    """The lists have the format that evaluation harnesses read: the prompt's tokens, then the completion's."""
    one = client.completions.create(model="toy", prompt=words, logprobs=2, echo=True, max_tokens=1)
    choice, usage = one.choices[0], one.usage
    found = choice.logprobs
    lists = (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset)
    assert [len(each or []) for each in lists] == [usage.prompt_tokens + 1] * 4
    assert "".join(found.tokens or []) == choice.text
    assert (found.token_logprobs or []) == [None, *[-0.5] * usage.prompt_tokens]
    assert [top is None for top in found.top_logprobs or []] == [True, *[False] * usage.prompt_tokens]
    starts = found.text_offset or []
    assert starts == [len("".join((found.tokens or [])[:k])) for k in range(len(starts))]

    text, chosen = "", []
    for chunk in client.completions.create(model="toy", prompt=words, logprobs=2, echo=True, max_tokens=1, stream=True):
        for piece in chunk.choices:
            text += piece.text
            chosen += (piece.logprobs.tokens or []) if piece.logprobs else []
    assert (text, chosen) == (choice.text, found.tokens)


def test_prompt_logprobs_have_vllms_format(client: openai.OpenAI) -> None:
    wanted: dict[str, Any] = {"model": "toy", "prompt": [5, 6, 7], "max_tokens": 1}
    made = client.completions.create(**wanted, extra_body={"prompt_logprobs": 2}).choices[0]
    places = made.model_dump()["prompt_logprobs"]
    assert made.logprobs is None
    assert places[0] is None
    assert [list(place) for place in places[1:]] == [["6", "7"], ["7", "8"]]
    assert [told["logprob"] for told in places[1].values()] == [-0.5, -1.5]
    assert [told["rank"] for told in places[1].values()] == [1, 2]
    assert all(isinstance(told["decoded_token"], str) for told in places[1].values())
    # completion logprobs appear only under `logprobs`, with the requested count
    both = client.completions.create(**wanted, logprobs=3, extra_body={"prompt_logprobs": 0}).choices[0]
    assert [list(place) for place in both.model_dump()["prompt_logprobs"][1:]] == [["6"], ["7"]]
    assert len(both.logprobs.tokens or []) == 1
    with pytest.raises(openai.BadRequestError, match="leave stream out"):
        client.completions.create(**wanted, stream=True, extra_body={"prompt_logprobs": 2})


def test_completions_stream_with_several_prompts(client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    options: Any = {"include_usage": True}
    for chunk in client.completions.create(
        model="toy", prompt=["Hi", "Bye"], echo=True, stream=True, stream_options=options, max_tokens=50
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "Hi[base] Hi", 1: "Bye[base] Bye"}
    assert chunk.usage.prompt_tokens == 5


# -- refusals ----------------------------------------------------------------------------------------------------------


UNSUPPORTED = {"use_beam_search": True, "reasoning_effort": "high", "functions": [{"name": "f"}], "chat_template": "x"}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"temprature": 1}, "unknown key 'temprature', did you mean 'temperature'"),
        ({"messages": [{"role": "user", "content": "x", "extra": 1}]}, "unknown key"),
        ({"temperature": -1}, "temperature must be greater than or equal to 0"),
        ({"temperature": 9}, "temperature must be less than or equal to 2"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 65}, "at most 64"),
        ({"n": 0}, "n must be"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 100000}, "of the context's 512"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "differ"),
        ({"min_tokens": 10, "max_tokens": 5}, "min_tokens"),
        ({"stop": ["x"] * 17}, "at most 16"),
        ({"stop": [""]}, "empty"),
        ({"logit_bias": {"cat": 1}}, "token id"),
        ({"logit_bias": {"99999": 1}}, "vocabulary"),
        ({"logit_bias": {"5": 101}}, "-100 to 100"),
        ({"stop_token_ids": [99999]}, "vocabulary"),
        *(({key: value}, f"{key} is not supported") for key, value in UNSUPPORTED.items()),
        ({"chat_template_kwargs": {"tokenize": True}}, "not a variable"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "several fields"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "no json_schema"),
        ({"top_logprobs": 2}, "requires logprobs"),
        ({"stream_options": {"include_usage": True}}, "requires stream"),
        ({"messages": []}, "messages"),
        ({"mix": [{"adapter": "sql", "strength": 1e9}]}, "the strength of 'sql' is 1e+09"),
        ({"mix": ["sql:-10001"]}, "the strength of 'sql' is -10001"),
        ({"mix": ["sql:nan"]}, "mix.0: the strength of 'sql' is nan"),
        ({"mix": [{"adapter": "sql", "campaign": "lens"}]}, "unknown key 'mix.0.campaign'"),
        ({"seed": 2**70}, "seed"),
        ({"user": "u" * 600}, "user"),
    ],
)
def test_bad_requests(server: Live, extra: Any, words: str) -> None:
    answer = server.post("/v1/chat/completions", {"model": "toy", "messages": HELLO, **extra})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert server.engine.seen == []


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"model": NaN}', b""])
def test_malformed_bodies_are_refused(server: Live, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/generate", "/tokenize"):
        answer = server.client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), (path, answer.text)
        assert "error" in answer.json()


def test_invalid_unicode_is_refused(server: Live) -> None:
    for body in (
        b'{"model": "toy", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "toy", "messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "toy", "\\ud800": 1, "messages": [{"role": "user", "content": "x"}]}',
    ):
        answer = server.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404), answer.text


def test_harmless_keys_are_ignored_with_a_warning(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="toy", messages=HELLO, metadata={"a": "b"}, store=True, user="u1", parallel_tool_calls=True
    )
    assert raw.headers["x-veneer-ignored"] == "metadata, parallel_tool_calls, store"


def test_a_prompt_longer_than_the_context_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "word " * 600)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "messages"


def test_a_body_that_is_too_large_is_refused(text: ToyText) -> None:
    with live(ToyEngine(text), ToyCatalog(), settings=HttpSettings(max_body=2000)) as server:
        body = {"model": "toy", "messages": [{"role": "user", "content": "x" * 3000}]}
        assert server.post("/v1/chat/completions", body).status_code == 413
        content, headers = iter([json.dumps(body).encode()]), {"content-type": "application/json"}
        chunked = server.client.post("/v1/chat/completions", content=content, headers=headers)
        assert chunked.status_code == 413
        assert chunked.json()["error"]["code"] == "too_large"
        assert server.post("/generate", {"inputs": "x" * 3000}).json()["error_type"] == "too_large"


def test_unknown_routes_and_methods(server: Live) -> None:
    nothing = server.get("/v1/nothing")
    assert (nothing.status_code, nothing.json()["error"]["type"]) == (404, "invalid_request_error")
    answer = server.get("/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


# -- models ------------------------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    found = {m.id: m for m in client.models.list()}
    assert set(found) == {"toy", "sql", "polite"}
    assert found["sql"].model_extra["parent"] == "toy"
    assert found["sql"].model_extra["root"] == "lib/sql"
    assert found["toy"].model_extra["parent"] is None
    assert client.models.retrieve("sql").id == "sql"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


# -- tools -------------------------------------------------------------------------------------------------------------

WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def test_tools_reach_the_template_and_calls_are_parsed(client: openai.OpenAI, server: Live) -> None:
    answer = ask(client, "TOOL", tools=[WEATHER]).choices[0]
    assert answer.finish_reason == "tool_calls"
    call = answer.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    assert answer.message.content == "Let me see.\n"
    assert '"weather"' in server.engine.text.tokenizer.decode(server.engine.seen[0].prompt)


def test_tool_calls_in_a_stream(client: openai.OpenAI) -> None:
    text, calls, reasons = "", [], []
    for chunk in ask(client, "TOOL", tools=[WEATHER], stream=True):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        calls += delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
    assert text == "Let me see.\n"
    assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [(0, "weather", '{"city": "Paris"}')]
    assert reasons[-1] == "tool_calls"


def test_a_tool_may_be_required_or_named(client: openai.OpenAI, server: Live) -> None:
    answer = ask(client, "x", tools=[WEATHER], tool_choice="required").choices[0]
    assert answer.message.tool_calls[0].function.arguments == '{"city": "text"}'
    assert answer.message.content is None
    named = {"type": "function", "function": {"name": "weather"}}
    assert (
        ask(client, "x", tools=[WEATHER], tool_choice=named).choices[0].message.tool_calls[0].function.name == "weather"
    )
    pieces = [c.choices[0].delta for c in ask(client, "x", tools=[WEATHER], tool_choice=named, stream=True)]
    parts = [call.function for piece in pieces for call in piece.tool_calls or []]
    assert [p.name for p in parts if p.name] == ["weather"]
    assert json.loads("".join(p.arguments for p in parts)) == {"city": "text"}
    assert ask(client, "TOOL", tools=[WEATHER], tool_choice="none").choices[0].message.tool_calls is None
    with pytest.raises(openai.BadRequestError, match="does not name one of the tools"):
        ask(client, "x", tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "other"}})


def test_tools_need_a_template_with_tools() -> None:
    with live(ToyEngine(ToyText()), ToyCatalog()) as server:
        answer = server.post("/v1/chat/completions", {"model": "toy", "messages": HELLO, "tools": [WEATHER]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
