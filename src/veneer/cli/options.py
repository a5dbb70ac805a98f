"""Options and arguments that several commands have, each in one wording."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.output import say
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.models.image.base import ImageBase
    from veneer.models.text.base import TextBase

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ShowAll = Annotated[bool, typer.Option("--all", help="Show lists whole, however long.")]

AdapterArgument = Annotated[
    str, typer.Argument(help="An adapter's folder or file, or its name in the library.", show_default=False)
]
AdapterArguments = Annotated[
    list[str], typer.Argument(metavar="ADAPTER[:STRENGTH]...", help="One or more adapters.", show_default=False)
]
FromPickle = Annotated[
    bool, typer.Option("--from-pickle", help="Read a .bin or .pt too, through torch's weights-only loader.")
]
MoeLayout = Annotated[
    str,
    typer.Option("--moe-layout", help="rank_major or grouped_by_expert: of experts' B, where Unsloth's file asks."),
]
AdapterName = Annotated[str, typer.Option("--adapter-name", help="The one to take of several adapters in one file.")]
Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha", help="The alpha it was trained with, where the file does not state it; of rsLoRA alpha × √rank."
    ),
]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Use an adapter of another base if every shape fits.")
]

BaseArgument = Annotated[
    str,
    typer.Argument(help="A built-in base, a directory, a .gguf or .safetensors file, or a hub id.", show_default=False),
]
LoadedDtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
WrittenDtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default each tensor keeps its own.")
]
Quantise = Annotated[
    str | None, typer.Option("--quantise", help="The base in 4 or 8 bits: nf4, fp4, int8; or keep, as a GGUF is.")
]
ChosenDevice = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]

JobsLibrary = Annotated[
    str | None,
    typer.Option("--library", envvar="VENEER_LIBRARY", help="Whose jobs; by default the veneer home's library."),
]
LibraryIndex = Annotated[
    str | None,
    typer.Option(
        "--index", envvar="VENEER_LIBRARY_INDEX", help="The library's database: a SQLite file or postgresql:// URL."
    ),
]
TenantsDatabase = Annotated[
    str | None,
    typer.Option(
        "--tenants",
        envvar="VENEER_TENANTS",
        help="The database of tenants, with what training costs them. Default: the veneer home's, where there is one.",
    ),
]


def chosen_base(base: str | None, adapters: list[str], fallback: str = "") -> str:
    """Return the base to load: `base`, else the first adapter's own, else `fallback`. Look for all adapters first, so
    that a name that does not exist does not wait for a base to load. Raises AdapterError."""
    from veneer.adapters.use import adapter_path, stated_base

    for name in adapters:
        adapter_path(name)
    if base:
        return base
    if adapters and (stated := stated_base(adapters[0])):
        say(f"base {stated}: the adapter's own")
        return stated
    if fallback:
        say(f"base {fallback}: none was named")
    return fallback


def say_loaded(base: TextBase | ImageBase) -> None:
    """Say in which dtype a base was loaded, where and why."""
    say(f"{base.name} in {str(base.dtype).removeprefix('torch.')} on {base.device}: {base.dtype_reason}")
    for note in base.notes:
        say(f"note: {note}")


Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [section.key=value]...",
        help="A configuration, and settings that replace its values; or settings alone.",
        show_default=False,
    ),
]


def is_config(word: str) -> bool:
    """Whether a word of the command line is a further configuration, and no value that replaces one's."""
    return "=" not in word and (word.endswith((".yaml", ".yml")) or Path(word).is_file())


def files_and_settings(words: list[str] | None) -> tuple[list[Path], list[str]]:
    """Split the words of a command line into configuration files and `section.key=value` settings."""
    files = [word for word in words or [] if "=" not in word or Path(word).is_file()]
    return [Path(file) for file in files], [word for word in words or [] if word not in files]


def file_and_settings(words: list[str] | None) -> tuple[Path | None, list[str]]:
    """As `files_and_settings`, for a command that takes at most one file. Raises ConfigError."""
    files, settings = files_and_settings(words)
    if len(files) > 1:
        raise ConfigError(f"{files[1]} is a second configuration, and this command takes one", fix="leave it out")
    return (files[0] if files else None), settings
