"""Choose a base's device, dtype and thread count, and check free memory.

The choice depends on the devices, the machine's profile (ops/profile.py), the environment, the affinity mask and
the cgroups. torch is imported only to query a device.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import ConfigError, ResourceError, nearest, one_of, quoted

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16",
    "fp16": "float16",
}  # fmt: skip


_NAMES = ("auto", "float32", "bfloat16", "float16")
_DEVICE_NAME = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,3})?")


def check_dtype_name(dtype: str, where: str) -> None:
    """Raise ConfigError unless bases can be loaded in `dtype`.

    `where`: the option that the error reports."""
    if dtype not in _DTYPES:
        one_of(dtype, _NAMES, "a dtype", where)


def check_device_name(device: str, where: str) -> None:
    """Raise ConfigError if the device name is invalid or the device is not present.

    `where`: the option that the error reports. Imports torch for devices other than auto and cpu."""
    if not _DEVICE_NAME.fullmatch(device):
        suggestion = nearest(device.lower(), ("auto", "cpu", "cuda"), 1)
        hint = f"did you mean {suggestion[0]}? " if suggestion else ""
        message = f"{quoted(device)} is not a device"
        raise ConfigError(message, where=where, fix=f"{hint}Valid devices: auto, cpu, cuda and cuda:1")
    if device not in ("auto", "cpu"):
        choose_device(device)


def choose_device(device: str | torch.device) -> torch.device:
    """Return the device with this name; "auto" is CUDA if available, else the CPU.

    The returned CUDA device always has an index, like a tensor's device; "cuda" means torch's current device.
    Raises ConfigError if the device is not present or not supported."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        selected = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} is not a device", fix="auto, cpu, cuda or cuda:1") from error
    if selected.type == "cuda" and (selected.index or 0) >= torch.cuda.device_count():
        message = f"there is no CUDA device {device!s} ({torch.cuda.device_count()} found)"
        raise ConfigError(message, fix="use device auto or cpu")
    if selected.type == "cuda" and selected.index is None:
        selected = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
    if selected.type == "mps":
        message = "veneer does not run on MPS: no test has run there, and MPS has no float64, which losses need"
        raise ConfigError(message, fix="use device auto or cpu")
    return selected


def choose_dtype(dtype: str | torch.dtype, device: torch.device, stored: str) -> tuple[torch.dtype, str]:
    """Return the dtype to load a base in, and the reason.

    `stored`: the dtype of the weight files ("BF16", "F32", "Q4_1", …).

    "auto" keeps weights that are stored in float32 in float32, so that they are not rounded. Other weights are
    loaded in bfloat16 on a CPU and on CUDA from compute capability 8, otherwise in float32. On a CPU, the machine's
    profile decides in which dtype products are computed. Raises ConfigError for an unknown dtype."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype, "as requested"
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ConfigError(f"{dtype!r} is not a dtype", fix="auto, float32, bfloat16 or float16")
        torch_dtype: torch.dtype = getattr(torch, _DTYPES[dtype])
        return torch_dtype, "as requested"
    if stored in ("F32", "F64"):
        return (
            torch.float32,
            "the weights are stored in float32 (bfloat16 would halve the memory but round the weights)",
        )
    if device.type == "cpu":
        return _cpu_dtype()
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (compute {major}.{minor})"
        return torch.bfloat16, f"{name} multiplies bfloat16 in hardware"
    return torch.float32, f"this {device.type.upper()} does not multiply bfloat16 in hardware, so float32 is faster"


def _cpu_dtype() -> tuple[torch.dtype, str]:
    """Return the dtype of 16-bit weights in memory, and the reason, which also names the dtype of products."""
    import torch

    from veneer.ops.profile import profile

    limit_threads()  # the profile depends on the number of threads
    found = profile()
    narrow, wide = found.rate("bfloat16"), found.rate("float32")
    if found.arithmetic == "bfloat16":
        text = f"bfloat16 in memory and in products (profile: {narrow:,.0f} GFLOP/s, float32 {wide:,.0f})"
        return torch.bfloat16, text
    text = "bfloat16 in memory; products in float32 (the profile has no rate for bfloat16)"
    if narrow:
        text = f"bfloat16 in memory; products in float32, which is {wide / narrow:.1f} times as fast on this processor "
        text += f"(profile: {wide:,.0f} against {narrow:,.0f} GFLOP/s)"
    return torch.bfloat16, text


def free_on_gpu(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a CUDA device.

    This is the free memory plus the memory that torch's allocator has reserved but does not use."""
    import torch

    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def check_memory(path: Path, needs: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ResourceError if `device` has fewer than `needs` bytes free.

    `path`: the base that the error reports."""

    if device.type == "cuda":
        free = free_on_gpu(device)
    elif device.type == "cpu":
        import psutil

        free = psutil.virtual_memory().available
    else:
        return
    if needs > free:
        message = (
            f"this base needs {needs / 1e9:.1f} GB in {dtype!s:.20} but only {free / 1e9:.1f} GB of memory are free"
        )
        where = f"{path} on {device}"
        raise ResourceError(message, where=where, fix="use a smaller base, dtype bfloat16, or another machine")


# -- threads -----------------------------------------------------------------------------------------------------------


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU quota set by cgroup v2, in processors, or None if there is none.

    If both the process's cgroup and its parents have quotas, the smallest one counts."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        group = (root / "proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition("0::/")[2]
        below, top = Path(group), root / "sys/fs/cgroup"
        for folder in {top / below, *(top / parent for parent in below.parents), top}:
            if (folder / "cpu.max").is_file():
                most, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
                limits += [] if most == "max" else [int(most) / int(period)]
    return min(limits, default=None)


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def thread_count(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Return the number of compute threads to use.

    If OMP_NUM_THREADS is set, return its value; otherwise return the number of processors in the affinity
    mask, limited to the cgroup's quota (rounded up)."""
    setting = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    if setting.isdigit() and int(setting):
        return int(setting)
    limit = cpu_quota(root)
    return max(1, min(len(_allowed()), math.ceil(limit) if limit is not None else sys.maxsize))


def limit_threads() -> None:
    """Lower torch's thread count to `thread_count()`, unless it was already changed.

    torch respects the affinity mask but ignores the cgroup's quota. If a process exceeds the quota, the
    kernel stops all threads of the process until the next period, usually 100 ms."""
    import torch

    threads = thread_count()
    if threads < len(_allowed()) == torch.get_num_threads():
        torch.set_num_threads(threads)
