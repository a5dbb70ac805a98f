"""The plan benchmarks: the grid is complete, and both benchmarks report in the common format."""

from __future__ import annotations

import re

import pytest

from tests.benchmarks.runs import BENCH_HOME, ROOT, benchmark_module, report_of


def test_the_grid_varies_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark_module(monkeypatch, "plan")
    names = [module.name_of(one) for one in module.GRID]
    assert len(set(names)) == len(names) >= 24
    for key in ("checkpointing", "dtype", "rank", "base", "length", "rows", "size", "pictures"):
        assert len({one.get(key) for one in module.GRID}) > 1, key


def test_every_run_of_the_grid_has_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark_module(monkeypatch, "plan")
    for one in module.GRID:
        peak, seconds = module.predicted(one)
        assert 480_000_000 < peak < 16e9
        assert seconds > 0


def test_documented_peaks_are_within_a_tenth_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark_module(monkeypatch, "plan")
    page = (ROOT / "docs" / "how-to" / "plan.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| [\d.]+ GB \| ([\d.]+) GB \| [+-][\d.]+% \|$", page, re.MULTILINE)
    measured = {name: float(peak) for name, peak in rows}
    grid = [one for one in module.GRID if module.name_of(one) in measured]
    assert len(grid) == len(measured) >= 6
    for one in grid:
        peak, _ = module.predicted(one)
        assert peak / 1e9 == pytest.approx(measured[module.name_of(one)], rel=0.1), module.name_of(one)


def test_published_figures_agree_with_the_plan() -> None:
    found = report_of("plan_published.py", **BENCH_HOME)
    assert len(found["rows"]) >= 40
    assert found["bars"][0]["ok"]


@pytest.mark.slow
def test_a_run_takes_the_memory_that_was_predicted() -> None:
    found = report_of("plan.py", "--only", "llama-12m, 16 × 128", "--memory", **BENCH_HOME)
    assert all(one["ok"] for one in found["bars"]), found
