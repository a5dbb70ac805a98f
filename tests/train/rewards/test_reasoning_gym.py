"""reasoning-gym's tasks, compared with the package."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.errors import DataError
from veneer.train.config.rewards import ReasoningGymReward
from veneer.train.records import read_data_files
from veneer.train.rewards.build import build_rewards
from veneer.train.rewards.reward import Answer, RewardScore
from veneer.train.text.rows import read_rows

pytestmark = pytest.mark.peers


def judged(section: Any, row: dict[str, Any], *texts: str) -> list[RewardScore]:
    prompt = [{"role": "user", "content": row["prompt"]}]
    with build_rewards([section], most_failed=1) as rewards:
        return rewards.judge([Answer(prompt, text, row) for text in texts]).scores[section.called]


@pytest.mark.parametrize("task", ["chain_sum", "leg_counting", "basic_arithmetic", "word_sorting"])
def test_scores_equal_reasoning_gyms(task: str) -> None:
    factory = pytest.importorskip("reasoning_gym.factory")
    records = read_data_files([f"reasoning-gym:{task}@4?seed=3"])
    made = factory.create_dataset(task, seed=3, size=4)
    for record, entry in zip(records, made, strict=True):
        assert record.values["prompt"] == entry["question"]
        expected = str(entry["answer"])
        first = f"<answer>0</answer> no: <answer> {expected} </answer>"
        message = [first, expected, "<answer>7</answer>", "", expected + "!"]
        final: list[Any] = [expected, expected, "7", "", expected + "!"]
        scores = judged(ReasoningGymReward(kind="reasoning_gym"), dict(record.values), *message)
        assert [s.value for s in scores] == [made.score_answer(text, entry) for text in final]


def test_tasks_can_be_read_as_training_rows() -> None:
    pytest.importorskip("reasoning_gym")
    rows, about = read_rows(["reasoning-gym:chain_sum@5?max_terms=3"])
    assert (len(rows), about.format) == (5, "prompt-completion")
    assert rows == read_rows(["reasoning-gym:chain_sum@5?max_terms=3"])[0]
    assert rows != read_rows(["reasoning-gym:chain_sum@5?max_terms=3&seed=1"])[0]
    assert len(read_rows(["reasoning-gym:chain_sum@5"], limit=2)[0]) == 2
    with pytest.raises(DataError, match="did you mean chain_sum"):
        read_rows(["reasoning-gym:chain_sums@5"])
    with pytest.raises(DataError, match="does not support these settings"):
        read_rows(["reasoning-gym:chain_sum@5?terms=3"])
