"""The profile of this machine: measured rates of matrix products and memory.

    found = profile()                   measured once, in about two seconds, and stored next to the compiled kernels
    found.rate("bfloat16")              GFLOP/s of the fastest of the measured shapes
    found.bandwidth                     GB/s read from memory

The file's name is a hash of the processor, its features, the number of threads and torch's version. An
invalid file, or a file from another machine, is replaced by a new measurement. If no folder is writable, the
profile is kept only in this process. VENEER_PROFILE names a profile file to use instead of measuring, so that
tests can give the same bits on every machine.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import torch

from veneer.errors import ConfigError
from veneer.files.atomic import replace_file

SHAPES = ((16, 1024, 1024), (256, 1024, 1024), (1024, 1024, 1024))
"""(rows, inputs, outputs) of the measured products: decoding, a short prompt and a training step."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_READ_BYTES = 1 << 28
WORTH = 1.2
"""How many times as fast an implementation must be to be chosen instead of the default."""
SECONDS = 2.0
_LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class Profile:
    """Measured rates.

    gflops: dtype -> "rows x inputs x outputs" -> GFLOP/s; dtypes that torch cannot multiply are missing.
    bandwidth: GB/s.
    spread: (median time / shortest time) − 1 of the noisiest measurement."""

    processor: str
    key: str
    threads: int
    torch: str
    date: str
    gflops: Mapping[str, Mapping[str, float]]
    bandwidth: float
    spread: float

    def rate(self, dtype: str) -> float:
        """Return the GFLOP/s of a dtype at its fastest shape, or 0 if torch cannot multiply it."""
        return max(self.gflops.get(dtype, {}).values(), default=0.0)

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

    The profile comes from the file that VENEER_PROFILE names, from the stored file, or from a new
    measurement. Raises ConfigError if VENEER_PROFILE does not name a valid profile."""
    return profile_for(torch.get_num_threads(), os.environ.get("VENEER_PROFILE", ""))


@cache
def profile_for(threads: int, pinned: str) -> Profile:
    """Return the profile for a number of threads; raises the same errors as `profile`.

    pinned: the value of VENEER_PROFILE, or ""."""
    if pinned:
        if (result := _read(Path(pinned))) is None:
            raise ConfigError(
                f"VENEER_PROFILE={pinned} is not a profile of a machine", where="VENEER_PROFILE", fix="unset it"
            )
        return result
    from filelock import FileLock

    from veneer.ops.cpu.build import processor_features, trusted_folder

    machine = [processor_name(), *processor_features(), str(threads), torch.__version__]
    key = hashlib.sha256("\0".join(machine).encode()).hexdigest()[:16]
    try:
        file = trusted_folder([]) / f"profile-{key}.json"
        if (result := _read(file, key)) is not None:
            return result
        # The lock keeps concurrent processes from disturbing each other's timing.
        with FileLock(f"{file}.lock", timeout=_LOCK_SECONDS, mode=0o600):
            if (result := _read(file, key)) is None:
                result = measure(key)
                replace_file(file, [(json.dumps(asdict(result), indent=1) + "\n").encode()], mode=0o600)
            return result
    except (OSError, NotImplementedError):  # no folder is writable, or the lock timed out (an OSError)
        return measure(key)


def _read(file: Path, key: str | None = None) -> Profile | None:
    """Return the profile in a file; None if missing, invalid or from another machine."""
    try:
        result = Profile(**json.loads(file.read_text(encoding="utf-8")))
        rates = [result.bandwidth, *(rate for shapes in result.gflops.values() for rate in shapes.values())]
        is_valid = all(isinstance(rate, float) and rate > 0 for rate in rates) and isinstance(result.spread, float)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return result if is_valid and (key is None or result.key == key) else None


def measure(key: str) -> Profile:
    """Measure this machine, which takes about two seconds."""
    works: dict[tuple[str, str], tuple[float, Callable[[], object]]] = {("", "read"): (_READ_BYTES / 1e9, _reading())}
    for dtype in _DTYPES:
        for rows, inputs, outputs in SHAPES:
            size = 2e-9 * rows * inputs * outputs
            name = str(dtype).removeprefix("torch."), f"{rows}x{inputs}x{outputs}"
            works[name] = size, _product(dtype, rows, inputs, outputs)
    rounds: dict[tuple[str, str], list[float]] = {}
    # A new thread is not affected by the caller's autograd and dispatch modes.
    thread = threading.Thread(target=_run_rounds, args=(works, rounds), name="veneer-profile")
    thread.start()
    thread.join()
    rates = {name: works[name][0] / min(seconds) for name, seconds in rounds.items()}
    bandwidth = rates.pop(("", "read"))
    gflops: dict[str, dict[str, float]] = {}
    for (dtype_name, shape), rate in rates.items():
        gflops.setdefault(dtype_name, {})[shape] = round(rate, 3)
    spread = max(statistics.median(seconds) / min(seconds) - 1 for seconds in rounds.values())
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    threads, version = torch.get_num_threads(), torch.__version__
    return Profile(processor_name(), key, threads, version, date, gflops, round(bandwidth, 3), round(spread, 3))


def _reading() -> Callable[[], object]:
    values = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    return values.sum


def _product(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> Callable[[], object]:
    x, weight = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    if dtype == torch.int8:
        return lambda: torch._int_mm(x, weight.t())
    return lambda: x @ weight.t()


@torch.no_grad()
def _run_rounds(
    works: Mapping[tuple[str, str], tuple[float, Callable[[], object]]], rounds: dict[tuple[str, str], list[float]]
) -> None:
    """Run all measurements in turn for SECONDS; the first round is a warm-up.

    A measurement that raises an exception is dropped."""
    alive = dict(works)
    began = time.perf_counter()
    for turn in range(1000):
        for name, (_, work) in list(alive.items()):
            start = time.perf_counter()
            try:
                work()
            except RuntimeError:
                del alive[name]
                continue
            if turn:
                rounds.setdefault(name, []).append(time.perf_counter() - start)
        if turn >= 2 and time.perf_counter() - began > SECONDS:
            return
