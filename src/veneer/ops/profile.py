"""The profile of this machine: measured rates of matrix products and memory.

    found = profile()                   measured once, in under two seconds, and stored next to the compiled kernels
    found.rate("bfloat16")              GFLOP/s of the fastest of the measured shapes
    found.arithmetic                    the dtype in which products of 16-bit weights are computed
    found.bandwidth                     GB/s read from memory

The file's name is a hash of the processor, its features, the number of threads, torch's version and the
variables that restrict the instruction set. An invalid file, or a file from another machine, is replaced by a
new measurement. A profile is provisional if its rounds differed too much or other processes ran; the next process
measures it again. If no folder is writable, the profile is kept only in this process. VENEER_PROFILE names a
profile file to use instead of measuring, so that tests can give the same bits on every machine.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from veneer.errors import ConfigError
from veneer.files.atomic import replace_file

SHAPES = ((16, 1024, 1024), (256, 1024, 1024), (1024, 1024, 1024))
"""(rows, inputs, outputs) of the measured products: decoding, a short prompt and a training step."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
READ_BYTES = 1 << 28
WORTH = 1.2
"""How many times as fast an implementation must be to be chosen instead of the default."""
SECONDS = 1.4
"""Seconds after which no further round begins."""
_SLOW = 0.12
"""Expected seconds of a product above which the shape is not measured."""
_LONG_ENOUGH = 2e-3
"""A short product is repeated for this many seconds, and its mean time counts."""
_READS = 4
"""Memory reads in each round; other processes disturb memory reads more than products."""
AGREEMENT = 0.2
"""Relative difference between rounds above which a profile is provisional."""
IDLE = 0.9
"""A profile is provisional if its measurement got less than this share of the processors."""
_VERSION = "2"
"""Changed when the measurements change, so that earlier profiles are not used."""
_LOCK_SECONDS = 30.0
_IMITATIONS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "VENEER_MARCH")
"""Variables that restrict the instructions of torch, MKL, oneDNN and veneer, to imitate an older processor."""


@dataclass(frozen=True)
class Profile:
    """Measured rates.

    threads: threads that computed, at most one for each processor that this process can use.
    gflops: dtype -> "rows x inputs x outputs" -> GFLOP/s; dtypes that torch cannot multiply, and shapes that
        take too long, are missing.
    bandwidth: GB/s.
    spread: (median time / shortest time) − 1 of the noisiest measurement.
    provisional: whether the next process measures again, because the rounds differed by more than AGREEMENT, or
        because the measurement got a smaller share of the processors than IDLE.
    share: processor time / (wall time · threads) of the measurement, which is below 1 if other processes ran."""

    processor: str
    key: str
    threads: int
    torch: str
    date: str
    gflops: Mapping[str, Mapping[str, float]]
    bandwidth: float
    spread: float
    provisional: bool = False
    share: float = 1.0

    def rate(self, dtype: str) -> float:
        """Return the GFLOP/s of a dtype at its fastest shape, or 0 if torch cannot multiply it."""
        return max(self.gflops.get(dtype, {}).values(), default=0.0)

    def product_rate(self, dtype: str) -> tuple[str, float]:
        """Return (the dtype in which products of weights in `dtype` are computed, its GFLOP/s).

        The rate is float32's if torch cannot multiply the dtype."""
        computed = self.arithmetic if dtype == "bfloat16" else dtype
        return computed, self.rate(computed) or self.rate("float32")

    @cached_property
    def arithmetic(self) -> str:
        """Return the dtype in which products of 16-bit weights are computed.

        This is "float32" if float32 is over WORTH times as fast as bfloat16, otherwise "bfloat16"."""
        return "float32" if self.rate("float32") > WORTH * self.rate("bfloat16") else "bfloat16"


def processor_name() -> str:
    """Return the processor's name and the number of logical processors, as text."""
    name = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    count = os.cpu_count()
    return f"{name}, {count} {'processor' if count == 1 else 'processors'}"


def profile() -> Profile:
    """Return the profile for the current number of threads.

    The profile comes from `use_profile`, the file that VENEER_PROFILE names, the stored file, or a new
    measurement. Raises ConfigError if VENEER_PROFILE does not name a valid profile."""
    return _in_use or profile_for(torch.get_num_threads(), os.environ.get("VENEER_PROFILE", ""))


_in_use: Profile | None = None


@contextlib.contextmanager
def use_profile(chosen: Profile) -> Iterator[None]:
    """Use a profile, for example that of a checkpoint, inside a with-block, in all threads."""
    global _in_use
    previous = _in_use
    _in_use = chosen
    try:
        yield
    finally:
        _in_use = previous


@cache
def profile_for(threads: int, pinned: str) -> Profile:
    """Return the profile for a number of threads; raises the same errors as `profile`.

    pinned: the value of VENEER_PROFILE, or ""."""
    if pinned:
        if (result := _read(Path(pinned))) is None:
            problem = f"VENEER_PROFILE={pinned} is not a file with a profile of a machine"
            raise ConfigError(problem, where="VENEER_PROFILE", fix="unset it")
        return result
    from filelock import FileLock

    key = _key(threads)
    try:
        file = _file(key)
        known = _read(file, key)
        if known is not None and not known.provisional:
            return known
        # The lock keeps concurrent processes from disturbing each other's timing.
        with FileLock(f"{file}.lock", timeout=_LOCK_SECONDS, mode=0o600):
            if (result := _read(file, key)) is None or result == known:
                result = measure(key, known)
                with contextlib.suppress(OSError):  # a full disk
                    replace_file(file, [(json.dumps(asdict(result), indent=1) + "\n").encode()], mode=0o600)
            return result
    except (OSError, NotImplementedError):  # no folder is writable, or the lock timed out (an OSError)
        return measure(key)


def renew() -> Profile:
    """Discard the stored profile for the current number of threads, and return a new one.

    Raises ConfigError if VENEER_PROFILE is set."""
    if os.environ.get("VENEER_PROFILE"):
        raise ConfigError("no profile is measured while VENEER_PROFILE is set", fix="unset VENEER_PROFILE")
    profile_for.cache_clear()
    with contextlib.suppress(OSError):
        _file(key := _key(torch.get_num_threads())).unlink(missing_ok=True)
        return profile()
    return measure(key)  # the stored profile cannot be deleted


def _key(threads: int) -> str:
    from veneer.ops.cpu.build import processor_features

    machine = [_VERSION, processor_name(), *processor_features(), str(threads), torch.__version__]
    machine += [f"{name}={value}" for name in _IMITATIONS if (value := os.environ.get(name))]
    return hashlib.sha256("\0".join(machine).encode()).hexdigest()[:16]


def _file(key: str) -> Path:
    from veneer.ops.cpu.build import trusted_folder

    return trusted_folder([]) / f"profile-{key}.json"


def _read(file: Path, key: str | None = None) -> Profile | None:
    """Return the profile in a file; None if missing, invalid or from another machine."""
    try:
        result = profile_from(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None
    return result if result is not None and (key is None or result.key == key) else None


def profile_from(values: Any) -> Profile | None:
    """Return the profile with these fields, as JSON values; None if they are invalid."""
    try:
        result = Profile(**values)
        rates = [result.bandwidth, *(rate for shapes in result.gflops.values() for rate in shapes.values())]
        "".join([result.processor, result.key, result.torch, result.date])  # TypeError unless all are texts
        is_valid = all(0 < n < math.inf for n in [result.threads, *rates]) and result.spread >= 0 <= result.share
    except (TypeError, AttributeError):
        return None
    return result if is_valid and result.rate("float32") else None


def measure(key: str, known: Profile | None = None) -> Profile:
    """Measure this machine, in under two seconds.

    known: an earlier provisional profile of the same machine. A disturbance only makes a measurement slower,
        so the higher of both rates counts. If no rate became much higher, the result is not provisional."""
    works: list[tuple[_Name, float, Callable[[], object]]] = []
    for dtype in _DTYPES:
        for rows, inputs, outputs in SHAPES:
            name = str(dtype).removeprefix("torch."), f"{rows}x{inputs}x{outputs}"
            size = 2e-9 * rows * inputs * outputs
            works += [(name, size, product) for product in products_of(dtype, rows, inputs, outputs)]
    works += _READS * [(("", "read"), READ_BYTES / 1e9, reading_of(READ_BYTES))]
    rounds: dict[_Name, list[float]] = {}
    shares: list[float] = []
    # A new thread is not affected by the caller's autograd and dispatch modes.
    thread = threading.Thread(target=run_rounds, args=(works, rounds, shares), name="veneer-profile")
    thread.start()
    thread.join()
    rates = {name: size / min(rounds[name]) for name, size, _ in works if name in rounds}
    spread = max(statistics.median(seconds) / min(seconds) - 1 for seconds in rounds.values())
    share = min(1.0, shares[0])
    provisional = spread > AGREEMENT or share < IDLE
    if known is not None:
        before = {(dtype, shape): rate for dtype, shapes in known.gflops.items() for shape, rate in shapes.items()}
        before[("", "read")] = known.bandwidth
        provisional &= any(rate > (1 + AGREEMENT) * before.get(name, 0) for name, rate in rates.items())
        rates = {name: max(rates.get(name, 0), before.get(name, 0)) for name in rates | before}
    bandwidth = rates.pop(("", "read"))
    gflops: dict[str, dict[str, float]] = {}
    for (dtype_name, shape), rate in rates.items():
        gflops.setdefault(dtype_name, {})[shape] = round(rate, 3)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    threads, version = torch.get_num_threads(), torch.__version__
    numbers = round(bandwidth, 3), round(spread, 3), provisional, round(share, 3)
    return Profile(processor_name(), key, threads, version, date, gflops, *numbers)


_Name = tuple[str, str]
"""(dtype, shape) of a product; ("", "read") for memory."""


def reading_of(count: int) -> Callable[[], object]:
    """Return a function that reads `count` bytes of memory."""
    values = torch.ones(count // 8, dtype=torch.int64)
    return values.sum


def products_of(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> list[Callable[[], object]]:
    """Return implementations of a product; only the fastest of them counts.

    In float32, oneDNN is measured as well as torch's library, MKL: on some processors, oneDNN is twice as fast,
    and the kernel that computes 16-bit weights in float32 (products.py) uses oneDNN's products."""
    x, weight = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    if dtype == torch.int8:
        return [lambda: torch._int_mm(x, weight.t())]
    products: list[Callable[[], object]] = [lambda: x @ weight.t()]
    if dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))
    return products


@torch.no_grad()
def run_rounds(
    works: Sequence[tuple[_Name, float, Callable[[], object]]], rounds: dict[_Name, list[float]], shares: list[float]
) -> None:
    """Run all measurements in turn for SECONDS, at least twice, after one untimed run of each.

    shares: list to which the share of the processors that the rounds got is appended.

    Leaves out products that torch does not have, the larger shapes of a slow dtype, and the slower
    implementations of a product."""
    began, alive, pace = time.perf_counter(), [], dict[str, float]()
    fastest: dict[_Name, tuple[float, Callable[[], object]]] = {}
    for name, size, work in works:
        with contextlib.suppress(RuntimeError):
            if size * pace.get(name[0], 0) < _SLOW:
                work()
                seconds = _seconds(work)
                pace[name[0]] = seconds / size
                alive.append((name, work, math.ceil(_LONG_ENOUGH / seconds)))
                if name not in fastest or seconds < fastest[name][0]:
                    fastest[name] = seconds, work
    alive = [each for each in alive if each[1] is fastest[each[0]][1]]
    start, used = time.perf_counter(), time.process_time()
    for turn in range(1000):
        for name, work, times in alive:
            rounds.setdefault(name, []).append(_seconds(work, times))
        if turn >= 1 and time.perf_counter() - began > SECONDS:
            break
    shares.append((time.process_time() - used) / ((time.perf_counter() - start) * torch.get_num_threads()))


def _seconds(work: Callable[[], object], times: int = 1) -> float:
    """Return the mean seconds of consecutive runs."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times
