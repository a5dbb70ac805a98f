"""`veneer train`: an adapter from a configuration file."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.errors import Interrupted

__all__ = ["app"]

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: veneer train support.yaml optimizer.learning_rate=5e-4 output=runs/second")
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="A YAML file; docs/reference/config.md lists every key.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Values that replace the file's, as adapter.rank=8."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the output.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and run the longest batch; write nothing.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write scalars to OUTPUT/tensorboard as well.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, on stdout.")] = False,
) -> None:
    """Train an adapter: check the data, train with checkpoints, save in PEFT's format, and write a report."""
    from veneer.train.config import load_config

    chosen, sources = load_config(config, overrides or [])

    from veneer.models.quiet import quiet
    from veneer.train.events import fan_out
    from veneer.train.report import ConsoleView, TensorBoardLog
    from veneer.train.run import train_text

    board = TensorBoardLog(Path(chosen.output.directory) / "tensorboard") if tensorboard and not dry_run else None
    view = ConsoleView()
    try:
        with quiet():
            result = train_text(
                chosen, resume=resume, dry_run=dry_run, sources=sources, on_event=fan_out(view, board)
            )  # fmt: skip
    except Interrupted as error:
        command = _again(config, overrides or [], tensorboard=tensorboard, as_json=as_json)
        raise Interrupted(error.what, where=error.where, fix=f"go on with: {command}") from None
    finally:
        view.close()
        if board is not None:
            board.close()
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        _say(result, chosen)


def _again(config: Path, overrides: list[str], *, tensorboard: bool, as_json: bool) -> str:
    """The command that goes on where this one stopped."""
    flags = ["--resume", *(["--tensorboard"] if tensorboard else []), *(["--json"] if as_json else [])]
    return shlex.join(["veneer", "train", str(config), *overrides, *flags])


def _say(result: Any, config: Any) -> None:
    """What to look at next, on stderr; stdout stays for programs."""
    if result.dry_run:
        print(
            f"dry run: {result.steps:,} steps, {result.tokens:,} tokens, {result.trained_tokens:,} of them learned; "
            "nothing was written",
            file=sys.stderr,
        )
        return
    where = shlex.quote(result.adapter)
    print(
        f"\nadapter  {result.adapter}\nreport   {result.report}\n"
        f'try it   veneer generate --base {shlex.quote(config.base.name)} --adapter {where} "…"',
        file=sys.stderr,
    )
