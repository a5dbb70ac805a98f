"""The text training benchmark runs, matches its peers' losses, and reports in the common format."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.runs import BENCH_HOME, report_of, run_benchmark


def test_missing_rows_are_reported(tmp_path: Path) -> None:
    ran = run_benchmark("text_training.py", "--banking77", str(tmp_path), **BENCH_HOME)
    assert ran.returncode != 0
    assert "needs the banking77 rows" in ran.stderr


@pytest.mark.peers
def test_quick_run_has_the_losses_of_peft() -> None:
    result = report_of("text_training.py", "--quick", **BENCH_HOME)
    curve = next(b for b in result["bars"] if b["name"].startswith("furthest loss"))
    assert curve["ok"], curve


@pytest.mark.network
def test_fast_paths_keep_the_outputs_of_real_bases() -> None:
    assert all(b["ok"] for b in report_of("text_training.py", "--real", **BENCH_HOME)["bars"])
