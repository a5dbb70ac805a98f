"""Rewards that are deterministic formulas of the answer and its row.

    exact_match   1 if answer = wanted, by `text_scores.same_text`
    json_schema   1 if the answer is JSON and matches the schema
    json_fields   |{k : answer[k] = wanted[k]}| / |wanted|, over the keys k of the wanted object
    regex         1 if the pattern matches, and its group equals the wanted value
    length        max(0, 1 − max(0, least − n, n − most) / slack) of n tokens;  without slack, 0 out of range

Each function takes its section of the configuration and returns a reward. A missing column or an invalid
schema stops the run with a DataError, because it affects every answer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import regex  # type: ignore[import-untyped]

from veneer.errors import ConfigError, DataError, MissingExtraError
from veneer.train.config.rewards import ExactMatchReward, JsonFieldsReward, JsonSchemaReward, LengthReward, RegexReward
from veneer.train.rewards.reward import Answer, Reward, RewardScore, column, each_answer
from veneer.train.rewards.text_scores import as_json, same_field, same_text

_PATIENCE = 1.0
"""Timeout in seconds for a regular expression on one completion; some patterns practically never end."""


def exact_match(section: ExactMatchReward) -> Reward:
    return each_answer(lambda answer: float(same_text(answer.text, column(answer, section.column))))


def json_schema(section: JsonSchemaReward) -> Reward:
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError, ValidationError
        from jsonschema.validators import extend
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError as error:
        text = "a json_schema reward requires the jsonschema package"
        raise MissingExtraError(text, extra="rewards") from error

    def matched(validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[Any]:
        if isinstance(value, str) and not regex.search(pattern, value, timeout=_PATIENCE):
            yield ValidationError(f"it does not match {pattern}")

    bounded = extend(Draft202012Validator, {"pattern": matched})

    @functools.cache
    def validator(schema_text: str) -> Any:
        schema = json.loads(schema_text)
        Draft202012Validator.check_schema(schema)
        return bounded(schema, registry=Registry())  # with an empty registry, no schema is downloaded

    def score(answer: Answer) -> RewardScore:
        schema = section.json_schema
        if section.column is not None:
            schema = column(answer, section.column)
            schema = as_json(schema) if isinstance(schema, str) else schema
        try:
            matches = validator(json.dumps(schema, sort_keys=True)).is_valid
            try:
                value = json.loads(answer.text)
            except (ValueError, RecursionError):
                return RewardScore(0.0)
            return RewardScore(float(matches(value)))
        except TimeoutError:
            return RewardScore(None, f"a pattern in the schema took longer than {_PATIENCE:g} s on an answer")
        except RecursionError:
            return RewardScore(None, "the schema refers to itself too deeply to check this answer")
        except (SchemaError, Unresolvable) as error:
            where = f"the column {section.column}" if section.column else "json_schema"
            raise DataError(f"invalid JSON schema: {str(error).splitlines()[0]}", where=where) from error

    if section.json_schema is not None:
        try:
            validator(json.dumps(section.json_schema, sort_keys=True))
        except SchemaError as error:
            problem = f"invalid JSON schema: {error.message}"
            raise ConfigError(problem, where=f"reinforcement.rewards, {section.called}") from error
    return each_answer(score)


def json_fields(section: JsonFieldsReward) -> Reward:
    def score(answer: Answer) -> float:
        row_value = column(answer, section.column)
        expected = as_json(row_value) if isinstance(row_value, str) else row_value
        if not isinstance(expected, dict):
            message = f"the reward {section.called} requires a JSON object in the column {section.column}"
            where = str(answer.row.get("where") or "") or None
            raise DataError(message, where=where, fix="remove the row, or name another column")
        value = as_json(answer.text)
        right = sum(same_field(value, expected, key) for key in expected)
        return right / len(expected) if expected else float(isinstance(value, dict))

    return each_answer(score)


def regular_expression(section: RegexReward) -> Reward:
    pattern = regex.compile(section.pattern, regex.DOTALL)
    group: str | int = "answer" if "answer" in pattern.groupindex else 1

    def score(answer: Answer) -> RewardScore:
        expected = None if section.column is None else column(answer, section.column)
        try:
            if section.whole:
                match = pattern.fullmatch(answer.text.strip(), timeout=_PATIENCE)
            elif section.column is None:
                match = pattern.search(answer.text, timeout=_PATIENCE)
            else:
                match = [None, *pattern.finditer(answer.text, timeout=_PATIENCE)][-1]
        except TimeoutError:
            return RewardScore(None, f"the pattern took longer than {_PATIENCE:g} s on an answer")
        if match is None or section.column is None:
            return RewardScore(float(match is not None))
        text = match.group(group)
        return RewardScore(float(text is not None and same_text(text, expected)))

    return each_answer(score)


def length(section: LengthReward) -> Reward:
    def score(answer: Answer) -> float:
        over = max(0, section.least - answer.tokens, 0 if section.most is None else answer.tokens - section.most)
        return max(0.0, 1 - over / section.slack) if section.slack else float(not over)

    return each_answer(score)
