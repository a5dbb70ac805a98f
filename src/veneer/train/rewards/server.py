"""A client of a model server over HTTP that can be unavailable for a while.

Judges and teachers use it:

    with AwaitedServer(url, "judge", "the reward's `patience`", key="OPENAI_API_KEY") as server:
        found = server.each(ask, questions)   # ask(question): server.response("/chat/completions", body)

    refused connections,               retried after 0.5, 1, 2 … 30 s, until the server
    408, 409, 425, 429, 5xx            has been unavailable for `patience`; then UnavailableError
    no answer within `timeout`         retried twice; then this question has no answer
    400, 413, 422                      this question has no answer
    401, 403, 404 and all others       ConfigError: every question would fail

The key is read from the environment and appears in no message.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar
from urllib.parse import urlsplit

from veneer.errors import ConfigError, MissingExtraError, UnavailableError, shown

A = TypeVar("A")
B = TypeVar("B")

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_OF_ONE = {400, 413, 422}
_TIMEOUTS = 3
"""Attempts for a request that times out."""
_LARGEST = 64 << 20
"""Maximum bytes of an answer."""
_LOOKED = 0.2
"""Seconds between checks of whether a run was asked to stop."""


class Unanswered(Exception):
    """Raised if a single question has no answer; `str` is the reason."""


class AwaitedServer:
    """An HTTP client that retries while its server is unavailable.

    `name`: the server's name in messages. `setting`: the setting of its `patience`. `key`: the environment
    variable with the API key. `timeout`, `patience`: seconds. `at_once`: concurrent requests."""

    def __init__(
        self,
        url: str,
        name: str,
        setting: str,
        *,
        key: str | None = None,
        timeout: float = 60.0,
        patience: float = 600.0,
        at_once: int = 8,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError(f"a {name} on a server needs httpx", fix="pip install 'veneer[rewards]'") from error
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise ConfigError(f"the {name}'s url is invalid: {error}", where=url) from None
        if parts.username or parts.password:
            fix = "put the key into a variable of the environment, and name that as `key`"
            raise ConfigError(f"the {name}'s url holds a name or a password", fix=fix)
        headers = {}
        if key is not None:
            value = os.environ.get(key, "").strip()
            if not value:
                raise ConfigError(
                    f"the variable {key} with the {name}'s key is not set", where=url, fix=f"export {key}=…"
                )
            if not (value.isascii() and value.isprintable()):
                fix = "set it to the key only"
                raise ConfigError(f"the variable {key} is not a valid key of a {name}", where=url, fix=fix)
            headers["Authorization"] = f"Bearer {value}"
        self.url, self.name, self._setting = url, name, setting
        self._timeout, self._patience, self._at_once = timeout, patience, at_once
        self._http = httpx.Client(headers=headers, timeout=timeout)
        self._httpx: Any = httpx
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._away_since: float | None = None

    def __enter__(self) -> AwaitedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._over.set()
        self._http.close()

    def each(
        self, request: Callable[[A], B], items: Sequence[A], interrupted: Callable[[], bool] = lambda: False
    ) -> list[B] | None:
        """Return `request` of each item, in order; None as soon as `interrupted()`.

        Several items run at once. Raises the errors of `request`."""
        self._away_since, self._over = None, threading.Event()
        pool = ThreadPoolExecutor(self._at_once, self.name)
        futures = [pool.submit(request, item) for item in items]
        try:
            left = set(futures)
            while left and not interrupted():
                finished, left = wait(left, _LOOKED, "FIRST_EXCEPTION")
                for future in finished:
                    future.result()
            return None if left else [future.result() for future in futures]
        finally:
            self._over.set()  # stop the retries of the other requests
            pool.shutdown(wait=False, cancel_futures=True)

    def response(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the server's response to a POST, of any status.

        Retries while the server is unavailable. Raises Unanswered and UnavailableError per the table above,
        and ConfigError for an invalid URL."""
        late, wait = 0, 0.5
        while True:
            try:
                answer = self._read_whole(f"{self.url.rstrip('/')}{path}", body)
                if answer.status_code not in _AGAIN:
                    self._away_since = None
                    return answer
                reason = f"HTTP {answer.status_code}"
            except (self._httpx.ReadTimeout, self._httpx.WriteTimeout, TimeoutError):
                late += 1
                if late == _TIMEOUTS:
                    raise Unanswered(f"the {self.name} gave no answer in time, {_TIMEOUTS} times") from None
                continue
            except self._httpx.TransportError as error:
                reason = f"{type(error).__name__} {shown(str(error))[:200]}".strip()
            except self._httpx.DecodingError as error:
                raise Unanswered(f"the {self.name}'s answer cannot be read: {shown(str(error))[:100]}") from None
            except self._httpx.InvalidURL as error:
                raise ConfigError(f"the {self.name}'s url is invalid: {error}", where=self.url) from None
            self._wait_or_give_up(reason, wait)
            wait = min(30.0, 2 * wait)

    def _read_whole(self, url: str, body: Mapping[str, Any]) -> Any:
        """Return a response with its complete content.

        Raises TimeoutError if the content arrives for longer than `timeout`, as from servers that send white
        space while they work; Unanswered if it exceeds the size limit."""
        ends, parts, size = time.monotonic() + self._timeout, list[bytes](), 0
        with self._http.stream("POST", url, json=body) as answer:
            for part in answer.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > _LARGEST:
                    raise Unanswered(f"the {self.name}'s response exceeds {_LARGEST >> 20} MB")
                if time.monotonic() > ends:
                    raise TimeoutError
            headers = {name: value for name, value in answer.headers.items() if name != "content-encoding"}
            return self._httpx.Response(answer.status_code, headers=headers, content=b"".join(parts))

    def read(self, answer: Any, content: str) -> Any:
        """Return the JSON of a response with status 200.

        `content`: the expected content, for messages. Raises Unanswered and ConfigError per the table above."""
        status = answer.status_code
        if status != 200:
            reason = f"HTTP {status}: {shown(answer.text)[:300]}"
            if status in _OF_ONE:
                raise Unanswered(f"the {self.name} refused the question, {reason}")
            raise ConfigError(
                f"the {self.name} refuses requests: {reason}", where=self.url, fix="check url, key and model"
            )
        try:
            return answer.json()
        except ValueError:
            raise self.unread(answer, content) from None

    def unread(self, answer: Any, content: str) -> Unanswered:
        return Unanswered(f"the {self.name}'s answer is no {content}: {shown(answer.text)[:100]}")

    def _wait_or_give_up(self, reason: str, wait: float) -> None:
        """Wait before a retry. Raises UnavailableError once `patience` is over."""
        now = time.monotonic()
        with self._lock:
            since = self._away_since = now if self._away_since is None else self._away_since
        left = since + self._patience - now
        if left <= 0 or self._over.wait(min(wait, left)):
            raise UnavailableError(
                f"the {self.name} has been away for {self._patience:g} s: {reason}",
                where=self.url,
                fix=f"start it, and resume the run; or let it wait longer with {self._setting}",
            )
