"""A decorator for commands that need an open resource, such as a library.

    library_command = partial(command, app, open_library)

    @library_command("remove", "veneer library remove support@1")
    def remove(library: Library, reference: Reference) -> Result:
        gone = library.remove(reference)
        return Result({"removed": gone}, f"removed {', '.join(gone)}")

`veneer library remove support@1` prints the Result's `text`; with `--json`, it prints the `value`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, get_type_hints

import typer

from veneer.cli.options import AsJson
from veneer.cli.output import print_json


@dataclass(frozen=True)
class Result:
    """The output of a command.

    value: the output with --json.
    text: the output without --json.
    code: the exit code."""

    value: Any
    text: str
    code: int = 0


def command(
    app: typer.Typer, opened: Callable[[], AbstractContextManager[Any]], name: str, example: str
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Return a decorator that registers a function as the command `name` of `app`.

    The function's first argument is the resource that `opened` yields. Its other arguments become the
    command's arguments and options, and the command also gets a `--json` option."""

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def run(*, as_json: bool, **arguments: Any) -> None:
            with opened() as first:
                result = function(first, **arguments)
            if as_json:
                print_json(result.value)
            elif result.text:
                print(result.text)
            if result.code:
                raise typer.Exit(result.code)

        first, *rest = inspect.signature(function).parameters.values()
        names = {
            **function.__globals__,
            str(first.annotation): object,
        }  # imported only for type checking, so not defined at run time
        hints = get_type_hints(function, names, include_extras=True)
        json_option = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson)
        options = [*(p.replace(annotation=hints[p.name]) for p in rest), json_option]
        run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in options}
        app.command(name, epilog=f"Example: {example}")(run)
        return function

    return register
