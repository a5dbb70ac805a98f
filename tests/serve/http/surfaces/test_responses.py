"""OpenAI's Responses, called by OpenAI's client on a live server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyTenancy, ToyText, live
from tests.test_readme import ROOT, blocks
from veneer.serve.http.stored_responses import LIFETIME, StoredResponses
from veneer.serve.settings import HttpSettings, QuotaLimits

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"type": "function", "name": "weather", "parameters": CITY}
CLOCK: dict[str, Any] = {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}}}
TEXT_EVENTS = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    "response.output_text.delta", "response.output_text.done", "response.content_part.done",
    "response.output_item.done", "response.completed",
]  # fmt: skip
"""The events of a text in OpenAI's reference, in order; deltas repeat."""


@pytest.fixture(scope="module")
def text() -> ToyText:
    return ToyText(tools=True, context=4096)


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture
def tenants(text: ToyText) -> Iterator[Live]:
    with live(ToyEngine(text), ToyCatalog(), ToyTenancy()) as served:
        yield served


def ask(client: openai.OpenAI, input: Any, **options: Any) -> Any:
    return client.responses.create(**{"model": "toy", "input": input, **options})


def prompt(server: Live) -> str:
    return str(server.engine.text.tokenizer.decode(server.engine.seen[-1].prompt))


# -- answers -----------------------------------------------------------------------------------------------------------


def test_answer(client: openai.OpenAI, server: Live) -> None:
    answer = ask(client, "Hello", instructions="Be brief", metadata={"a": "b"}, temperature=0.5, user="u")
    assert (answer.output_text, answer.status, answer.object) == ("[base] Hello", "completed", "response")
    assert (answer.instructions, answer.metadata, answer.temperature, answer.user) == ("Be brief", {"a": "b"}, 0.5, "u")
    assert answer.usage.input_tokens_details.cached_tokens == answer.usage.input_tokens // 2
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHello<|im_end|>" in prompt(server)
    assert (server.engine.seen[-1].sampling.temperature, server.engine.seen[-1].user) == (0.5, "u")


def test_program_of_the_reference_page(server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "reference" / "serving-http.md").read_text(encoding="utf-8")
    (program,) = blocks(page.partition("## Responses")[2], "python")
    exec(program.replace("http://localhost:8000", server.url).replace("smollm2-135m", "toy"), {})
    assert capsys.readouterr().out == "[base] Another one.\n"
    assert "Name a color." in prompt(server)


def test_async_client(server: Live) -> None:
    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            whole = await client.responses.create(model="sql", input="Hi")
            text = ""
            async with client.responses.stream(model="sql", input="Hi") as events:
                async for event in events:
                    text += event.delta if event.type == "response.output_text.delta" else ""
            return whole.output_text, text

    assert asyncio.run(both()) == ("[d-sql*1] Hi", "[d-sql*1] Hi")


def test_model_is_an_adapter_or_a_mix_and_never_the_base_in_silence(client: openai.OpenAI, server: Live) -> None:
    assert ask(client, "Hi", model="sql").output_text == "[d-sql*1] Hi"
    mix = {"extra_body": {"mix": ["sql:0.8", "polite:-0.5"]}}
    assert ask(client, "Hi", **mix).output_text == "[d-polite*-0.5+d-sql*0.8] Hi"
    asked = len(server.engine.seen)
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, "Hi", model="nobody")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    assert len(server.engine.seen) == asked


def test_items_become_the_messages_of_a_chat(client: openai.OpenAI, server: Live) -> None:
    """The prompt equals the prompt of the same conversation in chat completions."""
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Paris"}'}
    items = [
        {"role": "developer", "content": "Be kind"},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi "}, {"type": "input_text", "text": "you"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see"}]},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "sunny"}]},
        {"role": "user", "content": "Thanks"},
    ]
    raw = client.responses.with_raw_response.create(model="toy", input=items, instructions="Be brief", tools=[WEATHER])
    assert raw.headers["x-veneer-ignored"] == "input.reasoning"
    of_items = server.engine.seen[-1].prompt
    function = {"name": "weather", "description": "", "parameters": CITY}
    client.chat.completions.create(
        model="toy",
        tools=[{"type": "function", "function": function}],
        messages=[
            {"role": "system", "content": "Be brief\n\nBe kind"},
            {"role": "user", "content": "Hi you"},
            {
                "role": "assistant",
                "content": "Let me see",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": call["arguments"]}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            {"role": "user", "content": "Thanks"},
        ],
    )
    assert server.engine.seen[-1].prompt == of_items


def test_answer_that_reaches_the_limit_is_incomplete(client: openai.OpenAI) -> None:
    answer = ask(client, "Hello there", max_output_tokens=3)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 3
    events = list(ask(client, "Hello there", max_output_tokens=3, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == answer.output_text
    with pytest.raises(openai.BadRequestError, match="leaves") as refused:
        ask(client, "Hello", max_output_tokens=5000)
    assert refused.value.param == "max_output_tokens"


def test_logprobs_equal_those_of_a_chat(client: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    answer = ask(client, "Grüße 🎉", include=include, top_logprobs=2)
    chat = client.chat.completions.create(
        model="toy", messages=[{"role": "user", "content": "Grüße 🎉"}], logprobs=True, top_logprobs=2
    )
    wanted = [entry.model_dump() for entry in chat.choices[0].logprobs.content]  # type: ignore[union-attr]
    assert [entry.model_dump() for entry in answer.output[0].content[0].logprobs] == wanted
    streamed = ask(client, "Grüße 🎉", include=include, top_logprobs=2, stream=True)
    deltas = [e for e in streamed if e.type == "response.output_text.delta"]
    assert [entry.token for e in deltas for entry in e.logprobs] == [entry["token"] for entry in wanted]
    assert ask(client, "Hi").output[0].content[0].logprobs == []


def test_truncation_drops_the_oldest_messages(client: openai.OpenAI, server: Live) -> None:
    items: Any = [{"role": "user", "content": f"{n} " + "long " * 300} for n in range(8)]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, items)
    assert refused.value.code == "context_length_exceeded"
    raw = client.responses.with_raw_response.create(
        model="toy", input=items, truncation="auto", instructions="Be brief", max_output_tokens=100
    )
    assert (match := "oldest messages") in raw.headers["x-veneer-ignored"], match
    kept = prompt(server)
    assert kept.startswith("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\n")
    dropped = int(raw.headers["x-veneer-ignored"].split("the ")[1].split()[0])
    assert [f"user\n{n} long" in kept for n in range(8)] == [n >= dropped for n in range(8)]
    size = len(server.engine.seen[-1].prompt)
    assert size + 100 <= 4096 < size + 100 + size // (8 - dropped)  # one more message would not fit


# -- structured outputs ------------------------------------------------------------------------------------------------


class Place(BaseModel):
    city: str
    people: int


def test_parse_returns_the_model(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model="toy", input="Where?", text_format=Place)
    assert answer.output_parsed == Place(city="text", people=7)
    assert answer.to_dict()["text"]["format"]["type"] == "json_schema"  # type: ignore[index]


def test_json_object_and_text(client: openai.OpenAI, server: Live) -> None:
    assert json.loads(ask(client, "Hi", text={"format": {"type": "json_object"}}).output_text) == {"a": 1}
    assert ask(client, "Hi", text={"format": {"type": "text"}}).output_text == "[base] Hi"
    assert server.engine.seen[-1].sampling.grammar is None
    with pytest.raises(openai.BadRequestError, match=r"text\.format"):
        ask(client, "Hi", text={"format": {"type": "json_schema", "name": "x"}})


# -- tools -------------------------------------------------------------------------------------------------------------


def test_tools_round_trip_with_previous_response_id(client: openai.OpenAI, server: Live) -> None:
    first = ask(client, "TOOL please", tools=[WEATHER])
    text, call = first.output
    assert (text.content[0].text, call.type, call.name) == ("Let me see.\n", "function_call", "weather")
    assert json.loads(call.arguments) == {"city": "Paris"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = ask(client, [output, {"role": "user", "content": "And?"}], previous_response_id=first.id, tools=[WEATHER])
    assert (second.output_text, second.previous_response_id) == ("[base] And?", first.id)
    chained = prompt(server)
    stateless: Any = [{"role": "user", "content": "TOOL please"}, *first.output, output]
    third = ask(client, [*stateless, {"role": "user", "content": "And?"}], tools=[WEATHER], store=False)
    assert third.output_text == second.output_text
    assert prompt(server) == chained
    assert chained.index("TOOL please") < chained.index("Let me see") < chained.index("tool\nsunny")


def test_instructions_of_the_previous_response_are_not_kept(client: openai.OpenAI, server: Live) -> None:
    first = ask(client, "One", instructions="Be brief")
    ask(client, "Two", previous_response_id=first.id, instructions="Be long")
    assert "Be brief" not in prompt(server)
    assert prompt(server).index("Be long") < prompt(server).index("One") < prompt(server).index("Two")


def test_tool_choices(client: openai.OpenAI, server: Live) -> None:
    tools: Any = [WEATHER, CLOCK]

    def call(choice: Any, text: str = "Hi") -> Any:
        return ask(client, text, tools=tools, tool_choice=choice).output[-1]

    assert call("none", "TOOL").type == "message"
    assert "tools:" not in prompt(server)
    assert call("auto").type == "message"
    assert call("required").name == "weather"
    assert json.loads(call({"type": "function", "name": "clock"}).arguments) == {}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    assert call(allowed).name == "clock"
    for choice in ({"type": "function", "name": "nothing"}, "sometimes", {"type": "web_search"}):
        with pytest.raises(openai.BadRequestError) as refused:
            call(choice)
        assert refused.value.param == "tool_choice"


def test_without_parallel_calls_the_first_call_ends_the_answer(client: openai.OpenAI) -> None:
    one = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    both = ask(client, f"SAY:{one}{one}", tools=[CLOCK])
    assert [item.type for item in both.output] == ["function_call"] * 2
    single = ask(client, f"SAY:{one}{one}", tools=[CLOCK], parallel_tool_calls=False)
    assert [item.type for item in single.output] == ["function_call"]
    assert single.parallel_tool_calls is False


def test_constraints_without_effect_are_named(server: Live) -> None:
    body: dict[str, Any] = {"model": "toy", "input": "Hi", "tools": [WEATHER | {"strict": True}]}
    form = {"format": {"type": "json_object"}, "verbosity": "low"}
    for more, names in (
        ({}, "tools.strict"),
        ({"tool_choice": "required"}, None),
        ({"text": form}, "text.verbosity, tools, tools.strict"),
    ):
        answer = server.post("/v1/responses", body | more)
        assert (answer.status_code, answer.headers.get("x-veneer-ignored")) == (200, names)
    both = server.post("/v1/responses", body | {"text": form, "tool_choice": "required"})
    assert (both.status_code, both.json()["error"]["type"]) == (400, "invalid_request_error")


def test_custom_tool_has_one_text(client: openai.OpenAI, server: Live) -> None:
    tool = {
        "type": "custom",
        "name": "patch",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"},
    }
    said = 'SAY:<tool_call>{"name": "patch", "arguments": {"input": "*** Begin"}}</tool_call>'
    raw = client.responses.with_raw_response.create(model="toy", input=said, tools=[tool])  # type: ignore[list-item]
    assert raw.headers["x-veneer-ignored"] == "tools.format"
    (call,) = raw.parse().output
    assert (call.type, call.name, call.input) == ("custom_tool_call", "patch", "*** Begin")  # type: ignore[union-attr]
    assert "start: X" in prompt(server)
    events = [event.type for event in ask(client, said, tools=[tool], stream=True)]
    assert events[3:5] == ["response.custom_tool_call_input.delta", "response.custom_tool_call_input.done"]
    output = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}  # type: ignore[union-attr]
    ask(client, [{"role": "user", "content": "Hi"}, call, output], tools=[tool])
    assert "tool\ndone" in prompt(server)


@pytest.mark.parametrize(
    "kind", ["web_search", "file_search", "code_interpreter", "computer", "mcp", "image_generation", "local_shell"]
)
def test_tools_that_the_server_would_run_are_refused_by_name(client: openai.OpenAI, kind: str) -> None:
    with pytest.raises(openai.BadRequestError, match=kind) as refused:
        ask(client, "Hi", tools=[{"type": kind}])
    assert refused.value.param == "tools"


def test_request_of_codex(server: Live) -> None:
    """The keys, tools and items that Codex 0.171 sends to a provider with wire_api = "responses"."""
    spawn = {"type": "function", "name": "spawn", "strict": False, "parameters": CITY, "description": "Start an agent"}
    shell = spawn | {"name": "exec_command"}
    part = [{"type": "input_text", "text": "You are a coding agent"}]
    body = {
        "model": "toy",
        "input": [
            {"type": "message", "id": "msg_1", "role": "developer", "content": part},
            {"type": "message", "id": "msg_2", "role": "developer", "content": part * 2},
            {"type": "message", "id": "msg_3", "role": "user", "content": part},
        ],
        "tools": [shell, {"type": "namespace", "name": "agents", "description": "Agents", "tools": [spawn]}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a236ba",
        "client_metadata": {"turn_id": "1"},
    }
    said = 'SAY:<tool_call>{"name": "agents.spawn", "arguments": {"city": "x"}}</tool_call>'
    body["input"].append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": said}]})  # type: ignore[attr-defined]
    ignored = "client_metadata, include.reasoning.encrypted_content, prompt_cache_key, reasoning"
    assert server.post("/v1/responses", body).headers["x-veneer-ignored"] == ignored
    (done,) = [e for e in sse(server, body) if e["type"] == "response.output_item.done"]
    assert {key: done["item"][key] for key in ("type", "namespace", "name")} == {
        "type": "function_call", "namespace": "agents", "name": "spawn",
    }  # fmt: skip
    again = [*body["input"], done["item"]]  # type: ignore[misc]
    again.append({"type": "function_call_output", "call_id": done["item"]["call_id"], "output": "ok"})
    assert sse(server, body | {"input": again})[-1]["type"] == "response.completed"
    assert prompt(server).count("<|im_start|>system") == 2  # the tools, and one message of the developers


# -- streams -----------------------------------------------------------------------------------------------------------


def sse(server: Live, body: Any) -> list[Any]:
    """Return the events of a stream. Checks that `event:` and the numbers agree with the data."""
    answer = server.post("/v1/responses", body)
    assert answer.status_code == 200, answer.text
    blocks = [block.split("\n") for block in answer.text.split("\n\n") if block]
    events = [json.loads(line.removeprefix("data: ")) for _, line in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_stream_of_a_text_has_every_event_in_order(client: openai.OpenAI) -> None:
    events = list(ask(client, "Hello", model="sql", stream=True))
    kinds = [event.type for event in events]
    assert [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]] == TEXT_EVENTS
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].response.status == "in_progress"
    assert events[2].item.content == []
    ids = {event.item_id for event in events if hasattr(event, "item_id")}
    assert ids == {events[-1].response.output[0].id}
    assert events[-1].response.output_text == "[d-sql*1] Hello"


def test_stream_helper_collects_calls(client: openai.OpenAI) -> None:
    with client.responses.stream(model="toy", input="TOOL", tools=[WEATHER]) as stream:  # type: ignore[list-item]
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-5:] == [
        "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [item.type for item in final.output] == ["message", "function_call"]
    assert client.responses.retrieve(final.id).output[1].arguments == final.output[1].arguments  # type: ignore[union-attr]


PIECES = [
    "Hi",
    " ",
    "\n",
    "é🎉",
    "<tool",
    "<tool_call>",
    "</tool_call>",
    '{"name": "weather", "arguments": {"a": "é"}}',
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.lists(st.sampled_from(PIECES), max_size=8).map("".join), tools=st.booleans())
def test_deltas_equal_the_answer_that_is_not_streamed(server: Live, said: str, tools: bool) -> None:
    said = " ".join(f"SAY:{said}".splitlines())
    body: dict[str, Any] = {"model": "toy", "input": said, "store": False, **({"tools": [WEATHER]} if tools else {})}
    whole = server.post("/v1/responses", body).json()
    events = sse(server, body | {"stream": True})
    written: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            written[event["output_index"]] = written.get(event["output_index"], "") + event["delta"]
    last = events[-1]["response"]
    for output in (whole["output"], last["output"], [e["item"] for e in events if e["type"].endswith("item.done")]):
        texts = [item["arguments"] if "arguments" in item else item["content"][0]["text"] for item in output]
        assert texts == list(written.values())
        assert [item["type"] for item in output] == [item["type"] for item in whole["output"]]
    assert last["usage"] == whole["usage"]


def test_failure_in_a_stream_ends_it_with_the_reason(client: openai.OpenAI) -> None:
    events = list(ask(client, "FAIL now please", stream=True))
    error, failed = events[-2:]
    assert (error.type, error.message) == ("error", "the GPU fell off the bus")
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert (failed.response.error.code, failed.response.error.message) == ("server_error", error.message)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(failed.response.id)
    with pytest.raises(openai.RateLimitError):
        ask(client, "FULL", stream=True)


# -- stored responses --------------------------------------------------------------------------------------------------


def test_retrieve_list_and_delete(client: openai.OpenAI, server: Live) -> None:
    first = ask(client, "One")
    assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
    second = ask(client, [{"role": "user", "content": "Two"}], previous_response_id=first.id)
    items = [item.to_dict() for item in client.responses.input_items.list(second.id, limit=1, order="asc")]
    assert [(item["role"], item["content"][0]["text"]) for item in items] == [  # type: ignore[index]
        ("user", "One"), ("assistant", "[base] One"), ("user", "Two"),
    ]  # fmt: skip
    newest = client.responses.input_items.list(second.id, limit=2)
    assert ([item.id for item in newest.data], newest.has_more) == ([items[2]["id"], items[1]["id"]], True)
    client.responses.delete(first.id)
    for gone in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="not found"):
            gone(first.id)
    assert ask(client, "Three", previous_response_id=second.id).output_text == "[base] Three"
    assert "One" in prompt(server)  # a response has its whole input


def test_cancel_is_for_background_responses(client: openai.OpenAI) -> None:
    answer = ask(client, "Hi")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(answer.id)
    with pytest.raises(openai.BadRequestError, match="background"):
        ask(client, "Hi", background=True)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_nothing")


def test_store_false_stores_nothing(client: openai.OpenAI, server: Live) -> None:
    answer = ask(client, "Hi", store=False)
    assert answer.store is False
    assert server.service.quotas.used("", "memory") == 0
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, "Hi", previous_response_id=answer.id)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")


def test_item_reference(client: openai.OpenAI, server: Live) -> None:
    answer = ask(client, "SAY:remember me")
    ask(client, [{"type": "item_reference", "id": answer.output[0].id}, {"role": "user", "content": "Hi"}])
    assert "assistant\nremember me<|im_end|>\n<|im_start|>user\nHi" in prompt(server)
    for id in ("msg_nothing_0", f"{answer.output[0].id}9", ""):
        with pytest.raises(openai.BadRequestError, match="item") as refused:
            ask(client, [{"type": "item_reference", "id": id}])
        assert refused.value.param == "input"


def test_a_response_of_another_tenant_does_not_exist(tenants: Live) -> None:
    def body(text: str, **more: Any) -> dict[str, Any]:
        return {"model": "sql", "input": text, "max_output_tokens": 30, **more}

    mine = tenants.post("/v1/responses", body("secret"), "acme").json()
    path = f"/v1/responses/{mine['id']}"
    assert tenants.get(path, "acme").json() == mine
    reference = [{"type": "item_reference", "id": mine["output"][0]["id"]}, {"role": "user", "content": "x"}]
    answers = [tenants.get(path, "admin"), tenants.get(f"{path}/input_items", "admin")]
    answers.append(tenants.client.delete(path, headers={"authorization": "Bearer admin"}))
    answers.append(tenants.post("/v1/responses", body("x", previous_response_id=mine["id"]), "admin"))
    assert [(answer.status_code, "secret" in answer.text) for answer in answers] == [(404, False)] * 4
    refused = tenants.post("/v1/responses", body("x") | {"input": reference}, "admin")
    assert (refused.status_code, "secret" in refused.text) == (400, False)
    assert tenants.get(path, "acme").status_code == 200
    assert tenants.get(path).status_code == 401


def test_responses_expire_after_a_day(client: openai.OpenAI, server: Live) -> None:
    now = [0.0]
    server.service.responses = StoredResponses(server.service.quotas, lambda: now[0])
    answer = ask(client, "Hi")
    now[0] = LIFETIME - 1
    assert client.responses.retrieve(answer.id).id == answer.id
    assert server.service.quotas.used("", "memory") > 0
    now[0] = LIFETIME
    with pytest.raises(openai.NotFoundError, match="24 hours"):
        client.responses.retrieve(answer.id)
    assert server.service.quotas.used("", "memory") == 0


def test_a_restart_forgets_responses(client: openai.OpenAI, server: Live) -> None:
    answer = ask(client, "Hi")
    server.service.__post_init__()  # what a new process has
    with pytest.raises(openai.NotFoundError, match="by the server that made it"):
        ask(client, "Hi", previous_response_id=answer.id)


def test_a_response_beyond_the_quota_is_answered_and_not_stored(text: ToyText) -> None:
    limits = HttpSettings(quotas=QuotaLimits(memory=1000))
    with live(ToyEngine(text), ToyCatalog(), None, limits) as server:
        answer = server.post("/v1/responses", {"model": "toy", "input": "Hi"}).json()
        assert (answer["status"], answer["store"]) == ("completed", False)
        assert server.get(f"/v1/responses/{answer['id']}").status_code == 404


def test_stored_bytes_are_admitted_before_they_are_unpacked(
    client: openai.OpenAI, server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ask(client, "Hi")
    monkeypatch.setattr(server.service.admission.shares["bodies"], "total", 100)
    with pytest.raises(openai.RateLimitError):
        client.responses.retrieve(answer.id)


def test_a_body_beyond_the_limit_is_not_parsed(text: ToyText) -> None:
    with live(ToyEngine(text), ToyCatalog(), None, HttpSettings(max_body=1000)) as server:
        assert server.client.post("/v1/responses", content=b"[" * 2000, headers=JSON).status_code == 413


JSON = {"content-type": "application/json"}


def test_ledger_has_the_token_counts_of_a_chat(tenants: Live) -> None:
    bills = tenants.service.tenancy.bills
    chat = {"model": "sql", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30}
    tenants.post("/v1/chat/completions", chat, "acme")
    for stream in (False, True):
        body = {"model": "sql", "input": "Hi", "max_output_tokens": 30, "stream": stream}
        assert tenants.post("/v1/responses", body, "acme").status_code == 200
    assert len(bills) == 3
    assert {(tenant, usage.prompt, usage.cached, usage.completion) for tenant, usage in bills} == {
        ("acme", bills[0][1].prompt, bills[0][1].cached, bills[0][1].completion)
    }
    over = tenants.post("/v1/responses", body | {"max_output_tokens": 50, "stream": False}, "acme")
    assert (over.status_code, over.json()["error"]["type"]) == (429, "rate_limit_error")


# -- the reference -----------------------------------------------------------------------------------------------------

LOOK = [{"type": "input_text", "text": "what is in this image?"}, {"type": "input_image", "image_url": "https://a.b/c"}]
READ = [{"type": "input_text", "text": "what is in this file?"}, {"type": "input_file", "file_url": "https://a.b/c"}]
BOSTON = {
    "type": "function",
    "name": "get_current_weather",
    "description": "Get the current weather in a given location",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["location", "unit"],
    },
}
SEARCH = {"type": "file_search", "vector_store_ids": ["vs_1234567890"], "max_num_results": 20}
REFERENCE: dict[str, tuple[dict[str, Any], str]] = {
    "Text input": ({"input": "Tell me a three sentence bedtime story about a unicorn."}, ""),
    "Image input": ({"input": [{"role": "user", "content": LOOK}]}, "input_image"),
    "File input": ({"input": [{"role": "user", "content": READ}]}, "input_file"),
    "Web search": ({"tools": [{"type": "web_search_preview"}], "input": "What was a story?"}, "web_search_preview"),
    "File search": ({"tools": [SEARCH], "input": "What are the attributes of a dragon?"}, "file_search"),
    "Streaming": ({"instructions": "You are a helpful assistant.", "input": "Hello!", "stream": True}, ""),
    "Functions": ({"input": "What is the weather in Boston?", "tools": [BOSTON], "tool_choice": "auto"}, ""),
    "Reasoning": ({"input": "How much wood would a woodchuck chuck?", "reasoning": {"effort": "high"}}, ""),
}
"""Title -> (body without model, what the error names). From github.com/openai/openai-openapi, openapi.json:
x-oaiMeta.examples of POST /responses, with shorter texts and addresses."""


@pytest.mark.parametrize("title", REFERENCE)
def test_body_of_the_reference(server: Live, title: str) -> None:
    body, names = REFERENCE[title]
    answer = server.post("/v1/responses", {"model": "toy", **body})
    assert answer.status_code == (400 if names else 200), answer.text
    if names:
        error = answer.json()["error"]
        assert names in error["message"]
        assert (error["type"], error["param"]) == ("invalid_request_error", "tools" if "tools" in body else "input")
    assert answer.headers.get("x-veneer-ignored") == ("reasoning" if title == "Reasoning" else None)


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "role"),
        ({"input": [{"role": "user", "content": 5}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "user", "content": "x", "colour": "red"}]}, "colour"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        ({"input": [{"type": "function_call_output", "call_id": "c9", "output": "x"}]}, "c9"),
        ({"input": "x", "conversation": "conv_1"}, "conversation"),
        ({"input": "x", "temprature": 1}, "temperature"),
        ({"input": "x", "n": 2}, "n is"),
        ({"input": "x", "include": ["everything"]}, "everything"),
        ({"input": "x", "tools": [CLOCK], "tool_choice": {"type": "function", "name": {}}}, "tool_choice"),
        ({"input": "x", "tools": [CLOCK | {"name": ["clock"]}]}, "tools.0.name"),
        ({"input": "x", "tools": [WEATHER, WEATHER]}, "tools.1.name"),
        ({"input": "x", "metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ],
)
def test_wrong_bodies_name_the_place(server: Live, body: dict[str, Any], names: str) -> None:
    answer = server.post("/v1/responses", {"model": "toy", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert names in answer.json()["error"]["message"]
    assert not server.engine.seen
