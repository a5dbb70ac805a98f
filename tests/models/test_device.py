"""Choosing the dtype and the number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from veneer.errors import ConfigError, ResourceError
from veneer.models.device import check_device_name, check_memory, choose_device, choose_dtype, cpu_quota, thread_count
from veneer.train.preflight import free_memory

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Return a function that sets the profile's rates of float32 and bfloat16."""

    def use(float32: float, bfloat16: float) -> None:
        stored = json.loads((ROOT / "tests" / "profile.json").read_text())
        stored["gflops"] |= {"float32": {"1x1x1": float32}} | ({"bfloat16": {"1x1x1": bfloat16}} if bfloat16 else {})
        if not bfloat16:
            del stored["gflops"]["bfloat16"]
        file = tmp_path / f"{float32}-{bfloat16}.json"
        file.write_text(json.dumps(stored))
        monkeypatch.setenv("VENEER_PROFILE", str(file))

    return use


WIDE = "products in float32, which is 1.9 times as fast on this processor (profile: 311 against 167 GFLOP/s)"


def test_auto_dtype_on_a_cpu_is_read_from_the_profile(rates: Callable[[float, float], None]) -> None:
    rates(200.0, 400.0)
    for stored in ("BF16", "F16", "Q4_1"):
        dtype, reason = choose_dtype("auto", CPU, stored)
        assert dtype == torch.bfloat16
        assert reason == "bfloat16 in memory and in products (profile: 400 GFLOP/s, float32 200)"
    rates(311.0, 167.0)
    assert choose_dtype("auto", CPU, "BF16") == (torch.bfloat16, f"bfloat16 in memory; {WIDE}")
    rates(311.0, 0.0)
    assert choose_dtype("auto", CPU, "BF16")[0] == torch.bfloat16
    for float32, bfloat16 in ((200.0, 400.0), (311.0, 167.0)):
        rates(float32, bfloat16)
        dtype, reason = choose_dtype("auto", CPU, "F32")
        assert dtype == torch.float32
        assert reason.startswith("the weights are stored in float32")
    assert choose_dtype("float16", CPU, "BF16") == (torch.float16, "as requested")


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), torch.float32), ((9, 0), torch.bfloat16)])
def test_auto_dtype_on_cuda_follows_the_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: torch.dtype
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a card")
    dtype, reason = choose_dtype("auto", torch.device("cuda", 0), "BF16")
    assert dtype == chosen
    assert (reason == "a card (compute 9.0) multiplies bfloat16 in hardware") == (chosen == torch.bfloat16)


def test_a_mac_uses_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    for refuse in (lambda: choose_device("mps"), lambda: check_device_name("mps", "base.device")):
        with pytest.raises(ConfigError, match="does not run on MPS") as error:
            refuse()
        assert "cpu" in (error.value.fix or "")


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
