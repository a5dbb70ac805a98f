"""`veneer eval`: compare the base and adapters on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import AllowOtherBase, ChosenDevice, LoadedDtype, Quantize, chosen_base
from veneer.cli.output import field, say
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.train.text.evaluate import Scores

app = typer.Typer(add_completion=False)


@app.command("eval", epilog="Example: veneer eval --adapter runs/support --adapter runs/polite:0.5 --data test.jsonl")
def evaluate(
    base: Annotated[str | None, typer.Option("--base", help="Base model. Default: the first adapter's base.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="NAME_OR_PATH[:strength]: one column of the table; repeatable."),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Held-out rows: files, globs or hub:ID@SPLIT.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Number of rows to use, from the first.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Maximum tokens of an answer.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Answers per batch.", min=1)] = 32,
    loss_only: Annotated[
        bool, typer.Option("--loss-only", help="Only loss and perplexity, without generating answers.")
    ] = False,
    answers: Annotated[bool, typer.Option("--answers", help="With --json: include every answer.")] = False,
    dtype: LoadedDtype = "auto",
    quantize: Quantize = None,
    device: ChosenDevice = "auto",
    allow_other_base: AllowOtherBase = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: base and each mix.")] = False,
) -> None:
    """Score the base and each adapter on held-out rows.

    The metrics are exact match, valid JSON, loss and perplexity. For preference pairs, the metrics are how
    often and by how much the model prefers the chosen answer to the rejected answer."""
    specs = adapter or []
    mixes = {"base": [], **{spec: [spec] for spec in specs}}

    from veneer.adapters.use import parse_spec
    from veneer.models.loading import errors_only
    from veneer.models.text.base import load_text
    from veneer.serve.engine.offline import answering
    from veneer.train.text.evaluate import score_mixes
    from veneer.train.text.rows import read_rows

    name = chosen_base(base, [parse_spec(spec)[0] for spec in specs])
    if not name:
        raise ConfigError("no base is named", fix="--base smollm2-135m, a folder, a .gguf file or a hub id")
    if not data:
        raise ConfigError("there is nothing to evaluate on", fix="select held-out rows: --data test.jsonl")
    rows, source = read_rows(data, limit=limit)
    say(f"{len(rows)} rows in `{source.format}` format: {source.why}")
    with errors_only():
        model = load_text(name, dtype=dtype, device=device, quantize=quantize, say=say)
        results = score_mixes(
            model,
            rows,
            mixes,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            generate=not loss_only,
            allow_other_base=allow_other_base,
            on_progress=_progress,
            answering=answering,
        )
    if as_json:
        print(json.dumps({mix: s.to_dict(answers=answers) for mix, s in results.items()}))
    else:
        _table(results)


def _progress(mix: str, done: int, rows: int) -> None:
    say(f"  {mix}: {done} of {rows} answered")


def _table(results: dict[str, Scores]) -> None:
    """Print a table with one column per mix and one row per metric that has values."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def share(value: float) -> str:
        return f"{value:.1%}"

    measures: list[tuple[str, str, Callable[[Any], str]]] = [
        ("rows", "rows", str),
        ("exact match", "exact_match", share),
        ("valid JSON", "valid_json", share),
        ("loss", "loss", "{:.4f}".format),
        ("perplexity", "perplexity", "{:.3f}".format),
        ("chosen is likelier", "likelier", share),
        ("reward accuracy", "reward_accuracy", share),
        ("reward margin, nats", "reward_margin", "{:.2f}".format),
        ("seconds", "seconds", "{:.1f}".format),
    ]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for mix in results:
        table.add_column(escape(field(Path(mix).name)) if mix != "base" else "base", justify="right", overflow="fold")
    fields = list(dict.fromkeys(key for s in results.values() for key in s.json_fields))
    for label, name, shown in measures:
        values = [getattr(s, name) for s in results.values()]
        if any(value is not None for value in values):
            table.add_row(label, *(shown(value) if value is not None else "–" for value in values))
        if name == "valid_json":
            for key in fields:
                table.add_row(
                    f"  {escape(field(key))} right", *(share(s.json_fields.get(key, 0.0)) for s in results.values())
                )
    Console().print(table)
