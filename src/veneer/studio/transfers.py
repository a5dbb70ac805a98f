"""File transfers between a browser window and the API.

Uploads of dropped and picked files, and downloads of files that are created on request and can fail.
browser.js sends and fetches the files through API routes, like any other client.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from veneer.errors import VeneerError
from veneer.studio import parts

_FILES = 50
"""Maximum number of files dropped at once."""


class Transfers:
    """Transfers of one window.

    `browser`: its Browser element. `count`: number of files in the last drop. `to`, `done`, `form`: see
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
        """Set the handling of dropped files.

        words: text shown over the page while dragging
        to(filename): upload URL
        done(answer): called with the route's JSON
        form: fields of a multipart form; None to post the plain file"""
        self.to, self.done, self.form = to, done, form
        parts.mark(self.browser, words=words)

    def fetch(self, url: str, done: Callable[[str], Any]) -> None:
        """Download a file. `done`: called with "", or with the reason for a failure."""
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
    """Return (a route's JSON, its error message or "")."""
    try:
        answer = json.loads(came["text"])
    except (ValueError, RecursionError):
        answer = {}
    error = answer.get("error") if isinstance(answer, dict) else None
    return answer, str(error.get("message") or "") if isinstance(error, dict) else ""
