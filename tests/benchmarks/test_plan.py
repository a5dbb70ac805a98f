"""The plan benchmarks: the grid is complete, and both report in the common format."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import script_module

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments, "--json"]
    home = os.environ.get("VENEER_BENCH_HOME", str(Path.home() / ".veneer"))
    env = {**os.environ, "VENEER_HOME": home, "PYTHONPATH": str(ROOT / "src")}
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    assert set(found) == {"machine", "rows", "bars"}
    return found


def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script_module(ROOT / "benchmarks" / "plan.py", "plan_benchmark")


def test_the_grid_varies_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark(monkeypatch)
    names = [module.name_of(one) for one in module.GRID]
    assert len(set(names)) == len(names) >= 24
    for key in ("checkpointing", "dtype", "rank", "base", "length", "rows", "size", "pictures"):
        assert len({one.get(key) for one in module.GRID}) > 1, key


def test_every_run_of_the_grid_has_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark(monkeypatch)
    for one in module.GRID:
        peak, seconds = module.predicted(one)
        assert 480_000_000 < peak < 16e9
        assert seconds > 0


def test_documented_peaks_are_within_a_tenth_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark(monkeypatch)
    page = (ROOT / "docs" / "how-to" / "plan.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| [\d.]+ GB \| ([\d.]+) GB \| [+-][\d.]+% \|$", page, re.MULTILINE)
    measured = {name: float(peak) for name, peak in rows}
    grid = [one for one in module.GRID if module.name_of(one) in measured]
    assert len(grid) == len(measured) >= 6
    for one in grid:
        peak, _ = module.predicted(one)
        assert peak / 1e9 == pytest.approx(measured[module.name_of(one)], rel=0.1), module.name_of(one)


def test_published_figures_agree_with_the_plan() -> None:
    found = run("plan_published.py")
    assert len(found["rows"]) >= 40
    assert found["bars"][0]["ok"]


@pytest.mark.slow
def test_a_run_takes_the_memory_that_was_predicted() -> None:
    found = run("plan.py", "--only", "llama-12m, 16 × 128", "--memory")
    assert all(one["ok"] for one in found["bars"]), found
