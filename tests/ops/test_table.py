"""docs/reference/ops.md matches the registry."""

from __future__ import annotations

from pathlib import Path

from veneer.ops.dispatch import OPS, RULES
from veneer.ops.table import ops_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "ops.md"


def test_page_matches_the_registry() -> None:
    assert PAGE.read_text(encoding="utf-8") == ops_page(), "run: python -m veneer.ops.table > docs/reference/ops.md"


def test_every_op_has_a_line() -> None:
    lines = [line for line in ops_page().splitlines() if line.startswith("| `") and line.count(" | ") == 3]
    assert [line.split("`")[1] for line in lines] == list(OPS)


def test_every_choice_from_the_profile_fits_one_screen() -> None:
    choices = ops_page().partition("| choice |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(choices) <= 20
    named = [line.split("`")[1] for line in choices if line.startswith("| `")]
    assert set(RULES) <= set(named)
