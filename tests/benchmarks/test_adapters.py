"""The adapters benchmark uses the real shapes and labels its figures."""

from __future__ import annotations

import pytest

from tests.benchmarks.runs import benchmark_module, report_of


def test_the_shapes_are_those_of_the_real_models(monkeypatch):
    """SDXL has 722 modules and FLUX.1 has 304.

    Rank-4 files of 2-byte weights take 20.3 and 36.5 MiB, computed from the official configurations."""
    bench = benchmark_module(monkeypatch, "adapters")
    for shapes, count, size in ((bench.sdxl_shapes(), 722, 20.3), (bench.flux_shapes(), 304, 36.5)):
        assert shapes.total() == count
        assert sum(4 * 2 * sum(s) * n for s, n in shapes.items()) / 2**20 == pytest.approx(size, abs=0.06)


@pytest.mark.peers
def test_a_quick_run_meets_its_bars():
    result = report_of("adapters.py", "--quick", OMP_NUM_THREADS="1")
    assert all(b["ok"] for b in result["bars"] if "svd" in b["name"] or "error" in b["name"])
