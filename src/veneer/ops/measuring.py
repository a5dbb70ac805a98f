"""Which of several implementations of one op is the fastest here: measured once, and kept for later runs.

    timings = seconds_of({"compiled": work, "torch": work})      the least of a few interleaved runs of each
    fastest(timings)                                             the first, unless another is clearly faster
    Kept(file, machine).get(key) · .put(key, record)             a file beside the compiled library

Kept, because a run must come out the same twice: what was measured once on a machine is not measured again. A file that
is damaged, or of another machine, counts as none. Knows neither ops nor tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from veneer.files.atomic import replace_file

CLEARLY = 1.1
"""How many times as fast as the first another has to be to run instead of it: noise must not decide."""
_ROUNDS, _SECONDS = 20, 0.1
"""Rounds of all candidates, and the time after which (three being done) no other begins."""
_PATIENCE = 30.0
"""Seconds to wait for another process that measures."""


@dataclass(frozen=True)
class Measured:
    """`runs`: the implementation that was chosen; `ms`: what each took, in milliseconds."""

    runs: str
    ms: Mapping[str, float]

    def line(self) -> str:
        """For a person: which runs, and against what."""
        others = ", ".join(f"{name} {ms:.3g}" for name, ms in self.ms.items() if name != self.runs)
        own = f" {self.ms[self.runs]:.3g} ms" if self.runs in self.ms else ""
        return f"{self.runs}{own}" + (f" ({others})" if others else "")


def seconds_of(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The least seconds of each piece of work, in rounds so that what else the machine does meets all of them. What
    raises RuntimeError or MemoryError is left out.

    Runs in a thread of its own: no autograd mode, hook or dispatch mode of the caller's has a part in it."""
    best: dict[str, float] = {}

    def measure() -> None:
        alive = dict(works)
        began = time.perf_counter()
        for turn in range(_ROUNDS + 1):  # the first is not counted: caches, compiled products
            for name, work in list(alive.items()):
                start = time.perf_counter()
                try:
                    work()
                except (RuntimeError, MemoryError):
                    del alive[name]
                    best.pop(name, None)
                    continue
                if turn:
                    best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
            if turn >= 3 and time.perf_counter() - began > _SECONDS:
                return

    thread = threading.Thread(target=measure, name="veneer-measuring")
    thread.start()
    thread.join()
    return best


def fastest(seconds: Mapping[str, float], clearly: float = CLEARLY) -> str:
    """The first of them, unless another is clearly faster, by more than so many times: then the fastest."""
    first, best = next(iter(seconds)), min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] * clearly < seconds[first] else first


@cache
def this_machine() -> str:
    """What measurements belong to: the processor by name, and how many of it there are."""
    name = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    count = os.cpu_count()
    return f"{name}, {count} {'processor' if count == 1 else 'processors'}"


class Kept:
    """Measurements in a file, each under a key; None: in memory alone. A file that cannot be written does no harm."""

    def __init__(self, file: Path | None, machine: str) -> None:
        self.file, self.machine = file, machine
        self.here: dict[str, Measured] = self._read()
        self._locks = True

    def get(self, key: str) -> Measured | None:
        return self.here.get(key)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process of this machine is, and what they have put is known: processes of one run do not
        measure under one another's load, and come to the same. A folder that cannot be written to has no lock."""
        from filelock import FileLock

        with contextlib.ExitStack() as held:
            if self.file is not None and self._locks:
                try:
                    held.enter_context(FileLock(f"{self.file}.lock", timeout=_PATIENCE, mode=0o600))
                except (OSError, NotImplementedError):  # Timeout is an OSError: what another holds so long has stopped
                    self._locks = False
                self.here |= self._read()
            yield

    def put(self, key: str, found: Measured) -> Measured:
        """What is kept under the key from now on: `found`, unless another process was first, among the same."""
        self.here |= self._read()
        if key not in self.here or self.here[key].runs not in found.ms:
            self.here[key] = found
        if self.file is not None:
            content = {"machine": self.machine, "measured": {k: asdict(v) for k, v in sorted(self.here.items())}}
            with contextlib.suppress(OSError):
                replace_file(self.file, [(json.dumps(content, indent=1) + "\n").encode()], mode=0o600)
        return self.here[key]

    def _read(self) -> dict[str, Measured]:
        try:
            if self.file is None or not self.file.is_file():
                return {}
            content = json.loads(self.file.read_text(encoding="utf-8"))
            if content.get("machine") != self.machine:
                return {}
            found = {str(k): Measured(str(v["runs"]), dict(v["ms"])) for k, v in content["measured"].items()}
            return {
                k: v for k, v in found.items() if v.runs in v.ms and all(isinstance(ms, float) for ms in v.ms.values())
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}
