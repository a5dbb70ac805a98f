"""The text training benchmark runs, agrees with its peers on losses, and reports in the common format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "text_training.py"), *arguments]
    home = os.environ.get("VENEER_BENCH_HOME", str(Path.home() / ".veneer"))
    env = {**os.environ, "VENEER_HOME": home, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_it_says_what_it_measures() -> None:
    assert "share of the floor" in run("--help").stdout


def test_missing_rows_are_reported(tmp_path: Path) -> None:
    ran = run("--banking77", str(tmp_path))
    assert ran.returncode != 0
    assert "needs the banking77 rows" in ran.stderr


@pytest.mark.peers
def test_quick_run_follows_peft_s_losses() -> None:
    ran = run("--quick", "--json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert set(result) == {"machine", "rows", "bars"}
    curve = next(b for b in result["bars"] if b["name"].startswith("furthest loss"))
    assert curve["ok"], curve


@pytest.mark.network
def test_fast_paths_keep_the_outputs_of_real_bases() -> None:
    ran = run("--real", "--json")
    assert ran.returncode == 0, ran.stderr
    assert all(b["ok"] for b in json.loads(ran.stdout)["bars"])
