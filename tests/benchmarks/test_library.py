"""The library benchmark runs and reports in the common format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_small_run_reports_rows_and_bars() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "library.py"), "--quick", "--adapters", "500", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert set(result) == {"machine", "rows", "bars"}
    assert result["machine"]["adapters"] == 500
    assert len(result["bars"]) >= 10
    assert all(set(b) == {"name", "want", "got", "ok"} for b in result["bars"])
