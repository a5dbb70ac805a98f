"""Run a benchmark in a separate process, or import it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import script_module

ROOT = Path(__file__).resolve().parents[2]
BENCH_HOME = {"VENEER_HOME": os.environ.get("VENEER_BENCH_HOME", str(Path.home() / ".veneer"))}
"""The home that all benchmarks share, so that downloads are reused."""


def run_benchmark(name: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **env}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def report_of(name: str, *arguments: str, **env: str) -> dict[str, Any]:
    """Run a benchmark, and return its report after checking that the format is the common one."""
    ran = run_benchmark(name, *arguments, "--json", **env)
    assert ran.returncode == 0, ran.stderr
    result: dict[str, Any] = json.loads(ran.stdout)
    assert set(result) == {"machine", "rows", "bars"}
    assert all(set(r) == {"name", "metric", "value", "unit"} for r in result["rows"])
    assert all(set(b) == {"name", "want", "got", "ok"} for b in result["bars"])
    return result


def benchmark_module(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script_module(ROOT / "benchmarks" / f"{name}.py", f"{name}_benchmark")
