"""`veneer train`: an adapter from a configuration file."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.errors import ConfigError, Interrupted

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: veneer train support.yaml optimizer.learning_rate=5e-4 output=runs/second --devices 2")
def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.yaml",
            help="A YAML file; docs/reference/config.md lists every key, image-config.md those for pictures.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Values that replace the file's, as adapter.rank=8."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the output.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and run the longest batch; write nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Try a run that does not fit by its plan, with a warning.")
    ] = False,
    devices: Annotated[
        int | None, typer.Option("--devices", min=1, help="Share each step among so many processes on this machine.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the settings that nobody gave, with the reason for each.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, on stdout.")] = False,
) -> None:
    """Train an adapter: check the data, train with checkpoints, save, and write a report.

    A configuration with data.train is for text, one with data.pictures for pictures."""
    from veneer.train.config.image import ImageTrainConfig
    from veneer.train.config.load import load_config

    chosen, sources = load_config(config, overrides or [])
    given = {"--force": force, "--verbose": verbose, "--json": as_json}
    given[f"--devices={devices}"] = devices is not None
    again = [str(config), *(overrides or []), *(flag for flag, on in given.items() if on)]

    from veneer.train.devices import launch, leads, started

    if devices is not None and started() != devices:
        if started() > 1:
            raise ConfigError(
                f"--devices is {devices}, and {started()} processes were started already",
                fix="leave --devices out: whoever starts the processes says how many there are",
            )
        given = {"--resume": resume, "--dry-run": dry_run}
        again += [flag for flag, on in given.items() if on]
        raise SystemExit(launch(devices, [sys.executable, "-m", "veneer.cli.main", "train", *again]))

    from veneer.models.loading import errors_only
    from veneer.train.report.log import ConsoleView

    view = ConsoleView(unit="pictures" if isinstance(chosen, ImageTrainConfig) else "tokens", verbose=verbose)
    options: dict[str, Any] = {"resume": resume, "dry_run": dry_run, "force": force, "sources": sources}
    options["on_event"] = view
    result: Any
    try:
        with errors_only():
            if isinstance(chosen, ImageTrainConfig):
                from veneer.train.image.run import run_images

                result = run_images(chosen, **options)
            else:
                from veneer.train.text.task import run_text

                result = run_text(chosen, **options)
    except Interrupted as error:
        command = shlex.join(["veneer", "train", *again, "--resume"])
        stopped = Interrupted(error.what, where=error.where, fix=f"go on with: {command}", signal=error.signal)
        stopped.already_shown = error.already_shown
        raise stopped from None
    finally:
        view.close()
    if not leads():  # of several processes one speaks
        return
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        _say(result, chosen)


def _say(result: Any, config: Any) -> None:
    """What to look at next, on stderr; stdout stays for programs."""
    pictures = hasattr(result, "pictures")
    if result.dry_run:
        counted = f"{result.pictures:,} pictures" if pictures else f"{result.tokens:,} tokens, "
        counted += "" if pictures else f"{result.trained_tokens:,} of them learned"
        seen = f"; what the model would see is in {result.sheet}" if pictures else ""
        print(f"dry run: {result.steps:,} steps, {counted}; nothing was written{seen}", file=sys.stderr)
        return
    where, base = shlex.quote(result.adapter), shlex.quote(config.base.name)
    command = f'veneer generate --base {base} --adapter {where} "…"'
    if pictures:
        prompt = config.samples.prompts[0] if config.samples.prompts else config.data.trigger or "…"
        command = f"veneer image --base {base} --adapter {where} {shlex.quote(prompt)} -o out.png"
    print(f"\nadapter  {result.adapter}\nreport   {result.report}\ntry it   {command}", file=sys.stderr)
