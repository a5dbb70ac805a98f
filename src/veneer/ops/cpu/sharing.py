"""How threads wait for one another on processors that other processes use too.

    with shared(): …        a piece of work (a micro-batch, a step of decoding) that a neighbour does not bring to halt
    with forwards(model):   each forward of the model is such a piece

OpenMP's threads meet some thousand times a training step. On a quiet machine they wait best by spinning. Beside another
busy process they do not: one holds a processor in waiting for another that has none, and a step takes three times as
long and more. So before each piece of work it is looked at how busy others keep our processors (/proc/stat, less our
own time), and while they do

    threads sleep where they wait. libgomp spins for about a microsecond only while a process has more threads in its
    pools than processors (GOMP_SPINCOUNT in its manual), so a pool is kept that nobody uses. Unlike environment
    variables, this works after libgomp was loaded;
    on two processors both threads stay on one and take turns, and the neighbour has the other.

The number of threads stays, and with it how work is shared out and every bit of the result: what a machine's other
processes do cannot be seen in an adapter. (One thread instead would be a tenth faster beside a neighbour, but matrix
products of one thread and of two differ in their last bits.)

Somebody's own OMP_WAIT_POLICY, GOMP_SPINCOUNT, OMP_PROC_BIND, OMP_PLACES or GOMP_CPU_AFFINITY rules, as does
VENEER_SHARING=0. Needs Linux, GNU's OpenMP (torch's own wheels have it) and the compiled kernels; else `shared` does
nothing.
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
"""Processors that others have to use until they count as neighbours, and to fall below until they do not."""
_WINDOW = 0.25
"""Seconds between two looks: /proc/stat counts in hundredths."""


@dataclass
class Neighbours:
    """Which of our processors other processes keep busy, looked at no more often than each quarter of a second.

    `worked`: seconds that each processor has worked since some time, for anybody; `own`: those of this process."""

    worked: Callable[[], list[float]]
    own: Callable[[], float] = time.process_time
    clock: Callable[[], float] = time.perf_counter
    present: bool = False
    idle: int = 0
    """The processor that was least busy."""
    _last: tuple[float, list[float], float] | None = field(default=None, repr=False)

    def look(self, threads: int) -> bool:
        """Whether others leave less than a processor for each of `threads`."""
        now = self.clock()
        if self._last is not None and now - self._last[0] < _WINDOW:
            return self.present
        then, self._last = self._last, (now, self.worked(), self.own())
        if then is None:
            return self.present
        seconds = now - then[0]
        each = [(b - a) / seconds for a, b in zip(then[1], self._last[1], strict=True)]
        others = sum(each) - (self._last[2] - then[2]) / seconds
        missing = threads - (len(each) - others)
        self.present = missing > (_GOES if self.present else _COMES)
        if self.present and min(each) < 0.5:
            self.idle = each.index(min(each))
        return self.present


def worked(processors: Sequence[int], stat: Path = Path("/proc/stat")) -> list[float]:
    """Seconds that each of the processors has spent on anything, steal by other virtual machines too."""
    found: dict[str, float] = {}
    for line in stat.read_text(encoding="ascii").splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu"):
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, numbers[:8])
            found[name] = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return [found.get(f"cpu{n}", 0.0) for n in processors]


class Sharing:
    """What this process does about its neighbours."""

    def __init__(self, native: Any) -> None:
        self.native, self.processors = native, sorted(os.sched_getaffinity(0))
        self.neighbours = Neighbours(lambda: worked(self.processors))
        self.lock = threading.Lock()
        self.here = threading.local()  # `place`: the processor on which this thread's pool stays
        self.leave: threading.Event | None = None

    @contextmanager
    def work(self, threads: int) -> Iterator[bool]:
        with self.lock:
            present = self.neighbours.look(threads)
            self.sleep(present)
        place = self.neighbours.idle if present and threads == len(self.processors) == 2 else None
        if place != getattr(self.here, "place", None):
            self.stay(self.processors if place is None else [self.processors[place]], threads)
            self.here.place = place
        elif place is not None:
            os.sched_setaffinity(0, [self.processors[place]])
        try:
            yield present
        finally:
            if place is not None:  # what this thread does beside, and whatever it starts, runs anywhere
                os.sched_setaffinity(0, self.processors)

    def stay(self, processors: list[int], threads: int) -> None:
        self.native.stay((ctypes.c_int * len(processors))(*processors), len(processors), threads)

    def sleep(self, wanted: bool) -> None:
        """Keeps a pool that nobody uses, or lets it go."""
        if self.leave is None and wanted:
            self.leave, begun = threading.Event(), threading.Event()
            threading.Thread(target=self._pool, args=(self.leave, begun), name="veneer-pool", daemon=True).start()
            begun.wait()
            self.native.meet_asleep(1, None)
        elif self.leave is not None and not wanted:
            self.leave.set()
            self.leave = None
            self.native.meet_asleep(0, None)

    def _pool(self, leave: threading.Event, begun: threading.Event) -> None:
        self.stay(self.processors, len(self.processors) + 1)
        begun.set()
        leave.wait()


@contextmanager
def shared() -> Iterator[bool]:
    """A piece of work on the CPU, of some milliseconds at least; whether it runs beside neighbours. See the module."""
    threads = torch.get_num_threads()
    sharing = sharing_here() if threads > 1 else None
    if sharing is None:
        yield False
        return
    with sharing.work(threads) as present:
        yield present


@contextmanager
def forwards(model: nn.Module) -> Iterator[None]:
    """While inside, each forward of `model` runs `shared`."""
    inside: list[ExitStack] = []

    def begin(*_: object) -> None:
        inside.append(ExitStack())
        inside[-1].enter_context(shared())

    def end(*_: object) -> None:
        inside.pop().close()

    before, after = model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


@cache
def sharing_here() -> Sharing | None:
    """What this process does about its neighbours; None: nothing, by somebody's own setting or for want of a part."""
    if sys.platform != "linux" or os.environ.get("VENEER_SHARING") == "0" or any(os.environ.get(n) for n in _OWN):
        return None
    native = compiled.usable(("stay", "meet_asleep"))
    gnu = "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8")
    return Sharing(native) if native is not None and gnu and len(os.sched_getaffinity(0)) > 1 else None
