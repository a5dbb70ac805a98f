"""A browser's window without a browser: the page's tree, and its socket as Socket.IO has it.

with opened(f"{address}/studio/") as window:
    window.type("tone")
    window.until("globex/tone")
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


def page_html(page: httpx.Response) -> str:
    """What a page shows: the texts of its elements, and its fragments as HTML. Of a page without programs all of it."""
    found = re.search(r"String\.raw`(.*?)`", page.text, re.DOTALL)
    if found is None:
        return page.text
    elements = json.loads(html.unescape(found[1])).values()
    return "\n".join(html.escape(e.get("text") or "") + e.get("props", {}).get("html", "") for e in elements)


class Window:
    """A browser's socket, as Socket.IO has it, for the page at `url`."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.cookies = {} if key is None else {"cookie": f"veneer_studio={key}"}
        page = httpx.get(url, follow_redirects=True, headers=self.cookies).text
        found = re.search(r"query: (\{.*?\}),", page)
        assert found is not None
        self.query = {**ast.literal_eval(found[1]), "document_id": "d", "tab_id": "t", "old_tab_id": "t"}
        self.elements = json.loads(page.split("String.raw`")[1].split("`)")[0].replace("&quot;", '"'))
        said = "&".join(f"{k}={str(v).lower() if v is True else v}" for k, v in self.query.items())
        place = f"{url.split('/studio')[0].replace('http', 'ws')}/studio/_nicegui_ws/socket.io/"
        self.place = f"{place}?EIO=4&transport=websocket&{said}"
        self.socket: ClientConnection

    def type(self, text: str, kind: str = "search") -> None:
        """Into the first field of a kind."""
        id, field = next((i, e) for i, e in self.elements.items() if e.get("props", {}).get("kind") == kind)
        self._send(id, field, "changed", [json.dumps(text)])

    def fill(self, label: str, value: Any) -> None:
        """Another value in the field with this label, whether or not it is one that the browser offers."""
        self.tell(lambda e: e.get("props", {}).get("label") == label, "changed", value)

    def press(self, text: str) -> None:
        """The button that says this."""
        id, found = next((i, e) for i, e in self.elements.items() if e["tag"] == "button" and e.get("text") == text)
        self._send(id, found, "click", [])

    def act(self, name: str, **data: str) -> None:
        """What a click does on a part of a fragment that has `data-act=name`."""
        for id, each in self.elements.items():
            if f'data-act="{name}"' in str(each.get("props", {}).get("html", "")):
                return self._send(id, each, "click", [json.dumps({"act": name, **data})])
        raise AssertionError(f"nothing on the page does {name}")

    def act_unoffered(self, name: str, **data: str) -> None:
        """As `act`, of every fragment that is on the page, whether or not it shows a part that does this."""
        for id, each in self.elements.items():
            if "html" in each.get("props", {}) and any(e["type"] == "click" for e in each.get("events", [])):
                self._send(id, each, "click", [json.dumps({"act": name, **data})])

    def enter(self, label: str, text: str) -> None:
        """Type into the field with this label, and press Enter."""
        id, field = next((i, e) for i, e in self.elements.items() if e.get("props", {}).get("label") == label)
        self._send(id, field, "entered", [json.dumps(text)])

    def tell(self, which: Callable[[dict[str, Any]], bool], what: str, *given: Any) -> None:
        """An event of the first element that is meant."""
        id, found = next((i, e) for i, e in self.elements.items() if which(e))
        self._send(id, found, what, [json.dumps(each) for each in given])

    def _send(self, id: str, element: Any, kind: str, args: list[str]) -> None:
        listener = next(e["listener_id"] for e in element["events"] if e["type"] == kind)
        event = {"id": int(id), "client_id": self.query["client_id"], "listener_id": listener, "args": args}
        self.socket.send("42" + json.dumps(["event", event]))

    def values(self, name: str) -> list[str]:
        """The properties of this name of all elements: what is in fields (value), or fragments (html)."""
        return [str(each["props"][name]) for each in self.elements.values() if name in each.get("props", {})]

    def until(self, *words: str) -> str:
        """What comes, until all the words were in it. Elements that come are on the page from then on."""
        heard = ""
        while not all(word in heard for word in words):
            message = str(self.socket.recv(timeout=20))
            heard += message if message != "2" else ""
            if message.startswith('42["update"'):
                self.elements |= {id: each for id, each in json.loads(message[2:])[1].items() if isinstance(each, dict)}
        return heard


@contextmanager
def opened(url: str, key: str | None = None, **options: Any) -> Iterator[Window]:
    """`key`: of whoever is signed in."""
    window = Window(url, key)
    with connect(window.place, proxy=None, additional_headers=window.cookies, **options) as window.socket:
        assert str(window.socket.recv())[0] == "0"
        window.socket.send("40")
        assert "sid" in str(window.socket.recv(timeout=10))
        yield window
