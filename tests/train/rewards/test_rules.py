"""Rewards by formula, compared with sacrebleu, rouge-score, jsonschema and plain arithmetic."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import ConfigError, DataError
from veneer.train.config.rewards import REWARD_KINDS
from veneer.train.rewards.build import build_rewards
from veneer.train.rewards.reward import Answer, RewardScore


def judged(entry: dict[str, Any], text: str, row: dict[str, Any] | None = None, tokens: int = 0) -> RewardScore:
    section = REWARD_KINDS[entry["kind"]](**entry)
    with build_rewards([section]) as rewards:
        (score,) = rewards.judge([Answer([], text, row or {}, tokens)]).scores[section.called]
    return score


EXACT_MATCHES = [
    (" yes\n", "yes", 1), ("Yes", "yes", 0), ('{"b": 1, "a": 2}', '{"a":2,"b":1}', 1), ("[1]", [1], 1),
    ("[true]", "[1]", 0), ("12", 12, 1), ("", "", 1), ('{"total": 12.0}', '{"total": 12}', 1),
    ('{"total": [12, {"b": 1e2}]}', {"total": [12.0, {"b": 100}]}, 1), ('{"total": 12.5}', '{"total": 12}', 0),
    ("12.0", 12, 1), ("12", 12.0, 1), ("1.10", "1.1", 0), ("true", 1, 0), ('{"a": 1}', '{"a": 1, "b": 1}', 0),
    ("null", None, 1), ("what", None, 0), ("[" * 900 + "1.0" + "]" * 900, "[" * 900 + "1" + "]" * 900, 1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected", "value"), EXACT_MATCHES)
def test_exact_match(text: str, expected: Any, value: float) -> None:
    assert judged({"kind": "exact_match"}, text, {"answer": expected}).value == value
    assert judged({"kind": "exact_match", "column": "it"}, text, {"it": expected}).value == value


schemas: list[Any] = [
    {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}, "additionalProperties": False},
    {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    {"$ref": "#/$defs/a", "$defs": {"a": {}}}, True, False,
]  # fmt: skip


@pytest.mark.parametrize("schema", schemas)
@pytest.mark.parametrize("value", [{"a": 1}, {"a": True}, {"a": 1, "b": 2}, ["x"], ["x", "y", "x"], 3, None])
def test_schema_agrees_with_jsonschema(schema: Any, value: Any) -> None:
    allowed = jsonschema.Draft202012Validator(schema).is_valid(value)
    row = {"form": schema}
    assert judged({"kind": "json_schema", "column": "form"}, json.dumps(value), row).value == allowed
    if isinstance(schema, dict):
        assert judged({"kind": "json_schema", "json_schema": schema}, json.dumps(value)).value == allowed


def test_non_json_fails_every_schema() -> None:
    assert judged({"kind": "json_schema", "json_schema": {}}, "sure: {}").value == 0


@pytest.mark.parametrize("schema", [{"type": "objekt"}, {"properties": 3}])
def test_invalid_schema_stops_the_run(schema: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="invalid JSON schema"):
        judged({"kind": "json_schema", "json_schema": schema}, "{}")
    with pytest.raises(DataError, match="invalid JSON schema"):
        judged({"kind": "json_schema", "column": "form"}, "{}", {"form": schema})


ENDLESS_SCHEMAS = [
    ({"$ref": "#"}, "1", "refers to itself"),
    ({"items": {"$ref": "#"}}, "[" * 400 + "]" * 400, "refers to itself"),
    ({"pattern": "^(a|aa)+$"}, '"' + "a" * 60 + 'b"', "took longer than 1 s"),
]


@pytest.mark.parametrize(("schema", "text", "why"), ENDLESS_SCHEMAS)
def test_endless_schema_has_no_score(schema: Any, text: str, why: str) -> None:
    score = judged({"kind": "json_schema", "json_schema": schema}, text)
    assert score.value is None
    assert why in score.error


def test_schema_references_fetch_nothing() -> None:
    with pytest.raises(DataError, match="invalid JSON schema"):
        judged({"kind": "json_schema", "json_schema": {"$ref": "http://localhost:9/a.json"}}, "{}")


def test_json_fields_scores_the_share_of_equal_fields() -> None:
    expected = {"a": 1, "b": "x", "c": [1, 2], "d": True}
    score = judged(
        {"kind": "json_fields"}, '{"c": [1, 2], "a": 1.5, "b": "x", "d": 1}', {"answer": json.dumps(expected)}
    )
    assert score.value == 0.5
    assert judged({"kind": "json_fields"}, '{"total": 12.0}', {"answer": '{"total": 12}'}).value == 1
    assert judged({"kind": "json_fields"}, "none", {"answer": expected}).value == 0
    with pytest.raises(DataError, match="requires a JSON object in the column answer"):
        judged({"kind": "json_fields"}, "{}", {"answer": "[1]"})


REGULAR_EXPRESSIONS = [
    ({"pattern": r"\d+"}, "it is 12", {}, 1), ({"pattern": r"\d+", "whole": True}, "it is 12", {}, 0),
    ({"pattern": r"\d+", "whole": True}, " 12\n", {}, 1), ({"pattern": "a.b"}, "a\nb", {}, 1),
    ({"pattern": r"<answer>(.*?)</answer>", "column": "answer"}, "<answer>1</answer> <answer> 2 </answer>",
     {"answer": 2}, 1),
    ({"pattern": r"<answer>(.*?)</answer>", "column": "answer"}, "<answer>2.0</answer>", {"answer": 2}, 1),
    ({"pattern": r"<answer>(.*?)</answer>", "column": "answer"}, "<answer>1</answer>", {"answer": "2"}, 0),
    ({"pattern": r"(a|b): (?P<answer>\d)", "column": "n"}, "b: 3", {"n": "3"}, 1),
    ({"pattern": r"(x)?y", "column": "n"}, "y", {"n": ""}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("more", "text", "row", "value"), REGULAR_EXPRESSIONS)
def test_regular_expressions(more: dict[str, Any], text: str, row: dict[str, Any], value: float) -> None:
    assert judged({"kind": "regex", **more}, text, row).value == value


def test_endless_pattern_has_no_score() -> None:
    score = judged({"kind": "regex", "pattern": "^(a|aa)+$"}, "a" * 200 + "b")
    assert score.value is None
    assert "took longer" in score.error


@given(st.integers(0, 60), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_length_reward_falls_linearly_outside_its_bounds(n: int, least: int, more: int, slack: int) -> None:
    entry = {"kind": "length", "least": least, "most": least + more, "slack": slack}
    value = judged(entry, "", tokens=n).value
    over = least - n if n < least else max(0, n - least - more)
    assert value == pytest.approx(1 if not over else 0 if over >= slack else (slack - over) / slack)
