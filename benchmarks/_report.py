"""What all benchmarks share: the report format, sides as processes, the record of results, imitated processors.

{"machine", "rows": [{name, metric, value, unit}], "bars": [{name, want, got, ok}]}; a bar is a target.

A side is a process that prints a JSON object for each part of its work, {"part", …}, and its result as the
last one. Progress goes to stderr. If VENEER_BENCH_RECORD names a file, each result is added to the file as
soon as the side ends, and a side whose result is in the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD, BEGAN = "VENEER_BENCH_RECORD", "VENEER_BENCH_BEGAN"
IMITATIONS = {
    "avx512": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ATEN_CPU_CAPABILITY": "avx512", "TORCHINDUCTOR_CPP_MARCH": "cascadelake", "VENEER_MARCH": "cascadelake",
    },
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2", "TORCHINDUCTOR_CPP_MARCH": "haswell", "VENEER_MARCH": "haswell",
    },
}  # fmt: skip
"""Name -> variables that keep oneDNN, MKL, torch, torch.compile and veneer from using newer instructions.

MKL ignores its variable on AMD's processors, where its float32 products never use AVX-512."""
NOT_IMITATED = ("llama.cpp", "vllm")
"""Sides with kernels of their own, which ignore the variables."""


# -- the report --------------------------------------------------------------------------------------------------------


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
    if imitated():
        rows = [r | {"name": f"{r['name']} (not imitated)"} if r["name"].startswith(NOT_IMITATED) else r for r in rows]
    return {"machine": {**machine(), **about}, "rows": rows, "bars": bars}


def machine() -> dict[str, Any]:
    import torch

    info = cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    cpu = info.get("model name", platform.machine())
    if "cpu family" in info:
        cpu += f", family {info['cpu family']} model {info['model']}"
    versions = {n: _version(n) for n in ("torch", "transformers", "peft", "trl")}
    kind = kind_of(flags, imitated())
    return {"cpu": cpu, "kind": kind, "threads": torch.get_num_threads(), **versions}


def cpuinfo() -> dict[str, str]:
    """Return the first value of each key in /proc/cpuinfo; empty where there is no such file."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines)) if value}


def kind_of(flags: Collection[str], imitate: str = "") -> str:
    """Return the kind of a processor with these instruction sets, which selects the table's column."""
    left = set(flags)
    if imitate:
        left = {f for f in flags if not f.startswith(("amx", "avx512_bf16", "avx512_fp16", "avx_vnni", "avx_ne"))}
        left -= {f for f in flags if imitate == "avx2" and f.startswith("avx512")}
    kinds = {
        "amx_bf16": "AMX",
        "avx512_bf16": "AVX512-BF16 without AMX",
        "avx512_vnni": "AVX-512 and VNNI",
        "avx512f": "AVX-512",
        "avx2": "no AVX512",
        "bf16": "ARM, BF16",
    }
    kind = next((kind for flag, kind in kinds.items() if flag in left), platform.machine())
    return f"{kind} (imitated)" if imitate else kind


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


# -- options -----------------------------------------------------------------------------------------------------------


def options(text: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--imitate", choices=IMITATIONS, default=imitated(), help="use only the instructions of an older processor"
    )
    parser.add_argument("--side", type=json.loads, help=argparse.SUPPRESS)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and set the variables of --imitate before torch is imported."""
    args = parser.parse_args()
    if args.imitate:
        need = {"avx512": "avx512_vnni", "avx2": "avx2"}[args.imitate]
        if need not in cpuinfo().get("flags", "").split():
            parser.error(f"--imitate {args.imitate} needs a processor with {need}, on Linux")
        os.environ |= IMITATIONS[args.imitate]
    return args


def imitated() -> str:
    """Return the imitation whose variables are set, or ""."""
    return next((name for name, to_set in IMITATIONS.items() if to_set.items() <= os.environ.items()), "")


def print_report(result: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(result) if as_json else "\n".join(lines_of(result)))


# -- sides -------------------------------------------------------------------------------------------------------------


_STARTED = time.time()


def say(text: str) -> None:
    """Print progress to stderr, after the minutes and seconds since the start."""
    minutes, seconds = divmod(int(time.time() - float(os.environ.get(BEGAN, _STARTED))), 60)
    print(f"[{minutes}:{seconds:02}] {text}", file=sys.stderr, flush=True)


def part(name: str, **values: float) -> None:
    """Report a part of a side's work as soon as it is done."""
    print(json.dumps({"part": name, **values}), flush=True)


def run_side(
    script: str, side: str, *arguments: Any, work: Path | None = None, at: int = 0, **env: str
) -> dict[str, Any]:
    """Run a side of a benchmark, which gets [side, work, arguments…] as --side, and return its result.

    at: the number of the round. Raises SystemExit if the side fails."""
    given = json.dumps([side, *([] if work is None else [str(work)]), *arguments])
    command = [sys.executable, "-W", "ignore", script, "--side", given]
    return run_process([Path(script).stem, side, *arguments, at], command, PYTHONPATH=str(ROOT / "src"), **env)


def run_process(key: list[Any], command: Sequence[str], **env: str) -> dict[str, Any]:
    """Run a side as a process, and return the last JSON object that it prints.

    key: benchmark, side, and whatever else determines the result. Raises SystemExit if the process fails."""
    name = f"{key[0]}: {key[1]}"
    for line in recorded():
        if line.get("side") == key:
            say(f"{name}: skipped, because its result is already recorded")
            return line["result"]
    say(f"{name} …")
    began, result = time.time(), None
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **env}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            try:
                for printed in process.stdout:
                    if (found := _object(printed)) and "part" in found:
                        say(f"{name}: {found.pop('part')}: {_shown(found)}")
                    else:
                        result = found or result
            except BaseException:
                process.kill()
                raise
        if process.returncode or result is None:
            errors.seek(0)
            raise SystemExit(f"{name} failed with exit code {process.returncode}:\n{errors.read()[-3000:]}")
    seconds = time.time() - began
    record({"side": key, "seconds": round(seconds, 1), "result": result})
    say(f"{name}: {_shown(result)} ({seconds:.0f} s)")
    return result


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:,.4g}" for k, v in values.items() if isinstance(v, float)) or "done"


def record(line: dict[str, Any]) -> None:
    """Add a line to the record, if there is one."""
    if file := os.environ.get(RECORD):
        with Path(file).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def recorded(file: str | Path = "") -> list[dict[str, Any]]:
    """Return the lines of a record; a last line that was cut off is left out."""
    file = Path(file or os.environ.get(RECORD, ""))
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [found for line in lines if (found := _object(line))]


def without_slow_dtypes(sides: Iterable[str]) -> list[str]:
    """Return the sides of a benchmark without those in bfloat16 if bfloat16 is unusable here.

    Without AVX-512, oneDNN multiplies bfloat16 in a plain loop, about 50 times slower than float32; one step of
    training would take eight minutes."""
    import torch

    a = torch.randn(512, 512)
    full, half = (min(_seconds([lambda x=x: x @ x]) for _ in range(3)) for x in (a, a.bfloat16()))
    slow = [side for side in sides if "bf16" in side] if half > 20 * full else []
    if slow:
        say(f"left out, because products in bfloat16 take {half / full:.0f} times as long: {'; '.join(slow)}")
    return [side for side in sides if side not in slow]


# -- floors ------------------------------------------------------------------------------------------------------------


def fastest(
    prepare: Callable[[Any], Sequence[Callable[[], Any]]],
    rounds: int,
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16"),
) -> tuple[str, list[float]]:
    """Return the dtype in which the calls take the least time, and the seconds of all calls in each round.

    prepare: dtype -> calls. An eighth of the calls is timed to choose the dtype."""
    import torch

    trials: dict[str, float] = {}
    for dtype in dtypes:
        calls = prepare(getattr(torch, dtype))
        few, limit = calls[: max(1, len(calls) // 8)], 4 * min(trials.values(), default=float("inf"))
        trials[dtype] = min(_seconds(few, limit) for _ in range(2))
    best = min(trials, key=lambda dtype: trials[dtype])
    calls = prepare(getattr(torch, best))
    return best, [_seconds(calls) for _ in range(rounds + 1)][1:]


def _seconds(calls: Sequence[Callable[[], Any]], limit: float = float("inf")) -> float:
    """Return the seconds of the calls, or infinity as soon as they reach the limit."""
    start = time.perf_counter()
    for call in calls:
        call()
        if time.perf_counter() - start > limit:
            return float("inf")
    return time.perf_counter() - start
