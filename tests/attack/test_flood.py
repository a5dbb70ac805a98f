"""A tenant that exceeds its share is refused, and others are served without delay."""

from __future__ import annotations

from collections import Counter

from tests.attack.harness import GAP, MEMORY, SOON, Server, completion_body
from tests.serve.whole import prompt

SIZE = 8 << 20


def test_tokenizing_long_texts_does_not_delay_others(server: Server) -> None:
    body = b'{"model":"tiny","prompt":"' + b"The printer. " * ((SIZE - 40) // 13) + b'"}'
    initial = server.memory()
    with server.watched() as b:
        answers = server.together([lambda: server.post("/tokenize", body)] * 6)
        assert server.first_token() < SOON
    assert all(400 <= answer.status < 500 and answer.seconds < 3 * SOON for answer in answers)
    assert b.worst < GAP
    assert b.health < GAP
    assert server.growth_from(initial) < MEMORY


def test_tokenizing_the_longest_texts_does_not_delay_others(server: Server) -> None:
    """38 requests with very long texts arrive at once; each is answered in turn or refused."""
    body = {"model": "tiny", "prompt": "The printer. " * 4000, "return_token_strs": True}
    assert server.post("/tokenize", body).status == 200
    with server.watched() as b:
        statuses = server.crowd("/tokenize", server.body(body), 38)
    assert len(statuses) == 38
    assert set(statuses) <= {200, 429}
    assert b.worst < GAP
    assert b.health < GAP


def test_a_queue_filled_by_one_tenant_admits_others(server: Server) -> None:
    """Tenant A's five requests with 4 · 64 completions each would fill all 1,024 slots."""
    body = completion_body(prompt(9), 400) | {"prompt": [prompt(9, k) for k in range(4)], "n": 64, "temperature": 1.0}

    def ask_b() -> list[int]:
        return [server.post("/v1/completions", completion_body(prompt(9, k), 4), "b").status for k in range(8)]

    def ask_a() -> int:
        try:
            return server.post("/v1/completions", body, timeout=4).status
        except TimeoutError:  # the client stops waiting for the completions and disconnects
            return 0

    *a, b = server.together([*[ask_a] * 5, ask_b])
    assert b == [200] * 8
    assert Counter(a)[429] >= 3


def test_long_rows_yield_to_another_tenants_first_token(server: Server) -> None:
    """Tenant A fills all 32 slots, with 32 more completions waiting; B still gets a slot at once."""
    rows = completion_body(prompt(9), 3000) | {"n": 32, "temperature": 1.0, "stream": True}
    quiet = sorted(server.first_token(ids=prompt(200, k)) for k in range(5))[2]
    with server.flooding([rows, rows]):
        server.wait(lambda: server.series("vllm:num_requests_running") == 32)
        initial = server.series("vllm:num_preemptions_total")
        under = sorted(server.first_token(ids=prompt(200, 100 + k)) for k in range(5))[2]
        assert server.series("vllm:num_preemptions_total") > initial
    assert under < 1.5 * quiet + 0.25  # the margin covers a step that is already running, on a busy machine
