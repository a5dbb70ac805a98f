"""The baseline of the attacks: a server without load."""

from __future__ import annotations

from tests.attack.harness import GAP, SOON, Server


def test_a_quiet_server_answers_at_once(server: Server) -> None:
    with server.watched() as b:
        assert server.first_token("a") < SOON
        assert server.get("/ready", None).status == 200
    assert b.events > 10
    assert b.worst < GAP
    assert b.health < GAP


def test_an_invalid_key_is_refused(server: Server) -> None:
    for path in ("/v1/completions", "/generate"):
        assert server.post(path, {"prompt": "Hi"}, None).status == 401
