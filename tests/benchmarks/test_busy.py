"""The busy-machine benchmark: its processes keep processors busy until they end, and it reports in the common
format."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.benchmarks.runs import benchmark_module, report_of, run_benchmark


def test_load_processes_run_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = benchmark_module(monkeypatch, "busy")
    before = set(psutil.Process().children())
    with busy.neighbours(2):
        started = set(psutil.Process().children()) - before
        assert len(started) == 2
        end = time.monotonic() + 20
        while any(p.cpu_times().user < 0.05 for p in started):
            assert time.monotonic() < end
            time.sleep(0.01)
    assert set(psutil.Process().children()) == before


def test_unknown_part_error_lists_known_parts() -> None:
    ran = run_benchmark("busy.py", "--only", "training,mixing")
    assert ran.returncode == 2
    assert "--only has no mixing; there are training, serving, pictures" in ran.stderr


@pytest.mark.peers
def test_the_benchmark_runs() -> None:
    result = report_of("busy.py", "--quick")
    assert {b["name"].partition(":")[0] for b in result["bars"]} == {"training", "serving", "pictures"}
    told = {(r["name"], r["metric"]): r["value"] for r in result["rows"]}
    for name in ("training: PEFT", "pictures: diffusers + PEFT"):
        assert told[name, "beside two"] > 0
