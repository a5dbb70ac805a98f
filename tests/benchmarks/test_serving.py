"""The serving benchmarks run and report in the common format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **more}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def report_of(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert ran.returncode == 0, ran.stderr
    result: dict[str, Any] = json.loads(ran.stdout)
    assert set(result) == {"machine", "rows", "bars"}
    assert all(set(r) == {"name", "metric", "value", "unit"} for r in result["rows"])
    assert all(set(b) == {"name", "want", "got", "ok"} for b in result["bars"])
    return result


@pytest.mark.parametrize(
    ("name", "says"), [("serving.py", "tokens per second with and without"), ("serving_load.py", "Poisson process")]
)
def test_it_says_what_it_measures(name: str, says: str) -> None:
    assert says in run(name, "--help").stdout


@pytest.mark.slow
def test_http_load_makes_no_errors() -> None:
    result = report_of(run("serving_load.py", "--quick", "--rates", "20,60", "--requests", "10", "--json"))
    assert [b for b in result["bars"] if not b["ok"]] == []
    told = {(r["name"], r["metric"]): r["value"] for r in result["rows"]}
    assert len({name for name, _ in told}) == 2
    for name in {name for name, _ in told}:
        assert told[name, "errors"] == 0
        assert told[name, "answered"] > 0
        for what in ("first token", "between tokens"):
            median, p95, p99 = (told[name, f"{what}, {each}"] for each in ("median", "p95", "p99"))
            assert 0 < median <= p95 <= p99


@pytest.mark.peers
def test_the_engines_benchmark_runs() -> None:
    home = os.environ.get("VENEER_BENCH_HOME", str(Path.home() / ".veneer"))
    result = report_of(run("serving.py", "--quick", "--peers", "", "--json", VENEER_HOME=home))
    assert len(result["bars"]) >= 6


@pytest.mark.peers
def test_the_benchmark_of_a_large_base_runs() -> None:
    home = os.environ.get("VENEER_BENCH_HOME", str(Path.home() / ".veneer"))
    result = report_of(run("serving.py", "--large", "--quick", "--json", VENEER_HOME=home))
    assert {r["metric"] for r in result["rows"]} == {"base", "8 adapters"}
    assert all(r["value"] > 0 for r in result["rows"])
