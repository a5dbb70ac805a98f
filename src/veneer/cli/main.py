"""The `veneer` command: the table of subcommands and the handling of errors.

The subcommand NAME is in the file `cli/NAME.py`, which defines either

    app: typer.Typer        a command with subcommands (veneer base get …), or
    command: Callable       a single command as typer expects it: annotated parameters and a docstring

and imports torch, transformers and the rest of veneer inside its functions, so that `--help` is fast.
The file is imported when its command runs.

docs/reference/exit-codes.md lists the exit codes.

`cli/output.py` wraps stdout and stderr, so that text from files cannot send escape sequences to the terminal.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from veneer import __version__
from veneer.cli.output import error_text, guard, print_json, unwrapped
from veneer.errors import ConfigError, ResourceError, UnavailableError, VeneerError, lacks_memory, quoted

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("veneer.cli.quickstart", "Train an adapter on support tickets, and test it."),
    "image-quickstart": ("veneer.cli.image_quickstart", "Train two image adapters, and draw with both."),
    "base": ("veneer.cli.base", "Download, list and describe base models."),
    "data": ("veneer.cli.data", "Caption images, and collect a teacher's answers as rows."),
    "train": ("veneer.cli.train", "Train an adapter from a configuration file."),
    "sweep": ("veneer.cli.sweep", "Train every combination of some settings at once."),
    "plan": ("veneer.cli.plan", "Estimate a run's memory, time and cost."),
    "eval": ("veneer.cli.eval", "Compare the base and adapters on held-out rows."),
    "generate": ("veneer.cli.generate", "Generate text, or chat, with a base and any adapters."),
    "image": ("veneer.cli.image", "Generate images with a base, adapters and ControlNets."),
    "serve": ("veneer.cli.serve", "Serve a base and its adapters over HTTP."),
    "studio": ("veneer.cli.studio", "Open a web page to browse, compare, train and release adapters."),
    "export": ("veneer.cli.export", "Write a model with adapters merged in, for llama.cpp or Ollama."),
    "adapter": ("veneer.cli.adapter", "Inspect, verify, convert, mix and merge adapters."),
    "library": ("veneer.cli.library", "Store, share and verify named adapters."),
    "jobs": ("veneer.cli.jobs", "Submit, watch and stop training jobs."),
    "worker": ("veneer.cli.worker", "Run training jobs, here or on a cluster."),
    "tenant": ("veneer.cli.tenant", "Manage a server's tenants: keys, limits, prices, routes, usage."),
    "backup": ("veneer.cli.backup", "Back up and restore the library, jobs and tenants."),
    "doctor": ("veneer.cli.doctor", "Report this machine's hardware, libraries and active code paths."),
}
"""Command -> (module, description in `veneer --help`)."""
PANELS: dict[str, tuple[str, ...]] = {
    "Start": ("quickstart", "image-quickstart", "doctor"),
    "Train": ("train", "sweep", "plan", "eval", "data", "jobs", "worker"),
    "Use": ("generate", "image", "base", "export"),
    "Keep": ("adapter", "library", "backup"),
    "Serve": ("serve", "studio", "tenant"),
}
"""Group of `veneer --help` -> its commands."""


class LazyGroup(TyperGroup):
    """Typer group that lists COMMANDS and imports a command's module on first use."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        panels = {name: panel for panel, names in PANELS.items() for name in names}
        lines = {name: COMMANDS[name][1] for name in (*panels, *COMMANDS)}
        self.commands = {
            name: TyperCommand(name, help=line, rich_help_panel=panels.get(name)) for name, line in lines.items()
        }

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, _imported(str(name)) if command is not None else None, rest

    def invoke(self, ctx: Any) -> Any:
        with exit_on_error():
            return super().invoke(ctx)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn expected errors into a message and SystemExit; let other errors propagate."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # do not fail again when stdout is flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        expected = error if isinstance(error, VeneerError) else _expected_error(error)
        if expected is None:
            raise
        if not expected.already_shown:
            _print_error(expected)
        raise SystemExit(expected.exit_code) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and raise SystemExit.

    argv: the arguments after the program's name; by default the arguments in `sys.argv`."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    with guard():
        try:
            program()(args=arguments, prog_name="veneer")
        except Exception:
            traceback.print_exc()
            print("This is a bug in veneer, not a mistake of yours. Please report the lines above.", file=sys.stderr)
            raise SystemExit(70) from None  # EX_SOFTWARE in sysexits.h


def program() -> Any:
    """Return the program, a click command that imports subcommands on first use."""
    app = typer.Typer(
        cls=LazyGroup,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog='Example: veneer generate "What is the capital of France?" --base smollm2-135m',
    )
    app.callback()(_root)
    return typer.main.get_command(app)


def _version(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        print_json(_versions()) if ctx.params["as_json"] else print(f"veneer {__version__}")
        raise typer.Exit()


def _versions() -> dict[str, str | None]:
    """Return what a bug report needs, without importing torch. `commit`: of a clone."""
    import platform
    import subprocess
    from importlib import metadata

    torch = next((each.version for each in metadata.distributions(name="torch")), None)
    root, commit = Path(__file__).resolve().parents[3], None
    if (root / ".git").exists():
        with suppress(OSError):  # git is not installed
            git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
            commit = git.stdout.strip() or None
    found = {"veneer": __version__, "python": platform.python_version(), "torch": torch}
    return found | {"platform": platform.platform(), "commit": commit}


def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, help="Print the version and exit.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", is_eager=True, help="With --version: also Python, torch, platform and commit.")
    ] = False,
) -> None:
    """Train, store, mix and serve low-rank adapters (LoRA)."""
    if as_json:
        ctx.fail("--json belongs to --version here; a command's own --json comes after the command.")


def _imported(name: str) -> Any:
    module = importlib.import_module(COMMANDS[name][0])
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False)
        app.command(name)(module.command)
    app.pretty_exceptions_enable = False  # plain text, as in the main command
    command = typer.main.get_command(app)
    command.name = name
    return command


def _expected_error(error: Exception) -> VeneerError | None:
    """Return a VeneerError for an expected error, such as a full disk, else None."""
    text, code = str(error), error.errno if isinstance(error, OSError) else None
    path = error.filename if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return ResourceError("the disk is full", where=path, fix="free some space, or write elsewhere")
    if code == errno.ENAMETOOLONG:
        return ConfigError("the file name is too long", where=quoted(str(path)))
    if isinstance(error, PermissionError):
        return ResourceError(f"no permission to use this file: {error.strerror}", where=path)
    if isinstance(error, RuntimeError) and "home directory" in text:  # pathlib raises this for `~unknown/…`
        return ConfigError("a path begins with ~ and an unknown user name", fix="write out the path")
    if isinstance(error, UnicodeEncodeError) and "surrogates" in text:
        return ConfigError("the text is not valid Unicode", fix="type the text again in the terminal's encoding")
    if type(orig := getattr(error, "orig", None)).__name__ == "OperationalError" and hasattr(orig, "sqlstate"):
        # psycopg's error; SQLite's OperationalError has no sqlstate and can also report invalid SQL
        reason = str(orig).strip().split("\n")[0]
        return UnavailableError(f"a database does not answer: {reason}", fix="try again when the database runs")
    if type(error).__name__ == "OutOfMemoryError":  # matched by name, because torch may not be loaded
        fix = "use smaller batches, or activation checkpointing"
        return ResourceError("the GPU's memory is exhausted", where=text.split(". ")[0], fix=fix)
    if lacks_memory(error):
        return ResourceError("the memory is exhausted", fix="use smaller batches, a smaller base, or dtype bfloat16")
    return None


def _print_error(error: VeneerError) -> None:
    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print("\033[1;31merror:\033[0m" if color else "error:", end=" ", file=unwrapped(sys.stderr))
    print(error_text(error), file=sys.stderr)


if __name__ == "__main__":
    main()
