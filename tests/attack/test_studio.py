"""Attacks on the Studio: unauthenticated sockets, slow forms, and many pages of one tenant at once."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from tests.attack.harness import SOON, Server, target
from tests.serve.whole import Shop
from tests.studio.page_socket import PageSocket

MOST = 60
SOCKET = "GET /studio/_nicegui_ws/socket.io/?EIO=4&transport=websocket&client_id={n} HTTP/1.1\r\nhost: here\r\n"
UPGRADE = "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"
KEY = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"


@pytest.fixture(scope="module")
def server(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    (home / "server.yaml").write_text(f"max_connections: {MOST}", encoding="utf-8")
    with target(shop, home, "--studio", "--config", str(home / "server.yaml")) as running:
        yield running


def signed_in(server: Server, tenant: str) -> float:
    """Sign a tenant in, and return the seconds that it takes."""
    began = time.monotonic()
    answer = httpx.post(f"{server.url}/studio/enter", data={"key": server.keys[tenant]})
    assert (answer.status_code, "veneer_studio" in answer.headers.get("set-cookie", "")) == (303, True)
    return time.monotonic() - began


def test_unauthenticated_sockets_are_refused_and_do_not_block_others(server: Server) -> None:
    with ExitStack() as strangers:
        for n in range(3 * MOST):
            connection = strangers.enter_context(server.raw((SOCKET.format(n=n) + UPGRADE + KEY).encode()))
            if n % MOST == 0:
                assert b" 403 " in connection.recv(1 << 12).partition(b"\r\n")[0]
        assert server.get("/health", None).status == 200
        assert signed_in(server, "b") < SOON


def test_sockets_are_closed_first(server: Server) -> None:
    """Requests are still answered when signed-in pages open more sockets than the connection limit allows."""
    with ExitStack() as sockets:
        for _ in range(MOST // 2):
            page = PageSocket(f"{server.url}/studio/", server.keys["a"])
            for _ in range(4):
                sockets.enter_context(connect(page.socket_url, proxy=None, additional_headers=page.cookies))
        for _ in range(20):
            assert server.get("/health", None).status == 200
        server.wait(lambda: len(server.sockets()) <= MOST, 10)


def test_slow_forms_do_not_block_signing_in(server: Server) -> None:
    head = b"POST /studio/enter HTTP/1.1\r\nhost: here\r\ncontent-type: application/x-www-form-urlencoded\r\n"
    with ExitStack() as slow:
        for _ in range(40):
            slow.enter_context(server.raw(head + b"content-length: 4000\r\n\r\nkey="))
        assert signed_in(server, "b") < SOON
    assert httpx.post(f"{server.url}/studio/enter", data={"key": "x" * 5000}).status_code == 413


def test_many_pages_do_not_delay_health_and_streams(server: Server) -> None:
    def page(_: Any = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", "/studio/doctor", headers={"cookie": f"veneer_studio={server.keys['a']}"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status

    with server.watched() as b:
        statuses = server.together([page] * 100)
    assert set(statuses) == {200, 429}
    assert b.health < SOON
