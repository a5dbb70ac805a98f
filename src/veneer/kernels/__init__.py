"""The compiled half of the CPU fast path: native.c, built once on the user's machine, called through ctypes.

Optional: without a C compiler everything runs on torch's own operations, slower and with the same results within
bfloat16 rounding. `status()` says which of the two it is and why; VENEER_NATIVE=0 turns the compiled kernels off.

Knows raw tensors; imports torch and nothing of veneer.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Pair",
    "attention",
    "kept_memory",
    "load",
    "page_out",
    "peak_resident",
    "returned_memory",
    "serving",
    "status",
    "strides",
    "thin",
    "usable",
]

FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c11", "-fno-math-errno", "-fno-trapping-math"]
"""No -ffast-math: NaN and infinity keep their meaning, which the loop relies on to stop a diverged run."""

_pointer, _int64, _float, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_HEADS = [_pointer, _int64, *[_pointer] * 4, *[_int64] * 5, _float, _pointer, _int]
_SIGNATURES: dict[str, list[Any]] = {
    "use_threads": [_int],
    "stay": [_pointer, _int, _int],
    "meet_asleep": [_int],
    "rms_norm": [_pointer, _pointer, _pointer, _int64, _int64, _float, _int],
    "rms_norm_backward": [_pointer, _pointer, _pointer, _pointer, _int64, _int64, _float, _int],
    "norm_silu": [*[_pointer] * 5, *[_int64] * 4, _float, _int],
    "norm_silu_backward": [*[_pointer] * 6, *[_int64] * 4, _float, _int],
    "dropped": [_pointer, _pointer, _int64, *[ctypes.c_uint32] * 3, _float, _int],
    "gained": [*[_pointer] * 4, _int64, _int64, _int],
    "gained_backward": [*[_pointer] * 5, _int64, _int64, _int],
    "silu_gate": [_pointer, _pointer, _int64, _int64, _int],
    "silu_gate_backward": [_pointer, _pointer, _pointer, _pointer, _int64, _int64, _int],
    "geglu": [_pointer, _pointer, _int64, _int64, _int],
    "geglu_backward": [_pointer, _pointer, _pointer, _int64, _int64, _int],
    "gelu_tanh": [_pointer, _pointer, _int64, _int],
    "gelu_tanh_backward": [_pointer, _pointer, _pointer, _int64, _int],
    "gather_heads": _HEADS,
    "scatter_heads": _HEADS,
    "causal_softmax": [_pointer, *[_int64] * 7, _int],
    "softmax_backward": [_pointer, _pointer, _int64, _int64, _int],
    "token_nll": [_pointer, _pointer, _pointer, _int64, _int64, _int, _int],
    "blocks4_dense": [*[_pointer] * 4, _float, _pointer, *[_int64] * 4, _pointer, _int, _int],
    "blocks4_quantise": [_pointer, _int, _pointer, _pointer, _int64, _int64, _pointer, _pointer, _int],
    "ggml_dense": [_int, _pointer, _int64, _pointer, _int, _int],
    "rows8_dense": [_pointer, _pointer, _int64, _int64, _pointer, _int, _int],
}
_PRODUCTS: dict[str, list[Any]] = {
    "attend": [*[_pointer] * 6, *[_int64] * 5, _float, _int],
    "attend_backward": [*[_pointer] * 10, *[_int64] * 5, _float, _int],
    "thin_add": [_pointer, _int, *[_pointer] * 3, *[_int64] * 3, _int],
    "thin_through": [_pointer, _int, *[_pointer] * 3, *[_int64] * 3, _int],
    "thin_gradients": [_pointer, _int, *[_pointer] * 6, *[_int64] * 3, _int],
}
_SERVING: dict[str, list[Any]] = {
    "thin_rows": [
        _pointer, _int64, _pointer, _int64, _pointer, _int64, _pointer, _pointer, _pointer, _pointer, _int64, _int
    ],
    "store_rows": [_pointer, _int64, _pointer, _int64, _pointer, _pointer, *[_int64] * 3, _pointer, _pointer, _int],
    "turn_and_store": [
        _pointer, *[_int64] * 3, *[_pointer] * 4, _float, *[_pointer] * 3, _int64, _pointer, _pointer, _int
    ],
    "paged_attend": [
        _pointer, _int64, _pointer, *[_int64] * 3, _pointer, _pointer, _int64, _pointer, _int64, _pointer, _pointer,
        _float, _float, _int64, _int64, _int
    ],
    "panel_product": [_pointer, *[_int64] * 3, *[_pointer] * 4, _int64, _int, _int],
    "decode": [
        _pointer, _int64, _pointer, _int64, *[_pointer] * 7, _int64, _pointer, _int64, _int64, _pointer, _int64,
        *[_pointer] * 4, _int64, _pointer, _int
    ],
}  # fmt: skip
"""What only a processor with AVX512-BF16 has."""
SOURCES = ("native.c", "quantised.c", "serving.c", "decoder.c", "threads.c")
HEADERS = ("bf16.h", "serving.h")
_reason = "not looked for yet"


def _cache() -> Path:
    home = os.environ.get("VENEER_HOME")
    return Path(home) / "kernels" if home else Path.home() / ".veneer" / "kernels"


def _build(compiler: str) -> Path:
    """Compile into the cache, named by what was compiled, for which processor and by which compiler."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    cpu = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0] if sys.platform == "linux" else ""
    here = Path(__file__).parent
    texts = [(here / name).read_text() for name in (*SOURCES, *HEADERS)]
    key = hashlib.sha256("\0".join([*texts, version, cpu, platform.machine(), *FLAGS]).encode()).hexdigest()
    target = _cache() / f"native-{key[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / target.name
            subprocess.run(
                [compiler, *FLAGS, *(str(here / name) for name in SOURCES), "-o", str(built), "-lm"],
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
            )
            built.replace(target)
    return target


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled kernels, or None. Looked for once a process."""
    global _reason
    if os.environ.get("VENEER_NATIVE", "1") == "0":
        _reason = "turned off by VENEER_NATIVE=0"
        return None
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        _reason = "no C compiler (cc, gcc or clang) on the path"
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
        more = (_PRODUCTS if _has(library, "products") else {}) | (_SERVING if _has(library, "serving") else {})
        for name, arguments in (_SIGNATURES | more).items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        wrong = _self_test(library)
    except (OSError, AttributeError, ValueError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines() or [repr(error)]
        _reason = f"{compiler} could not build them: {lines[-1]}"
        return None
    if wrong:
        _reason = f"built by {compiler}, but {wrong} disagrees with torch on this machine"
        return None
    _reason = f"compiled by {compiler}"
    return library


def _self_test(library: ctypes.CDLL) -> str:
    """The name of the first kernel whose result is not torch's; cheap, and run before anything trusts the library."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 72, generator=generator).bfloat16()
    w = torch.randn(72, generator=generator).bfloat16()
    y = torch.empty_like(x)
    library.rms_norm(x.data_ptr(), w.data_ptr(), y.data_ptr(), 7, 72, 1e-5, 1)
    if not torch.allclose(
        y.float(), torch.nn.functional.rms_norm(x.float(), (72,), w.float(), 1e-5), rtol=1e-2, atol=1e-3
    ):
        return "rms_norm"
    s = x.clone()
    library.causal_softmax(s.data_ptr(), 1, 7, 1, 72, 65, 0, 0, 1)
    future = torch.arange(72)[None] > torch.arange(65, 72)[:, None]
    if not torch.allclose(s.float(), x.float().masked_fill(future, -torch.inf).softmax(1), rtol=1e-2, atol=1e-5):
        return "causal_softmax"
    if _has(library, "products"):
        q, k, v = (torch.randn(1, 70, 2, 40, generator=generator).bfloat16() for _ in range(3))
        out, lse = torch.empty_like(q), torch.empty(1, 2, 70)
        pointers = [t.data_ptr() for t in (q, k, v, out, lse)]
        library.attend(*pointers, strides(q, k, v, out), 1, 2, 70, 70, 40, 0.25, 1)
        q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
        want = torch.softmax(0.25 * q @ k.mT, -1) @ v
        if not torch.allclose(out.float().transpose(1, 2), want, rtol=2e-2, atol=2e-2):
            return "attend"
    return ""


def status() -> str:
    """One line for a report: which kernels run and why."""
    return (
        f"native CPU kernels: {_reason}"
        if load() is not None
        else f"torch's own operations (native CPU kernels: {_reason})"
    )


def usable(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library if every tensor is a contiguous bfloat16 one on the CPU, else None."""
    if all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.is_contiguous() for t in tensors):
        return load()
    return None


def attention(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library if it has the attention kernels (a processor with AVX512-BF16) and they take these: bfloat16 on the
    CPU, the last dimension even and lying together."""
    if all(
        t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.shape[-1] % 2 == 0 and t.stride(-1) == 1
        for t in tensors
    ):
        return _with_products()
    return None


def thin(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library if it has the kernels of thin products (as `attention`) and they take these as x or y: as `usable`,
    and the last dimension a multiple of 16."""
    return _with_products() if usable(*tensors) is not None and all(t.shape[-1] % 16 == 0 for t in tensors) else None


class Pair(ctypes.Structure):
    """A pair as the kernels of thin products take it; A and B are pointers to contiguous float32."""

    _fields_ = (
        ("A", _pointer),
        ("B", _pointer),
        ("first", _int64),
        ("last", _int64),
        ("rank", _int64),
        ("scale", _float),
    )


def strides(*tensors: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """All but the last of each, as the kernels for any layout take them."""
    flat = [step for t in tensors for step in t.stride()[:-1]]
    return (_int64 * len(flat))(*flat)


def serving(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library if it has the kernels for serving (as `attention`) and they take these: as `usable`."""
    library = usable(*tensors)
    return library if library is not None and _has(library, "serving") else None


def _with_products() -> ctypes.CDLL | None:
    library = load()
    return library if library is not None and _has(library, "products") else None


def _has(library: ctypes.CDLL, what: str) -> bool:
    return bool(_int.in_dll(library, f"has_{what}").value)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h of glibc
_DEFAULT_TRIM, _DEFAULT_MMAPS = 128 * 1024, 65536


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process for the length of a with-block, then give it back.

    glibc maps every block above 32 MB (and many above 128 kB) afresh and unmaps it when freed; the kernel zeroes the
    pages again each time. A training step frees and takes the same activations over and over: keeping them measured
    8% of a step. Does nothing where the C library has no mallopt."""
    libc = ctypes.CDLL(None)
    mallopt, trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
    if mallopt is None or trim is None:
        yield
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_M_MMAP_MAX, _DEFAULT_MMAPS)
        mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM)
        gc.collect()
        trim(0)


@contextmanager
def returned_memory() -> Iterator[None]:
    """Give freed memory back at once for the length of a with-block: the opposite of `kept_memory`.

    glibc takes larger and larger blocks from its heap once one has been freed, and what stays there between them keeps
    the heap from shrinking: quantising weight after weight left a tenth of the model in holes."""
    libc = ctypes.CDLL(None)
    mallopt, trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
    if mallopt is None or trim is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _DEFAULT_TRIM)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # where glibc's own rule ends
        trim(0)


def peak_resident() -> int:
    """The most memory this process has held, in bytes. On Linux not ru_maxrss, which begins at what the parent held
    when it started us."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:  # Windows has no resource module
        import psutil

        return int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


_MADV_PAGEOUT = 21  # Linux 5.4


def page_out(tensor: Tensor) -> None:
    """Hint that nobody will read this memory soon, so that pages which only mirror a file stop counting as ours.

    Weights read through a memory map stay resident as long as any of the file's tensors lives. The hint changes no
    content: a page that is touched again is read again. Does nothing off Linux, or on a device."""
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "madvise"):
        return
    page = os.sysconf("SC_PAGE_SIZE")
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if last > first:
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(_MADV_PAGEOUT))
