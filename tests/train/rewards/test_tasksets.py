"""Tasks of reasoning-gym and tasksets of verifiers, beside what the packages themselves say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from veneer.errors import ConfigError, DataError
from veneer.train.config.rewards import ReasoningGymReward, VerifiersReward
from veneer.train.records import read_data_files
from veneer.train.rewards.build import rewards_of
from veneer.train.rewards.reward import Answer, RewardScore
from veneer.train.text.rows import read_rows

pytestmark = pytest.mark.peers


def judged(section: Any, row: dict[str, Any], *texts: str, turns: Any = ()) -> list[RewardScore]:
    prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    with rewards_of([section], most_failed=1) as rewards:
        return rewards.judge([Answer(prompt, text, row, turns=turns) for text in texts]).scores[section.called]


@pytest.mark.parametrize("task", ["chain_sum", "leg_counting", "basic_arithmetic", "word_sorting"])
def test_reasoning_gym_scores_as_it_does(task: str) -> None:
    factory = pytest.importorskip("reasoning_gym.factory")
    records, _ = read_data_files([f"reasoning-gym:{task}@4?seed=3"])
    made = factory.create_dataset(task, seed=3, size=4)
    for record, entry in zip(records, made, strict=True):
        assert record.values["prompt"] == entry["question"]
        wanted = str(entry["answer"])
        said = [
            "<answer>0</answer> no: <answer> " + wanted + " </answer>",
            wanted,
            "<answer>7</answer>",
            "",
            wanted + "!",
        ]
        final: list[Any] = [wanted, wanted, "7", "", wanted + "!"]
        scores = judged(ReasoningGymReward(kind="reasoning_gym"), dict(record.values), *said)
        assert [s.value for s in scores] == [made.score_answer(text, entry) for text in final]
        assert [s.parts["found"] for s in scores] == [1, 0, 1, 0, 0]


def test_reasoning_gym_rows_are_rows_to_train_on() -> None:
    pytest.importorskip("reasoning_gym")
    rows, about = read_rows(["reasoning-gym:chain_sum@5?max_terms=3"])
    assert (len(rows), about.format) == (5, "prompt-completion")
    assert rows == read_rows(["reasoning-gym:chain_sum@5?max_terms=3"])[0]
    assert rows != read_rows(["reasoning-gym:chain_sum@5?max_terms=3&seed=1"])[0]
    assert len(read_rows(["reasoning-gym:chain_sum@5"], limit=2)[0]) == 2
    with pytest.raises(DataError, match="did you mean chain_sum"):
        read_rows(["reasoning-gym:chain_sums@5"])
    with pytest.raises(DataError, match="cannot be set so"):
        read_rows(["reasoning-gym:chain_sum@5?terms=3"])


TASKSET = """
import verifiers.v1 as vf

__all__ = ["Sums"]

class SumData(vf.TaskData):
    answer: str

class SumTask(vf.Task[SumData]):
    NEEDS_CONTAINER = BOXED

    @vf.reward(weight=2.0)
    async def right(self, trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward
    async def short(self, trace) -> float:
        return 1 / trace.num_turns

    @vf.metric
    async def letters(self, trace) -> float:
        return len(trace.last_reply)

class Sums(vf.Taskset[SumTask]):
    def load(self):
        for i in range(100):
            yield SumTask(SumData(prompt=f"{i} + 1?", answer=str(i + 1), system_prompt="Add."), self.config.task)
"""


@pytest.fixture
def taskset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("verifiers.v1")
    monkeypatch.syspath_prepend(tmp_path)
    for name, boxed in {"veneer_sums": "False", "veneer_boxes": "True"}.items():
        (tmp_path / f"{name}.py").write_text(TASKSET.replace("BOXED", boxed), encoding="utf-8")
    return "veneer_sums"


def test_verifiers_rewards_are_the_task_s(taskset: str) -> None:
    records, _ = read_data_files([f"verifiers:{taskset}@3"])
    rows = [dict(record.values) for record in records]
    assert [row["prompt"] for row in rows] == [
        [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{i} + 1?"}] for i in range(3)
    ]
    section = VerifiersReward(kind="verifiers", taskset=taskset)
    right, wrong = judged(section, rows[1], "2", "three")
    assert (right.value, right.parts) == (3, {"right": 1, "short": 1, "letters": 1})
    assert (wrong.value, wrong.parts) == (1, {"right": 0, "short": 1, "letters": 5})
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    (twice,) = judged(section, rows[1], "2", turns=turns)
    assert twice.value == 2 + 1 / 2


def test_what_verifiers_cannot_score_here_is_refused(taskset: str) -> None:
    with pytest.raises(ConfigError, match="need a container"):
        rewards_of([VerifiersReward(kind="verifiers", taskset="veneer_boxes")])
    with pytest.raises(ConfigError, match="is not installed"):
        rewards_of([VerifiersReward(kind="verifiers", taskset="no_such_taskset")])
