"""The page on the real server: its socket, its paths beside the API's, what comes before the base is loaded."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from websockets.sync.client import connect

from tests.serve.http.toy import wait_for
from tests.studio.conftest import Served
from veneer.serve.build import Extension, together


class Window:
    """A browser's socket, as Socket.IO has it, for the page at `url`."""

    def __init__(self, url: str, **options: Any) -> None:
        page = httpx.get(url, follow_redirects=True).text
        found = re.search(r"query: (\{.*?\}),", page)
        assert found is not None
        self.query = {**ast.literal_eval(found[1]), "document_id": "d", "tab_id": "t", "old_tab_id": "t"}
        self.elements = json.loads(page.split("String.raw`")[1].split("`)")[0].replace("&quot;", '"'))
        said = "&".join(f"{k}={str(v).lower() if v is True else v}" for k, v in self.query.items())
        place = f"{url.split('/studio')[0].replace('http', 'ws')}/studio/_nicegui_ws/socket.io/"
        self.socket = connect(f"{place}?EIO=4&transport=websocket&{said}", proxy=None, **options)
        assert self.socket.recv()[0] == "0"
        self.socket.send("40")
        assert "sid" in self.socket.recv(timeout=10)

    def type(self, text: str) -> None:
        """Into the first field."""
        id, field = next((i, e) for i, e in self.elements.items() if e.get("props", {}).get("kind") == "search")
        listener = next(e["listener_id"] for e in field["events"] if e["type"] == "changed")
        event = {
            "id": int(id),
            "client_id": self.query["client_id"],
            "listener_id": listener,
            "args": [json.dumps(text)],
        }
        self.socket.send("42" + json.dumps(["event", event]))

    def until(self, *words: str) -> str:
        """What comes, until all the words were in it."""
        heard = ""
        while not all(word in heard for word in words):
            heard += str(message) if (message := self.socket.recv(timeout=20)) != "2" else ""
        return heard


def test_a_page_hears_and_answers_through_the_real_front_and_door(studio: Served) -> None:
    window = Window(f"{studio.address}/studio/")
    with window.socket:
        window.type("tone")
        heard = window.until("globex/tone", "q=tone")
        assert "support@2" not in heard


def test_the_api_is_as_it_is_without_the_page(studio: Served) -> None:
    with httpx.Client(base_url=studio.address) as client:
        assert client.get("/v1/nope").json()["error"]["code"] == "not_found"
        assert client.get("/v1/chat/completions").status_code == 405
        assert client.get("/studio").headers["location"].endswith("/studio/")
        assert client.get("/studio/nope").status_code == 404
        page = client.get("/studio/")
        for path in set(re.findall(r'"(/studio/_nicegui/[^"]+\.(?:js|css))"', page.text)):
            asset = client.get(path)
            assert (asset.status_code, "immutable" in asset.headers["cache-control"]) == (200, True), path


def test_who_comes_while_the_base_loads_waits_on_a_page(tmp_path: Path, tiny: tuple[Path, Path]) -> None:
    served = Served(tmp_path, *tiny)
    seen: list[httpx.Response] = []

    def there() -> bool:
        try:
            seen.append(httpx.get(f"{served.address}/studio/compare?p=x"))
        except httpx.TransportError:
            return False
        return True

    try:
        wait_for(there, 60)
        assert seen[0].status_code == 503
        assert 'http-equiv="refresh"' in seen[0].text
        assert "loading tiny-base" in seen[0].text
        assert httpx.get(f"{served.address}/v1/models").json()["error"]["code"] == "shutting_down"
        with pytest.raises(Exception, match="HTTP 403"):
            connect(served.address.replace("http", "ws") + "/studio/_nicegui_ws/socket.io/", proxy=None)
    finally:
        served.end()


def test_several_extensions_are_one_that_ends_the_other_way_round() -> None:
    heard: list[str] = []

    def of(name: str) -> Extension:
        async def start() -> None:
            heard.append(f"start {name}")

        async def stop() -> None:
            heard.append(f"stop {name}")

        return Extension([], {name: 1}, [name], start, stop, lambda app: heard.append(f"mount {name}"))

    both = together(lambda *_: of("a"), lambda *_: of("b"))(None, None)  # type: ignore[arg-type]
    both.mount(FastAPI())
    asyncio.run(both.start())
    asyncio.run(both.stop())
    assert heard == ["mount a", "mount b", "start a", "start b", "stop b", "stop a"]
    assert (both.large, both.unguarded) == ({"a": 1, "b": 1}, ["a", "b"])
