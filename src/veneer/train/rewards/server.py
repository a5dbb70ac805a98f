"""A judge on a server with OpenAI's chat completions API. Requests are retried during an outage.

    with ServerJudge("https://api.openai.com/v1", key="OPENAI_API_KEY") as ask:
        replies = ask([Question([{"role": "user", "content": "…"}], model="gpt-4o-mini")])

    refused connections,               retried after 0.5, 1, 2 … 30 s, until the server
    408, 409, 425, 429, 5xx            has been unavailable for `patience`; then UnavailableError
    no response within `timeout`       retried twice; then this question has no reply
    400, 413, 422                      this question has no reply
    401, 403, 404 and all others       ConfigError: every question would fail

The API key is read from the environment and never appears in a message.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from veneer.errors import ConfigError, MissingExtraError, UnavailableError, shown
from veneer.train.rewards.judge import Question, Reply

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_OF_ONE = {400, 413, 422}
_TIMEOUTS = 3
"""Maximum attempts for a request that times out."""
_LARGEST = 64 << 20
"""Maximum bytes of a response."""
_SETTINGS = ("max_tokens", "temperature", "top_p", "seed", "response_format")


class _Unanswered(Exception):
    """Raised if a single question has no reply; `str(error)` is the reason."""


class ServerJudge:
    """An `AskModel` over HTTP that retries while its server is unavailable.

    key: name of the environment variable with the API key. timeout, patience: seconds. at_once: maximum
    number of concurrent requests."""

    def __init__(
        self, url: str, *, key: str | None = None, timeout: float = 60.0, patience: float = 600.0, at_once: int = 8
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("a judge on a server needs httpx", extra="rewards") from error
        try:
            has_password = bool(httpx.URL(url).userinfo)
        except httpx.InvalidURL as error:
            raise ConfigError(f"the judge's url is invalid: {error}", where=url) from None
        if has_password:
            fix = "put the key into an environment variable, and set `key` to the variable's name"
            raise ConfigError("the judge's url contains a user name or a password", fix=fix)
        headers = {}
        if key is not None:
            value = os.environ.get(key, "").strip()
            if not (value and value.isascii() and value.isprintable()):
                message = f"the environment variable {key} does not contain a valid API key"
                raise ConfigError(message, where=url, fix=f"export {key}=…")
            headers["Authorization"] = f"Bearer {value}"
        self.url, self._timeout, self._patience, self._at_once = url, timeout, patience, at_once
        self._http = httpx.Client(headers=headers, timeout=timeout)
        self._httpx: Any = httpx
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._away_since: float | None = None
        self._without: frozenset[str] = frozenset()
        """Settings that the server does not support."""

    def __enter__(self) -> ServerJudge:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._http.close()

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        """Return the replies in the order of the questions. Questions are sent concurrently."""
        self._away_since, self._stopped = None, threading.Event()
        pool = ThreadPoolExecutor(self._at_once, "judge")
        try:
            return list(pool.map(self._ask, questions))
        finally:
            self._stopped.set()  # stops the retries of the other requests
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, question: Question) -> Reply:
        """Send a question. If the server rejects a setting, send the question again without this setting.

        If the server's error names no setting, the rejected setting is assumed to be `response_format`, which
        many servers do not support. Later questions omit the rejected settings."""
        without = self._without
        try:
            while True:
                body = self._body(question, without)
                answer = self._response(body)
                if answer.status_code not in (400, 422):
                    self._without |= without
                    return self._reply(answer)
                setting = _refused_setting(answer) or "response_format"
                if setting not in _SETTINGS or setting not in body:
                    return self._reply(answer)
                without |= {setting}
        except _Unanswered as error:
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

    def _response(self, body: Mapping[str, Any]) -> Any:
        """Return the server's response, whatever its status. Retry while the server is unavailable."""
        late, wait = 0, 0.5
        while True:
            try:
                answer = self._read_whole(body)
                if answer.status_code not in _AGAIN:
                    self._away_since = None
                    return answer
                reason = f"HTTP {answer.status_code}"
            except (self._httpx.ReadTimeout, self._httpx.WriteTimeout, TimeoutError):
                late += 1
                if late == _TIMEOUTS:
                    raise _Unanswered(f"the judge timed out {_TIMEOUTS} times") from None
                continue
            except self._httpx.TransportError as error:
                reason = f"{type(error).__name__} {shown(str(error))[:200]}".strip()
            except self._httpx.DecodingError as error:
                raise _Unanswered(f"the judge's response cannot be read: {shown(str(error))[:100]}") from None
            self._wait_or_give_up(reason, wait)
            wait = min(30.0, 2 * wait)

    def _read_whole(self, body: Mapping[str, Any]) -> Any:
        """Return a response with its complete content.

        Raises TimeoutError if receiving the content takes longer than `timeout`, for example from a server
        that sends white space while it works, and _Unanswered if the content exceeds the size limit."""
        ends, content = time.monotonic() + self._timeout, bytearray()
        with self._http.stream("POST", f"{self.url.rstrip('/')}/chat/completions", json=body) as answer:
            for part in answer.iter_bytes():
                content += part
                if len(content) > _LARGEST:
                    raise _Unanswered(f"the judge's response exceeds {_LARGEST >> 20} MB")
                if time.monotonic() > ends:
                    raise TimeoutError
            headers = {name: value for name, value in answer.headers.items() if name != "content-encoding"}
            return self._httpx.Response(answer.status_code, headers=headers, content=bytes(content))

    def _wait_or_give_up(self, reason: str, wait: float) -> None:
        """Wait before a retry. Raise UnavailableError once the server has been away for `patience`."""
        now = time.monotonic()
        with self._lock:
            since = self._away_since = now if self._away_since is None else self._away_since
        left = since + self._patience - now
        if left <= 0 or self._stopped.wait(min(wait, left)):
            text = f"the judge has been unavailable for {self._patience:g} s: {reason}"
            fix = "start the judge, and resume the run; or raise the reward's `patience`"
            raise UnavailableError(text, where=self.url, fix=fix)

    def _reply(self, answer: Any) -> Reply:
        """Return the reply in a chat completion.

        Raises _Unanswered or ConfigError as listed at the top of this module."""
        if answer.status_code != 200:
            reason = f"HTTP {answer.status_code}: {shown(answer.text)[:300]}"
            if answer.status_code in _OF_ONE:
                raise _Unanswered(f"the judge refused the question, {reason}")
            fix = "check url, key and model"
            raise ConfigError(f"the judge refuses requests: {reason}", where=self.url, fix=fix)
        try:
            choice = answer.json()["choices"][0]
            text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Unanswered(f"the judge's response is not a chat completion: {shown(answer.text)[:100]}") from None
        text = text if isinstance(text, str) else ""
        if choice.get("finish_reason") == "length":
            return Reply(text, cut=True)
        if not text.strip():
            reason = f": {shown(refusal)[:200]}" if refusal else ""
            return Reply(error=f"the judge's reply is empty{reason}")
        return Reply(text)


def _refused_setting(answer: Any) -> str:
    """Return the setting that a server's error names in `param`, as OpenAI does; "" if it names none."""
    try:
        return str(answer.json()["error"]["param"] or "").partition(".")[0]
    except (ValueError, LookupError, TypeError):
        return ""
