"""The serving benchmarks run and report in the common format."""

from __future__ import annotations

import pytest

from tests.benchmarks.runs import BENCH_HOME, report_of


@pytest.mark.slow
def test_http_load_makes_no_errors() -> None:
    result = report_of("serving_load.py", "--quick", "--rates", "20,60", "--requests", "10")
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
    result = report_of("serving.py", "--quick", "--peers", "", **BENCH_HOME)
    assert len(result["bars"]) >= 6


@pytest.mark.peers
def test_the_benchmark_of_a_large_base_runs() -> None:
    result = report_of("serving.py", "--large", "--quick", **BENCH_HOME)
    assert {r["metric"] for r in result["rows"]} == {"base", "8 adapters"}
    assert all(r["value"] > 0 for r in result["rows"])
