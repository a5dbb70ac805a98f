"""`veneer quickstart`: train a small language model to route support tickets.

    python examples/quickstart.py [--output runs/quickstart] [--base smollm2-135m] [--tickets 200]

All calls of veneer are in `main` and use its public functions. The other functions print the output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

import veneer
from veneer.cli.main import exit_on_error
from veneer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
TICKETS = ROOT / "examples" / "tickets"
console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    started = time.perf_counter()

    step(1, "The base: what everybody starts from")
    base = veneer.load_base(args.base, say=line)
    line(f"{base.name} on {base.device} in {str(base.dtype).removeprefix('torch.')}: {base.dtype_reason}")

    step(2, "Training: a thin layer on it, from 1,200 answered tickets")
    emptied(args.output)
    with Watch() as watch:
        run = veneer.train_text(args.config, f"base={args.base}", f"output={args.output}", base=base, on_event=watch)
    line(f"{run.steps} steps; of {run.tokens:,} tokens read, {run.learned_tokens:,} were learned: the answers")

    step(3, f"Evaluation: {args.tickets} tickets that share no sentence with those")
    mixes = {"base": [], "adapter": [run.adapter]}
    with Watch() as watch:
        scores = veneer.evaluate(
            base, TICKETS / "test.jsonl", mixes, limit=args.tickets, max_new_tokens=32, on_progress=watch.answered
        )

    rows = [json.loads(text) for text in (TICKETS / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = time.perf_counter() - started
    console.print()
    for part in (table(scores), samples(rows, scores), facts(run, seconds)):
        console.print(part)
    console.print(commands(args.output, rows[0]), soft_wrap=True)


def emptied(folder: Path) -> None:
    """Remove the results of an earlier run.

    Raises ConfigError if the folder contains other files."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "log.jsonl").is_file():
        raise ConfigError(f"{folder} holds files that are not of an earlier run", fix="--output, a folder of its own")
    shutil.rmtree(folder, ignore_errors=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and try a support-ticket adapter.")
    parser.add_argument("--base", default="smollm2-135m", help="built-in name, folder, .gguf file or hub id")
    parser.add_argument("--config", type=Path, default=TICKETS / "config.yaml")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), help="earlier results there are removed"
    )
    parser.add_argument("--tickets", type=int, default=200, help="held-out tickets to answer")
    return parser.parse_args(argv)


# -- drawing


def step(number: int, title: str) -> None:
    console.print(f"\n[bold cyan]{number}[/]  [bold]{escape(title)}[/]")


def line(text: str) -> None:
    console.print(f"   {escape(text)}", soft_wrap=True)


class Watch:
    """Shows progress: a bar on a terminal, otherwise one line per 10%."""

    def __init__(self) -> None:
        columns = [TextColumn("   {task.description}"), BarColumn(36), TextColumn("{task.percentage:3.0f}%")]
        columns += [TextColumn("{task.fields[note]}"), TimeRemainingColumn(compact=True)]
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.tasks: dict[str, TaskID] = {}
        self.told: dict[str, int] = {}

    def __enter__(self) -> Watch:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, event: Any) -> None:
        """Handle an event of a training run; see veneer.train.events."""
        kind = type(event).__name__
        if kind == "Stepped":
            note = f"loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s"
            self.show("training", event.step, event.steps, note)
        elif kind == "Evaluated":
            line(f"after step {event.step}: loss {event.loss:.3f} on {event.rows} rows kept back from training")

    def answered(self, mix: str, done: int, rows: int) -> None:
        self.show(f"{mix} answers", done, rows, "")

    def show(self, what: str, done: int, total: int, note: str) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total, note="")
        self.bar.update(self.tasks[what], completed=done, note=note)
        tenth = 10 * done // total
        if not console.is_terminal and tenth > self.told.get(what, 0):
            self.told[what] = tenth
            line(f"{what} {done}/{total}  {note}".rstrip())


def table(scores: Mapping[str, Any]) -> Table:
    base, adapter = scores["base"], scores["adapter"]
    out = Table(box=box.SIMPLE_HEAD, title=f"{base.rows} held-out tickets", title_justify="left", title_style="bold")
    out.add_column("")
    out.add_column("base", justify="right")
    out.add_column("adapter", justify="right", style="bold green")
    out.add_row("accuracy (all three fields right)", f"{base.exact_match:.1%}", f"{adapter.exact_match:.1%}")
    for field in adapter.json_fields:
        out.add_row(f"  {field}", f"{base.json_fields.get(field, 0):.1%}", f"{adapter.json_fields[field]:.1%}")
    out.add_row("valid JSON", f"{base.valid_json:.1%}", f"{adapter.valid_json:.1%}")
    out.add_row("loss on the answers", f"{base.loss:.3f}", f"{adapter.loss:.3f}")
    return out


def samples(rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Any], count: int = 3) -> Table:
    """Return a table of short tickets with the answers of base and adapter.

    It has the first such ticket of each of `count` teams."""
    out = Table.grid(padding=(0, 2))
    out.title, out.title_justify, out.title_style = f"{count} of them\n", "left", "bold"
    out.add_column(justify="right", style="cyan", no_wrap=True)
    out.add_column(overflow="fold")
    teams: set[str] = set()
    for row, plain, tuned in zip(rows, scores["base"].answers, scores["adapter"].answers, strict=False):
        text, want = (" ".join(row["messages"][i]["content"].split()) for i in (-2, -1))
        team = json.loads(want)["team"]
        if team in teams or len(text) > 300:
            continue
        teams.add(team)
        right = tuned.strip() == want
        out.add_row("  ticket", escape(text))
        out.add_row("base", f"[dim]{escape(' '.join(plain.split())) or '(nothing)'} …[/]")
        out.add_row("adapter", f"[{'green' if right else 'red'}]{escape(tuned.strip())}[/]")
        out.add_row("wanted", "the same" if right else escape(want), end_section=True)
        out.add_row("", "")
        if len(teams) == count:
            break
    return out


def facts(run: Any, seconds: float) -> Table:
    out = Table(box=None, show_header=False, padding=(0, 2))
    size = sum(file.stat().st_size for file in Path(run.adapter).glob("adapter_model*"))
    out.add_row("adapter", f"{size / 1e6:.1f} MB in {shown(Path(run.adapter))}")
    out.add_row("training", f"{run.tokens_per_second:,.0f} tokens/s")
    out.add_row("peak memory", f"{run.peak_memory_bytes / 1e9:.1f} GB")
    out.add_row("time", f"{int(seconds // 60)} min {int(seconds % 60):02d} s from first to last")
    return out


def commands(output: Path, row: Mapping[str, Any]) -> str:
    """Return three commands to try next."""
    command, folder = shown(Path(sys.executable).parent / "veneer"), shown(output)
    system = row["messages"][0]["content"]
    lines = [
        f'{command} generate "Nobody can get into the lab, the Latch is dead!" --adapter {folder} --system "{system}"',
        f"{command} adapter inspect {folder}",
        f"{command} train {shown(TICKETS / 'config.yaml')} adapter.rank=8 output=runs/rank8",
    ]
    told = ["\n[bold]Try next[/]", *(f"  {escape(text)}" for text in lines)]
    return "\n".join([*told, f"\nAll about this run: {escape(shown(output / 'report.html'))}"])


def shown(path: Path) -> str:
    """Return a path, relative to the working directory if possible."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    with exit_on_error():
        main()
