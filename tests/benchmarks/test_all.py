"""The run of all benchmarks: a stopped run continues, and the table has a column for each kind of processor."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.benchmarks.runs import benchmark_module, run_benchmark

RUN = {
    "kind": "no AVX512", "cpu": "Some Xeon, family 6 model 63", "threads": 2, "torch": "2.13", "transformers": "5.24",
    "peft": "0.21", "quick": True, "date": "2026-12-01T10:00", "commit": "abc",
}  # fmt: skip
TEXT = {
    ("floor, float32", "products"): 310.4,
    ("floor, head at trained ones", "tokens_per_second"): 600.0,
    ("veneer", "tokens_per_second"): 420.0,
    ("veneer", "peak_memory"): 2.0,
    ("peft float32", "tokens_per_second"): 300.0,
    ("peft float32", "peak_memory"): 5.5,
    ("peft bf16", "tokens_per_second"): 177.0,
    ("peft bf16", "peak_memory"): 4.6,
    ("peft float32, compiled", "tokens_per_second"): 350.0,
}
SERVING = {
    ("veneer", "alone, base"): 60.0,
    ("llama.cpp, base (not imitated)", "generated"): 150.0,
    ("llama.cpp, base, alone (not imitated)", "generated"): 50.0,
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_module(monkeypatch, "all")


def written(folder: Path, run: dict[str, Any], *lines: dict[str, Any], name: str = "a.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(line) + "\n" for line in ({"run": run}, *lines)), encoding="utf-8")
    return file


def reported(benchmark: str, values: dict[tuple[str, str], float]) -> dict[str, Any]:
    rows = [{"name": n, "metric": m, "value": v, "unit": ""} for (n, m), v in values.items()]
    return {"benchmark": benchmark, "report": {"machine": {}, "rows": rows, "bars": []}}


def test_the_table_has_a_column_for_each_kind_of_processor(bench: ModuleType, tmp_path: Path) -> None:
    written(tmp_path, RUN, reported("text_training", TEXT))
    amd = {**RUN, "kind": "AVX-512 and VNNI (imitated)", "cpu": "AMD EPYC, family 26 model 2"}
    written(tmp_path, amd, reported("serving", SERVING), name="b.jsonl")
    written(tmp_path, {**RUN, "kind": "AMX"}, name="c.jsonl")  # nothing was measured
    lines = bench.table(bench.latest(tmp_path)).splitlines()
    assert lines[:2] == ["| | no AVX512 | AVX-512 and VNNI (imitated) |", "| --- | --- | --- |"]
    for line in (
        "| products of the model's shapes, GFLOP/s | 310 (float32) | |",
        "| **training text**, tokens/s | 420 | |",
        "| share of what the products allow | 70% | |",
        "| over PEFT | 1.40× (peft float32) | |",
        "| over PEFT, compiled | 1.20× (peft float32, compiled) | |",
        "| PEFT's least memory over it | 2.30× (peft bf16) | |",
        "| **serving one request**, tokens/s | | 60 |",
        "| one request: over llama.cpp | | 1.20× (llama.cpp, base, alone (not imitated)) |",
    ):
        assert line in lines
    assert len([line for line in lines if line.startswith("|")]) == 11
    assert any("Some Xeon, family 6 model 63, 2 threads" in line for line in lines)


def test_a_full_run_comes_before_a_later_quick_one(bench: ModuleType, tmp_path: Path) -> None:
    full = {("veneer", "tokens_per_second"): 100.0}
    written(tmp_path, {**RUN, "quick": False}, reported("text_training", full))
    written(tmp_path, RUN, reported("text_training", TEXT), name="b.jsonl")
    (found,) = bench.latest(tmp_path)
    assert not found[0]["run"]["quick"]


def test_a_stopped_run_is_continued_and_a_finished_one_is_not(bench: ModuleType, tmp_path: Path) -> None:
    later = {**RUN, "date": "2026-12-02T11:30"}
    stopped = written(tmp_path, RUN, {"side": ["serving", "veneer"], "result": {}})
    stopped.write_text(stopped.read_text() + '{"side": ["serv')
    assert bench.record_of(later, tmp_path) == stopped
    with stopped.open("a") as file:
        file.write(json.dumps({"done": True}) + "\n")
    assert len(bench.recorded(stopped)) == 3
    assert bench.record_of(later, tmp_path).name == "2026-12-02T1130-no-avx512-quick.jsonl"
    assert bench.record_of({**RUN, "quick": False}, tmp_path) != stopped
    assert bench.record_of({**RUN, "commit": "def"}, tmp_path) != stopped


def test_unknown_benchmark_error_lists_known_benchmarks() -> None:
    ran = run_benchmark("all.py", "--only", "serving,mixing")
    assert ran.returncode == 2
    assert "--only has no mixing; there are text_training, image_training" in ran.stderr
