"""Threads on a busy machine: detection of other processes, waiting, unchanged results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.ops.cpu import compiled
from veneer.ops.cpu.sharing import OtherProcessLoad, busy_seconds

ROOT = Path(__file__).resolve().parents[3]
OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "VENEER_SHARING")
able = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2 or compiled.kernels() is None,
    reason="two processors, Linux and the compiled kernels are needed",
)


class Machine:
    """Two simulated processors, with a clock that the test moves."""

    def __init__(self) -> None:
        self.now, self.busy, self.own = 0.0, [0.0, 0.0], 0.0
        self.neighbours = OtherProcessLoad(lambda: list(self.busy), lambda: self.own, lambda: self.now)

    def passes(self, seconds: float, busy: tuple[float, float], own: float, threads: int = 2) -> bool:
        """Advance the clock; return whether another process is detected.

        busy: fraction of the time that each processor worked
        own: processor time of this process, per second"""
        self.now += seconds
        self.busy = [b + seconds * share for b, share in zip(self.busy, busy, strict=True)]
        self.own += seconds * own
        return self.neighbours.refresh(threads)


def test_own_work_does_not_count_as_a_neighbor() -> None:
    machine = Machine()
    assert not any(machine.passes(1.0, (1.0, 1.0), 2.0) for _ in range(5))


def test_busy_neighbor_is_detected_until_it_leaves() -> None:
    machine = Machine()
    machine.passes(1.0, (1.0, 1.0), 2.0)
    assert machine.passes(1.0, (1.0, 1.0), 1.4)
    assert machine.passes(1.0, (1.0, 0.8), 1.6), "one that rests a little is still there"
    assert not machine.passes(1.0, (1.0, 1.0), 1.95)


def test_neighbor_is_ignored_with_spare_processors() -> None:
    machine = Machine()
    machine.passes(1.0, (0.0, 0.0), 0.0, threads=1)
    assert not machine.passes(1.0, (1.0, 1.0), 1.0, threads=1)


def test_idle_processor_is_chosen() -> None:
    """The chosen processor is the one that no other process keeps busy."""
    machine = Machine()
    machine.passes(1.0, (1.0, 1.0), 2.0)
    machine.passes(1.0, (1.0, 0.1), 0.5)
    assert machine.neighbours.idle == 1
    machine.passes(1.0, (0.1, 1.0), 0.5)
    assert machine.neighbours.idle == 0


def test_busy_time_covers_only_our_processors(tmp_path: Path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\n"
        f"cpu0 {tick} 0 {tick} 500 500 0 0 {tick} 0 0\n"
        f"cpu2 {2 * tick} 0 0 500 500 0 0 0 0 0\n"
        "intr 5 6\n"
    )
    assert busy_seconds([0, 2], stat) == [3.0, 2.0]


PRELUDE = """
import json, os, time, torch
from veneer.ops.cpu import sharing
torch.set_num_threads(2)
x = torch.ones(1 << 18)
def act(present):
    there = sharing.thread_sharing()
    there.neighbours.refresh = lambda threads: present
    return sharing.shared()
"""


def in_two_threads(program: str) -> dict[str, float]:
    env = {k: v for k, v in os.environ.items() if k not in OWN} | {
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "2",
        "OMP_DYNAMIC": "false",
    }
    ran = subprocess.run(
        [sys.executable, "-c", PRELUDE + program], env=env, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


@able
def test_waiting_threads_sleep_only_on_a_busy_machine() -> None:
    """Measures processor time between two parallel regions, which only waiting threads can use."""
    found = in_two_threads("""
def waiting():
    used = time.process_time()
    for _ in range(60):
        x.add_(1)
        time.sleep(0.002)
    return time.process_time() - used
out = {}
for name, present in (("quiet", False), ("beside", True), ("quiet again", False)):
    with act(present):
        x.add_(1)
        time.sleep(0.02)
        out[name] = waiting()
print(json.dumps(out))
""")
    assert found["beside"] < found["quiet"] / 2
    assert found["beside"] < found["quiet again"] / 2


@able
def test_products_are_unchanged_on_a_busy_machine() -> None:
    found = in_two_threads("""
g = torch.Generator().manual_seed(0)
a, b = torch.randn(300, 576, generator=g), torch.randn(576, 960, generator=g)
def made():
    return [a @ b, (a.bfloat16() @ b.bfloat16()).float(), a.t() @ a, a.sum()]
results = []
for present in (False, True, False):
    with act(present):
        results.append(made())
same = all(torch.equal(p, q) for r in results[1:] for p, q in zip(results[0], r))
print(json.dumps({"same": same, "threads": torch.get_num_threads()}))
""")
    assert found == {"same": True, "threads": 2}


@able
def test_affinity_is_restored_after_sharing() -> None:
    """The calling thread, and so its child processes, can always use all processors."""
    found = in_two_threads("""
before = sorted(os.sched_getaffinity(0))
with act(True):
    x.add_(1)
between = sorted(os.sched_getaffinity(0))
with act(False):
    x.add_(1)
everyone = []
for thread in os.listdir("/proc/self/task"):
    try:
        everyone.append(sorted(os.sched_getaffinity(int(thread))))
    except ProcessLookupError:  # it has ended since
        pass
print(json.dumps({"caller": between == before, "everyone": all(each == before for each in everyone)}))
""")
    assert found == {"caller": True, "everyone": True}


@able
@pytest.mark.parametrize("name", OWN)
def test_user_settings_disable_sharing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.ops.cpu import sharing

    for other in OWN:
        monkeypatch.delenv(other, raising=False)
    sharing.thread_sharing.cache_clear()
    try:
        assert sharing.thread_sharing() is not None
        sharing.thread_sharing.cache_clear()
        monkeypatch.setenv(name, "0")
        assert sharing.thread_sharing() is None
    finally:
        sharing.thread_sharing.cache_clear()
