"""`veneer train`: train one adapter, or several adapters together."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.options import Settings, files_and_settings
from veneer.cli.output import error_text, say
from veneer.errors import ConfigError, Interrupted, VeneerError

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: veneer train --base smollm2-135m --data desk.jsonl --rank 16 batching.rows=8")
def train(
    words: Settings = None,
    base: Annotated[str | None, typer.Option("--base", help="base.name: the base to train on.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="data.train or data.pictures: rows or images; repeatable.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="output.directory. Default: runs/NAME, named after the data.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="adapter.rank.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="schedule.epochs.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="schedule.steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="optimizer.learning_rate.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest checkpoint in the output folder.")
    ] = False,
    allow_other_machine: Annotated[
        bool,
        typer.Option("--allow-other-machine", help="Resume even if this machine cannot match the run bit for bit."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and run the longest batch; write nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Run with a warning even if the plan says the run does not fit.")
    ] = False,
    devices: Annotated[
        int | None, typer.Option("--devices", min=1, help="Data-parallel processes on this machine.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show default settings, with the reason for each.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, on stdout.")] = False,
) -> None:
    """Train an adapter: check the data, train, save checkpoints and write a report.

    Settings come from options, from section.key=value (docs/reference/config.md; image-config.md for images),
    and from a YAML file. data.train is for text, data.pictures for images. With several text configurations
    that have the same base (veneer train a.yaml b.yaml), the runs share each forward pass, and their results
    are the same as those of separate runs."""
    from veneer.train.config.image import ImageTrainConfig
    from veneer.train.config.load import common_settings, load_config

    named, settings = files_and_settings(words)
    given: dict[str, Any] = {"base": base, "data": tuple(data or ()), "output": output, "rank": rank}
    given |= {"epochs": epochs, "steps": steps, "learning_rate": learning_rate}
    settings = [*common_settings(**given), *settings]
    files: list[Path | None] = [*named] or [None]
    several = len(files) > 1
    loaded = [load_config(file, settings) for file in files]
    flags = {"--force": force, "--verbose": verbose, "--json": as_json}
    flags[f"--devices={devices}"] = devices is not None
    again = [*map(str, named), *settings, *(flag for flag, on in flags.items() if on)]

    from veneer.train.devices import is_leader, launch, process_count

    if several and devices not in (None, 1):
        message = "several configurations train together in one process"
        raise ConfigError(message, where="--devices", fix="omit --devices, or train one configuration at a time")
    if devices is not None and process_count() != devices:
        if process_count() > 1:
            problem = f"--devices is {devices}, and {process_count()} processes were started already"
            raise ConfigError(problem, fix="omit --devices: the launcher sets the number of processes")
        flags = {"--resume": resume, "--dry-run": dry_run, "--allow-other-machine": allow_other_machine}
        again += [flag for flag, on in flags.items() if on]
        raise SystemExit(launch(devices, [sys.executable, "-m", "veneer.cli.main", "train", *again]))

    from veneer.models.loading import errors_only
    from veneer.train.report.log import ConsoleView

    listeners = []
    for file, (config, _) in zip(files, loaded, strict=True):
        unit = "pictures" if isinstance(config, ImageTrainConfig) else "tokens"
        listeners.append(ConsoleView(unit=unit, verbose=verbose, name=str(file) if several else ""))
    options: dict[str, Any] = {"resume": resume, "dry_run": dry_run, "force": force}
    options["allow_other_machine"] = allow_other_machine
    try:
        with errors_only():
            results = _results(files, loaded, listeners, options)
    except Interrupted as error:
        command = shlex.join(["veneer", "train", *again, "--resume"])
        stopped = Interrupted(error.what, where=error.where, fix=f"continue with: {command}", signal=error.signal)
        stopped.already_shown = error.already_shown
        raise stopped from None
    finally:
        for listener in listeners:
            listener.close()
    if not is_leader():  # only the first of several processes prints
        return
    failed = {file: result for file, result in zip(files, results, strict=True) if isinstance(result, VeneerError)}
    if as_json:
        objects = [_json_of(result) for result in results]
        runs = [{"config": str(file), **summary} for file, summary in zip(files, objects, strict=True)]
        print(json.dumps({"runs": runs} if several else objects[0]))
    else:
        for result, (config, _) in zip(results, loaded, strict=True):
            if not isinstance(result, VeneerError):
                _print_result(result, config)
    for file, why in failed.items():
        say(f"error: {file}: {error_text(why)}")
    if failed:
        raise SystemExit(next(iter(failed.values())).exit_code)


def _results(files: list[Path | None], loaded: list[Any], listeners: list[Any], options: dict[str, Any]) -> list[Any]:
    """Return one result per run; if one of several runs fails, its result is the error."""
    from veneer.train.config.image import ImageTrainConfig

    if len(files) == 1:
        config, sources = loaded[0]
        options = {**options, "sources": sources, "on_event": listeners[0]}
        if isinstance(config, ImageTrainConfig):
            from veneer.train.image.run import run_images

            return [run_images(config, **options)]
        from veneer.serve.engine.live import live_sampler
        from veneer.train.text.task import run_text

        return [run_text(config, **options, sampler=live_sampler)]
    from veneer.train.text.together import run_texts

    names, sources = [str(file) for file in files], [sources for _, sources in loaded]
    return list(run_texts([c for c, _ in loaded], names=names, sources=sources, listeners=listeners, **options))


def _json_of(result: Any) -> dict[str, Any]:
    if isinstance(result, VeneerError):
        return {"error": result.what, "where": result.where, "fix": result.fix}
    values: dict[str, Any] = result.to_dict()
    return values


def _print_result(result: Any, config: Any) -> None:
    """Print to stderr the output paths and a command to try."""
    pictures = hasattr(result, "pictures")
    if result.dry_run:
        amount = f"{result.pictures:,} pictures" if pictures else f"{result.tokens:,} tokens, "
        amount += "" if pictures else f"{result.learned_tokens:,} of them count in the loss"
        preview = f"; the model's view of each picture is in {result.sheet}" if pictures else ""
        print(f"dry run: {result.steps:,} steps, {amount}; nothing was written{preview}", file=sys.stderr)
        return
    from veneer.formats.card import generate_command, read_card, sample_messages

    where, base = shlex.quote(result.adapter), shlex.quote(config.base.name)
    if not pictures:
        command = generate_command(
            config.base.name, result.adapter, sample_messages(read_card(result.adapter).card.extra)
        )
    else:
        prompt = config.samples.prompts[0] if config.samples.prompts else config.data.trigger or "…"
        command = f"veneer image --base {base} --adapter {where} {shlex.quote(prompt)} -o out.png"
    print(f"\nadapter  {result.adapter}\nreport   {result.report}\ntry it   {command}", file=sys.stderr)
