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
from veneer.train.rewards.compared import as_json
from veneer.train.rewards.reward import Answer, Reward, RewardScore
from veneer.train.rewards.server import AwaitedServer, Unanswered
from veneer.train.rewards.template import NoValue, TextTooLong, filled, sample_of

_SETTINGS = ("max_tokens", "temperature", "top_p", "seed", "response_format")
_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
_N = r"(?:\d+(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<n>[-+\u2212]?{_N})(?![\w]|\.\d)"
    rf"(?:[*`\s]*(?:(?P<percent>%)|(?:/|\b(?:out\s+)?of\b)[*`\s]*(?P<m>{_N})(?![\w]|\.\d)))?"
)
"""A number in text with its maximum, if any.

For example `8`, `8/10`, `**8** out of 10`, `8 of 10`, `80%`."""


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
        """Ask a question.

        If the server's error names an unsupported setting, omit the setting now and in all later questions.
        If the error names none, ask once more without `response_format`, which many servers lack."""
        formless = False
        try:
            while True:
                body = self._body(question)
                if formless:
                    body.pop("response_format", None)
                answer = self._server.response("/chat/completions", body)
                if answer.status_code in (400, 422):
                    setting = _refused_setting(answer)
                    if setting in _SETTINGS and setting in body:
                        self._without = self._without | {setting}
                        continue
                    if not setting and "response_format" in body:
                        formless = True
                        continue
                elif formless:
                    self._without = self._without | {"response_format"}
                return self._read(answer)
        except Unanswered as error:
            return Reply(error=str(error))

    def _body(self, question: Question) -> dict[str, Any]:
        settings = {
            "max_tokens": question.tokens,
            "temperature": question.temperature,
            "top_p": question.top_p,
            "seed": question.seed,
            **question.extra,
        }
        if question.form is not None:
            form = {"name": "score", "strict": True, "schema": question.form}
            settings["response_format"] = {"type": "json_schema", "json_schema": form}
        if "max_tokens" in self._without:
            settings["max_completion_tokens"] = question.tokens
        kept = {key: value for key, value in settings.items() if key not in self._without}
        return {"model": question.model, "messages": list(question.messages), **kept}

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
            said = f": {shown(refusal)[:200]}" if refusal else ""
            return Reply("", usage, f"the judge said nothing{said}", bool(refusal))
        return Reply(text, usage)


def ask_once(ask: AskModel, questions: Sequence[Question]) -> list[Reply]:
    """Return the replies, asking equal questions once."""
    keys = [json.dumps([vars(q)], sort_keys=True, default=str) for q in questions]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    order = sorted(first.values())
    found = dict(zip((keys[i] for i in order), ask([questions[i] for i in order]), strict=True)) if order else {}
    return [found[key] for key in keys]


def score_form(low: float, high: float) -> tuple[str, dict[str, Any]]:
    """Return the instruction for the form of a judge's answer, and its JSON schema."""
    told = (
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
    return told, schema


def reply_score(reply: Reply, low: float, high: float) -> float | str:
    """Return the score in a judge's reply, or the reason why the reply has no score.

    The score is from `low` to `high`. A JSON object with `result`, even fenced or inside other text, gives
    its `result`. Any other text gives a score if all its numbers have the same value: `n/m`, `n out of m` and
    `n%` count as n if m (or 100) equals `high`, and give no score otherwise."""
    if reply.error:
        return reply.error
    if reply.cut:
        return f"the judge's reply was truncated at its token limit: {shown(reply.text)[-100:]!r}"
    text, found = reply.text, as_json(_braced(reply.text))
    if isinstance(found, dict) and "result" in found:
        result = found["result"]
        if isinstance(result, int | float) and not isinstance(result, bool):
            return _in_range(result, f"{result}", low, high)
        text = result if isinstance(result, str) else ""
    values: dict[float, str] = {}
    for match in _NUMBER.finditer(text):
        most = 100.0 if match["percent"] else float(match["m"] or high)
        if most != high:
            return f"the judge gave {shown(match[0])!r}, but its range ends at {high:g}"
        values.setdefault(float(match["n"].replace("\u2212", "-")), match["n"])
    if not values:
        return f"the judge gave no number: {shown(reply.text)[-100:]!r}"
    if len(values) > 1:
        return f"the judge gave several numbers ({', '.join(list(values.values())[:5])}): {shown(text)[-100:]!r}"
    ((value, said),) = values.items()
    return _in_range(value, said, low, high)


def _in_range(value: float, said: str, low: float, high: float) -> float | str:
    if not low <= value <= high:  # also true for NaN
        return f"the judge gave {said[:50]}, which is outside {low:g} to {high:g}"
    return float(value)


def _braced(text: str) -> str:
    """Return the text from the first brace to the last.

    Models put words and fences around JSON."""
    return text[text.find("{") : text.rfind("}") + 1] if "{" in text else text


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
    told, form = score_form(low, high)

    def question(answer: Answer) -> Question | str:
        try:
            text = filled(section.prompt, sample_of(answer), answer.row)
        except (NoValue, TextTooLong) as error:
            return str(error)
        return Question([{"role": "user", "content": f"{text}\n\n{told}"}], section.model, section.tokens, form=form)

    def reward(answers: Sequence[Answer], /) -> list[RewardScore]:
        made = [question(answer) for answer in answers]
        replies = iter(ask_once(ask, [q for q in made if isinstance(q, Question)]))
        return [RewardScore(None, q) if isinstance(q, str) else score(next(replies)) for q in made]

    def score(reply: Reply) -> RewardScore:
        found = reply_score(reply, low, high)
        if isinstance(found, str):
            return RewardScore(None, found)
        return RewardScore((found - low) / (high - low))

    return reward
