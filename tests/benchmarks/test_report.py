"""The parts that benchmarks share: sides are recorded as they end, and older processors are imitated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.benchmarks.runs import benchmark_module

SIDE = """
import json, pathlib, sys
with pathlib.Path(sys.argv[1]).open("a") as log: log.write("ran ")
print("a line of a library")
print(json.dumps({"part": "first half", "speed": 12.5}))
print(json.dumps({"speed": 25.0}))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VENEER_BENCH_RECORD", str(tmp_path / "record.jsonl"))
    return benchmark_module(monkeypatch, "_report")


def side(shared: ModuleType, folder: Path, name: str, code: int = 0) -> dict:
    command = [sys.executable, "-c", SIDE, str(folder / f"{name}.log"), str(code)]
    return shared.run_process(["some", name, 0], command)


def test_a_stopped_run_continues_with_the_sides_not_recorded(
    shared: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert side(shared, tmp_path, "one") == {"speed": 25.0}
    with pytest.raises(SystemExit, match="some: two failed with exit code 3"):
        side(shared, tmp_path, "two", code=3)
    (line,) = shared.recorded(tmp_path / "record.jsonl")
    assert line["side"] == ["some", "one", 0]
    assert line["result"] == {"speed": 25.0}
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "some: one: first half: speed 12.5" in printed.err

    assert side(shared, tmp_path, "one") == {"speed": 25.0}
    assert side(shared, tmp_path, "two") == {"speed": 25.0}
    assert (tmp_path / "one.log").read_text() == "ran "
    assert (tmp_path / "two.log").read_text() == "ran ran "
    assert [found["side"][1] for found in shared.recorded(tmp_path / "record.jsonl")] == ["one", "two"]


@pytest.mark.parametrize(
    ("flags", "native", "as_avx512"),
    [
        ("avx2 avx512f avx512_vnni avx512_bf16 amx_bf16", "AMX", "AVX-512 and VNNI (imitated)"),
        ("avx2 avx512f avx512_vnni avx512_bf16", "AVX512-BF16 without AMX", "AVX-512 and VNNI (imitated)"),
        ("avx2 avx512f", "AVX-512", "AVX-512 (imitated)"),
        ("avx2 avx_vnni", "no AVX512", "no AVX512 (imitated)"),
    ],
)
def test_kinds_of_processors(shared: ModuleType, flags: str, native: str, as_avx512: str) -> None:
    assert shared.kind_of(flags.split()) == native
    assert shared.kind_of(flags.split(), "avx512") == as_avx512
    assert shared.kind_of(flags.split(), "avx2") == "no AVX512 (imitated)"


@pytest.mark.parametrize("name", ["avx512", "avx2"])
def test_imitation_sets_every_variable_and_marks_the_sides_that_ignore_them(
    shared: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(shared, "cpuinfo", lambda: {"flags": "avx2 avx512f avx512_vnni avx512_bf16"})
    monkeypatch.setattr(sys, "argv", ["some.py", "--imitate", name])
    assert shared.parsed(shared.options("", "")).imitate == name
    march = {"avx512": "cascadelake", "avx2": "haswell"}[name]
    assert os.environ["VENEER_MARCH"] == os.environ["TORCHINDUCTOR_CPP_MARCH"] == march
    assert os.environ["ATEN_CPU_CAPABILITY"] == name
    result = shared.report([shared.row(n, "speed", 1, "") for n in ("veneer", "vllm, no LoRA")], [], {})
    assert [r["name"] for r in result["rows"]] == ["veneer", "vllm, no LoRA (not imitated)"]
    assert result["machine"]["kind"].endswith("(imitated)")


def test_a_processor_is_not_imitated_by_an_older_one(
    shared: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared, "cpuinfo", lambda: {"flags": "avx2"})
    monkeypatch.setattr(sys, "argv", ["some.py", "--imitate", "avx512"])
    with pytest.raises(SystemExit):
        shared.parsed(shared.options("", ""))
    assert "needs a processor with avx512_vnni" in capsys.readouterr().err


@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="needs AVX-512")
def test_torch_obeys_the_imitation(shared: ModuleType) -> None:
    code = "import json, torch; print(json.dumps({'capability': torch.backends.cpu.get_cpu_capability()}))"
    env = {**os.environ, **shared.IMITATIONS["avx2"]}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == {"capability": "AVX2"}


def test_the_floor_is_the_fastest_arithmetic(shared: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake clock counts the products: float32 is twice as fast as bfloat16, and float16 takes too long to finish."""
    now, made = [0.0], []
    monkeypatch.setattr(shared.time, "perf_counter", lambda: now[0])

    def prepare(dtype: torch.dtype) -> list:
        def product() -> None:
            now[0] += {torch.float32: 1.0, torch.bfloat16: 2.0, torch.float16: 50.0}[dtype]
            made.append(dtype)

        return [product] * 16

    assert shared.fastest(prepare, rounds=2) == ("float32", [16.0, 16.0])
    assert made.count(torch.float16) == 2
    assert made.count(torch.bfloat16) == 4
