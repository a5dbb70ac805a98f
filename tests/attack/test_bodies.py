"""Expensive bodies are refused within a second, without delaying streams or keeping memory."""

from __future__ import annotations

import pytest

from tests.attack.harness import GAP, MEMORY, SOON, Server

SIZE = 8 << 20
"""The largest allowed body in bytes."""


def filled(head: bytes, item: bytes, tail: bytes) -> bytes:
    """Return head, as many comma-separated copies of `item` as fit, and tail."""
    times = (SIZE - len(head) - len(tail)) // (len(item) + 1) - 1
    return head + b",".join([item] * times) + tail


def keys() -> bytes:
    parts, size, n = [b'{"model":"tiny","prompt":"Hi"'], 40, 0
    while size < SIZE - 20:
        parts.append(b'"k%d":0' % n)
        size += len(parts[-1]) + 1
        n += 1
    return b",".join(parts) + b"}"


BODIES = {
    "numbers": lambda: filled(b'{"model":"tiny","prompt":[', b"-1", b"]}"),
    "right-numbers": lambda: filled(b'{"model":"tiny","prompt":[', b"7", b"]}"),
    "lists": lambda: filled(b'{"model":"tiny","prompt":[', b"[]", b"]}"),
    "keys": keys,
    "text": lambda: filled(b'{"model":"tiny","prompt":"', b"The printer on the third floor", b'"}'),
    "deep": lambda: b'{"model":"tiny","prompt":' + b"[" * (SIZE // 2 - 20) + b"]" * (SIZE // 2 - 20) + b"}",
}


@pytest.mark.parametrize("kind", BODIES)
def test_an_expensive_body_does_not_delay_others(server: Server, kind: str) -> None:
    body = BODIES[kind]()
    assert SIZE - 64 < len(body) <= SIZE
    initial = server.memory()
    with server.watched() as b:
        answer = server.post("/v1/completions", body)
    assert 400 <= answer.status < 500
    assert len(answer.body) < 2000
    assert answer.seconds < SOON
    assert b.worst < GAP
    assert b.health < GAP
    assert server.growth_from(initial) < MEMORY
