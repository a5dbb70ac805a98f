"""On every route, the size of a body is checked before parsing, and parsing is strict."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyText, live, toy_app
from veneer.serve.http.bodies import CHUNK, DEPTH, VALUES, count_values, read_json
from veneer.serve.request import Refused
from veneer.serve.settings import HttpSettings

SURFACES = {
    "/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/messages": "messages", "/generate": "inputs",
    "/tokenize": "prompt",
}  # fmt: skip
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text('"\\[{,:a', max_size=6), inner, max_size=5),
    max_leaves=30,
)


def counted(value: Any) -> tuple[int, int]:
    """Return (number of values and keys, depth), computed recursively."""
    inner = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    below = [counted(each) for each in inner]
    own = len(value) if isinstance(value, dict) else 0
    depth = 1 + max([d for _, d in below], default=0) if isinstance(value, dict | list) else 0
    return 1 + own + sum(n for n, _ in below), depth


@given(VALUE, st.booleans(), st.sampled_from([None, 1]))
def test_value_counts_equal_those_of_parsed_json(value: Any, ascii: bool, indent: int | None) -> None:
    data = json.dumps(value, ensure_ascii=ascii, indent=indent).encode("utf-8", "replace")
    values, depth = count_values(data)
    wanted, deep = counted(json.loads(data))
    assert depth == deep
    assert wanted <= values <= 2 * wanted + 1
    assert read_json(data) == json.loads(data)


def test_a_string_across_chunks_is_one_value() -> None:
    for n in range(4):  # the chunk ends at a backslash, at the character that it escapes, or near them
        text = "x" * (CHUNK - 3 + n) + '\\" [[[, \\\\' * 3
        assert count_values(json.dumps({"a": text}).encode()) == (3, 1)
        assert read_json(json.dumps({"a": text}).encode()) == {"a": text}
    assert count_values(b'"' + b"\\" * (2 * CHUNK) + b'",[') == (3, 1)
    assert count_values(b'"' + b"\\" * (2 * CHUNK + 1) + b'",[') == (1, 0)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[" + b"1," * VALUES + b"1]", "more than"),
        (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "deep"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": ' + b"1" * 5000 + b"}", "too long"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": ', "not JSON"),
    ],
)
def test_invalid_bodies_are_refused_with_a_reason(data: bytes, says: str) -> None:
    with pytest.raises(Refused, match=says) as caught:
        read_json(data)
    assert caught.value.status == 400


@pytest.fixture(scope="module")
def small() -> Any:
    with live(ToyEngine(ToyText()), ToyCatalog(), settings=HttpSettings(max_body=1 << 20)) as served:
        yield served


def sent(server: Live, path: str, raw: bytes) -> Any:
    return server.client.post(path, content=raw, headers={"content-type": "application/json"})


@pytest.mark.parametrize("path", SURFACES)
def test_a_repeated_key_is_an_error(small: Live, path: str) -> None:
    key = SURFACES[path]
    value = b'[{"role": "user", "content": "Hi"}]' if key == "messages" else b'"Hi"'
    answer = sent(small, path, b'{"%s": %s, "stream": false, "%s": %s}' % (key.encode(), value, key.encode(), value))
    assert answer.status_code in (400, 422)
    assert f"the key '{key}' is given twice" in answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [-1] * 60_000}),
        ("/v1/completions", {"prompt": [[]] * 60_000}),
        ("/v1/completions", {"prompt": [["x"]] * 3_000}),
        ("/v1/completions", {"prompt": "Hi", **{f"key{i}": 0 for i in range(30_000)}}),
        ("/v1/completions", {"prompt": "Hi", "logit_bias": {f"{i}": "x" for i in range(30_000)}}),
        ("/v1/completions", {"prompt": "Hi", "lora_path": [1] * 60_000}),
        ("/v1/completions", {"prompt": "Hi", "stop": [1] * 60_000}),
        ("/v1/completions", {"prompt": "Hi", "mix": [{"adapter": 1}] * 20_000}),
        ("/v1/completions", {"prompt": "Hi", "mix": {f"{i}": "x" for i in range(30_000)}}),
        ("/v1/completions", {"prompt": "Hi", "mix": {"sql": 0.8}}),
        ("/v1/chat/completions", {"messages": [{"role": "x"}] * 20_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", **{f"key{i}": 0 for i in range(30_000)}}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * 60_000}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "tools": [1] * 60_000}),
        ("/generate", {"inputs": "Hi", "parameters": {"stop": [1] * 60_000}}),
        ("/generate", {"inputs": "Hi", "parameters": {"mix": [{"adapter": 1}] * 20_000}}),
        ("/tokenize", {"messages": [{"role": "x"}] * 20_000}),
        ("/detokenize", {"tokens": [-1] * 60_000}),
    ],
)
def test_only_a_few_errors_of_a_body_are_listed(small: Live, path: str, body: Any) -> None:
    answer = small.post(path, body)
    assert answer.status_code in (400, 422)
    assert len(answer.content) < 1000
    assert " and " not in answer.text.partition("more")[0] or "and at most" in answer.text or "more than" in answer.text


@pytest.mark.parametrize("path", SURFACES)
def test_disconnect_mid_body_is_not_a_server_error(path: str) -> None:
    """The server logs no error, does not count a refused request, and releases the request's slot."""
    app = toy_app(ToyEngine(ToyText()), ToyCatalog())
    service, answers = app.state.service, []
    come = iter([{"type": "http.request", "body": b'{"model', "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(come)

    async def send(message: Any) -> None:
        answers.append(message)

    head = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"100")]
    scope = {"type": "http", "http_version": "1.1", "query_string": b""}
    scope |= {"method": "POST", "path": path, "headers": head}
    asyncio.run(app(scope, receive, send))
    assert answers[0]["status"] == 499
    assert service.inside == 0
    refused = [each for metric in service.metrics.refused.collect() for each in metric.samples]
    assert not refused


def test_an_oversized_prompt_is_not_tokenized(small: Live) -> None:
    text = "x" * (small.service.prompts.most + 1)
    before = len(small.engine.seen)
    for path, key in SURFACES.items():
        value = [{"role": "user", "content": text}] if key == "messages" else text
        needed = {"model": "toy", "max_tokens": 5} if path == "/v1/messages" else {}
        answer = small.post(path, {key: value, **needed})
        assert answer.status_code in (400, 422)
        assert "at most" in answer.text
        assert len(answer.content) < 1000
    assert len(small.engine.seen) == before


NO_TEXT = {"messages": [{"role": "user", "content": [{"type": "text"}]}]}


def test_tokens_are_the_tokenizers_own(small: Live) -> None:
    prompts, tokenizer = small.service.prompts, small.service.reader.tokenizer
    for text in ("", "Hello, the printer!", "<|im_start|>user\nHi<|im_end|>", "naïve 東京 🙂", " a  b\t\n"):
        for special in (True, False):
            wanted = tokenizer(text, add_special_tokens=special)["input_ids"]
            assert list(prompts.encode(text, special=special)) == wanted


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/completions", {"prompt": "Hi", "stop": ["a"] * 1000}, "stop: 1000 items"),
        ("/v1/completions", {"prompt": "Hi", "stop": [None]}, "stop.0 must be a valid string"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt.1 must be a valid integer"),
        ("/v1/completions", {"prompt": "Hi", "logit_bias": {"1": "x"}}, "logit_bias.1 must be a valid number"),
        ("/v1/completions", b"", "the request has no body: a JSON object is expected"),
        ("/v1/completions", b"null", "the body: a JSON object is expected"),
        ("/v1/completions", b"[]", "the body: a JSON object is expected"),
        ("/generate", {"inputs": "Hi", "parameters": None}, "parameters: a JSON object is expected"),
        ("/generate", {"inputs": "Hi", "adapter_id": "a"}, "unknown key 'adapter_id'"),
        ("/v1/chat/completions", NO_TEXT, "messages.0.content: a part of type 'text' has no text under 'text'"),
    ],
)
def test_errors_name_the_bodys_fields_and_no_internals(small: Live, path: str, body: Any, says: str) -> None:
    answer = sent(small, path, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert answer.status_code in (400, 422)
    assert says in answer.text
    assert not re.search(r"function-|list\[|=\w|did you mean 'adapter_id'", answer.text), answer.text


def test_a_body_needs_the_json_content_type(small: Live) -> None:
    answer = small.client.post(
        "/v1/completions", content=b'{"prompt": "Hi"}', headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert answer.status_code == 415
    assert "application/json" in answer.text
