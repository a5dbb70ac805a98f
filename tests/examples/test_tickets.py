"""The tickets have the documented counts, schema and policy.

Held-out tickets and training tickets share no sentence."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import script_module

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tickets"
TEAMS = {"billing", "hardware", "logistics", "security", "software", "success"}
PRIORITIES = {"urgent", "high", "normal", "low"}
AREAS = {"api", "console", "hub", "lock", "mobile_app", "panel", "sensor", "subscription"}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def answer(row: dict[str, Any]) -> dict[str, str]:
    return json.loads(row["messages"][2]["content"])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module(FOLDER / "make_tickets.py")


def grams(text: str, n: int = 4) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def test_a_fifth_of_the_tickets_is_held_out() -> None:
    assert (len(rows("train")), len(rows("test"))) == (1200, 300)


@pytest.mark.parametrize("name", ["train", "test"])
def test_every_row_has_three_messages_and_known_labels(name: str) -> None:
    for row in rows(name):
        assert set(row) == {"messages"}
        assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
        label = answer(row)
        assert list(label) == ["team", "priority", "product_area"]
        assert row["messages"][2]["content"] == json.dumps(label, separators=(",", ":"))
        assert label["team"] in TEAMS
        assert label["priority"] in PRIORITIES
        assert label["product_area"] in AREAS


@pytest.mark.parametrize("name", ["train", "test"])
@pytest.mark.parametrize(
    ("field", "values", "least", "most"),
    [("team", TEAMS, 0.10, 0.25), ("priority", PRIORITIES, 0.12, 0.40), ("product_area", AREAS, 0.04, 0.20)],
)
def test_labels_are_balanced(name: str, field: str, values: set[str], least: float, most: float) -> None:
    counts = Counter(answer(row)[field] for row in rows(name))
    assert set(counts) == values
    assert min(counts.values()) >= least * counts.total()
    assert max(counts.values()) <= most * counts.total()


def test_the_prompt_does_not_list_the_labels() -> None:
    """No label value occurs in the system prompt, so an untrained base cannot copy the labels."""
    (system,) = {row["messages"][0]["content"] for row in rows("train") + rows("test")}
    assert not (TEAMS | PRIORITIES | AREAS) & set(system.lower().replace(".", " ").replace(",", " ").split())


def test_tickets_are_unique() -> None:
    texts = [row["messages"][1]["content"].lower() for row in rows("train") + rows("test")]
    assert len(set(texts)) == len(texts)


def test_tickets_have_three_lengths() -> None:
    words = sorted(len(row["messages"][1]["content"].split()) for row in rows("train"))
    assert words[len(words) // 10] < 20
    assert words[-len(words) // 10] > 50
    assert sum("\n\n" in row["messages"][1]["content"] for row in rows("train")) > 150


def test_script_reproduces_the_committed_files(script: ModuleType) -> None:
    train, test, system = script.make()
    assert script.jsonl(train, system).encode() == (FOLDER / "train.jsonl").read_bytes()
    assert script.jsonl(test, system).encode() == (FOLDER / "test.jsonl").read_bytes()


def test_another_seed_gives_other_tickets(script: ModuleType) -> None:
    assert {t.text for t in script.make(rows=50, seed=1)[0]} != {t.text for t in script.make(rows=50, seed=2)[0]}


def test_training_and_test_tickets_share_no_template(script: ModuleType) -> None:
    """Compares ids and texts of sentences, because one text with two ids would be a leak too."""
    train, test, _ = script.make()
    used = [{name for ticket in side for name in ticket.templates} for side in (train, test)]
    assert all(used)
    assert not used[0] & used[1]
    assert all("/train/" in name for name in used[0])
    assert all("/test/" in name for name in used[1])

    def sentences(node: Any, side: str) -> list[str]:
        if isinstance(node, list):
            return [s for part in node for s in sentences(part, side)]
        if not isinstance(node, dict):
            return []
        return [*node.get(side, []), *(s for part in node.values() for s in sentences(part, side))]

    spec = script.tomllib.loads((FOLDER / "templates.toml").read_text(encoding="utf-8"))
    flat = [[s.lower().strip(" .,!") for s in sentences(spec, side)] for side in ("train", "test")]
    assert len(flat[0]) > 300
    assert len(flat[1]) > 100
    assert len(set(flat[0])) == len(flat[0])
    assert not set(flat[0]) & set(flat[1])
    for held_out in flat[1]:
        own = set(re.findall(r"\w+", held_out))
        for sentence in flat[0]:
            words = set(re.findall(r"\w+", sentence))
            alike = len(own & words) / len(own | words)
            assert alike < 0.5 or len(own) < 5, f"nearly the same sentence on both sides: {held_out} | {sentence}"


def test_no_test_ticket_resembles_a_training_ticket() -> None:
    """Less than 20% of a test ticket's word 4-grams occur in any single training ticket; names can repeat."""
    train = [grams(row["messages"][1]["content"]) for row in rows("train")]
    for row in rows("test"):
        own = grams(row["messages"][1]["content"])
        assert max(len(own & other) for other in train) / len(own) < 0.2, row["messages"][1]["content"]


def test_priority_follows_the_policy(script: ModuleType) -> None:
    assert script.priority_of("low", []) == "low"
    assert script.priority_of("normal", []) == "normal"
    assert script.priority_of("normal", ["wait"]) == "low"
    assert script.priority_of("low", ["deadline"]) == "high"
    assert script.priority_of("high", []) == "high"
    assert script.priority_of("normal", ["critical", "many"]) == "urgent"


def test_no_placeholder_is_left_in_a_ticket() -> None:
    for row in rows("train") + rows("test"):
        assert not set("{}[]|") & set(row["messages"][1]["content"])
