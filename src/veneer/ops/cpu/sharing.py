"""How threads wait for each other on processors that other processes also use.

    with shared(): …        a piece of work (a micro-batch, a step of decoding) that stays fast next to busy processes
    with forwards(model):   each forward of the model is such a piece

OpenMP's threads synchronize some thousand times per training step. On an idle machine, spinning is the
fastest way to wait. Beside another busy process it is not: one thread holds a processor while waiting for
another thread that has none, and a step takes three times as long or more. Before each piece of work, this
module checks how busy other processes keep our processors (/proc/stat, minus our own time). While they are
busy:

    threads sleep while they wait. libgomp spins for only about a microsecond if a process has more threads in its
    pools than processors (GOMP_SPINCOUNT in its manual), so an unused pool is kept. Unlike environment variables,
    this works after libgomp was loaded;
    on two processors, both threads stay on one and take turns, and the other process has the other.

The number of threads is constant, and with it the division of work and every bit of the result: other
processes cannot change an adapter. (One thread instead would be a tenth faster next to a busy process, but
matrix products of one thread and of two differ in their last bits.)

The user's OMP_WAIT_POLICY, GOMP_SPINCOUNT, OMP_PROC_BIND, OMP_PLACES or GOMP_CPU_AFFINITY takes
precedence, as does VENEER_SHARING=0. Requires Linux, GNU's OpenMP (included in torch's wheels) and the
compiled kernels; otherwise `shared` does nothing.
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
_COMES, _GOES = 0.35, 0.15
"""Busy processors at which other processes start to count as present, and below which they stop."""
_WINDOW = 0.25
"""Seconds between two checks; /proc/stat counts in hundredths of a second."""


@dataclass
class Neighbours:
    """How busy other processes keep our processors.

    Checked at most every quarter second.

    worked: seconds that each processor has worked, for any process; cpu_seconds: seconds of this process."""

    worked: Callable[[], list[float]]
    cpu_seconds: Callable[[], float] = time.process_time
    clock: Callable[[], float] = time.perf_counter
    present: bool = False
    idle: int = 0
    """The least busy processor."""
    _last: tuple[float, list[float], float] | None = field(default=None, repr=False)

    def refresh(self, threads: int) -> bool:
        """Return whether other processes leave less than one processor per thread."""
        now = self.clock()
        if self._last is not None and now - self._last[0] < _WINDOW:
            return self.present
        then, self._last = self._last, (now, self.worked(), self.cpu_seconds())
        if then is None:
            return self.present
        seconds = now - then[0]
        each = [(b - a) / seconds for a, b in zip(then[1], self._last[1], strict=True)]
        used_by_others = sum(each) - (self._last[2] - then[2]) / seconds
        missing = threads - (len(each) - used_by_others)
        self.present = missing > (_GOES if self.present else _COMES)
        if self.present and min(each) < 0.5:
            self.idle = each.index(min(each))
        return self.present


def worked(processors: Sequence[int], stat: Path = Path("/proc/stat")) -> list[float]:
    """Return seconds that each processor has worked, including steal by other VMs."""
    seconds: dict[str, float] = {}
    for line in stat.read_text(encoding="ascii").splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu"):
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, numbers[:8])
            seconds[name] = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return [seconds.get(f"cpu{n}", 0.0) for n in processors]


class Sharing:
    """The response of this process to other busy processes."""

    def __init__(self, native: Any) -> None:
        self.native, self.processors = native, sorted(os.sched_getaffinity(0))
        self.neighbours = Neighbours(lambda: worked(self.processors))
        self.lock = threading.Lock()
        self.here = threading.local()  # `place`: the processor that this thread's pool stays on
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
            if idle is not None:  # this thread's other work, and its child processes, can run anywhere
                os.sched_setaffinity(0, self.processors)

    def stay(self, processors: list[int], threads: int) -> None:
        self.native.stay((ctypes.c_int * len(processors))(*processors), len(processors), threads)

    def sleep(self, asleep: bool) -> None:
        """Keep an unused thread pool, or release it."""
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
    """Run a piece of CPU work of some milliseconds or more.

    Yields whether others are busy.

    See the module."""
    threads = torch.get_num_threads()
    sharing = thread_sharing() if threads > 1 else None
    if sharing is None:
        yield False
        return
    with sharing.work(threads) as present:
        yield present


@contextmanager
def forwards(model: nn.Module) -> Iterator[None]:
    """Run each forward of `model` inside `shared`, during the with-block."""
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
    """Return this process's Sharing; None if disabled by a setting or unsupported."""
    if sys.platform != "linux" or os.environ.get("VENEER_SHARING") == "0" or any(os.environ.get(n) for n in _OWN):
        return None
    native = compiled.usable(("stay", "meet_asleep"))
    gnu = "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8")
    return Sharing(native) if native is not None and gnu and len(os.sched_getaffinity(0)) > 1 else None
