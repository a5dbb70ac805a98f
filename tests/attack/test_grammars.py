"""Grammars that are expensive to compile or to follow are refused in time, and streams continue."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from tests.attack.harness import GAP, Server

SCHEMAS: dict[str, Any] = {
    "4,500 properties": {"type": "object", "properties": {f"property_{i}": {"type": "string"} for i in range(4500)}},
    "itself": {"$ref": "#"},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_that_cannot_be_compiled_is_refused(server: Server, name: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMAS[name]}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "response_format": form}
    with server.watched() as b:
        answers = server.together([lambda: server.post("/v1/chat/completions", body)] * 4)
    for answer in answers:
        assert answer.status == 400
        assert answer.json["error"]["message"].startswith("the grammar cannot be used: ")
        assert len(answer.body) < 600
        assert answer.seconds < 2
    assert b.worst < GAP


def test_hostile_regular_expressions(server: Server) -> None:
    """These patterns once blocked the server; now each is answered or refused without long gaps in streams."""
    patterns = ["(a+)+$", "(a|aa)*b", "(.*a){20}", "[a-z]{1,1000}([0-9]{1,1000})?", "((a{1,50}){1,50}){1,50}"]
    patterns.append("(" * 200 + "a" + ")" * 200)
    bodies = [{"prompt": "Hi", "max_tokens": 40, "structured_outputs": {"regex": p}} for p in patterns]
    with server.watched() as b:
        answers = server.together([partial(server.post, "/v1/completions", body) for body in bodies])
    for answer in answers:
        assert answer.status in (200, 400), answer.body[:500]
        assert "<state>" not in json.dumps(answer.json)
    assert b.worst < 2 * GAP
