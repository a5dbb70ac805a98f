"""The benchmark of runs trained together or one by one: either way, the same number of steps of the requested
size are trained."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.benchmarks.runs import benchmark_module
from tests.tiny_base import tiny_base_dir


def test_both_sides_train_every_customer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = benchmark_module(monkeypatch, "together")
    sizes = {"customers": 3, "rows": 1, "tokens": 96, "steps": 4, "rank": 2}
    args = argparse.Namespace(**sizes, base=str(tiny_base_dir(tmp_path)), dtype="float32", device="cpu")
    for name in bench.SIDES[:2]:
        folder = tmp_path / name
        folder.mkdir()
        bench.write_rows(folder, args)
        found = bench.side(name, folder, args)
        assert found["tokens_per_second"] > 0
        assert found["tokens"] == 3 * 2 * 96
        assert len(list(folder.glob("out-*/adapter_model.safetensors"))) == 3
