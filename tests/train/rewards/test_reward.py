"""The weighted sum of rewards, failed rewards, and groups of completions that give no gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import DataError, TrainingError
from veneer.train.rewards.reward import Answer, NamedReward, Rewards, RewardScore, column, reward_findings


def answers(*texts: str) -> list[Answer]:
    return [Answer([{"role": "user", "content": "?"}], text) for text in texts]


def giving(*values: float | None) -> Callable[[Sequence[Answer]], list[RewardScore]]:
    return lambda prompts: [RewardScore(v, "" if v is not None else "it broke") for v in values]


numbers = st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=5)


@given(numbers, st.floats(-3, 3))
def test_values_are_weighted_sums(pairs: list[tuple[float, float]], weight: float) -> None:
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    rewards = Rewards([NamedReward("a", giving(*a)), NamedReward("b", giving(*b), weight)])
    judged = rewards.judge(answers(*"x" * len(pairs)))
    assert judged.values == pytest.approx([x + weight * y for x, y in pairs])
    assert [s.value for s in judged.scores["b"]] == b
    logged = judged.logged()
    assert logged["reward_b"] == pytest.approx(math.fsum(b) / len(b))
    assert logged["reward_failed"] == 0


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 1e300])
def test_non_finite_scores_are_left_out(bad: float | None) -> None:
    judged = Rewards([NamedReward("a", giving(1.0, bad)), NamedReward("b", giving(2.0, 2.0))]).judge(answers("x", "y"))
    assert judged.values == [3.0, None]
    assert judged.failed == 1
    assert judged.scores["a"][1].error
    assert judged.logged()["reward"] == 3.0


def test_too_many_failures_stop_the_run_and_say_why() -> None:
    rewards = [NamedReward("mine", giving(None, None, 1.0, 1.0))]
    rows = [Answer([], text, {"where": f"rows.jsonl:{n}"}) for n, text in enumerate("wxyz", 1)]
    with pytest.raises(TrainingError, match=r"2 of 4 answers could not be judged(.|\n)*mine: 'it broke'") as caught:
        Rewards(rewards, most_failed=0.25).judge(rows)
    assert "2 answers (rows.jsonl:1, rows.jsonl:2): mine: 'it broke'" in str(caught.value)
    assert Rewards(rewards, most_failed=0.5).judge(rows).failed == 2


def test_reward_with_too_few_scores_is_refused() -> None:
    with pytest.raises(TrainingError, match="short returned 1 score"):
        Rewards([NamedReward("short", giving(1.0))]).judge(answers("x", "y"))


def test_constant_groups_are_counted() -> None:
    judged = Rewards([NamedReward("a", giving(1, 1, 0, 1, None, 2))]).judge(answers(*"uvwxyz"))
    actual = reward_findings(judged, [0, 0, 1, 1, 2, 2])
    assert (actual["groups"], actual["constant_groups"]) == (3, 2)  # the third group has only one score
    assert actual["constant_share"] == 2 / 3


def test_missing_column_names_the_nearest() -> None:
    answer = Answer([], "x", {"answer": "y", "id": 3})
    assert column(answer, "answer") == "y"
    with pytest.raises(DataError, match="did you mean answer"):
        column(answer, "answr")
