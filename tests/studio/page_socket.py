"""A Studio page without a browser: the page's elements and the page's Socket.IO connection.

with open_page(f"{address}/studio/") as page:
    page.type("tone")
    page.until("globex/tone")
"""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

Matcher = Callable[[dict[str, Any]], bool]


def page_html(response: httpx.Response) -> str:
    """Return the HTML of a page's texts and fragments; for a static page, the whole response."""
    match = re.search(r"String\.raw`(.*?)`", response.text, re.DOTALL)
    if match is None:
        return response.text
    elements = json.loads(html.unescape(match[1])).values()
    return "\n".join(html.escape(e.get("text") or "") + e.get("props", {}).get("html", "") for e in elements)


def has_label(label: str) -> Matcher:
    return lambda element: element.get("props", {}).get("label") == label


class PageSocket:
    """The page at `url`, opened by a visitor with the given key. `socket_url`: address of the page's socket."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.cookies = {} if key is None else {"cookie": f"veneer_studio={key}"}
        page = httpx.get(url, follow_redirects=True, headers=self.cookies).text
        query = ast.literal_eval(re.search(r"query: (\{.*?\}),", page)[1])
        self.query = {**query, "document_id": "d", "tab_id": "t", "old_tab_id": "t"}
        self.elements = json.loads(page.split("String.raw`")[1].split("`)")[0].replace("&quot;", '"'))
        encoded = "&".join(f"{k}={str(v).lower() if v is True else v}" for k, v in self.query.items())
        address = url.split("/studio")[0].replace("http", "ws")
        self.socket_url = f"{address}/studio/_nicegui_ws/socket.io/?EIO=4&transport=websocket&{encoded}"
        self.socket: ClientConnection

    def emit(self, matches: Matcher, event: str, *args: Any) -> None:
        """Send an event to the first matching element."""
        self._send(*next((i, e) for i, e in self.elements.items() if matches(e)), event, *args)

    def type(self, text: str) -> None:
        """Type into the first search field."""
        self.emit(lambda e: e.get("props", {}).get("kind") == "search", "changed", text)

    def fill(self, label: str, value: Any) -> None:
        """Change a field's value. The value can be one that the browser does not offer."""
        self.emit(has_label(label), "changed", value)

    def enter(self, label: str, text: str) -> None:
        """Type into a field and press Enter."""
        self.emit(has_label(label), "entered", text)

    def press(self, text: str) -> None:
        """Press the button that has this text."""
        self.emit(lambda e: e["tag"] == "button" and e.get("text") == text, "click")

    def act(self, name: str, **data: str) -> None:
        """Click on the part of a fragment that has `data-act=name`."""
        self.emit(lambda e: f'data-act="{name}"' in e.get("props", {}).get("html", ""), "click", {"act": name, **data})

    def act_unoffered(self, name: str, **data: str) -> None:
        """Send the click of `act` to every fragment, whether or not the fragment has such a part."""
        for id, each in self.elements.items():
            if "html" in each.get("props", {}) and any(e["type"] == "click" for e in each.get("events", [])):
                self._send(id, each, "click", {"act": name, **data})

    def _send(self, id: str, element: Any, kind: str, *args: Any) -> None:
        listener = next(e["listener_id"] for e in element["events"] if e["type"] == kind)
        event = {"id": int(id), "client_id": self.query["client_id"], "listener_id": listener}
        self.socket.send("42" + json.dumps(["event", event | {"args": [json.dumps(each) for each in args]}]))

    def values(self, name: str) -> list[str]:
        """Return one property of all elements, such as `value` of fields or `html` of fragments."""
        return [str(each["props"][name]) for each in self.elements.values() if name in each.get("props", {})]

    def until(self, *words: str) -> str:
        """Receive messages until they contain all words, and update the elements. Return the messages."""
        received = ""
        while not all(word in received for word in words):
            message = str(self.socket.recv(timeout=20))
            received += message if message != "2" else ""
            if message.startswith('42["update"'):
                self.elements |= {id: each for id, each in json.loads(message[2:])[1].items() if isinstance(each, dict)}
        return received


@contextmanager
def open_page(url: str, key: str | None = None) -> Iterator[PageSocket]:
    page = PageSocket(url, key)
    with connect(page.socket_url, proxy=None, additional_headers=page.cookies) as page.socket:
        assert str(page.socket.recv())[0] == "0"
        page.socket.send("40")
        assert "sid" in str(page.socket.recv(timeout=10))
        yield page
