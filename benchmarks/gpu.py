"""One command to try a machine with a GPU, in ten minutes.

Runs tests, then measures training, serving and image generation at real sizes.

    python benchmarks/gpu.py [--only PART,PART] [--minutes 10] [--out docs/gpu] [--python vllm=PATH] [--json]
    python benchmarks/gpu.py --dry          runs every line in a moment on a CPU; writes nothing without --out

probe    one bfloat16 product and one copy; these limits of the GPU give the roofline of every figure
tests    the tests marked `gpu`
train    Llama 3 8B, rank 16 on all linears, bfloat16, micro-batches of 2 × 4,096 tokens, loss on all tokens
qlora    the same on nf4 weights; also bitsandbytes with PEFT, and Unsloth
large    Llama 3.1 70B in nf4, one step with the settings that `veneer plan` chooses
serve    Llama 3 8B, 128 requests of 256 + 64 tokens: the base, 8 adapters, 1,000 adapters; also vLLM
products one weight of Llama 3 8B times few rows, in bfloat16, 4 and 8 bits; then norm, rotary positions,
         attention and loss, each with its library and with torch
flux     FLUX.1 dev at 1,024²: a training step, and calls with three stacked adapters

Weights are random and created on the GPU from a configuration. A side is a measurement of veneer or of a peer.
Sides run one after another, each in its own process with its own time limit. If a side fails, is not installed
or exceeds its limit, its results so far are reported and the next side starts. Peers come last. CARD.md and
CARD.json, named after the GPU, are written after each side, so a kill at any time loses only the running side.
Ctrl-C, SIGTERM and SIGHUP stop that side and its child processes. Parts that do not run keep their earlier
results. `--python` names the Python interpreter of a peer: vllm, unsloth or bitsandbytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from _gpu_sides import MARK, PARTS, PROBE, ROOT, SIDES, Side, Task, tell
from _report import bar, lines_of, report, row

PUBLISHED = (12_473, 402)
"""Tokens and TFLOP per second for Llama 3 8B with LoRA, micro-batches of 2 × 4,096 tokens, one H100.

Published by NVIDIA for NeMo AutoModel, not measured by this project."""
OVER_UNSLOTH = 1.2
LEAST = 5.0
"""A side starts only if at least this many seconds remain."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOT_TRIED = ("no time left", "not installed", "stopped")
"""Statuses without results; a side with one of them keeps the results of an earlier run."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a side.

    `status`: ran, failed, timed out, stopped, not installed, left out or no time left. `why`: details of the
    status. `figures`: all results, including those before a failure. `more`: results of the probe. `at`: when
    the side ended. `command`: the command line of the run."""

    status: str
    seconds: float = 0.0
    why: str = ""
    figures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    at: str = ""
    command: str = ""

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "timed out")

    def value(self, metric: str) -> float | None:
        return next((f["value"] for f in self.figures if f["metric"] == metric), None)


def outcome_of(result: Mapping[str, Any], seconds: float) -> Outcome:
    if "left_out" in result:
        return Outcome("left out", seconds, result["left_out"])
    more = {k: v for k, v in result.items() if k not in ("figures", "notes")}
    return Outcome("ran", seconds, "", list(result["figures"]), list(result["notes"]), more)


# -- running a side in its own process ---------------------------------------------------------------------------------


def watched(command: Sequence[str], limit: float, work: Path) -> Outcome:
    """Run the command of a side, and return its outcome with the results so far.

    After `limit` seconds, or if this process is interrupted, the command and its children are killed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    out, err = (
        work / "out.txt",
        work / "err.txt",
    )  # files, because pipes would stay open until every child ends
    start = time.monotonic()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr, start_new_session=True)
        code: int | None = None
        stopped = False
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:
            stopped = True
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - start
    said, wrong = (f.read_text(encoding="utf-8", errors="replace") for f in (out, err))
    told = _last_told(said)
    if told is not None and code == 0:
        return outcome_of(told, seconds)
    so_far = Outcome("") if told is None else outcome_of(told, seconds)
    if stopped:
        return replace(so_far, status="stopped", seconds=seconds, why="before it was through")
    if code is None:
        why = f"after {limit:.0f} s; its last words: {_tail(wrong)}"
        return replace(so_far, status="timed out", seconds=seconds, why=why)
    return replace(so_far, status="failed", seconds=seconds, why=f"exit code {code}: {_tail(wrong or said)}")


def _last_told(said: str) -> dict[str, Any] | None:
    """Return the last complete result line; if a side is killed, its last line can be incomplete."""
    for line in reversed(said.splitlines()):
        if line.startswith(MARK):
            with suppress(ValueError):
                told: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return told
    return None


def _tail(text: str) -> str:
    return text.strip()[-1500:] or "nothing"


def in_a_process(pythons: Mapping[str, str]) -> Callable[[Side, Task, float], Outcome]:
    """Return a function that runs a side in its own process.

    `pythons`: package of a peer -> Python interpreter of its environment."""

    def launch(side: Side, task: Task, limit: float) -> Outcome:
        python = pythons.get(side.needs, sys.executable)
        if side.needs:
            looks = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({side.needs!r}) is None)"
            try:
                there = subprocess.run([python, "-c", looks], capture_output=True, timeout=limit).returncode == 0
            except (OSError, subprocess.SubprocessError) as error:
                return Outcome("not installed", why=f"{python} does not run: {error}")
            if not there:
                return Outcome("not installed", why=f"{python} has no {side.needs}")
        given = json.dumps([side.key, asdict(task)])
        return watched([python, "-W", "ignore", str(Path(__file__).resolve()), "--side", given], limit, Path(task.work))

    return launch


def run(
    sides: Iterable[Side],
    launch: Callable[[Side, Task, float], Outcome],
    work: Path,
    *,
    dry: bool,
    minutes: float,
    command: str,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Outcome]], None] = lambda done: None,
) -> dict[str, Outcome]:
    """Run the probe and then all sides; return the outcomes by key.

    After a side that fails, the next one runs; after an interruption, none does. `keep` is called after each
    side with all outcomes so far."""
    end = time.monotonic() + 60 * minutes
    done: dict[str, Outcome] = {}
    probe = None
    for side in [PROBE, *sides]:
        left = end - time.monotonic()
        if dry and side.needs:
            outcome = Outcome("left out", why="peers are no part of a dry run")
        elif left < LEAST:
            outcome = Outcome("no time left", why=f"{minutes:g} minutes are set")
        else:
            limit = min(side.limit, left)
            try:
                outcome = launch(side, Task(str(work), dry, probe, limit), limit)
            except KeyboardInterrupt:
                outcome = Outcome("stopped", why="before it was through")
        if side is PROBE:
            probe = outcome.more.get("probe")
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        done[side.key] = replace(outcome, at=now, command=command)
        keep(done)
        told = ", ".join(f"{f['metric']} {f['value']:,.4g} {f['unit']}" for f in outcome.figures) or outcome.why
        say(f"{side.key}: {outcome.status}, {outcome.seconds:.0f} s{told and f': {told}'}")
        if outcome.status == "stopped":
            break
    return done


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block for SIGINT, SIGTERM and SIGHUP."""

    from veneer.train.signals import signal_handler

    def stop(number: int) -> None:
        raise KeyboardInterrupt

    with signal_handler(stop, *STOPS):
        yield


# -- output ------------------------------------------------------------------------------------------------------------


def result_of(done: Mapping[str, Outcome], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the common report; "sides" has the complete outcomes, for the page and for the next run."""
    rows = []
    for key, outcome in done.items():
        for f in outcome.figures:
            rows.append(row(key, f["metric"], f["value"], f["unit"]))
            rows += [row(key, f"{f['metric']}: {k}", f[k], f["unit"]) for k in ("roofline", "planned") if f[k]]
    return {
        **report(rows, bars_of(done, str(about.get("card", ""))), dict(about)),
        "sides": {key: asdict(outcome) for key, outcome in done.items()},
    }


def bars_of(done: Mapping[str, Outcome], card: str) -> list[dict[str, Any]]:
    """Return the targets for the sides that ran.

    The published figure is a target on an H100 only."""

    def value(part: str, name: str, metric: str) -> float | None:
        return next((o.value(metric) for k, o in done.items() if k.startswith(f"{part}: {name}")), None)

    bars = []
    failed = value("tests", "", "failed")
    if failed is not None:
        bars.append(bar("gpu tests that fail", 0, failed, at_least=False))
    mine = value("train", "veneer", "training")
    if mine is not None and "H100" in card:
        bars.append(bar("Llama 3 8B, bf16, tokens/s (NeMo AutoModel's as published)", PUBLISHED[0], mine))
    for part, peer, metric, wanted in (
        ("qlora", "Unsloth", "training", OVER_UNSLOTH),
        ("serve", "vLLM", "8 adapters", 1.0),
    ):
        mine, theirs = value(part, "veneer", metric), value(part, peer, metric)
        if mine is not None and theirs:
            bars.append(bar(f"{metric} over {peer}'s", wanted, mine / theirs))
    return bars


def page(result: Mapping[str, Any]) -> str:
    """Return the text of CARD.md: figures with their rooflines and planned values."""
    machine, sides = result["machine"], {k: Outcome(**v) for k, v in result["sides"].items()}
    lines = [f"# {machine.get('card', 'a card')}", "", "[What this is, and how to read it](../how-to/gpu.md).", ""]
    lines += ["| part | what | measured | at most | of it | planned | measured over planned |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for key, outcome in sides.items():
        for f in outcome.figures:
            value, most, said = f["value"], f["roofline"], f["planned"]
            cells = [
                key,
                f["metric"],
                f"{_number(value)} {f['unit']}",
                _number(most),
                f"{value / most:.0%}" if most else "",
            ]
            cells += [_number(said), f"{value / said:.2f}" if said else ""]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| published: NVIDIA NeMo AutoModel, one H100 | training | {PUBLISHED[0]:,} tokens/s | | | | |"]
    lines += [f"| | arithmetic | {PUBLISHED[1]} TFLOP/s | | | | |", ""]
    if result["bars"]:
        lines += ["| wanted | | got | |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {b['name']} | {b['want']} | {b['got']} | {'met' if b['ok'] else '**missed**'} |" for b in result["bars"]
        ]
        lines.append("")
    lines += ["## What ran, and what did not", "", "| side | | seconds | when | |", "| --- | --- | --- | --- | --- |"]
    for key, outcome in sides.items():
        text = _cell("; ".join([*([outcome.why] if outcome.why else []), *outcome.notes]))
        lines.append(f"| {key} | {outcome.status} | {outcome.seconds:.0f} | {outcome.at} | {text} |")
    lines += ["", "## With what", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items() if name != "card"]
    lines += [f"- command: `{command}`" for command in dict.fromkeys(o.command for o in sides.values())]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:400]


def slug(card: str) -> str:
    """Return a GPU's name as a file name: NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") or "card"


def written(result: dict[str, Any], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Write CARD.md and CARD.json atomically; return the page's path and the result.

    For sides that were not tried, the result has the results of an earlier run. If the existing file is not
    from an earlier run, it is renamed to end with .unread."""
    from veneer.files.atomic import (
        replace_file,
    )  # a late import, as above: the Python of a peer lacks veneer

    card = str(result["machine"].get("card", "card"))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{slug(card)}.json"
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            had = {key: Outcome(**values) for key, values in before["sides"].items()}
            machine = {**before["machine"], **result["machine"]}
        except (ValueError, TypeError, KeyError, AttributeError):
            file.replace(file.with_suffix(".json.unread"))
        else:
            now = {key: Outcome(**values) for key, values in result["sides"].items()}
            stays = {key for key, o in now.items() if o.status in NOT_TRIED and not o.figures and key in had}
            result = result_of({**had, **{key: o for key, o in now.items() if key not in stays}}, machine)
    replace_file(file, [(json.dumps(result, indent=1) + "\n").encode()])
    replace_file(where := file.with_suffix(".md"), [page(result).encode()])
    return where, result


def about_of(done: Mapping[str, Outcome]) -> dict[str, Any]:
    """Return the GPU as probed, the commit, and the versions of GPU packages."""
    from importlib.metadata import PackageNotFoundError, version

    commit, packages = "", {}
    with suppress(OSError):  # without git
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for name in ("triton", "liger_kernel", "diffusers", "bitsandbytes", "unsloth", "vllm"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    card = done[PROBE.key].more.get("card", {"card": _card_by_name()})
    return {**card, "commit": commit or "unknown", **packages}


def _card_by_name() -> str:
    """Return the GPU's name from nvidia-smi, for a probe without a result."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "a card that could not be probed"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it; what is left decides (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, no peers: does it run, not how fast")
    parser.add_argument("--out", type=Path, help="where CARD.md goes (docs/gpu)")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH", help="a peer's environment")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.side:
        key, task = json.loads(args.side)
        side = next(s for s in [PROBE, *SIDES] if s.key == key)
        given = Task(**task)
        if given.limit and hasattr(signal, "alarm"):
            signal.alarm(math.ceil(given.limit) + 5)  # ends this process if its parent is gone
        tell(side.run(given))
        return 0
    wanted = [part.strip() for part in args.only.split(",")]
    if unknown := [p for p in wanted if p not in PARTS]:
        parser.error(f"--only has no {', '.join(p or repr(p) for p in unknown)}; there are {', '.join(PARTS)}")
    if not math.isfinite(args.minutes) or args.minutes <= 0:
        parser.error(f"--minutes has to be a number above 0, as 10, and is {args.minutes:g}")
    try:
        pythons = pythons_of(args.python)
    except ValueError as error:
        parser.error(str(error))
    out = args.out or (None if args.dry else ROOT / "docs" / "gpu")
    if out is not None and (why := not_writable(out)):
        parser.error(f"--out {out}: {why}")
    if not args.dry and not _has_a_card():
        parser.error("there is no CUDA device here; --dry tries every line on the CPU")
    command = " ".join(["benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])

    def keep(done: dict[str, Outcome]) -> None:
        if out is not None:
            written(result_of(done, about_of(done)), out)

    with tempfile.TemporaryDirectory() as folder, stoppable():
        done = run(
            [s for s in SIDES if s.part in wanted],
            in_a_process(pythons),
            Path(folder),
            dry=args.dry,
            minutes=args.minutes,
            command=command,
            say=lambda line: print(line, file=sys.stderr, flush=True),
            keep=keep,
        )
    result = result_of(done, about_of(done))
    if out is not None:
        where, result = written(result, out)
        print(f"written: {where}", file=sys.stderr)
    print(json.dumps(result) if args.json else "\n".join(lines_of(result)) if out is not None else page(result))
    if any(outcome.status == "stopped" for outcome in done.values()):
        return 130
    return int(any(done[s.key].bad for s in [PROBE, *SIDES] if s.key in done and not s.needs))


def pythons_of(given: Sequence[str]) -> dict[str, str]:
    """Parse PEER=PATH arguments into a mapping of peers to Python interpreters.

    Raises ValueError if the peer is unknown or repeated, or the interpreter is not found."""
    peers = sorted({side.needs for side in SIDES if side.needs})
    found: dict[str, str] = {}
    for each in given:
        peer, _, path = each.partition("=")
        if peer not in peers or not path:
            raise ValueError(f"--python {each!r}: PEER=PATH is wanted, with a PEER of {', '.join(peers)}")
        if peer in found:
            raise ValueError(f"--python names {peer} twice")
        if shutil.which(path) is None:
            raise ValueError(f"--python {each!r}: there is no program {path}; give the environment's bin/python")
        found[peer] = path
    return found


def not_writable(folder: Path) -> str:
    """Return the reason why no page can be written to `folder`, or "".

    Creates no folder."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        return f"{there} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"nothing can be written to {there} ({error.strerror})"


def _has_a_card() -> bool:
    import torch

    return torch.cuda.is_available()


def ended() -> int:
    """Run `main` and return its exit code; on Ctrl-C between sides, print no traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        print("stopped; what was written before is whole", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(ended())
