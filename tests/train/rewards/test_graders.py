"""OpenAI's graders, compared with the packages that they are based on and with plain arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.gleu_score import sentence_gleu
from rouge_score.rouge_scorer import RougeScorer

from veneer.errors import ConfigError, DataError, UnavailableError
from veneer.train.config.rewards import GraderReward
from veneer.train.rewards.build import build_rewards
from veneer.train.rewards.graders import parse_grader
from veneer.train.rewards.judge import Question, Reply
from veneer.train.rewards.reward import Answer, RewardScore


def grade(grader: dict[str, Any], text: str, item: dict[str, Any] | None = None, ask: Any = None) -> RewardScore:
    section = GraderReward(kind="grader", grader={"name": "it", **grader})
    with build_rewards([section], ask=ask, most_failed=1) as rewards:
        return rewards.judge([Answer([], text, item or {})]).scores["grader"][0]


def check(operation: str, **more: Any) -> dict[str, Any]:
    own = {"type": "string_check", "operation": operation, "input": "{{ sample.output_text }}"}
    return {**own, "reference": "{{ item.want }}", **more}


def similar(metric: str) -> dict[str, Any]:
    own = {"type": "text_similarity", "evaluation_metric": metric, "input": "{{ sample.output_text }}"}
    return {**own, "reference": "{{ item.want }}"}


STRING_CHECKS = [
    ("eq", "Cat", "Cat", 1), ("eq", "cat", "Cat", 0), ("ne", "cat", "Cat", 1), ("ne", "Cat", "Cat", 0),
    ("like", "a Cat!", "Cat", 1), ("like", "a cat!", "Cat", 0), ("ilike", "a cat!", "Cat", 1),
    ("ilike", "dog", "Cat", 0),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "text", "expected", "value"), STRING_CHECKS)
def test_string_check(operation: str, text: str, expected: str, value: float) -> None:
    assert grade(check(operation), text, {"want": expected}) == RewardScore(value)


words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat"]), min_size=1, max_size=9).map(" ".join)


@given(words, words)
def test_text_similarity_equals_the_packages(text: str, reference: str) -> None:
    expected = {
        "bleu": sacrebleu.sentence_bleu(text, [reference]).score / 100,
        "gleu": sentence_gleu([reference.split()], text.split()),
        **{f"rouge_{n}": RougeScorer([f"rouge{n}"]).score(reference, text)[f"rouge{n}"].fmeasure for n in (1, 2, 5)},
        "rouge_l": RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure,
    }
    for metric, value in expected.items():
        assert grade(similar(metric), text, {"want": reference}).value == pytest.approx(value), metric
    assert grade(similar("fuzzy_match"), text, {"want": text}).value == 1


def test_texts_over_the_limit_are_not_compared() -> None:
    for metric in ("rouge_l", "fuzzy_match", "bleu"):
        result = grade(similar(metric), "x" * 65_537, {"want": "x"})
        assert result.value is None
        assert "at most 65,536 characters" in result.error
    assert "more than" in grade(check("eq", reference="{{ item.want }}" * 100), "", {"want": "x" * 20_000}).error


def test_sources_in_a_multi_grader_share_one_limit() -> None:
    python = {"type": "python", "name": "p", "source": "def grade(sample, item):\n    return 1\n" + "#" * 50_000}
    parse_grader(python)
    with pytest.raises(ConfigError, match="65,536 characters in total"):
        parse_grader({"type": "multi", "name": "m", "graders": {"a": python, "b": python}, "calculate_output": "a"})
    with pytest.raises(ConfigError, match="not valid Python: line 2"):
        parse_grader(python | {"source": "#" * 10_000 + "\ndef grade(:"})


SCORE = {
    "type": "score_model", "model": "judge", "range": [0, 10],
    "input": [{"role": "user", "content": "Rate {{ sample.output_text }} for {{ item.want }}"}],
}  # fmt: skip


SCORED_REPLIES = [
    (Reply('{"steps": [], "result": 7.5}'), 7.5, ""), (Reply("It is 4"), 4, ""),
    (Reply("11"), None, "outside 0 to 10"), (Reply(error="broken"), None, "broken"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "value", "error"), SCORED_REPLIES)
def test_score_model(reply: Reply, value: float | None, error: str) -> None:
    asked: list[Question] = []

    def ask(questions: Sequence[Question]) -> list[Reply]:
        asked.extend(questions)
        return [reply] * len(questions)

    result = grade(SCORE, "this", {"want": "taste"}, ask)
    assert result.value == value
    assert error in result.error
    assert "Rate this for taste" in asked[0].messages[-1]["content"]
    assert "from 0 to 10" in asked[0].messages[0]["content"]
    assert asked[0].form["properties"]["result"] == {"type": "number", "minimum": 0, "maximum": 10}


def test_score_model_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="no model is available"):
        grade(SCORE, "x")


def test_python_graders_return_the_functions_number() -> None:
    source = "import math\ndef grade(sample, item):\n    return math.sqrt(item['n']) + len(sample['output_text'])\n"
    assert grade({"type": "python", "source": source}, "abc", {"n": 4}) == RewardScore(5.0)
    result = grade({"type": "python", "source": source}, "abc", {"n": -1})
    assert result.value is None
    assert "line 3 of source: ValueError" in result.error
    with pytest.raises(ConfigError, match="no_such_package"):
        grade({"type": "python", "source": "import no_such_package\ndef grade(s, i): return 1"}, "x")


def multi(formula: str, **graders: Any) -> dict[str, Any]:
    own = graders or {"a": check("eq", name="a"), "b": {**similar("fuzzy_match"), "name": "b"}}
    return {"type": "multi", "graders": own, "calculate_output": formula}


FORMULAS = [
    "a + b", "0.25 * a - b / 2", "-(a + 1) ^ 2 + b", "2 ** 3 ^ 2", "max(a, b, 0.25)", "min(a, b)",
    "sqrt(4 * b) + log(1)",
    "abs(a - b) + floor(1.7) + ceil(0.2)", "exp(a)",
]  # fmt: skip


@pytest.mark.parametrize("formula", FORMULAS)
def test_multi_grader_computes_its_formula(formula: str) -> None:
    result = grade(multi(formula), "xy", {"want": "xz"})
    names = {name: getattr(math, name) for name in ("floor", "ceil", "exp", "sqrt", "log")}
    assert result.value == pytest.approx(eval(formula.replace("^", "**"), names | {"a": 0, "b": 0.5}))


def test_multi_reports_missing_values() -> None:
    result = grade(multi("a / (b - b)"), "x", {"want": "x"})
    assert result.value is None
    assert "calculate_output" in result.error
    long = grade(multi("a + b"), "x" * 65_537, {"want": "x"})
    assert long.error == "b: text_similarity compares texts of at most 65,536 characters"


def test_single_grader_in_multi_gets_its_own_name() -> None:
    own = {"type": "multi", "graders": check("eq", name="same"), "calculate_output": "2 * same"}
    assert grade(own, "x", {"want": "x"}).value == 2


def test_a_bad_answer_scores_zero_and_a_bad_row_stops() -> None:
    own = check("eq", input="{{ sample.output_json.total }}")
    assert grade(own, '{"total": 3}', {"want": "3"}).value == 1
    assert grade(own, "no json", {"want": "3"}).value == 0
    with pytest.raises(DataError, match=r"item\.want has no value"):
        grade(own, '{"total": 3}', {})


INVALID_GRADERS = [
    ({}, "a grader needs a type"), ({"type": "string_chek"}, "use one of string_check"),
    ({**check("eq"), "operation": "is"}, "'eq', 'ne', 'like' or 'ilike'"), (check("eq", extra=1), "grader.extra"),
    (check("eq", input="{{ items.x }}"), "not a path"), ({"type": "python", "source": "x ="}, "line 1"),
    ({"type": "python", "source": "def score(a, b): ..."}, "does not define a function grade"),
    (multi("a + c"), "no grader has this name"),
    (multi("a +"), "not a formula"), (multi("a.real"), "allows only"), (multi("__import__('os')"), "allows only"),
    (multi("a if b else 1"), "allows only"), (multi("log(a, b)"), "allows only"),
    (multi("'a'"), "allows only"),
    ({**SCORE, "range": [1, 0]}, "must begin with the lower number"), (similar("cosine"), "fuzzy_match"),
    (multi("a", a={"type": "label_model", "name": "a"}), "label_model"),
]  # fmt: skip


@pytest.mark.parametrize(("grader", "message"), INVALID_GRADERS)
def test_invalid_graders_are_refused_before_running(grader: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_grader({"name": "it", **grader} if grader else grader)
    assert message in str(caught.value)


def test_huge_formulas_are_bounded() -> None:
    for formula in ("(" * 200 + "a" + ")" * 200, "-" * 900 + "a", "9" * 500):
        try:
            result = grade(multi(formula), "x", {"want": "x"})
        except ConfigError:
            continue
        assert result.value is None or math.isfinite(result.value)
    assert grade(multi("10 ^ 10 ^ 10"), "x", {"want": "x"}).value is None


def test_a_grader_can_be_a_reward() -> None:
    section = GraderReward(kind="grader", grader={"name": "it", **check("eq")})
    with build_rewards([section]) as rewards:
        answers = [Answer([], text, {"want": "x"}) for text in "xy"]
        assert rewards.judge(answers).values == [1, 0]
    with (
        pytest.raises(ConfigError, match=r"reinforcement\.rewards, grader\.operation"),
        build_rewards([GraderReward(kind="grader", grader={"name": "it", **check("is")})]),
    ):
        pass


def test_score_model_on_a_server_respects_patience() -> None:
    section = GraderReward(kind="grader", grader={"name": "it", **SCORE}, url="http://127.0.0.1:9/v1", patience=0)
    with build_rewards([section]) as rewards, pytest.raises(UnavailableError, match="unavailable for 0 s") as away:
        rewards.judge([Answer([], "x", {"want": "x"})])
    assert "the reward's `patience`" in str(away.value)
    with pytest.raises(ValueError, match="give its `url`"):
        GraderReward(kind="grader", grader={"name": "it", **SCORE}, key="KEY")


def test_grader_round_trips_through_json() -> None:
    grader = {"name": "it", **multi("a + b"), "graders": {"a": check("eq", name="a"), "b": {**SCORE, "name": "b"}}}
    assert json.loads(parse_grader(grader).model_dump_json(exclude_unset=True)) == grader
