"""The image benchmarks run, match the losses of diffusers + PEFT, and report in the common format."""

from __future__ import annotations

import pytest

from tests.benchmarks.runs import report_of


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "base", "agrees"),
    [("image_generation.py", "--base", "latents' error over PEFT's"), ("image_training.py", "--only", "furthest loss")],
)
def test_quick_run_agrees_with_peft(name: str, base: str, agrees: str) -> None:
    result = report_of(name, "--quick", base, "tiny flux")
    assert all(b["ok"] for b in result["bars"] if agrees in b["name"])
    assert any(agrees in b["name"] for b in result["bars"])
