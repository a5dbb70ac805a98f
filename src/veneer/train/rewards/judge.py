"""A model as judge: it answers a question about each answer with a number.

    judge    score = (n − low) / (high − low); n: the number in the judge's reply; `range` = (low, high)

Every question asks for JSON, `{"steps": [...], "result": n}`, and includes the schema for judges that support
constrained decoding. `reply_score` reads the reply; a truncated or ambiguous reply has no score.

`AskModel` answers many questions at once. It is the engine of this process, passed by its owner, or a server
with OpenAI's chat completions:

    with ServerJudge("https://api.openai.com/v1", key="OPENAI_API_KEY") as server:
        replies = server([Question([{"role": "user", "content": "…"}], model="gpt-4o-mini")])

An unavailable server is retried, and a question without an answer has no score (`rewards.server`). Equal
questions of one call are asked once. Temperature 0 and a fixed seed give equal answers to equal questions if
the server supports it.
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
from veneer.train.rewards.server import AwaitedServer, Unanswered
from veneer.train.rewards.template import NoValue, TextTooLong, filled, template_sample
from veneer.train.rewards.text_scores import as_json

_SETTINGS = ("max_tokens", "temperature", "top_p", "seed", "response_format")
_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
_NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?(?:\d+(?:\.\d+)?|\.\d+)(?!\w|\.\d)")


@dataclass(frozen=True)
class Question:
    """A question to a model.

    `model`: the model's name at the server or engine that answers. `tokens`: maximum tokens of the answer.
    `form`: JSON schema of the answer, enforced if constrained decoding is supported."""

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
        """Return `form` for the engine's sampler.

        Excludes optional white space, which small models repeat endlessly."""
        compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        return None if self.form is None else ("json_schema", json.dumps({**self.form, "x-guidance": compact}))


@dataclass(frozen=True)
class Reply:
    """A model's reply.

    `error`: why there is no text; `refused`: the model refused to answer. `usage`: tokens, in OpenAI's form.
    `cut`: the reply was truncated at its token limit."""

    text: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    refused: bool = False
    cut: bool = False


AskModel = Callable[[Sequence[Question]], Sequence[Reply]]
"""Answers questions in order; raises UnavailableError if the model is away."""


class ServerJudge:
    """An `AskModel` over HTTP.

    `how`: key, timeout, patience and at_once of `AwaitedServer`."""

    def __init__(self, url: str, **how: Any) -> None:
        self._server = AwaitedServer(url, "judge", "the reward's `patience`", **how)
        self._without: frozenset[str] = frozenset()

    def __enter__(self) -> ServerJudge:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        """Return the replies. Raises the errors of `AwaitedServer`."""
        return self._server.each(self._ask, questions) or []

    def _ask(self, question: Question) -> Reply:
        """Ask a question, again without each setting that the server's error names.

        If the error names none, ask without `response_format`, which many servers lack. Settings that had to
        be omitted are omitted from later questions."""
        without = self._without
        try:
            while True:
                body = self._body(question, without)
                answer = self._server.response("/chat/completions", body)
                if answer.status_code not in (400, 422):
                    self._without |= without
                    return self._read(answer)
                setting = _refused_setting(answer) or "response_format"
                if setting not in _SETTINGS or setting not in body:
                    return self._read(answer)
                without |= {setting}
        except Unanswered as error:
            return Reply(error=str(error))

    def _body(self, question: Question, without: frozenset[str]) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "max_tokens": question.tokens,
            "temperature": question.temperature,
            "top_p": question.top_p,
            "seed": question.seed,
            **question.extra,
        }
        if question.form is not None:
            form = {"name": "score", "strict": True, "schema": question.form}
            settings["response_format"] = {"type": "json_schema", "json_schema": form}
        if "max_tokens" in without:
            settings["max_completion_tokens"] = question.tokens
        used = {key: value for key, value in settings.items() if key not in without}
        return {"model": question.model, "messages": list(question.messages), **used}

    def _read(self, answer: Any) -> Reply:
        body = self._server.read(answer, "chat completion")
        try:
            choice = body["choices"][0]
            message, cut = choice["message"], choice.get("finish_reason") == "length"
            text, refusal = message.get("content"), message.get("refusal")
            usage = {key: n for key, n in (body.get("usage") or {}).items() if key in _USAGE and isinstance(n, int)}
        except (LookupError, TypeError, AttributeError):
            raise self._server.unread(answer, "chat completion") from None
        if cut:
            return Reply(text if isinstance(text, str) else "", usage, cut=True)
        if not isinstance(text, str) or not text.strip():
            reason = f": {shown(refusal)[:200]}" if refusal else ""
            return Reply("", usage, f"the judge's reply is empty{reason}", bool(refusal))
        return Reply(text, usage)


def ask_unique(ask: AskModel, questions: Sequence[Question]) -> list[Reply]:
    """Return the replies, asking equal questions once."""
    keys = [json.dumps([vars(q)], sort_keys=True, default=str) for q in questions]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    order = sorted(first.values())
    replies = dict(zip((keys[i] for i in order), ask([questions[i] for i in order]), strict=True)) if order else {}
    return [replies[key] for key in keys]


def score_form(low: float, high: float) -> tuple[str, dict[str, Any]]:
    """Return the instruction for the form of a judge's answer, and its JSON schema."""
    instruction = (
        'Answer with a JSON object alone: {"steps": [what you considered, in short sentences], '
        f'"result": a number from {low:g} to {high:g}}}.'
    )
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


def reply_score(reply: Reply, low: float, high: float) -> float | str:
    """Return the score in a judge's reply, or the reason why the reply has no score.

    The score is from `low` to `high`: the `result` of a JSON object, even fenced or inside other text, or the
    only number in any other text."""
    if reply.error:
        return reply.error
    excerpt = f"{shown(reply.text)[-100:]!r}"
    if reply.cut:
        return f"the judge's reply was truncated at its token limit: {excerpt}"
    value = as_json(reply.text[reply.text.find("{") : reply.text.rfind("}") + 1])
    if isinstance(value, dict) and "result" in value:
        numbers = [value["result"]] if type(value["result"]) in (int, float) else []
    else:
        numbers = list({float(n.replace("\u2212", "-")) for n in _NUMBER.findall(reply.text)})
    if len(numbers) != 1:
        return f"the judge gave {'several numbers' if numbers else 'no number'}: {excerpt}"
    if not low <= numbers[0] <= high:  # also true for NaN
        return f"the judge gave {str(numbers[0])[:50]}, which is outside {low:g} to {high:g}"
    return float(numbers[0])


def _refused_setting(answer: Any) -> str:
    """Return the setting that a server's error names; "" if it names none.

    Read from the error's `param`, as at OpenAI."""
    try:
        return str(answer.json()["error"]["param"] or "").partition(".")[0]
    except (ValueError, LookupError, TypeError):
        return ""


def judge_reward(section: JudgeReward, ask: AskModel) -> Reward:
    """Return a judge's reward.

    A row without a column of the prompt, or with a prompt that is too long, has no score."""
    low, high = section.range
    instruction, form = score_form(low, high)

    def question(answer: Answer) -> Question | str:
        try:
            text = filled(section.prompt, template_sample(answer), answer.row)
        except (NoValue, TextTooLong) as error:
            return str(error)
        return Question(
            [{"role": "user", "content": f"{text}\n\n{instruction}"}], section.model, section.tokens, form=form
        )

    def reward(answers: Sequence[Answer], /) -> list[RewardScore]:
        questions = [question(answer) for answer in answers]
        replies = iter(ask_unique(ask, [q for q in questions if isinstance(q, Question)]))
        return [RewardScore(None, q) if isinstance(q, str) else score(next(replies)) for q in questions]

    def score(reply: Reply) -> RewardScore:
        value = reply_score(reply, low, high)
        if isinstance(value, str):
            return RewardScore(None, value)
        return RewardScore((value - low) / (high - low))

    return reward
