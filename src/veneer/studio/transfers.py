"""Files between a window and the API: dropped on it or picked, where each is sent, and what becomes of the answer; and
files that are made when they are asked for, which may fail.

The browser sends and fetches them (browser.js) by routes of the API, so that it is as for every other client.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from veneer.errors import VeneerError
from veneer.studio import parts

_FILES = 50
"""At most so many are taken at a time."""


class Transfers:
    """Of one window. `browser`: its browser.js. `count`: how many came together last. `to`, `done`, `form`: see
    `take`."""

    def __init__(self, browser: Any, tell: Callable[..., None]) -> None:
        self.browser, self.tell, self.count = browser, tell, 0
        self.form: Mapping[str, str] | None = None
        self.to: Callable[[str], str]
        self.done: Callable[[dict[str, Any]], Any]
        self.fetched: dict[str, Callable[[str], Any]] = {}
        browser.on("dropped", parts.heard(parts.permit("read", self._dropped)))
        browser.on("sent", parts.heard(parts.permit("read", self._sent)))
        browser.on("fetched", parts.heard(parts.permit("read", self._fetched)))

    def take(
        self,
        words: str,
        to: Callable[[str], str],
        done: Callable[[dict[str, Any]], Any],
        form: Mapping[str, str] | None = None,
    ) -> None:
        """What becomes of dropped files from now on. `words`: said over the page meanwhile. `to(filename)`: where it is
        posted. `done(answer)`: with that route's JSON. `form`: the fields of the form that the file is posted in, for a
        route that wants a form."""
        self.to, self.done, self.form = to, done, form
        parts.mark(self.browser, words=words)

    def fetch(self, url: str, done: Callable[[str], Any]) -> None:
        """Download a file. `done`: with "" when it is there, or with why there is none."""
        self.fetched[url] = done
        self.tell("fetchFile", url)

    def _dropped(self, names: list[str]) -> None:
        self.count = len(names)
        for n, name in enumerate(names[:_FILES]):
            self.tell("send", n, self.to(str(name)[-200:]), self.form)

    async def _sent(self, came: dict[str, Any]) -> None:
        answer, told = _answer(came)
        if came["status"] not in (200, 201):
            raise VeneerError(told or "the file did not arrive")
        if inspect.isawaitable(made := self.done(answer)):
            await made

    def _fetched(self, came: dict[str, Any]) -> None:
        done = self.fetched.pop(str(came["url"]), None)
        if done is not None:
            done("" if came["status"] == 200 else _answer(came)[1] or "the file did not come")


def _answer(came: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The JSON of a route, and what of it is an error's message."""
    try:
        answer = json.loads(came["text"])
    except (ValueError, RecursionError):
        answer = {}
    error = answer.get("error") if isinstance(answer, dict) else None
    return answer, str(error.get("message") or "") if isinstance(error, dict) else ""
