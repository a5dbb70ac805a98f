"""The `veneer` command: a table of subcommands, each imported only when it is run, and one place where errors end.

A command NAME lives in a file of its own, `cli/NAME.py`, which defines either

    app: typer.Typer        a command with subcommands (veneer base get …), or
    command: Callable       a single command, written as typer reads it: annotated parameters and a docstring

and imports torch, transformers and the rest of veneer inside its functions, so that its `--help` is immediate.

| what ends a command             | on stderr                                   | exit code |
| a VeneerError                   | error, where, fix                           | its own, 2 (Interrupted: 130, 143) |
| a wrong option or argument      | typer's usage message                       | 2 |
| Ctrl-C                          | "stopped"                                   | 130 |
| a full disk, no memory, no rights | what ran out and the way out              | 2 |
| a closed pipe                   | nothing                                     | 141 |
| anything else: a fault of ours  | that it is, what to report (cli/fault.py)   | 70 |

stdout and stderr are guarded on the way (cli/output.py): no text of a file reaches the terminal as an escape sequence.
"""

from __future__ import annotations

import errno
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from veneer import __version__
from veneer.cli import fault
from veneer.cli.output import error_text, guard, own
from veneer.errors import ConfigError, ResourceError, VeneerError, lacks_memory, quoted

COMMANDS: dict[str, tuple[str, str]] = {
    "base": ("veneer.cli.base", "Get, list and look at base models."),
    "data": ("veneer.cli.data", "Captions for pictures, and a teacher's answers as rows."),
    "train": ("veneer.cli.train", "Train an adapter from a configuration file."),
    "sweep": ("veneer.cli.sweep", "Train every combination of some settings at once."),
    "plan": ("veneer.cli.plan", "Memory, time and money of a run, before it runs."),
    "eval": ("veneer.cli.eval", "Compare the base and adapters on held-out rows."),
    "generate": ("veneer.cli.generate", "Generate text, or chat, with a base and any adapters."),
    "image": ("veneer.cli.image", "Make pictures with an image base, adapters and ControlNets."),
    "serve": ("veneer.cli.serve", "Serve a base and its adapters over HTTP."),
    "studio": ("veneer.cli.studio", "The page: look at adapters, compare, train, release them."),
    "adapter": ("veneer.cli.adapter", "Inspect, verify, convert, mix and merge adapters."),
    "library": ("veneer.cli.library", "Keep adapters under names, share and check them."),
    "jobs": ("veneer.cli.jobs", "Training jobs: submit, watch, stop."),
    "worker": ("veneer.cli.worker", "Carry out training jobs, here or on a cluster."),
    "tenant": ("veneer.cli.tenant", "Tenants of a server: keys, limits, prices, routes, usage."),
    "doctor": ("veneer.cli.doctor", "What this machine has for veneer, what runs on it, and why."),
    "export": ("veneer.cli.export", "Write an adapter as a directory that vLLM or TGI serves as it is."),
}
"""Command -> (module, one line for `veneer --help`)."""


class LazyGroup(TyperGroup):
    """Lists commands from the table, and imports one when it is resolved to be run or completed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: _listed(name, line) for name, (_, line) in COMMANDS.items()}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, _imported(str(name)) if command is not None else None, rest

    def invoke(self, ctx: Any) -> Any:
        with ended():
            return super().invoke(ctx)


@contextmanager
def ended() -> Iterator[None]:
    """What is expected to end a command ends in one message and SystemExit; a bug goes on as it is."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        _close_pipe()
        raise SystemExit(141) from None
    except Exception as error:
        known = error if isinstance(error, VeneerError) else _known(error)
        if known is None:
            raise
        if not known.already_shown:
            _show(known)
        raise SystemExit(known.exit_code) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; always ends with SystemExit. `argv`: the arguments after the program's name."""
    given = sys.argv[1:] if argv is None else list(argv)
    with guard():
        try:
            program()(args=given, prog_name="veneer")
        except Exception as error:
            print(fault.report(error, given, {name: module for name, (module, _) in COMMANDS.items()}), file=sys.stderr)
            raise SystemExit(fault.EXIT_CODE) from None


def program() -> Any:
    """The whole command line, as click has it; a command's own file is imported when it is asked for."""
    app = typer.Typer(
        cls=LazyGroup,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog='Example: veneer generate "What is the capital of France?" --base smollm2-135m',
    )
    app.callback()(_root)
    return typer.main.get_command(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"veneer {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, keep, mix and serve low-rank adapters (LoRA)."""


def _listed(name: str, line: str) -> Any:
    """What stands for a command in lists: its name and its line, nothing behind it."""
    stub = typer.Typer(add_completion=False)
    stub.command(name, help=line)(lambda: None)
    command = typer.main.get_command(stub)
    command.name = name
    return command


def _imported(name: str) -> Any:
    module = importlib.import_module(COMMANDS[name][0])
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False)
        app.command(name)(module.command)
    _finite_alone(app)
    # Plain text in help and errors of every command, as of the group.
    app.pretty_exceptions_enable = False
    command = typer.main.get_command(app)
    command.name = name
    return command


def _finite_alone(app: typer.Typer) -> None:
    """nan and infinity are refused as numbers of every command in `app`: a range lets nan through."""
    for group in app.registered_groups:
        if group.typer_instance is not None:
            _finite_alone(group.typer_instance)
    for command in app.registered_commands:
        if command.callback is not None and not hasattr(command.callback, "__wrapped__"):  # once a process
            command.callback = _finite(command.callback)


def _finite(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def checked(*args: Any, **given: Any) -> Any:
        for name, value in given.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{value} is not a finite number.", param_hint=f"--{name.replace('_', '-')}")
        return call(*args, **given)

    return checked


def _known(error: Exception) -> VeneerError | None:
    """A machine's limits in veneer's words; None for what is not known."""
    text, kind = str(error), type(error).__name__
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ResourceError(
                "the disk is full", where=error.filename, fix="free some space there, or write elsewhere"
            )
        if error.errno == errno.ENAMETOOLONG:
            return ConfigError("this is too long to be the name of a file", where=quoted(str(error.filename)))
        if isinstance(error, PermissionError):
            return ResourceError(f"no permission to use this file: {error.strerror}", where=error.filename)
    if kind == "RuntimeError" and "home directory" in text:  # pathlib's, of `~somebody/…`
        return ConfigError("a path begins with ~ and a name that this machine has no home for", fix="write it out")
    if isinstance(error, UnicodeEncodeError) and "surrogates" in text:
        fix = "write it anew: it was cut, or typed in another encoding than the terminal's"
        return ConfigError("a text has half a character, which is none", fix=fix)
    if "No space left on device" in text:
        return ResourceError("the disk is full", fix="free some space, or write elsewhere")
    if kind == "OutOfMemoryError":  # torch's, known by name: torch need not be loaded
        return ResourceError(
            "the GPU's memory is exhausted",
            where=text.split(". ")[0],
            fix="fewer rows at once, or activation checkpointing",
        )
    if lacks_memory(error):
        return ResourceError("the memory is exhausted", fix="fewer rows at once, a smaller base, or dtype bfloat16")
    return None


def _show(error: VeneerError) -> None:
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        print("\033[1;31merror:\033[0m", end=" ", file=own(sys.stderr))
        print(error_text(error), file=sys.stderr)
    else:
        print(f"error: {error_text(error)}", file=sys.stderr)


def _close_pipe() -> None:
    """Whoever read stdout is gone; point it elsewhere, so that closing it at exit does not fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
