"""`veneer sweep`: train all combinations of settings and compare the results."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import AsJson
from veneer.cli.output import print_json, print_table, say
from veneer.errors import Interrupted

app = typer.Typer(add_completion=False)

_COLUMNS = ("validation", "loss", "kept_step")


@app.command(epilog="Example: veneer sweep support.yaml adapter.rank=8,16,64 optimizer.learning_rate=1e-4,5e-4")
def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A text configuration, as for veneer train.")],
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="section.key=VALUE,VALUE...",
            help="Settings; those with several values are swept in all combinations.",
        ),
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest checkpoints.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything; write nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Run with a warning even if the plan says the runs do not fit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter for every combination of settings, and compare the results.

    The runs of all combinations share each forward pass of the base."""
    from veneer.models.loading import errors_only
    from veneer.train.report.log import ConsoleView
    from veneer.train.text.sweep import run_sweep

    try:
        with errors_only():
            result = run_sweep(
                config,
                settings,
                resume=resume,
                dry_run=dry_run,
                force=force,
                listener=lambda name: ConsoleView(name=name),
            )
    except Interrupted as error:
        command = shlex.join(["veneer", "sweep", str(config), *settings, "--resume"])
        raise Interrupted(error.what, fix=f"continue with: {command}", signal=error.signal) from None
    rows = result.rows()
    if as_json:
        print_json(result.to_dict())
    else:
        swept = list(result.combinations[0].swept)
        cells = [[*(row[key] for key in swept), *(_number(row.get(key)) for key in _COLUMNS)] for row in rows]
        heads = [*swept, *(column.replace("_", " ") for column in _COLUMNS), ""]
        print_table(heads, [[*values, row.get("ended", "")] for values, row in zip(cells, rows, strict=True)])
    if result.report:
        say(f"report   {result.report}")
    if all("ended" in row for row in rows):
        raise typer.Exit(2)


def _number(value: object) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
