"""The serving benchmarks run and report in the common format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks.runs import BENCH_HOME, ROOT, benchmark_module, report_of, run_benchmark


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
    assert {"base", "8 adapters", "alone, 1 adapter"} <= {r["metric"] for r in result["rows"]}


@pytest.mark.peers
@pytest.mark.parametrize("side", ["many adapters", "more adapters than fit"])
def test_sides_with_more_adapters_run(side: str, tmp_path: Path) -> None:
    ran = run_benchmark("serving.py", "--side", json.dumps([f"veneer, {side}", str(tmp_path), True]), **BENCH_HOME)
    result = json.loads(ran.stdout.splitlines()[-1])
    assert all(v["tokens/s"] > 0 for k, v in result.items() if k != "cold loads")


@pytest.mark.peers
def test_llama_cpp_generates_what_veneer_generates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files for llama.cpp hold the same base and adapter: greedy tokens begin alike, and the adapter matters."""
    from peft import PeftModel

    bench = benchmark_module(monkeypatch, "serving")
    monkeypatch.setattr(bench, "REQUESTS", 2)
    python = ROOT / ".venv-llama/bin/python"
    if not python.exists():
        pytest.skip("needs .venv-llama: make .venv-llama/.ready")
    bench.export(tmp_path)
    found = [
        bench.run_script("llama.cpp", bench.LLAMA, python, tmp_path, adapters, True, 0)["tokens"] for adapters in (0, 1)
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ids = torch.tensor(bench.prompts(1))
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "a0"))
    with adapted.disable_adapter():
        base = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, 64:].tolist()
    own = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, 64:].tolist()
    assert [tokens[:8] for tokens in found] == [base, own]
    assert base != own


@pytest.mark.peers
def test_the_benchmark_of_a_large_base_runs() -> None:
    result = report_of("serving.py", "--large", "--quick", **BENCH_HOME)
    assert {r["metric"] for r in result["rows"]} == {"base", "8 adapters"}
    assert all(r["value"] > 0 for r in result["rows"])
