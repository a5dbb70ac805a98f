"""A model as judge: asked about each answer, it gives a number.

    judge    score = (n − low) / (high − low), where n is the number in the judge's reply and `range` = (low, high)

Every question asks for JSON, `{"steps": [...], "result": n}`, and carries its schema, so that a judge that can decode
under a grammar does. `reply_score` reads the reply; a reply that could mean two numbers, or was cut, has no score.

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
"""A number in text, and what it is out of: `8`, `8/10`, `**8** out of 10`, `8 of 10`, `80%`."""


@dataclass(frozen=True)
class Question:
    """`model`: by the name that whoever is asked knows. `tokens`: most of the answer. `form`: the JSON schema that the
    answer has to match, enforced where the model can decode under a grammar."""

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
        """`form` as the engine's samplers take it, without the white space that small models repeat for ever."""
        compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        return None if self.form is None else ("json_schema", json.dumps({**self.form, "x-guidance": compact}))


@dataclass(frozen=True)
class Reply:
    """`error`: why there is no text; `refused`: because the model would not. `usage`: as OpenAI has it, of tokens.
    `cut`: the reply ended at its limit of tokens."""

    text: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    refused: bool = False
    cut: bool = False


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
        """A setting that the server names as one its model does not take is left out, now and from now on. A question
        refused without a name is asked once more without `response_format`, which many servers do not know."""
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
            "max_tokens": question.tokens, "temperature": question.temperature, "top_p": question.top_p,
            "seed": question.seed, **question.extra,
        }  # fmt: skip
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
    """The replies, with equal questions asked once."""
    keys = [json.dumps([vars(q)], sort_keys=True, default=str) for q in questions]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    order = sorted(first.values())
    found = dict(zip((keys[i] for i in order), ask([questions[i] for i in order]), strict=True)) if order else {}
    return [found[key] for key in keys]


def score_form(low: float, high: float) -> tuple[str, dict[str, Any]]:
    """What a judge is told about the form of its answer, and the JSON schema of that form."""
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
    """The score that a judge's reply gives, from `low` to `high`; or why the reply has none.

    A JSON object with `result`, fenced or among words, gives that. Any other text gives its number if it has exactly
    one value: `n/m`, `n out of m` and `n%` count as n where m (or 100) is `high`, and have no score otherwise."""
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
    if not low <= value <= high:  # NaN is not
        return f"the judge gave {said[:50]}, which is outside {low:g} to {high:g}"
    return float(value)


def _braced(text: str) -> str:
    """From the first brace to the last: models put words and fences around their JSON."""
    return text[text.find("{") : text.rfind("}") + 1] if "{" in text else text


def _refused_setting(answer: Any) -> str:
    """The setting that a server's error names, as OpenAI's do in `param`; "" where it names none."""
    try:
        return str(answer.json()["error"]["param"] or "").partition(".")[0]
    except (ValueError, LookupError, TypeError):
        return ""


def judge_reward(section: JudgeReward, ask: AskModel) -> Reward:
    """A judge's reward. No score for a row that lacks a column of the prompt, or that makes the prompt too long."""
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
