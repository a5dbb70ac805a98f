"""How threads wait for each other on processors that other processes also use.

    with shared(): …        work (a micro-batch, a decoding step) that stays fast if other processes are busy
    with forwards(model):   runs each forward pass of the model inside `shared`

OpenMP threads synchronize many times per training step. On an idle machine, spinning is the fastest way to
wait. If another process is busy, spinning is slow: the spinning thread occupies a processor that the thread
it waits for needs, and a step takes three times as long or more. Before each piece of work, this module
measures how busy other processes keep the processors (/proc/stat, minus this process's own time). While other
processes are busy, this module makes waiting threads sleep:

    libgomp spins for only about a microsecond if a process has more threads in its pools than processors
    (see GOMP_SPINCOUNT in libgomp's manual), so this module starts an additional, unused pool. Unlike
    environment variables, this works after libgomp is loaded. On a machine with two processors, both threads
    also move to one processor and leave the other processor to the other process.

The number of threads does not change, so work is divided in the same way and results are bit-identical: other
processes cannot influence an adapter. (Next to a busy process, a single thread would be a tenth faster, but
matrix products on one thread and on two threads differ in their last bits.)

`shared` requires Linux, GNU OpenMP (bundled with torch's wheels) and the compiled kernels; otherwise it does
nothing. It also does nothing if OMP_WAIT_POLICY, GOMP_SPINCOUNT, OMP_PROC_BIND, OMP_PLACES or
GOMP_CPU_AFFINITY is set, or with VENEER_SHARING=0.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.ops.cpu import compiled

_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
_BUSY_ABOVE, _IDLE_BELOW = 0.35, 0.15
"""Thresholds for how many processors this process's threads lack: above the first, other processes count as
busy; below the second, they count as idle again."""
_WINDOW = 0.25
"""Minimum seconds between two measurements; /proc/stat has a resolution of a hundredth of a second."""


@dataclass
class OtherProcessLoad:
    """Measures how busy other processes keep this process's processors, at most every quarter second.

    busy_seconds: returns, for each processor, the seconds for which the processor has been busy with any
        process.
    cpu_seconds: returns the processor seconds that this process has used."""

    busy_seconds: Callable[[], list[float]]
    cpu_seconds: Callable[[], float] = time.process_time
    clock: Callable[[], float] = time.perf_counter
    present: bool = False
    idle: int = 0
    """Index of the least busy processor."""
    _last: tuple[float, list[float], float] | None = field(default=None, repr=False)

    def refresh(self, threads: int) -> bool:
        """Return whether other processes leave less than one processor per thread."""
        now = self.clock()
        if self._last is not None and now - self._last[0] < _WINDOW:
            return self.present
        then, self._last = self._last, (now, self.busy_seconds(), self.cpu_seconds())
        if then is None:
            return self.present
        seconds = now - then[0]
        each = [(b - a) / seconds for a, b in zip(then[1], self._last[1], strict=True)]
        used_by_others = sum(each) - (self._last[2] - then[2]) / seconds
        missing = threads - (len(each) - used_by_others)
        self.present = missing > (_IDLE_BELOW if self.present else _BUSY_ABOVE)
        if self.present and min(each) < 0.5:
            self.idle = each.index(min(each))
        return self.present


def busy_seconds(processors: Sequence[int], stat: Path = Path("/proc/stat")) -> list[float]:
    """Return how many seconds each processor has been busy, including steal time."""
    seconds: dict[str, float] = {}
    for line in stat.read_text(encoding="ascii").splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu"):
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, numbers[:8])
            seconds[name] = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return [seconds.get(f"cpu{n}", 0.0) for n in processors]


class Sharing:
    """Adapts how this process's threads wait while other processes are busy."""

    def __init__(self, native: Any) -> None:
        self.native, self.processors = native, sorted(os.sched_getaffinity(0))
        self.neighbours = OtherProcessLoad(lambda: busy_seconds(self.processors))
        self.lock = threading.Lock()
        self.here = threading.local()  # attribute `place`: the processor that this thread's pool is bound to
        self.leave: threading.Event | None = None

    @contextmanager
    def work(self, threads: int) -> Iterator[bool]:
        with self.lock:
            present = self.neighbours.refresh(threads)
            self.sleep(present)
        idle = self.neighbours.idle if present and threads == len(self.processors) == 2 else None
        if idle != getattr(self.here, "place", None):
            self.stay(self.processors if idle is None else [self.processors[idle]], threads)
            self.here.place = idle
        elif idle is not None:
            os.sched_setaffinity(0, [self.processors[idle]])
        try:
            yield present
        finally:
            if idle is not None:  # so that this thread's other work, and its child processes, can use any processor
                os.sched_setaffinity(0, self.processors)

    def stay(self, processors: list[int], threads: int) -> None:
        self.native.stay((ctypes.c_int * len(processors))(*processors), len(processors), threads)

    def sleep(self, asleep: bool) -> None:
        """Start an unused thread pool, which makes waiting threads sleep, or stop the pool."""
        if self.leave is None and asleep:
            self.leave, begun = threading.Event(), threading.Event()
            threading.Thread(target=self._pool, args=(self.leave, begun), name="veneer-pool", daemon=True).start()
            begun.wait()
            self.native.meet_asleep(1, None)
        elif self.leave is not None and not asleep:
            self.leave.set()
            self.leave = None
            self.native.meet_asleep(0, None)

    def _pool(self, leave: threading.Event, begun: threading.Event) -> None:
        self.stay(self.processors, len(self.processors) + 1)
        begun.set()
        leave.wait()


@contextmanager
def shared() -> Iterator[bool]:
    """Adapt how threads wait during a piece of CPU work to the load of other processes.

    The work should take some milliseconds or longer. Yields whether other processes are busy. See the
    module's docstring."""
    threads = torch.get_num_threads()
    sharing = thread_sharing() if threads > 1 else None
    if sharing is None:
        yield False
        return
    with sharing.work(threads) as present:
        yield present


@contextmanager
def forwards(model: nn.Module) -> Iterator[None]:
    """Run each forward pass of `model` inside `shared`, within a with-block."""
    inside: list[ExitStack] = []

    def begin(*_: object) -> None:
        inside.append(ExitStack())
        inside[-1].enter_context(shared())

    def end(*_: object) -> None:
        inside.pop().close()

    begin_hook, end_hook = model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)
    try:
        yield
    finally:
        begin_hook.remove()
        end_hook.remove()


@cache
def thread_sharing() -> Sharing | None:
    """Return this process's `Sharing`, or None if it is disabled or unsupported."""
    if sys.platform != "linux" or os.environ.get("VENEER_SHARING") == "0" or any(os.environ.get(n) for n in _OWN):
        return None
    native = compiled.usable(("stay", "meet_asleep"))
    gnu = "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8")
    return Sharing(native) if native is not None and gnu and len(os.sched_getaffinity(0)) > 1 else None
