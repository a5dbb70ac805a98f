"""Choosing the dtype and the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer.errors import ResourceError
from veneer.models.device import check_memory, choose_device, choose_dtype, cpu_quota, thread_count
from veneer.train.preflight import free_memory

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("stored", "hardware", "chosen"),
    [
        ("BF16", "this CPU (AMX)", torch.bfloat16),
        ("F16", "this CPU (AMX)", torch.bfloat16),
        ("Q4_1", "this CPU (AMX)", torch.bfloat16),
        ("F32", "this CPU (AMX)", torch.float32),
        ("BF16", "", torch.float32),
        ("F32", "", torch.float32),
    ],
)
def test_auto_dtype_uses_bf16_hardware(
    monkeypatch: pytest.MonkeyPatch, stored: str, hardware: str, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(hardware), raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    dtype, reason = choose_dtype("auto", CPU, stored)
    assert dtype == chosen
    assert ("bfloat16" in reason) or ("float32" in reason)
    assert dtype == torch.float32 or hardware in reason
    assert choose_dtype("float16", CPU, stored) == (torch.float16, "as requested")


def test_cuda_device_has_the_index_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [choose_device(name) for name in ("auto", "cuda", "cuda:1")] == [torch.device("cuda", n) for n in (0, 0, 1)]
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    assert choose_device("cuda") == torch.device("cuda", 1)


def test_torch_cache_counts_as_free_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 50)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 20)
    card = torch.device("cuda", 0)
    assert free_memory(card) == 10 + 50 - 20
    check_memory(Path("base"), 40, torch.float32, card)
    with pytest.raises(ResourceError, match="memory are free"):
        check_memory(Path("base"), 41, torch.float32, card)


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """Create a file tree that imitates a machine's /proc and /sys."""
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "200000 100000"}, 0.5),
        ("5:memory:/\n0::/", {"memory/cpu.max": "1 100000", "cpu.max": "100000 100000"}, 1.0),
        ("0::/", {"cpu.max": "nonsense"}, None),
    ],
)
def test_cpu_quota_is_the_minimum_over_parents(
    tmp_path: Path, groups: str, files: dict[str, str], wanted: float | None
) -> None:
    assert cpu_quota(machine(tmp_path, groups, files)) == wanted


def test_threads_are_limited_by_the_quota(tmp_path: Path) -> None:
    assert thread_count({}, machine(tmp_path, "0::/", {"cpu.max": "30000 100000"})) == 1
    assert thread_count({}, machine(tmp_path, "0::/", {"cpu.max": "999900000 100000"})) == len(os.sched_getaffinity(0))


def test_omp_num_threads_sets_the_count(tmp_path: Path) -> None:
    limited = machine(tmp_path, "0::/", {"cpu.max": "30000 100000"})
    assert thread_count({"OMP_NUM_THREADS": "3"}, limited) == 3
    assert thread_count({"OMP_NUM_THREADS": "3,2"}, limited) == 3, "OpenMP's list is one number for each level"
    assert thread_count({"OMP_NUM_THREADS": "all"}, limited) == 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_threads_are_limited_by_affinity() -> None:
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT / "src")}
    program = "from veneer.models.device import thread_count; import sys; print(thread_count(), 'torch' in sys.modules)"
    command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-c", program]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ran.stdout.split() == ["1", "False"], ran.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
@pytest.mark.parametrize(("said", "threads"), [("", 1), ("torch.set_num_threads(5);", 5)])
def test_limit_threads_uses_the_quota(said: str, threads: int) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    program = f"import torch; from veneer.models import device; device.cpu_quota = lambda root: 0.5; {said}"
    program += "device.limit_threads(); print(torch.get_num_threads())"
    ran = subprocess.run(
        [sys.executable, "-c", program], env=env | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True
    )
    assert ran.stdout.strip() == str(threads), ran.stderr
