"""The adapters benchmark uses the real shapes and labels its figures."""

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


def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script_module(ROOT / "benchmarks" / "adapters.py", "adapters_benchmark")


def test_the_shapes_are_those_of_the_real_models(monkeypatch):
    """722 and 304 modules; a rank-4 file of 2-byte weights has 20.3 and 36.5 MiB, computed from the official
    configs."""
    bench = module(monkeypatch)
    for shapes, count, size in ((bench.sdxl_shapes(), 722, 20.3), (bench.flux_shapes(), 304, 36.5)):
        assert shapes.total() == count
        assert sum(4 * 2 * sum(s) * n for s, n in shapes.items()) / 2**20 == pytest.approx(size, abs=0.06)


@pytest.mark.peers
def test_a_quick_run_meets_its_bars():
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "adapters.py"), "--quick", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert set(result) == {"machine", "rows", "bars"}
    assert all(b["ok"] for b in result["bars"] if "svd" in b["name"] or "error" in b["name"])
