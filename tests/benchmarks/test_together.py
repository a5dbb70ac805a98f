"""The benchmark of runs trained together: both sides make the same steps of the requested size."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import script_module
from tests.tiny_base import tiny_base_dir

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script_module(ROOT / "benchmarks" / "together.py", "together_benchmark")


def test_both_sides_train_every_customer(bench: Any, tmp_path: Path) -> None:
    args = argparse.Namespace(
        customers=3,
        rows=1,
        tokens=96,
        steps=4,
        rank=2,
        base=str(tiny_base_dir(tmp_path)),
        dtype="float32",
        device="cpu",
    )
    for name in bench.SIDES[:2]:
        folder = tmp_path / name
        folder.mkdir()
        bench.write_rows(folder, args)
        found = bench.side(name, folder, args)
        assert found["tokens_per_second"] > 0
        assert found["tokens"] == 3 * 2 * 96
        assert len(list(folder.glob("out-*/adapter_model.safetensors"))) == 3
