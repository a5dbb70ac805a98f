"""Rewards: functions that score many completions at once. Several rewards form a weighted sum.

    exact_reward, short_reward = NamedReward("exact_match", exact, 1.0), NamedReward("length", short, 0.2)
    judged = Rewards([exact_reward, short_reward]).judge(answers)
    judged.values                       the sum for each completion; None if one of its rewards failed
    judged.scores["length"]             a reward's scores, for the log
    reward_findings(judged, groups)     counts of groups without a training signal

    value(answer) = Σ weight · score(answer), over the rewards;  None if any of the scores is None

A reward scores many completions at once, so that a judge can be asked about all of them together. The score
of a completion is a finite number, or the reason for a missing number. Trainers remove a completion without a
value from its group. A missing value is never replaced by 0, because an unjudged completion is not
necessarily bad. If the share of completions without a value exceeds `most_failed`, the run stops with
TrainingError. If a judge is unavailable, UnavailableError stops the run, and the run can be resumed.

This module does not depend on models or servers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import DataError, TrainingError, bullets, counted, first_few, nearest, quoted, shown

_LARGEST = 1e30
"""Maximum absolute score, so that squares of scores and their sums are finite."""


@dataclass(frozen=True)
class Answer:
    """A model's completion of a prompt.

    prompt: the messages before the completion
    text: the model's text
    row: the columns of the prompt's row; `answer` is the text of the final assistant turn, if the row has one
    tokens: number of tokens that the model generated"""

    prompt: Sequence[Mapping[str, Any]]
    text: str
    row: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class RewardScore:
    """A reward's score of an answer.

    `value`: a finite number, or None, with the reason in `error`."""

    value: float | None
    error: str = ""


Reward = Callable[[Sequence[Answer]], Sequence[RewardScore]]
"""Function that returns the score of each completion, in order.

    Raises UnavailableError if a server is unavailable."""


@dataclass(frozen=True)
class NamedReward:
    name: str
    reward: Reward
    weight: float = 1.0


@dataclass(frozen=True)
class JudgedAnswers:
    """Scores of several completions, in order.

    values: the weighted sums. scores: the scores of each reward, by its name."""

    values: list[float | None]
    scores: dict[str, list[RewardScore]]

    @property
    def failed(self) -> int:
        return self.values.count(None)

    def why(self, answers: Sequence[Answer]) -> list[str]:
        """Return the reasons for missing scores, most common first.

        Each line names one reason, the number of completions with this reason, and their first rows."""
        reasons: dict[str, list[str]] = {}
        for name, scores in self.scores.items():
            for score, answer in zip(scores, answers, strict=True):
                if score.value is None:
                    where = shown(answer.row.get("where") or "")
                    reasons.setdefault(f"{name}: {quoted(shown(score.error), 300)}", []).append(where)
        lines = []
        for reason, rows in sorted(reasons.items(), key=lambda reason_and_rows: -len(reason_and_rows[1])):
            named = [row for row in dict.fromkeys(rows) if row]
            lines.append(f"{counted(len(rows), 'answer')}{f' ({first_few(named, 3)})' if named else ''}: {reason}")
        return lines

    def logged(self) -> dict[str, float]:
        """Return the log's metrics: the mean of the sum and of each reward, and the number of failures.

        Each mean is over the completions that have a value."""
        means = {}
        named = {f"reward_{name}": [score.value for score in scores] for name, scores in self.scores.items()}
        for name, values in {"reward": self.values, **named}.items():
            if numbers := [value for value in values if value is not None]:
                means[name] = math.fsum(numbers) / len(numbers)
        return means | {"reward_failed": float(self.failed)}


@dataclass(frozen=True)
class Rewards:
    """A weighted sum of rewards.

    most_failed: maximum share of completions without a value in one call; one missing value is always
        allowed."""

    rewards: Sequence[NamedReward]
    most_failed: float = 0.1

    def judge(self, answers: Sequence[Answer]) -> JudgedAnswers:
        """Score the completions.

        Raises TrainingError, with the most common reasons, if too many completions have no value, and
        UnavailableError if a judge is unavailable."""
        scores = {each.name: _scored(each.name, each.reward, answers) for each in self.rewards}
        values: list[float | None] = []
        for i in range(len(answers)):
            weighted = [(each.weight, scores[each.name][i].value) for each in self.rewards]
            total = math.fsum(weight * value for weight, value in weighted if value is not None)
            values.append(total if all(value is not None for _, value in weighted) else None)
        judged = JudgedAnswers(values, scores)
        if judged.failed > max(1, self.most_failed * len(answers)):
            failed = f"{judged.failed} of {counted(len(answers), 'answer')}"
            text = f"{failed} could not be judged:\n{bullets(judged.why(answers), 5)}"
            raise TrainingError(text, fix="fix the reward, or raise reinforcement.most_failed")
        return judged


def _scored(name: str, reward: Reward, answers: Sequence[Answer]) -> list[RewardScore]:
    """Return the scores of one reward.

    A score that is infinite, NaN or above `_LARGEST` is replaced by a missing score with the reason."""
    scores = reward(answers)
    if len(scores) != len(answers):
        text = f"the reward {name} returned {counted(len(scores), 'score')} for {counted(len(answers), 'answer')}"
        raise TrainingError(text, fix="the reward must return one score per answer, in the same order")
    usable = []
    for score in scores:
        if score.value is not None and not abs(score.value) <= _LARGEST:
            why = f"more than {_LARGEST:g}" if math.isfinite(score.value) else "no number"
            score = RewardScore(None, f"the score is {score.value:g}, which is {why}")
        usable.append(score)
    return usable


# -- groups without a training signal ----------------------------------------------------------------------------------


def reward_findings(judged: JudgedAnswers, groups: Sequence[int]) -> dict[str, float]:
    """Count the groups of completions, and the groups without a training signal, for the log.

    groups: the group of each completion. In a constant group, all completions have the same sum, so no
    completion has an advantage."""
    distinct: dict[int, set[float | None]] = {}
    for value, group in zip(judged.values, groups, strict=True):
        distinct.setdefault(group, set()).add(value)
    constant = sum(len(values - {None}) <= 1 for values in distinct.values())
    share = constant / max(1, len(distinct))
    return {"groups": float(len(distinct)), "constant_groups": float(constant), "constant_share": share}


# -- helpers for rewards -----------------------------------------------------------------------------------------------


def each_answer(score: Callable[[Answer], RewardScore | float]) -> Reward:
    """Return a reward that scores one completion at a time."""

    def scored(answer: Answer) -> RewardScore:
        value = score(answer)
        return value if isinstance(value, RewardScore) else RewardScore(value)

    return lambda answers: [scored(answer) for answer in answers]


def column(answer: Answer, name: str) -> Any:
    """Return the value of a column in the completion's row.

    Raises DataError, with the most similar column name, if the row lacks the column. The error stops the run,
    because every row needs the column."""
    if name not in answer.row:
        suggestions = nearest(name, map(str, answer.row), 1)
        hint = f"did you mean {suggestions[0]}?" if suggestions else f"it has {', '.join(map(str, answer.row))}"
        where = str(answer.row.get("where") or "") or None
        raise DataError(f"a reward needs the column {quoted(name)}, which a row lacks", where=where, fix=hint)
    return answer.row[name]
