"""Helpers for error messages."""

from __future__ import annotations

import pytest

from veneer.errors import nearest


@pytest.mark.parametrize(
    ("typed", "known", "meant"),
    [
        ("rnak", ["rows", "rank"], ["rank"]),  # swapping two neighbors is one edit
        ("suport@1", ["support@1", "support@2", "tone@1"], ["support@1", "support@2"]),
        ("Learning_Rte", ["learning_rate"], ["learning_rate"]),
        ("desk.jsonl", ["tests"], []),
        ("nope", ["opt", "home"], []),
        ("lr", ["learning_rate", "r"], []),
        ("", ["a"], []),
    ],
)
def test_only_names_within_few_edits_are_offered(typed: str, known: list[str], meant: list[str]) -> None:
    assert nearest(typed, known) == meant


def test_no_more_than_three_edits_are_a_typing_error() -> None:
    long = "a-name-of-many-letters"
    assert nearest(f"{long}xyz", [long]) == [long]
    assert nearest(f"{long}wxyz", [long]) == []
