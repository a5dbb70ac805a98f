"""Anthropic's routes, called by Anthropic's client on a live server.

The bodies of the API reference are read from the docstrings of Anthropic's client.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pydantic
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.serve.http.toy import TOOL_TEMPLATE, Live, ToyCatalog, ToyEngine, ToyTenancy, ToyText, live, wait_for
from veneer.serve.principal import Principal
from veneer.serve.settings import HttpSettings

HELLO: Any = [{"role": "user", "content": "Hello there"}]
WEATHER: Any = {
    "name": "weather",
    "description": "Get the weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
THINKING_TEMPLATE = (
    TOOL_TEMPLATE.replace("+ m['content'] +", "+ (m.reasoning_content or '') + m['content'] +")
    + "{% if add_generation_prompt and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 529: "overloaded_error",
}  # fmt: skip
"""Error types by status: https://platform.claude.com/docs/en/api/errors"""


@pytest.fixture
def client(server: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def wide() -> Iterator[Live]:
    """A server whose context is as long as the reference's examples need, and whose base can think."""
    text = ToyText(tools=True, context=4096)
    text.tokenizer.chat_template = THINKING_TEMPLATE
    with live(ToyEngine(text), ToyCatalog()) as server:
        yield server


def ask(client: anthropic.Anthropic, content: Any, **options: Any) -> Any:
    options = {"model": "toy", "max_tokens": 200, **options}
    return client.messages.create(messages=[{"role": "user", "content": content}], **options)


def post(server: Live, content: Any = "Hello there", **more: Any) -> httpx.Response:
    body = {"model": "toy", "max_tokens": 200, "messages": [{"role": "user", "content": content}], **more}
    return server.post("/v1/messages", body)


def events(answer: httpx.Response) -> list[Any]:
    """Return a stream's events; each must have the name of its type."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in filter(None, answer.text.split("\n\n")):
        name, content = block.split("\n")
        found.append(json.loads(content.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def fields(message: anthropic.types.Message) -> list[Any]:
    """Return a message's blocks; those of the stream helper also have the client's own `parsed_output`."""
    return [block.to_dict() | {"parsed_output": None, "id": ""} for block in message.content]


def prompts(server: Live) -> list[str]:
    return [server.engine.text.tokenizer.decode(request.prompt) for request in server.engine.seen]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_message(client: anthropic.Anthropic, server: Live) -> None:
    answer = ask(client, "Hello there", model="sql", extra_body={"temperature": 0.3, "top_p": 0.9, "top_k": 40})
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "sql")
    assert [(block.type, block.text) for block in answer.content] == [("text", "[d-sql*1] Hello there")]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.id.startswith("msg_")
    assert answer._request_id == answer.id.removeprefix("msg_")  # the client reads the request-id header
    sampling = server.engine.seen[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.3, 0.9, 40, 200)


def test_messages_have_the_prompt_and_the_bill_of_chat_completions(text: ToyText) -> None:
    tenancy = ToyTenancy()
    with live(ToyEngine(text), ToyCatalog(), tenancy) as server:
        system, user = "Answer briefly.", {"role": "user", "content": "Hello there"}
        chat = {"model": "sql", "messages": [{"role": "system", "content": system}, user], "max_tokens": 30}
        own = {"model": "sql", "system": system, "messages": [user], "max_tokens": 30}
        said = server.post("/v1/chat/completions", chat, "acme").json()["choices"][0]["message"]["content"]
        answers = [
            server.client.post("/v1/messages", json=own, headers={"x-api-key": "acme"}),
            server.post("/v1/messages", own, "acme"),
            server.post("/v1/messages", own | {"stream": True}, "acme"),
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert answers[0].json()["content"][0]["text"] == said
        wait_for(lambda: len(tenancy.bills) == 4)
    counts = {(tenant, usage.prompt, usage.cached, usage.completion) for tenant, usage in tenancy.bills}
    assert len(counts) == 1
    assert {request.prompt for request in server.engine.seen} == {server.engine.seen[0].prompt}
    usage = answers[0].json()["usage"]
    (_, prompt, cached, completion) = counts.pop()
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == prompt
    assert (usage["cache_read_input_tokens"], usage["output_tokens"]) == (cached, completion)


@pytest.mark.parametrize(
    ("options", "digests"),
    [
        ({"model": "toy:sql"}, "d-sql*1"),
        ({"model": "stable"}, "d-sql*1"),
        ({"extra_body": {"mix": ["sql:0.8", "polite:-0.5"]}}, "d-polite*-0.5+d-sql*0.8"),
    ],
)
def test_adapters_routes_and_mixes(client: anthropic.Anthropic, options: Any, digests: str) -> None:
    assert ask(client, "Hi", **options).content[0].text == f"[{digests}] Hi"


def test_an_unknown_model_is_404_and_never_the_base(client: anthropic.Anthropic, server: Live) -> None:
    for options in ({"model": "claude-sonnet-4-5"}, {"model": "toy:nobody"}, {"extra_body": {"mix": ["nobody"]}}):
        with pytest.raises(anthropic.NotFoundError) as refused:
            ask(client, "Hi", **options)
        assert refused.value.type == "not_found_error"
        with pytest.raises(anthropic.NotFoundError):
            client.messages.count_tokens(messages=HELLO, **({"model": "toy"} | options))
    assert post(server, model="").status_code == 400
    assert server.engine.seen == []


def test_stop_reasons(client: anthropic.Anthropic, server: Live) -> None:
    answer = ask(client, "one two three", stop_sequences=["§", " three"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " three")
    assert answer.content[0].text == "[base] one two"
    answer = ask(client, "one two three", max_tokens=2)
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 2)


def test_an_answer_can_end_with_the_context(server: Live) -> None:
    """As at Anthropic, `max_tokens` above the context is accepted."""

    def left(content: str) -> int:
        body = {"model": "toy", "messages": [{"role": "user", "content": content}]}
        return 512 - int(server.post("/v1/messages/count_tokens", body).json()["input_tokens"])

    said = "SAY:yes and no"
    answer = post(server, said, max_tokens=100_000).json()
    assert server.engine.seen[0].sampling.max_tokens == left(said)
    assert answer["stop_reason"] == "end_turn"
    padded = "a\n" * ((left(said) - 3) // (left(said) - left(f"a\n{said}"))) + said
    assert 0 < left(padded) <= 3
    full = post(server, padded, max_tokens=100_000).json()
    assert full["stop_reason"] == "model_context_window_exceeded"
    usage = full["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["output_tokens"] == 512


# -- streams -----------------------------------------------------------------------------------------------------------


def test_events_come_in_the_references_order(server: Live) -> None:
    found = events(post(server, "TOOL", tools=[WEATHER], stream=True))
    kinds = [event["type"] for event in found]
    assert re.fullmatch(
        r"message_start ping "
        r"content_block_start( content_block_delta)+ content_block_stop "
        r"content_block_start( content_block_delta)+ content_block_stop "
        r"message_delta message_stop",
        " ".join(kinds),
    )
    start, delta = found[0]["message"], found[-2]
    assert (start["content"], start["stop_reason"], start["role"]) == ([], None, "assistant")
    assert start["usage"]["output_tokens"] == 0
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert delta["usage"] | {"output_tokens": 0} == start["usage"]
    starts = [event["content_block"] for event in found if event["type"] == "content_block_start"]
    assert [(block["type"], block.get("input")) for block in starts] == [("text", None), ("tool_use", {})]
    assert {event["delta"]["type"] for event in found if event["type"] == "content_block_delta"} == {
        "text_delta",
        "input_json_delta",
    }
    indices = [event["index"] for event in found if "index" in event]
    assert indices == sorted(indices)
    assert set(indices) == {0, 1}


def test_the_clients_streams(client: anthropic.Anthropic) -> None:
    whole = ask(client, "Grüße 🎉")
    with client.messages.stream(
        model="toy", max_tokens=200, messages=[{"role": "user", "content": "Grüße 🎉"}]
    ) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text == "[base] Grüße 🎉"
        final = stream.get_final_message()
    assert final.usage == whole.usage
    assert final.stop_reason == "end_turn"
    raw = list(ask(client, "Hi", stream=True))
    assert (raw[0].type, raw[-1].type) == ("message_start", "message_stop")


def test_the_async_client(server: Live) -> None:
    async def work() -> None:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="unused", max_retries=0) as client:
            answer = await client.messages.create(model="sql", max_tokens=50, messages=HELLO)
            async with client.messages.stream(model="sql", max_tokens=50, messages=HELLO) as stream:
                final = await stream.get_final_message()
            count = await client.messages.count_tokens(model="sql", messages=HELLO)
        assert fields(answer) == fields(final)
        assert count.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens

    asyncio.run(work())


TAGS = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        '{"name": "weather", "arguments": {"city": "x"}}',
        "<th",
        " ",
    ]
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(TAGS | st.text("ab <>é🎉", max_size=6), max_size=8).map("".join), st.booleans(), st.booleans())
@example("<think>why</think>  so<tool_call>{}</tool_call>", True, True)
@example('<tool_call>{"name": "weather", "arguments": 3}</tool_call>', True, False)
def test_deltas_add_up_to_the_whole_answer(wide: Live, said: str, tools: bool, thinks: bool) -> None:
    more: dict[str, Any] = {"tools": [WEATHER]} if tools else {}
    if thinks:
        more["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    whole = post(wide, f"SAY:{said}", **more).json()
    blocks: list[Any] = []
    for event in events(post(wide, f"SAY:{said}", stream=True, **more)):
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"] | {"partial": ""})
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            key = {"input_json_delta": "partial"}.get(delta["type"], delta["type"].removesuffix("_delta"))
            block[key] += delta.get("partial_json", delta.get(key))
        elif event["type"] == "message_delta":
            assert event["delta"]["stop_reason"] == whole["stop_reason"]
            assert event["usage"] == whole["usage"]
    for block in blocks:
        partial = block.pop("partial")
        if block["type"] == "tool_use":
            block["input"] = json.loads(partial)
    for block in (*blocks, *whole["content"]):
        block.pop("id", None)
    assert blocks == whole["content"]
    if not tools and not thinks:
        last = said.splitlines()[-1].strip() if said.strip() else ""
        assert "".join(block["text"] for block in blocks).strip() == last.strip()


def test_an_error_in_mid_stream_is_an_event(client: anthropic.Anthropic, server: Live) -> None:
    with pytest.raises(anthropic.APIError, match="fell off the bus"):
        list(ask(client, "FAIL now please", stream=True))
    found = events(post(server, "CRASH now", stream=True))
    assert found[-1]["type"] == "error"
    assert found[-1]["error"]["type"] == "api_error"
    assert "secret" not in json.dumps(found)


def test_a_client_that_disconnects_frees_its_request(client: anthropic.Anthropic, server: Live) -> None:
    stream = ask(client, "SLOW " + "word " * 20, stream=True)
    for event in stream:
        if event.type == "content_block_delta":
            break
    stream.close()
    wait_for(lambda: server.engine.cancelled)
    assert server.engine.running == 0
    with pytest.raises(anthropic.APITimeoutError):
        ask(client, "SLOW " + "word " * 40, timeout=0.3)
    wait_for(lambda: len(server.engine.cancelled) == 2 and not server.engine.running)


# -- token counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"system": "Be brief."},
        {"system": [{"type": "text", "text": "Be brief."}], "tools": [WEATHER], "tool_choice": {"type": "any"}},
        {"thinking": {"type": "adaptive"}},
    ],
)
def test_counted_tokens_are_the_input_tokens_of_the_message(wide: Live, more: Any) -> None:
    with anthropic.Anthropic(base_url=wide.url, api_key="unused", max_retries=0) as client:
        count = client.messages.count_tokens(model="toy", messages=HELLO, **more)
        usage = ask(client, "Hello there", **more).usage
    # Anthropic's input_tokens leave out what the cache held
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert usage.cache_creation_input_tokens == 0
    assert usage.cache_read_input_tokens > 0


# -- tools -------------------------------------------------------------------------------------------------------------


def test_a_tool_round_trip(client: anthropic.Anthropic, server: Live) -> None:
    first = ask(client, "TOOL", tools=[WEATHER])
    assert first.stop_reason == "tool_use"
    text, call = first.content
    assert text.text == "Let me see.\n"
    assert (call.name, call.input) == ("weather", {"city": "Paris"})
    assert call.id.startswith("toolu_")
    history = [
        {"role": "user", "content": "TOOL"},
        {"role": "assistant", "content": first.content},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    second = client.messages.create(model="toy", max_tokens=50, messages=history, tools=[WEATHER])
    assert second.content[0].text == "[base] And now?"
    said = prompts(server)[1]
    assert "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>user\nAnd now?" in said
    assert said.index("Let me see.") < said.index("sunny")
    history[2]["content"] = [
        {"type": "tool_result", "tool_use_id": call.id, "content": "no such city", "is_error": True}
    ]
    client.messages.create(model="toy", max_tokens=50, messages=history, tools=[WEATHER])
    assert "tool\nError: no such city<" in prompts(server)[2]


def test_a_calls_history_reaches_the_template() -> None:
    text = ToyText(tools=True)
    text.tokenizer.chat_template = TOOL_TEMPLATE.replace(
        "m['content'] +",
        "m['content'] + (m.tool_calls | map(attribute='function') | list | tojson if m.tool_calls else '') +",
    )
    with live(ToyEngine(text), ToyCatalog()) as server:
        call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}
        turns = [*HELLO, {"role": "assistant", "content": [call]}]
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}]}
        assert post(server, messages=[*turns, result]).status_code == 200
        assert '[{"name": "weather", "arguments": {"city": "Paris"}}]' in prompts(server)[0]
        unknown = post(
            server, messages=[*turns, {"role": "user", "content": [result["content"][0] | {"tool_use_id": "x"}]}]
        )
        assert "no earlier tool_use block has the id 'x'" in unknown.json()["error"]["message"]
        assert "send their tool_result blocks" in post(server, messages=turns).json()["error"]["message"]


def test_tool_choice(client: anthropic.Anthropic, server: Live) -> None:
    for choice in (
        {"type": "any"},
        {"type": "tool", "name": "weather"},
        {"type": "any", "disable_parallel_tool_use": True},
    ):
        answer = ask(client, "x", tools=[WEATHER], tool_choice=choice)
        assert [(block.type, block.input) for block in answer.content] == [("tool_use", {"city": "text"})]
        assert answer.stop_reason == "tool_use"
    answer = ask(client, "TOOL", tools=[WEATHER], tool_choice={"type": "none"})
    assert [block.type for block in answer.content] == ["text"]
    assert '"weather"' not in prompts(server)[-1]
    with pytest.raises(anthropic.BadRequestError, match="did you mean 'weather'"):
        ask(client, "x", tools=[WEATHER], tool_choice={"type": "tool", "name": "wether"})
    with pytest.raises(anthropic.BadRequestError, match="has no tools"):
        ask(client, "x", tool_choice={"type": "any"})


def test_parallel_calls_can_be_disabled(client: anthropic.Anthropic) -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"city": "%s"}}</tool_call>'
    said = f"SAY:{call % 'Paris'}{call % 'Rome'}"
    cities = [block.input["city"] for block in ask(client, said, tools=[WEATHER]).content]
    assert cities == ["Paris", "Rome"]
    one = ask(client, said, tools=[WEATHER], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.input["city"] for block in one.content] == ["Paris"]
    assert (one.stop_reason, one.stop_sequence) == ("tool_use", None)


def test_tools_need_a_template_with_tools() -> None:
    with live(ToyEngine(ToyText()), ToyCatalog()) as server:
        assert "does not support tools" in post(server, tools=[WEATHER]).json()["error"]["message"]


class Order(pydantic.BaseModel):
    product: str
    quantity: int


def test_structured_outputs(client: anthropic.Anthropic, server: Live) -> None:
    options: dict[str, Any] = {"model": "toy", "max_tokens": 100, "messages": HELLO}
    parsed = client.messages.parse(**options, output_format=Order)
    assert parsed.parsed_output == Order(product="text", quantity=7)
    schema = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    for field in ({"output_format": schema}, {"output_config": {"format": schema}}):
        assert json.loads(post(server, **field).json()["content"][0]["text"]) == {"a": 7}
    both = post(server, tools=[WEATHER], tool_choice={"type": "any"}, output_format=schema)
    assert "several fields" in both.json()["error"]["message"]


# -- thinking ----------------------------------------------------------------------------------------------------------


def test_a_base_without_thinking_answers_without_it(client: anthropic.Anthropic) -> None:
    raw = client.messages.with_raw_response.create(
        model="toy", max_tokens=2000, messages=HELLO, thinking={"type": "enabled", "budget_tokens": 1024}
    )
    assert raw.headers["x-veneer-ignored"] == "anthropic-version, budget_tokens, thinking"
    assert [block.type for block in raw.parse().content] == ["text"]


def test_a_base_with_thinking_thinks_if_asked(wide: Live) -> None:
    said = "SAY:<think>carefully</think> So."
    assert post(wide, said).json()["content"][0]["text"] == said.removeprefix("SAY:")
    assert prompts(wide)[-1].endswith("</think>\n\n")  # thinking is off unless the request turns it on
    with anthropic.Anthropic(base_url=wide.url, api_key="unused", max_retries=0) as client:
        on: Any = {"type": "enabled", "budget_tokens": 1024}
        answer = ask(client, said, thinking=on)
        assert prompts(wide)[-1].endswith("assistant\n")
        thought, text = answer.content
        assert (thought.type, thought.thinking, text.text) == ("thinking", "carefully", "So.")
        with client.messages.stream(
            model="toy", max_tokens=200, thinking=on, messages=[{"role": "user", "content": said}]
        ) as stream:
            kinds = [event.delta.type for event in stream if event.type == "content_block_delta"]
            assert fields(stream.get_final_message()) == fields(answer)
        assert [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]] == [
            "thinking_delta",
            "signature_delta",
            "text_delta",
        ]
        hidden = ask(client, said, thinking=on | {"display": "omitted"})
        assert [getattr(block, block.type) for block in hidden.content] == ["", "So."]
        client.messages.create(
            model="toy",
            max_tokens=50,
            messages=[*HELLO, {"role": "assistant", "content": answer.content}, *HELLO],
        )
    assert "assistant\ncarefullySo." in prompts(wide)[-1]


def test_thinking_blocks_in_the_history_are_accepted(server: Live) -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "abc"},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "text", "text": "Yes."},
    ]
    answer = post(server, messages=[*HELLO, {"role": "assistant", "content": blocks}, *HELLO])
    assert answer.headers["x-veneer-ignored"] == "redacted_thinking, thinking"
    assert "assistant\nYes.<" in prompts(server)[0]


# -- the reference's bodies --------------------------------------------------------------------------------------------


def reference() -> list[Any]:
    """Return the JSON examples in the API reference of the messages and count_tokens bodies.

    Source: the docstrings of anthropic/types/message_create_params.py and message_count_tokens_params.py.
    """
    found: list[Any] = []
    for module in (message_create_params, message_count_tokens_params):
        for text in re.findall(r"```json\n(.*?)```", inspect.getsource(module), re.DOTALL):
            found.append(json.loads(textwrap.dedent(text)))
    return [each for i, each in enumerate(found) if each not in found[:i]]


EXAMPLES = reference()
"""Lists of messages, messages, tools, and content blocks."""
TURNS = [e if isinstance(e, list) else [e] for e in EXAMPLES if "role" in (e[0] if isinstance(e, list) else e)]
(TOOLS,) = [e for e in EXAMPLES if isinstance(e, list) and "input_schema" in e[0]]
(CALL,) = [e for e in EXAMPLES if isinstance(e, list) and e[0].get("type") == "tool_use"]
(RESULT,) = [e for e in EXAMPLES if isinstance(e, list) and e[0].get("type") == "tool_result"]
STOCKS: Any = {"role": "user", "content": "What's the S&P 500 at today?"}
BODIES: list[dict[str, Any]] = [
    *({"messages": turns} for turns in TURNS),
    {"messages": [STOCKS], "tools": TOOLS},
    {
        "messages": [STOCKS, {"role": "assistant", "content": CALL}, {"role": "user", "content": RESULT}],
        "tools": TOOLS,
    },
    # the bodies of examples/*.py in the repository anthropics/anthropic-sdk-python
    {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1024},  # messages.py
    {  # tools.py
        "messages": [{"role": "user", "content": "What is the weather in SF?"}],
        "tools": [
            {
                "name": "get_weather",
                "description": "Get the weather for a specific location",
                "input_schema": {"type": "object", "properties": {"location": {"type": "string"}}},
            }
        ],
    },
    {  # thinking.py
        "max_tokens": 3200,
        "thinking": {"type": "enabled", "budget_tokens": 1600},
        "messages": [{"role": "user", "content": "Create a haiku about Anthropic."}],
    },
    {  # prompt_caching.py
        "max_tokens": 256,
        "system": [{"type": "text", "text": "You review code.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Network Topology Reference", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "Which host is the daily driver?"},
                ],
            }
        ],
    },
]


def test_the_reference_has_every_kind_of_example() -> None:
    assert len(TURNS) >= 5
    assert any(turns[-1]["role"] == "assistant" for turns in TURNS)


@pytest.mark.parametrize("body", BODIES)
def test_the_references_bodies_are_answered(wide: Live, body: Any) -> None:
    with anthropic.Anthropic(base_url=wide.url, api_key="unused", max_retries=0) as client:
        options = {"model": "sql", "max_tokens": 1024} | body
        answer = client.messages.create(**options)
        with client.messages.stream(**options) as stream:
            final = stream.get_final_message()
        counted = {key: value for key, value in options.items() if key != "max_tokens"}
        count = client.messages.count_tokens(**counted)
    assert answer.content
    assert fields(final) == fields(answer)
    assert count.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def test_the_references_two_spellings_of_a_message_are_one_prompt(wide: Live) -> None:
    short, long = [turns for turns in TURNS if len(turns) == 1 and turns[0]["content"] != "Hello!"][:2]
    before = len(wide.engine.seen)
    for turns in (short, long):
        post(wide, messages=turns)
    first, second = wide.engine.seen[before:]
    assert first.prompt == second.prompt


def test_a_started_answer_is_continued(wide: Live) -> None:
    (started,) = [turns for turns in TURNS if turns[-1]["role"] == "assistant"]
    post(wide, messages=started)
    assert prompts(wide)[-1].endswith(f"<|im_start|>assistant\n{started[-1]['content']}")


# -- ignored and refused -----------------------------------------------------------------------------------------------


def test_fields_without_effect_are_named(client: anthropic.Anthropic, server: Live) -> None:
    marked = {"type": "ephemeral"}
    raw = client.messages.with_raw_response.create(
        model="toy",
        max_tokens=20,
        system=[{"type": "text", "text": "Be brief.", "cache_control": marked}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": marked}]}],
        metadata={"user_id": "ann"},
        service_tier="auto",
        container="c1",
        output_config={"effort": "low"},
        tools=[WEATHER | {"cache_control": marked, "strict": True}],
        extra_headers={"anthropic-beta": "context-1m-2025-08-07"},
        extra_body={"context_management": {"edits": []}},
    )
    assert raw.headers["x-veneer-ignored"].split(", ") == [
        "anthropic-beta", "anthropic-version", "cache_control", "container", "context_management", "effort",
        "service_tier", "strict",
    ]  # fmt: skip
    assert server.engine.seen[0].user == "ann"  # metadata.user_id is the end user, as `user` of chat completions
    assert "x-veneer-ignored" not in post(server).headers
    # a key of a tool's schema or arguments is the client's own
    schema = {"type": "object", "properties": {"cache_control": {"type": "string"}}}
    assert "x-veneer-ignored" not in post(server, tools=[WEATHER | {"input_schema": schema}]).headers


IMAGE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
CALLED: Any = {"type": "tool_use", "id": "t", "name": "weather", "input": {}}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_token": 5}, "unknown key 'max_token', did you mean 'max_tokens'"),
        ({"max_tokens": 0}, "max_tokens must be greater"),
        ({"temperature": -1}, "temperature must be"),
        ({"top_p": 0}, "top_p"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "contents": 1}]}, "did you mean 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "txt", "text": "x"}]}]}, "did you mean 'text'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_results"}]}]}, "did you mean 'tool_result'"),
        ({"messages": [{"role": "user", "content": [{"type": "server_tool_use"}]}]}, "of type 'server_tool_use'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "txt": "x"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "supports only text"),
        ({"messages": [{"role": "user", "content": [CALLED]}]}, "role 'user' has no block of type 'tool_use'"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, "no block of type 'image'"),
        ({"system": [IMAGE]}, "system.0"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "no tool of type 'web_search_20250305'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "no tool of type 'bash_20250124'"),
        ({"tools": [{"name": "weather"}]}, "tools.0.input_schema is required"),
        ({"tools": [WEATHER | {"parameters": {}}]}, "unknown key 'tools.0.parameters'"),
        ({"mcp_servers": [{"type": "url", "url": "https://example.com", "name": "x"}]}, "mcp_servers is not supported"),
        ({"fallbacks": [{"model": "toy"}]}, "fallbacks is not supported"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config.format.type"),
        ({"stop_sequences": [""]}, "empty"),
        ({"metadata": {"user_id": "u" * 600}}, "metadata.user_id"),
        ({"mix": ["polite"], "model": "sql"}, "model, mix"),
    ],
)
def test_bad_requests(server: Live, more: Any, words: str) -> None:
    answer = post(server, **more)
    assert answer.status_code == 400, answer.text
    error = answer.json()
    assert words in error["error"]["message"]
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert error["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    assert server.engine.seen == []


# -- errors ------------------------------------------------------------------------------------------------------------


def test_each_error_has_anthropics_shape(server: Live, text: ToyText) -> None:
    seen: dict[int, Any] = {}

    def add(answer: httpx.Response) -> None:
        body = answer.json()
        assert set(body) == {"type", "error", "request_id"}
        assert (body["type"], body["error"]["type"]) == ("error", TYPES[answer.status_code])
        assert body["request_id"] == answer.headers["request-id"]
        seen[answer.status_code] = answer

    add(post(server, max_tokens=-1))
    add(post(server, model="nobody"))
    add(post(server, "FULL"))
    add(post(server, "CRASH"))
    add(server.post("/v1/messages/batches", {"requests": []}))
    server.service.phase = "draining"
    add(post(server))
    server.service.phase = "ready"
    body = {"model": "sql", "max_tokens": 100, "messages": HELLO}
    with live(ToyEngine(text), ToyCatalog(), ToyTenancy(), HttpSettings(max_body=2000)) as guarded:
        add(guarded.post("/v1/messages", body))
        add(guarded.post("/v1/messages", body | {"system": "x" * 3000}, "acme"))
        add(limited := guarded.post("/v1/messages", body, "acme"))  # this tenant has 40 tokens per answer
        with anthropic.Anthropic(base_url=guarded.url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError) as refused:
                ask(client, "Hi")
            assert refused.value.request_id
            assert refused.value.type == "authentication_error"
        assert guarded.engine.seen == []
    assert limited.headers["retry-after"] == "7"
    assert seen[529].headers["retry-after"] == "5"
    assert {*TYPES} - {403} == {*seen}


def test_the_client_raises_its_own_errors(client: anthropic.Anthropic, server: Live) -> None:
    with pytest.raises(anthropic.RateLimitError):
        ask(client, "FULL")
    with pytest.raises(anthropic.InternalServerError, match="fell off the bus"):
        ask(client, "FAIL now please")
    server.service.phase = "draining"
    with pytest.raises(anthropic.InternalServerError) as refused:
        ask(client, "Hi")
    assert type(refused.value).__name__ == "OverloadedError"


def test_a_key_without_the_permission_gets_403(text: ToyText) -> None:
    class Auditors(ToyTenancy):
        async def authenticate(self, key: str | None, user: str | None = None) -> Principal:
            return Principal("tenant", "acme", roles=("auditor",))

    with live(ToyEngine(text), ToyCatalog(), Auditors()) as server:
        answer = server.client.post("/v1/messages", content=b"{", headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, TYPES[403])


def test_limits_come_before_the_body_is_parsed(text: ToyText) -> None:
    """A body that is no JSON gets the limit's error, so that the server has not parsed it."""
    bad, headers = b"[" * 3000, {"content-type": "application/json", "x-api-key": "acme"}
    with live(ToyEngine(text), ToyCatalog(), ToyTenancy(), HttpSettings(max_body=2000)) as server:
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            assert server.client.post(path, content=bad, headers=headers).status_code == 413
            assert server.client.post(path, content=iter([bad]), headers=headers).status_code == 413
        server.service.admission.shares["bodies"].take("", 1.0, 8 * 2000 - 100)
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            full = server.client.post(path, content=bad[:1000], headers=headers)
            assert (full.status_code, full.json()["error"]["type"]) == (429, TYPES[429])
            assert full.headers["retry-after"] == "1"


# -- models ------------------------------------------------------------------------------------------------------------


def test_models_for_anthropics_client(client: anthropic.Anthropic, server: Live) -> None:
    found = {model.id: model for model in client.models.list()}
    assert set(found) == {"toy", "sql", "polite"}
    assert found["sql"].display_name == "sql"
    assert found["sql"].created_at.timestamp() == 1700000000
    assert found["sql"].max_input_tokens == 512
    assert client.models.retrieve("sql") == found["sql"]
    assert [model.id for model in client.models.list(limit=1)] == ["toy", "sql", "polite"]  # reads every page
    before = client.models.list(before_id="polite", limit=1)
    assert ([model.id for model in before.data], before.has_more) == (["sql"], True)
    with pytest.raises(anthropic.NotFoundError) as refused:
        client.models.retrieve("nobody")
    assert refused.value.type == "not_found_error"
    for query in ({"limit": 0}, {"after_id": "nobody"}):
        with pytest.raises(anthropic.BadRequestError):
            client.models.list(**query)
    assert server.get("/v1/models").json()["object"] == "list"  # OpenAI's, without the header


def test_the_pages_example_works(server: Live) -> None:
    page = (Path(__file__).parents[4] / "docs" / "reference" / "serving-http.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(client = anthropic.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"anthropic": anthropic}
    exec(code.replace("http://localhost:8000", server.url).replace('"support"', '"sql"'), names)
    with names["client"]:
        assert names["message"].content[0].text == "[d-sql*1] Hello"
