"""Helpers for error messages."""

from __future__ import annotations

import pytest

from veneer.errors import nearest


@pytest.mark.parametrize(
    ("typed", "known", "meant"),
    [
        ("rnak", ["rows", "rank"], ["rank"]),  # two swapped neighboring letters count as one edit
        ("suport@1", ["support@1", "support@2", "tone@1"], ["support@1", "support@2"]),
        ("Learning_Rte", ["learning_rate"], ["learning_rate"]),
        ("desk.jsonl", ["tests"], []),
        ("nope", ["opt", "home"], []),
        ("lr", ["learning_rate", "r"], []),
        ("", ["a"], []),
    ],
)
def test_nearest_names_are_within_few_edits(typed: str, known: list[str], meant: list[str]) -> None:
    assert nearest(typed, known) == meant


def test_nearest_allows_three_edits_at_most() -> None:
    long = "a-name-of-many-letters"
    assert nearest(f"{long}xyz", [long]) == [long]
    assert nearest(f"{long}wxyz", [long]) == []
