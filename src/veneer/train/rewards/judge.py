"""A model as judge: asked about each answer, it gives a number.

    judge    score = (n − low) / (high − low), where n is the last number that the model says, of `range` = (low, high)

Who is asked is a function of many questions at once, `AskModel`: the engine of this process, handed in by whoever has
one, or a server that speaks OpenAI's chat completions:

    with ServerJudge("https://api.openai.com/v1", key="OPENAI_API_KEY") as server:
        replies = server([Question([{"role": "user", "content": "…"}], model="gpt-4o-mini")])

    refused connections, 408, 409, 425, 429, 5xx    asked again, after 0.5, 1, 2 … 30 s or as Retry-After says, while
                                            it is away for no longer than `patience`; then UnavailableError
    no answer within `timeout`              asked again twice; then that answer has no score
    400, 413, 422                           that answer has no score
    401, 403, 404 and whatever else         ConfigError: it is wrong with every question

Equal questions of one call are asked once. Temperature 0 and a seed, so that equal questions are answered equally where
the server can do that. The key is read from the environment and in no message.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from veneer.errors import ConfigError, MissingExtraError, UnavailableError, shown
from veneer.train.config.rewards import JudgeReward
from veneer.train.rewards.reward import Answer, Reward, RewardScore
from veneer.train.rewards.template import NoValue, filled, sample_of

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_OF_ONE = {400, 413, 422}
_SETTINGS = ("max_tokens", "temperature", "top_p", "seed")
_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
_TIMEOUTS = 3
"""How often a question is asked that is not answered in time."""
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
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("a judge on a server needs httpx", fix="pip install 'veneer[rewards]'") from error
        parts = urlsplit(url)
        if parts.username or parts.password:
            fix = "put the key into a variable of the environment, and name that as `key`"
            raise ConfigError("the judge's url holds a name or a password", fix=fix)
        headers = {}
        if key is not None:
            if not os.environ.get(key):
                raise ConfigError(
                    f"the variable {key} with the judge's key is not set", where=url, fix=f"export {key}=…"
                )
            headers["Authorization"] = f"Bearer {os.environ[key]}"
        self.url, self._patience, self._at_once = url, patience, at_once
        self._http = httpx.Client(headers=headers, timeout=timeout)
        self._httpx: Any = httpx
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._without: frozenset[str] = frozenset()

    def __enter__(self) -> ServerJudge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        """Raises UnavailableError, ConfigError as the table above says."""
        self._away_since = None
        with ThreadPoolExecutor(self._at_once, "judge") as pool:
            asked = [pool.submit(self._ask, question) for question in questions]
            try:
                return [each.result() for each in asked]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, question: Question) -> Reply:
        late, wait = 0, 0.5
        while True:
            after, body = 0.0, self._body(question)
            try:
                answer = self._http.post(f"{self.url.rstrip('/')}/chat/completions", json=body)
            except (self._httpx.ReadTimeout, self._httpx.WriteTimeout):
                late += 1
                if late == _TIMEOUTS:
                    return Reply(error=f"the judge gave no answer in time, {_TIMEOUTS} times")
                continue
            except self._httpx.TransportError as error:
                said = type(error).__name__
            else:
                if answer.status_code not in _AGAIN:
                    self._away_since = None
                    if self._refused(answer, body):
                        continue
                    return self._read(answer)
                said = f"HTTP {answer.status_code}"
                after = _seconds(answer.headers.get("retry-after"))
            self._hold_out(said, max(wait, after))
            wait = min(30.0, 2 * wait)

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

    def _hold_out(self, said: str, wait: float) -> None:
        """Waits, as long as the server may be away. Raises UnavailableError."""
        now = time.monotonic()
        with self._lock:
            since = self._away_since = now if self._away_since is None else self._away_since
        left = since + self._patience - now
        if left <= 0:
            raise UnavailableError(
                f"the judge has been away for {self._patience:g} s: {said}", where=self.url,
                fix="start it, and resume the run; or let it wait longer with the reward's `patience`",
            )  # fmt: skip
        time.sleep(min(wait, left))

    def _read(self, answer: Any) -> Reply:
        status = answer.status_code
        if status != 200:
            said = f"HTTP {status}: {shown(answer.text)[:300]}"
            if status in _OF_ONE:
                return Reply(error=f"the judge refused the question, {said}")
            raise ConfigError(f"the judge cannot be asked: {said}", where=self.url, fix="check url, key and model")
        try:
            body = answer.json()
            message = body["choices"][0]["message"]
            text, refusal = message.get("content"), message.get("refusal")
            usage = {key: n for key, n in (body.get("usage") or {}).items() if key in _USAGE and isinstance(n, int)}
        except (ValueError, LookupError, TypeError, AttributeError):
            return Reply(error=f"the judge's answer is no chat completion: {shown(answer.text)[:100]}")
        if not isinstance(text, str) or not text.strip():
            said = f": {shown(refusal)[:200]}" if refusal else ""
            return Reply("", usage, f"the judge said nothing{said}", bool(refusal))
        return Reply(text, usage)


def _seconds(text: str | None) -> float:
    """Retry-After in seconds; a date, or what is none, counts as nothing."""
    try:
        return min(60.0, max(0.0, float(text or 0)))
    except ValueError:
        return 0.0


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
