"""Tools: shown by the chat template, and calls read back, whole and in streams, by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.serve.http.surfaces.test_openai import HELLO, ask, client
from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyText, live

__all__ = ["client"]

WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def test_tools_are_shown_and_calls_read(client: openai.OpenAI, server: Live) -> None:
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
    with pytest.raises(openai.BadRequestError, match="not one of the tools"):
        ask(client, "x", tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "other"}})


def test_tools_are_refused_where_the_template_has_no_place_for_them() -> None:
    with live(ToyEngine(ToyText()), ToyCatalog()) as server:
        answer = server.post("/v1/chat/completions", {"model": "toy", "messages": HELLO, "tools": [WEATHER]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
