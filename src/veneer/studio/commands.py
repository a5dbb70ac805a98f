"""The command that does the same as a page: what is shown beside it, to copy.

command("library", "alias", "support@2", "prod")                veneer library alias support@2 prod
command("library", "search", "sql", tag=["a", "b"], all=True)   veneer library search sql --tag a --tag b --all
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veneer.studio.frame import ViewPage


def command(*words: str | int, **options: object) -> str:
    """`options`: a text or a number, a list of them for an option that is given again and again, True for a flag; None,
    False, "" and an empty list for one that is not given. Their underscores are dashes."""
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
    """Return this server's base as a command accepts it; only the operator sees the path of a base in a folder."""
    return str(page.studio.service.catalog.shelf.base.name) if page.caller.can("operate") else page.studio.base
