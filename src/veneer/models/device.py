"""How many threads to compute with: the processors this process may use, and not all that the machine has.

Knows the environment, the affinity mask and cgroups; imports torch only where it is told.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["count", "quota", "settle"]


def quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the cgroup of this process may take, the least of it and those above; None
    without a limit. cgroup 2's cpu.max, and version 1's cpu.cfs_quota_us over cpu.cfs_period_us."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        mounts = [controllers, "cpu"] if controllers else ["", "unified"]
        for mount in dict.fromkeys(mounts):
            top = root / "sys/fs/cgroup" / mount
            below = Path(path.strip("/"))
            for folder in (top / below, *(top / parent for parent in below.parents), top):
                found += _limit(folder)
    return min(found, default=None)


def _limit(folder: Path) -> list[float]:
    try:
        if (folder / "cpu.max").is_file():
            most, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            return [] if most == "max" else [int(most) / int(period)]
        most, period = (
            (folder / name).read_text(encoding="utf-8") for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
        return [int(most) / int(period)] if int(most) > 0 else []
    except (OSError, ValueError, ZeroDivisionError):
        return []


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):  # Linux alone
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def count(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Threads to compute with: OMP_NUM_THREADS where it is set; else the processors of the affinity mask, and no more
    than the cgroup's quota pays for, rounded up."""
    given = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    if given.isdigit() and int(given):
        return int(given)
    limit = quota(root)
    return max(1, min(len(_allowed()), math.ceil(limit) if limit is not None else sys.maxsize))


def settle() -> None:
    """Lowers torch's threads to `count()`, where they are as many as torch chose by itself; a number that somebody
    set stays. torch goes by the affinity mask and knows no quota; threads that take more than it are stopped, all of
    them, for the rest of each tenth of a second."""
    import torch

    wanted = count()
    if wanted < len(_allowed()) == torch.get_num_threads():
        torch.set_num_threads(wanted)
