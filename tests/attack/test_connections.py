"""Slow, idle and unread connections are closed in time, and do not delay others."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.attack.harness import GAP, SOON, Server, completion_body, target
from tests.serve.whole import Shop, prompt

MOST = 60
LIMITS = {"head_seconds": 0.6, "body_seconds": 0.6, "idle_seconds": 1, "stall_seconds": 1, "max_connections": MOST}


@pytest.fixture(scope="module")
def server(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    (home / "server.yaml").write_text(json.dumps(LIMITS), encoding="utf-8")
    with target(shop, home, "--config", str(home / "server.yaml")) as running:
        yield running


def closed_after(connection: socket.socket, send: bytes = b"", every: float = 0.2, most: float = 8.0) -> float:
    """Return the seconds until the server closes the connection.

    `send`: bytes to write again and again, at intervals of `every` seconds."""
    began = time.monotonic()
    connection.settimeout(every)
    while time.monotonic() - began < most:
        try:
            if send:
                connection.sendall(send)
            if not connection.recv(1 << 16):
                return time.monotonic() - began
        except TimeoutError:
            continue
        except OSError:
            return time.monotonic() - began
    raise AssertionError("it stays open")


def test_a_connection_that_sends_nothing_is_closed(server: Server) -> None:
    with server.raw() as idle:
        assert 0.5 < closed_after(idle) < 3


def test_a_connection_with_slow_headers_is_closed(server: Server) -> None:
    with server.raw(b"POST /v1/completions HTTP/1.1\r\nx-long: ") as slow:
        assert 0.5 < closed_after(slow, b"x") < 3


def test_a_keep_alive_connection_is_closed_when_idle_or_slow(server: Server) -> None:
    for send in (b"", b"x"):
        with server.raw(b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n") as connection:
            assert b"200 OK" in connection.recv(1 << 16)
            assert 0.5 < closed_after(connection, send) < 4


def test_a_slow_body_is_refused(server: Server) -> None:
    with server.watched() as b, server.raw(server.head("/v1/completions", 4000)) as slow:
        assert 0.5 < closed_after(slow, b" ") < 6
    assert b.worst < GAP
    answer = b""
    with server.raw(server.head("/v1/completions", 4000)) as slow:
        while b"\r\n\r\n" not in answer:
            answer += slow.recv(1 << 16)
    assert b" 408 " in answer


def test_a_body_that_continues_after_its_answer_is_cut(server: Server) -> None:
    # the declared length is too large, so the server refuses the request after its header
    with server.raw(server.head("/nowhere", 9 << 20)) as late:
        assert b" 413 " in late.recv(1 << 16)
        assert 0.5 < closed_after(late, b" ") < 6


def test_idle_connections_do_not_block_others(server: Server) -> None:
    with server.watched() as b, ExitStack() as idle:
        for _ in range(5 * MOST):
            idle.enter_context(server.raw())
        for _ in range(5):
            assert server.get("/health", None).seconds < SOON
        assert server.first_token() < SOON
        server.wait(lambda: len(server.sockets()) <= MOST + 5, 5)
    assert b.worst < GAP


def test_a_client_that_does_not_read_loses_its_rows(server: Server) -> None:
    """The completion would take a minute, but the client reads nothing, so the server ends it."""
    body = completion_body(prompt(9), 3000) | {"stream": True, "n": 16, "temperature": 1.0, "logprobs": 20}
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        raw = server.body(body)
        deaf.sendall(server.head("/v1/completions", len(raw)) + raw)
        began = time.monotonic()
        server.wait(lambda: server.series("vllm:num_requests_running") > 0)
        with server.watched() as b:
            server.wait(lambda: server.series("vllm:num_requests_running") <= 1, 40)
        assert time.monotonic() - began < 30
    assert b.worst < 2 * GAP
    tokens = server.series("vllm:generation_tokens_total")
    assert tokens < 16 * 3000
