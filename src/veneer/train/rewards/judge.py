"""Score answers with a model as the judge: the model replies to a question about each answer.

    judge    score = (n − low) / (high − low); n: the number in the judge's reply; `range` = (low, high)

Every question asks for JSON, `{"steps": [...], "result": n}`, and includes the schema for judges that support
constrained decoding. A truncated or ambiguous reply has no score.

The judge is an `AskModel`, a function that answers many questions at once: either the engine of this process,
passed by its owner, or a server (`rewards.server`). An answer whose question gets no reply has no score.
Identical questions in one call are sent once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.errors import shown
from veneer.train.config.rewards import JudgeReward
from veneer.train.rewards.reward import Answer, Reward, RewardScore
from veneer.train.rewards.template import NoValue, TextTooLong, filled, template_sample
from veneer.train.rewards.text_scores import as_json

_NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?(?:\d+(?:\.\d+)?|\.\d+)(?!\w|\.\d)")


@dataclass(frozen=True)
class Question:
    """A question to a model.

    model: the model's name at the server or engine. tokens: maximum tokens of the reply. form: JSON schema of
    the reply, enforced if constrained decoding is supported."""

    messages: Sequence[Mapping[str, Any]]
    model: str
    tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    form: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def grammar(self) -> tuple[Literal["json_schema"], str] | None:
        """Return `form` as a grammar for the engine's sampler.

        The grammar excludes optional white space, which small models repeat endlessly."""
        compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        return None if self.form is None else ("json_schema", json.dumps({**self.form, "x-guidance": compact}))


@dataclass(frozen=True)
class Reply:
    """A model's reply.

    `error`: the reason if there is no text. `cut`: whether the reply was truncated at its token limit."""

    text: str = ""
    error: str = ""
    cut: bool = False


AskModel = Callable[[Sequence[Question]], Sequence[Reply]]
"""Function that returns one reply per question, in the same order.

Raises UnavailableError if the model is unavailable."""


def asked_reward(
    ask: AskModel, question: Callable[[Answer], Question | RewardScore], low: float, high: float
) -> Reward:
    """Return a reward that asks a model about each answer and reads a score in the reply.

    low, high: bounds of the number in the reply. question: returns the question about an answer, or a score
    if the model need not be asked. Identical questions are sent once."""

    def reward(answers: Sequence[Answer], /) -> list[RewardScore]:
        questions = [question(answer) for answer in answers]
        keys = [json.dumps(vars(each), sort_keys=True, default=str) for each in questions]
        unique = {key: each for key, each in zip(keys, questions, strict=True) if isinstance(each, Question)}
        replies = ask(list(unique.values())) if unique else []
        scores = {key: _reply_score(reply, low, high) for key, reply in zip(unique, replies, strict=True)}
        return [
            each if isinstance(each, RewardScore) else scores[key] for key, each in zip(keys, questions, strict=True)
        ]

    return reward


def score_form(low: float, high: float) -> tuple[str, dict[str, Any]]:
    """Return the instruction that describes the format of a judge's reply, and the JSON schema."""
    instruction = 'Answer with only a JSON object: {"steps": [what you considered, in short sentences], '
    instruction += f'"result": a number from {low:g} to {high:g}}}.'
    schema = {
        "type": "object",
        "properties": {
            "steps": {"type": "array", "items": {"type": "string"}},
            "result": {"type": "number", "minimum": low, "maximum": high},
        },
        "required": ["steps", "result"],
        "additionalProperties": False,
    }
    return instruction, schema


def _reply_score(reply: Reply, low: float, high: float) -> RewardScore:
    """Return the score in a judge's reply, or the reason why the reply has no score.

    If the reply contains a JSON object with a `result`, possibly fenced or inside other text, `result` is the
    score. Otherwise, the reply must contain exactly one number. The score must be from `low` to `high`."""
    if reply.error:
        return RewardScore(None, reply.error)
    excerpt = f"{shown(reply.text)[-100:]!r}"
    if reply.cut:
        return RewardScore(None, f"the judge's reply was truncated at its token limit: {excerpt}")
    value = as_json(reply.text[reply.text.find("{") : reply.text.rfind("}") + 1])
    if isinstance(value, dict) and "result" in value:
        numbers = [value["result"]] if type(value["result"]) in (int, float) else []
    else:
        numbers = list({float(n.replace("\u2212", "-")) for n in _NUMBER.findall(reply.text)})
    if len(numbers) != 1:
        return RewardScore(None, f"the judge's reply has {'several numbers' if numbers else 'no number'}: {excerpt}")
    if not low <= numbers[0] <= high:  # also rejects NaN
        return RewardScore(None, f"the judge replied {str(numbers[0])[:50]}, which is outside {low:g} to {high:g}")
    return RewardScore(float(numbers[0]))


def judge_reward(section: JudgeReward, ask: AskModel) -> Reward:
    """Return the reward that scores answers with a judge.

    An answer has no score if its row lacks a column that the prompt uses, or if the filled prompt is too
    long."""
    low, high = section.range
    instruction, form = score_form(low, high)

    def question(answer: Answer) -> Question | RewardScore:
        try:
            text = filled(section.prompt, template_sample(answer), answer.row)
        except (NoValue, TextTooLong) as error:
            return RewardScore(None, str(error))
        messages = [{"role": "user", "content": f"{text}\n\n{instruction}"}]
        return Question(messages, section.model, section.tokens, form=form)

    in_range = asked_reward(ask, question, low, high)

    def reward(answers: Sequence[Answer], /) -> list[RewardScore]:
        scores = in_range(answers)
        return [s if s.value is None else RewardScore((s.value - low) / (high - low)) for s in scores]

    return reward
