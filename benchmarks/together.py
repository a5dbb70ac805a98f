"""Adapters of many customers: trained together in one pass of the base, compared with one after another.

    python benchmarks/together.py [--customers 8] [--rows 1] [--tokens 128] [--steps 12] [--rounds 3] [--json]

Real runs of `run_texts` and `run_text` on SmolLM2-135M in bfloat16, each side in a process: rank 16 on all
linear layers, AdamW, loss on the answers, prompts truncated to the length of a row. The time of a run is from
the end of its first step to the end of its second-last step, which excludes loading, checks, files and
verification; times of separate runs are added. Peak memory is that of the process. The figures of a single
run are printed too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _report import bar, lines_of, peak_bytes, report, row

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("together", "one after another", "one run")


def write_rows(folder: Path, args: argparse.Namespace) -> None:
    """Write a file for each customer.

    Prompts consist of several tickets, so that they exceed a row and are truncated."""
    lines = (ROOT / "examples" / "tickets" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    asked, answers = zip(*([m["content"] for m in json.loads(line)["messages"][-2:]] for line in lines), strict=True)
    need = args.rows * args.steps
    for customer in range(args.customers):
        rows = []
        for i in range(need):
            at = (customer * need + i) * 7
            prompt = " ".join(asked[(at + k) % len(lines)] for k in range(2 + args.tokens // 12))
            rows.append({"prompt": prompt, "completion": answers[at % len(lines)]})
        file = folder / f"{customer}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def config(folder: Path, customer: int, args: argparse.Namespace) -> Any:
    from veneer.train.config.load import config_from

    values = {
        "base": {"name": args.base, "dtype": args.dtype, "device": args.device},
        "output": str(folder / f"out-{customer}"),
        "data": {
            "train": str(folder / f"{customer}.jsonl"),
            "split": 0,
            "max_length": args.tokens,
            "long_rows": "cut",
        },
        "adapter": {"rank": args.rank},
        "batching": {"rows": args.rows},
        "schedule": {"steps": args.steps},
        "checkpoint": {"every": args.steps},
        "seed": customer,
    }
    return config_from(values)[0]


def side(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second over all runs of a side, and the peak memory of its process."""
    from veneer import load_base
    from veneer.errors import VeneerError
    from veneer.train.events import Event, Note, Stepped
    from veneer.train.text.task import run_text
    from veneer.train.text.together import run_texts

    base = load_base(args.base, dtype=args.dtype, device=args.device)
    configs = [config(folder, i, args) for i in range(1 if name == "one run" else args.customers)]
    ends: dict[int, float] = {}
    notes: list[str] = []
    tokens = 0

    def heard(event: Event) -> None:
        nonlocal tokens
        if isinstance(event, Stepped):
            ends[event.step] = time.perf_counter()  # for several runs, the time of the last one
            tokens += event.tokens if 1 < event.step < args.steps else 0
        if isinstance(event, Note):
            notes.append(event.text)

    seconds = 0.0
    if name == "together":
        for result in run_texts(configs, base=base, listeners=[heard] * len(configs)):
            if isinstance(result, VeneerError):
                raise result
        seconds = ends[args.steps - 1] - ends[1]
    else:
        for one in configs:
            ends.clear()
            run_text(one, base=base, on_event=heard)
            seconds += ends[args.steps - 1] - ends[1]
    how = [note for note in notes if note.startswith(("fast paths", f"{args.customers} runs"))]
    peak = peak_bytes()
    return {"tokens_per_second": tokens / seconds, "tokens": tokens, "peak_bytes": peak, "how": how[-2:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--customers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1, help="of each in a step")
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(side(args.side[0], Path(args.side[1]), args)))
        return

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    result = compare(args, say)
    print(json.dumps(result) if args.json else "\n".join(lines_of(result)))


def compare(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for at in range(args.rounds):
        for name in SIDES:
            with tempfile.TemporaryDirectory() as folder:
                write_rows(Path(folder), args)
                command = [sys.executable, __file__, *sys.argv[1:], "--side", name, folder]
                ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(ran.stdout.splitlines()[-1]))
            last = found[name][-1]
            speed, peak = last["tokens_per_second"], last["peak_bytes"] / 1e9
            say(f"round {at + 1}: {name}: {speed:.1f} tokens/s, {peak:.2f} GB")

    def middle(name: str, key: str) -> float:
        return statistics.median(r[key] for r in found[name])

    together, apart, one = SIDES
    rows = [row(n, "tokens_per_second", middle(n, "tokens_per_second"), "tokens/s") for n in SIDES]
    rows += [row(n, "peak_memory", middle(n, "peak_bytes") / 1e9, "GB") for n in SIDES]
    more = (middle(together, "peak_bytes") - middle(one, "peak_bytes")) / max(1, args.customers - 1)
    rows.append(row(together, "memory of each run more", more / 1e9, "GB"))
    speed = middle(together, "tokens_per_second") / middle(apart, "tokens_per_second")
    bars = [bar(f"{args.customers} together over {apart}", 2.5, speed)]
    about = {
        "customers": args.customers,
        "a step of each": f"{args.rows} × {args.tokens} tokens",
        "rounds": args.rounds,
    }
    return report(rows, bars, {**about, "how": found[together][0]["how"]})


if __name__ == "__main__":
    main()
