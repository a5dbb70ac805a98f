"""Command lines that do the same as a page, for users to copy.

command("library", "alias", "support@2", "prod")                veneer library alias support@2 prod
command("library", "search", "sql", tag=["a", "b"], all=True)   veneer library search sql --tag a --tag b --all
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veneer.studio.frame import ViewPage


def command(*words: str | int, **options: object) -> str:
    """Return a `veneer` command line.

    `options`: text or number; a list repeats the option; True is a flag; None, False, "" and [] omit the
    option. Underscores in names become dashes."""
    parts = ["veneer", *map(str, words)]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        for each in value if isinstance(value, list | tuple) else [value]:
            if each is True:
                parts.append(option)
            elif each is not None and each is not False and each != "":
                parts += [option, str(each)]
    return shlex.join(parts)


def command_base(page: ViewPage) -> str:
    """Return this server's base as an argument; only the operator sees its path."""
    return str(page.studio.service.catalog.shelf.base.name) if page.caller.can("operate") else page.studio.base
