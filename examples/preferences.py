"""Train a small language model to prefer short, polite replies to support tickets.

    python examples/preferences.py [--output runs/preferences] [--base smollm2-135m] [--tickets 40]

The model trains on pairs of replies (examples/tickets/preferences.yaml). The script evaluates the model on
other tickets and with replies made of other sentences: which reply of a pair the model prefers, and how long
and polite its own replies are.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import veneer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quickstart import emptied

TICKETS = Path(__file__).resolve().parent / "tickets"
POLITE = re.compile(r"\b(thank|thanks|sorry|apolog\w*|appreciate|please|kind)\b", re.IGNORECASE)
console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    started = time.perf_counter()
    base = veneer.load_base(args.base, say=print)
    emptied(args.output)
    run = veneer.train_text(args.config, f"base={args.base}", f"output={args.output}", base=base)
    mixes = {"base": [], "adapter": [run.adapter]}
    scores = veneer.evaluate(
        base, TICKETS / "preferences-test.jsonl", mixes, limit=args.tickets, max_new_tokens=args.tokens
    )
    console.print()
    for part in (table(scores, run, args.tokens), samples(scores)):
        console.print(part)
    console.print(f"{run.steps} steps, {(time.perf_counter() - started) / 60:.1f} min from first to last")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on preferences and measure their effect.")
    parser.add_argument("--base", default="smollm2-135m", help="built-in name, folder, .gguf file or hub id")
    parser.add_argument("--config", type=Path, default=TICKETS / "preferences.yaml")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/preferences"), help="earlier results there are removed"
    )
    parser.add_argument("--tickets", type=int, default=40, help="held-out tickets to reply to")
    parser.add_argument("--tokens", type=int, default=96, help="tokens a reply may have")
    return parser.parse_args(argv)


def table(scores: Mapping[str, Any], run: Any, tokens: int) -> Table:
    out = Table(box=box.SIMPLE_HEAD, title=f"{scores['base'].rows} held-out tickets", title_justify="left")
    out.add_column("")
    out.add_column("base", justify="right")
    out.add_column("adapter", justify="right", style="bold green")

    def line(what: str, of: Any) -> None:
        out.add_row(what, *(of(scores[name]) for name in ("base", "adapter")))

    line(f"words in a reply (of at most {tokens} tokens)", lambda s: f"{mean(len(a.split()) for a in s.answers):.1f}")
    line("replies with a polite phrase", lambda s: f"{mean(bool(POLITE.search(a)) for a in s.answers):.0%}")
    line("chosen reply is the likelier one", lambda s: f"{s.likelier:.0%}")
    out.add_row("chosen reply gained on the rejected one", "", f"{scores['adapter'].reward_accuracy:.0%}")
    out.add_row(
        "log p of the chosen replies, nats", *(f"{m['logp_chosen']:.1f}" for m in (run.measured_before, run.measured))
    )
    return out


def samples(scores: Mapping[str, Any], count: int = 3) -> Table:
    out = Table.grid(padding=(0, 2))
    out.add_column(justify="right", style="cyan", no_wrap=True)
    out.add_column(overflow="fold")
    for plain, tuned in list(zip(scores["base"].answers, scores["adapter"].answers, strict=True))[:count]:
        out.add_row("base", f"[dim]{escape(' '.join(plain.split()))}[/]")
        out.add_row("adapter", escape(" ".join(tuned.split())))
        out.add_row("", "")
    return out


def mean(values: Any) -> float:
    listed = [float(v) for v in values]
    return sum(listed) / len(listed)


if __name__ == "__main__":
    try:
        main()
    except veneer.VeneerError as error:
        Console(stderr=True, highlight=False).print(f"[red]error[/] {escape(str(error))}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
