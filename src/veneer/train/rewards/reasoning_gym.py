"""Rows and rewards of reasoning-gym's tasks (extra `reasoning-gym`).

    data.train: reasoning-gym:chain_sum@2000?seed=7&max_terms=3  rows of the task with these settings
    rewards: [{kind: reasoning_gym}]                             the task's score of a completion, from 0 to 1

A row is {prompt, completion, answer, metadata}. reasoning-gym itself computes the scores.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any
from urllib.parse import parse_qsl

import regex  # type: ignore[import-untyped]

from veneer.errors import DataError, MissingExtraError, nearest, quoted
from veneer.train.config.rewards import ReasoningGymReward
from veneer.train.rewards.reward import Answer, Reward, RewardScore, column, each_answer

_SPEC = re.compile(r"reasoning-gym:(?P<task>[^@?]+)(?:@(?P<rows>\d+))?(?:\?(?P<settings>.*))?", re.DOTALL)
_ROWS = 500
_ANSWER = r"<answer>\s*(.*?)\s*</answer>"


def generated_rows(spec: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the rows that `reasoning-gym:TASK@ROWS?key=value…` describes.

    Values are parsed as JSON if possible, and are texts otherwise. Raises DataError, and MissingExtraError if
    reasoning-gym is not installed."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        message = "this source of rows is invalid"
        raise DataError(message, where=spec, fix="reasoning-gym:TASK@ROWS?key=value&key=value")
    task, rows = match["task"], min(int(match["rows"] or _ROWS), limit or int(match["rows"] or _ROWS))
    settings = {key: _parsed(text) for key, text in parse_qsl(match["settings"] or "", keep_blank_values=True)}
    factory = _factory(task)
    try:
        entries = factory.create_dataset(task, **{"size": rows, "seed": 0, **settings})
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"the task {task} does not support these settings: {error}", where=spec) from error
    return [
        {
            "prompt": entry["question"],
            "completion": str(entry["answer"]),
            "answer": entry["answer"],
            # Convert the metadata to JSON values, as if the row had been read from a file.
            "metadata": {"source_dataset": task, **json.loads(json.dumps(entry["metadata"], default=str))},
        }
        for entry in (entries[i] for i in range(rows))
    ]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _factory(task: str) -> Any:
    """Return `reasoning_gym.factory`, which creates tasks. Raise DataError for an unknown task."""
    try:
        import reasoning_gym  # noqa: F401
        from reasoning_gym import factory
    except ImportError as error:
        text = "reasoning-gym tasks require the reasoning-gym package"
        raise MissingExtraError(text, where=task, extra="reasoning-gym") from error
    if task not in factory.DATASETS:
        suggestions = nearest(task, factory.DATASETS, 1)
        hint = f"did you mean {suggestions[0]}?" if suggestions else "see reasoning_gym.factory.DATASETS"
        raise DataError(f"reasoning-gym has no task {quoted(task)}", fix=hint)
    return factory


def reasoning_gym_reward(section: ReasoningGymReward) -> Reward:
    """Return the reward that calls `score_answer` of the row's task.

    Scores the last match of `section.answer` in the completion. By default, scores the text of the last
    <answer> element, or the whole completion if there is no such element."""
    pattern = regex.compile(section.answer or _ANSWER, regex.DOTALL)

    @functools.cache
    def score_of(task: str) -> Any:
        return _factory(task).get_score_answer_fn(task)

    def score(answer: Answer) -> RewardScore:
        metadata = column(answer, "metadata")
        task = str(metadata.get("source_dataset"))
        matches = pattern.findall(answer.text)
        final = matches[-1] if matches else None if section.answer else answer.text.strip()
        entry = {"question": answer.row.get("prompt", ""), "answer": column(answer, "answer"), "metadata": metadata}
        score_answer = score_of(task)
        try:
            return RewardScore(float(score_answer(final, entry)))
        except Exception as error:  # the task's code can fail on a model's output
            return RewardScore(None, f"{task}: {type(error).__name__}: {error}")

    return each_answer(score)
