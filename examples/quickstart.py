"""`make quickstart`: teach a small language model to route support tickets, and show what it learned.

    python examples/quickstart.py [--output runs/quickstart] [--base smollm2-135m] [--tickets 200]

Everything that veneer does here is in `main`, through the public functions; the rest draws tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

import veneer

ROOT = Path(__file__).resolve().parents[1]
TICKETS = ROOT / "examples" / "tickets"
SYSTEM = "Route this Tarnhill ticket. Answer in JSON: team, priority, product_area."
FIELDS = ("team", "priority", "product_area")
console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    started = time.perf_counter()

    say("1", "The base")
    base = veneer.load_base(args.base)
    console.print(
        f"  {escape(base.name)} on {base.device}, {str(base.dtype).removeprefix('torch.')}: {base.dtype_reason}"
    )

    say("2", "Training an adapter on 800 tickets")
    shutil.rmtree(args.output, ignore_errors=True)
    with Watch() as watch:
        run = veneer.train(args.config, f"base={args.base}", f"output={args.output}", base=base, on_event=watch)
    console.print(f"  {run.trained_tokens:,} of {run.tokens:,} tokens were learned: the answers, not the tickets")

    say("3", f"Base and adapter on {args.tickets} tickets they have not seen")
    rows = [json.loads(line) for line in (TICKETS / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = spread(rows, args.tickets)
    results = veneer.evaluate(base, rows, mixes={"base": (), "adapter": [run.adapter]}, max_new_tokens=32)

    say("4", "What it learned")
    console.print(scores(rows, results))
    console.print(samples(rows, results))
    console.print(facts(run, time.perf_counter() - started))
    console.print(commands(args), soft_wrap=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and try a support-ticket adapter.")
    parser.add_argument("--base", default="smollm2-135m", help="built-in name, folder, .gguf file or hub id")
    parser.add_argument("--config", type=Path, default=TICKETS / "config.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="emptied first")
    parser.add_argument("--tickets", type=int, default=200, help="held-out tickets to answer")
    return parser.parse_args(argv)


def spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows at even distances, so that a short evaluation sees all kinds."""
    return [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]


# -- drawing


def say(number: str, title: str) -> None:
    console.print(f"\n[bold cyan]{number}[/] [bold]{title}[/]")


class Watch:
    """Listens to a run: a progress bar on a terminal, a line every tenth of the run elsewhere."""

    def __init__(self) -> None:
        columns = [TextColumn("  {task.description}"), BarColumn(40), TextColumn("{task.percentage:3.0f}%")]
        columns += [TextColumn("{task.fields[note]}"), TimeRemainingColumn(compact=True)]
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task: TaskID | None = None

    def __enter__(self) -> Watch:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, event: Any) -> None:
        kind = type(event).__name__
        if kind == "Stepped":
            note = f"loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s"
            if self.task is None:
                self.task = self.bar.add_task("training", total=event.steps, note="")
            self.bar.update(self.task, completed=event.step, note=note)
            if not console.is_terminal and event.step % max(1, event.steps // 10) == 0:
                console.print(f"  step {event.step}/{event.steps}  {note}")
        elif kind == "Evaluated":
            console.print(f"  after step {event.step}: held-out loss {event.loss:.3f} on {event.rows} rows")


def parsed(answer: str) -> dict[str, Any]:
    try:
        value = json.loads(answer)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def scores(rows: list[dict[str, Any]], results: Any) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"{len(rows)} held-out tickets", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("base", "adapter"):
        table.add_column(name, justify="right", style="bold green" if name == "adapter" else "")
    shown = [("accuracy (all three right)", "exact_match", "{:.1%}"), ("valid JSON", "valid_json", "{:.1%}")]
    for label, key, form in [*shown, ("held-out loss", "loss", "{:.3f}")]:
        table.add_row(label, *(form.format(getattr(results[name], key)) for name in ("base", "adapter")))
    wanted = [parsed(row["messages"][-1]["content"]) for row in rows]
    for key in FIELDS:
        right = []
        for name in ("base", "adapter"):
            pairs = zip(wanted, results[name].answers, strict=True)
            right.append(sum(parsed(answer).get(key) == want[key] for want, answer in pairs) / len(rows))
        table.add_row(f"  {key} right", *(f"{share:.1%}" for share in right))
    return table


def samples(rows: list[dict[str, Any]], results: Any) -> Table:
    """Three tickets of different teams and both answers, right or wrong: the first, and the next of another team."""
    table = Table(box=box.SIMPLE_HEAD, title="Three of them", title_justify="left", title_style="bold", show_lines=True)
    for name in ("ticket", "base", "adapter", "wanted"):
        table.add_column(name, ratio=3 if name == "ticket" else 2, overflow="fold")
    teams: set[str] = set()
    for i, row in enumerate(rows):
        want = row["messages"][-1]["content"]
        text = " ".join(row["messages"][-2]["content"].split())
        team = parsed(want)["team"]
        if team in teams or len(text) > 240:
            continue
        teams.add(team)
        adapter = results["adapter"].answers[i]
        style = "green" if parsed(adapter) == parsed(want) else "red"
        answers = [" ".join(results["base"].answers[i].split()) or "(nothing)", f"[{style}]{escape(adapter)}[/]"]
        table.add_row(escape(text), escape(answers[0]), answers[1], escape(want))
        if len(teams) == 3:
            break
    return table


def facts(run: Any, seconds: float) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2))
    size = sum(f.stat().st_size for f in Path(run.adapter).glob("adapter_model*"))
    table.add_row("adapter", f"{size / 1e6:.1f} MB in {shown_path(Path(run.adapter))}")
    table.add_row("training", f"{run.steps} steps, {run.tokens_per_second:,.0f} tokens/s")
    table.add_row("peak memory", f"{run.peak_memory_bytes / 1e9:.1f} GB")
    table.add_row("time", f"{int(seconds // 60)} min {int(seconds % 60):02d} s in all")
    return table


def commands(args: argparse.Namespace) -> str:
    """The next three commands, as they can be pasted here."""
    veneer_command = shown_path(Path(sys.executable).parent / "veneer")
    folder = shown_path(args.output)
    prompt = "Hi, nobody can get into the lab, the Latch is dead. Jonas"
    lines = [
        f'{veneer_command} generate "{prompt}" --adapter {folder} --system "{SYSTEM}"',
        f"{veneer_command} adapter inspect {folder}",
        f"{veneer_command} train {shown_path(TICKETS / 'config.yaml')} adapter.rank=8 output=runs/rank8",
    ]
    report = shown_path(args.output / "report.html")
    return "\n".join(["\n[bold]Try next[/]", *(f"  {escape(line)}" for line in lines), f"\nThe report: {report}"])


def shown_path(path: Path) -> str:
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    try:
        main()
    except veneer.VeneerError as error:
        console.print(f"[red]{escape(str(error))}[/]")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
