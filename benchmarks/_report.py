"""The report format that all benchmarks share.

{"machine", "rows": [{name, metric, value, unit}], "bars": [{name, want, got, ok}]}; a bar is a target."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """Return this process's peak memory in bytes.

    On Linux, ru_maxrss cannot be used, because it starts at the parent's memory."""
    status = Path("/proc/self/status")
    if status.exists():
        peaks = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")]
        if peaks:
            return int(peaks[0].split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def row(name: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "metric": metric, "value": round(value, 4), "unit": unit}


def bar(name: str, want: float, got: float, at_least: bool = True) -> dict[str, Any]:
    ok = got >= want if at_least else got <= want
    return {"name": name, "want": f"{'≥' if at_least else '≤'} {want:.3g}", "got": round(got, 4), "ok": ok}


def report(rows: list[dict[str, Any]], bars: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    import torch

    cpu = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    versions = {n: _version(n) for n in ("torch", "transformers", "peft", "trl")}
    machine = {"cpu": cpu, "threads": torch.get_num_threads(), **versions, **about}
    return {"machine": machine, "rows": rows, "bars": bars}


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def lines_of(result: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    width = max(len(r["name"]) for r in result["rows"])
    metric = max(18, *(len(r["metric"]) for r in result["rows"]))
    for r in result["rows"]:
        yield f"{r['name']:<{width}}  {r['metric']:<{metric}} {r['value']:>12,.3f} {r['unit']}".rstrip()
    for b in result["bars"]:
        yield f"{'ok  ' if b['ok'] else 'MISS'} {b['name']}: want {b['want']}, got {b['got']}"
