"""A model as judge: asked about each answer, it gives a number.

    judge    score = (n − low) / (high − low), where n is the last number that the model says, of `range` = (low, high)

Who is asked is a function of many questions at once, `AskModel`: the engine of this process, handed in by whoever has
one, or a server that speaks OpenAI's chat completions:

    with ServerJudge("https://api.openai.com/v1", key="OPENAI_API_KEY") as server:
        replies = server([Question([{"role": "user", "content": "…"}], model="gpt-4o-mini")])

One that is away is waited for, and a question without an answer has no score (`rewards.server`). Equal questions of
one call are asked once. Temperature 0 and a seed, so that equal questions are answered equally where the server can do
that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import shown
from veneer.train.config.rewards import JudgeReward
from veneer.train.rewards.reward import Answer, Reward, RewardScore
from veneer.train.rewards.server import AwaitedServer, Unanswered
from veneer.train.rewards.template import NoValue, filled, sample_of

_SETTINGS = ("max_tokens", "temperature", "top_p", "seed")
_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?![\w]|\.\d)")


@dataclass(frozen=True)
class Question:
    """`model`: by the name that whoever is asked knows. `tokens`: most of the answer."""

    messages: Sequence[Mapping[str, Any]]
    model: str
    tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """`error`: why there is no text; `refused`: because the model would not. `usage`: as OpenAI has it, of tokens."""

    text: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    refused: bool = False


AskModel = Callable[[Sequence[Question]], Sequence[Reply]]
"""Many questions -> as many replies, in their order. Raises UnavailableError where the model is away."""


class ServerJudge:
    """An `AskModel` over HTTP. `key`: the variable of the environment that holds the server's key."""

    def __init__(
        self, url: str, *, key: str | None = None, timeout: float = 60.0, patience: float = 600.0, at_once: int = 8
    ) -> None:
        self._server = AwaitedServer(
            url, "judge", "the reward's `patience`", key=key, timeout=timeout, patience=patience, at_once=at_once
        )
        self._without: frozenset[str] = frozenset()

    def __enter__(self) -> ServerJudge:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        """Raises UnavailableError, ConfigError as `AwaitedServer` does."""
        return self._server.each(self._ask, questions) or []

    def _ask(self, question: Question) -> Reply:
        try:
            while True:
                body = self._body(question)
                answer = self._server.response("/chat/completions", body)
                if not self._refused(answer, body):
                    return self._read(answer)
        except Unanswered as error:
            return Reply(error=str(error))

    def _body(self, question: Question) -> dict[str, Any]:
        settings = {
            "max_tokens": question.tokens, "temperature": question.temperature, "top_p": question.top_p,
            "seed": question.seed, **question.extra,
        }  # fmt: skip
        if "max_tokens" in self._without:
            settings["max_completion_tokens"] = question.tokens
        kept = {key: value for key, value in settings.items() if key not in self._without}
        return {"model": question.model, "messages": list(question.messages), **kept}

    def _refused(self, answer: Any, body: Mapping[str, Any]) -> bool:
        """Whether the server names a setting that its model does not take, as OpenAI's that reason do: it is asked
        again, and from now on, without."""
        if answer.status_code != 400:
            return False
        try:
            param = answer.json()["error"]["param"]
        except (ValueError, LookupError, TypeError):
            return False
        if param not in _SETTINGS or param not in body:
            return False
        self._without = self._without | {param}
        return True

    def _read(self, answer: Any) -> Reply:
        body = self._server.read(answer, "chat completion")
        try:
            message = body["choices"][0]["message"]
            text, refusal = message.get("content"), message.get("refusal")
            usage = {key: n for key, n in (body.get("usage") or {}).items() if key in _USAGE and isinstance(n, int)}
        except (LookupError, TypeError, AttributeError):
            raise self._server.unread(answer, "chat completion") from None
        if not isinstance(text, str) or not text.strip():
            said = f": {shown(refusal)[:200]}" if refusal else ""
            return Reply("", usage, f"the judge said nothing{said}", bool(refusal))
        return Reply(text, usage)


def ask_once(ask: AskModel, questions: Sequence[Question]) -> list[Reply]:
    """The replies, with equal questions asked once."""
    keys = [json.dumps([vars(q)], sort_keys=True, default=str) for q in questions]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    order = sorted(first.values())
    found = dict(zip((keys[i] for i in order), ask([questions[i] for i in order]), strict=True)) if order else {}
    return [found[key] for key in keys]


def last_number(text: str, low: float, high: float) -> float | str:
    """The last number in a text; or why there is none between `low` and `high`."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return f"the judge gave no number: {shown(text)[-100:]!r}"
    value = float(numbers[-1])
    if not math.isfinite(value) or not low <= value <= high:
        return f"the judge gave {numbers[-1]}, which is not from {low:g} to {high:g}"
    return value


def judge_reward(section: JudgeReward, ask: AskModel) -> Reward:
    """A judge's reward. A column that its prompt names and a row lacks has no score."""
    low, high = section.range

    def question(answer: Answer) -> Question | str:
        try:
            text = filled(section.prompt, sample_of(answer), answer.row)
        except NoValue as error:
            return str(error)
        return Question([{"role": "user", "content": text}], section.model, section.tokens)

    def reward(answers: Sequence[Answer], /) -> list[RewardScore]:
        made = [question(answer) for answer in answers]
        replies = iter(ask_once(ask, [q for q in made if isinstance(q, Question)]))
        return [RewardScore(None, q) if isinstance(q, str) else score(next(replies)) for q in made]

    def score(reply: Reply) -> RewardScore:
        found = reply.error or last_number(reply.text, low, high)
        if isinstance(found, str):
            return RewardScore(None, found)
        return RewardScore((found - low) / (high - low))

    return reward
