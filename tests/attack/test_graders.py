"""Graders that are expensive to parse or run have limits, use only their tenant's threads, and delay nobody else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.attack.harness import GAP, MEMORY, SOON, Server

RUN, VALIDATE = (f"/v1/fine_tuning/alpha/graders/{verb}" for verb in ("run", "validate"))


def check(text: str) -> dict[str, Any]:
    return {"type": "string_check", "name": "it", "operation": "eq", "input": text, "reference": "y"}


def similar(metric: str) -> dict[str, Any]:
    fields = {"type": "text_similarity", "name": "it", "evaluation_metric": metric}
    return fields | {"input": "{{ sample.output_text }}", "reference": "{{ item.want }}"}


def words(count: int, step: int = 1) -> str:
    return " ".join(f"w{i * step % 16_001}" for i in range(count))


def sources() -> dict[str, Any]:
    source = "def grade(sample, item):\n return 0\n" + "x=1;" * 60_000
    graders = {f"g{i}": {"type": "python", "name": f"g{i}", "source": source} for i in range(30)}
    return {"type": "multi", "name": "all", "graders": graders, "calculate_output": "g0"}


ATTACKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "braces": (VALIDATE, {"grader": check("{{" * 25_000)}, 400),
    "repeated": (
        RUN,
        {"grader": check("{{ item.a }}" * 4000), "model_sample": "x", "item": {"a": "x" * 200_000}},
        413,
    ),
    "long texts": (
        RUN,
        {"grader": similar("rouge_l"), "model_sample": words(90_000), "item": {"want": words(16_000)}},
        413,
    ),
    "sources": (VALIDATE, {"grader": sources()}, 403),
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_expensive_grader_does_not_delay_others(trainer: Server, kind: str) -> None:
    path, body, status = ATTACKS[kind]
    initial = trainer.memory()
    with trainer.watched() as b:
        answers = trainer.together([lambda: trainer.post(path, body)] * 4)
    statuses = {answer.status for answer in answers}
    assert status in statuses <= {status, 429}, answers[0].body[:500]  # 429: bodies over the tenant's share of memory
    assert max(answer.seconds for answer in answers) < 4 * SOON
    assert b.worst < GAP
    assert b.health < GAP
    assert trainer.growth_from(initial) < MEMORY


def test_slow_graders_of_one_tenant_leave_threads_for_others(trainer: Server) -> None:
    slow = {"grader": similar("rouge_l"), "model_sample": words(10_000), "item": {"want": words(10_000, 2)}}
    quick = {"grader": check("y"), "model_sample": "x"}
    initial = trainer.memory()

    def ask_b() -> float:
        return max(trainer.post(RUN, quick, "b").seconds for _ in range(5))

    *a, b = trainer.together([*[lambda: trainer.post(RUN, slow)] * 12, ask_b])
    assert {answer.status for answer in a} == {200}
    assert max(answer.seconds for answer in a) > b
    assert b < SOON
    assert trainer.growth_from(initial) < MEMORY
