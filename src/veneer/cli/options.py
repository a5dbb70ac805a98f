"""Options and arguments that several commands share."""

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
ShowAll = Annotated[bool, typer.Option("--all", help="Show complete lists.")]

AdapterArgument = Annotated[
    str, typer.Argument(help="An adapter's folder or file, or its name in the library.", show_default=False)
]
AdapterArguments = Annotated[
    list[str], typer.Argument(metavar="ADAPTER[:STRENGTH]...", help="One or more adapters.", show_default=False)
]
FromPickle = Annotated[
    bool, typer.Option("--from-pickle", help="Also read .bin and .pt files, with torch's weights-only loader.")
]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", help="Alpha used in training, if the file does not state it; for rsLoRA, alpha × √rank."),
]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Accept an adapter of another base if every shape matches.")
]

BaseArgument = Annotated[
    str,
    typer.Argument(help="A built-in base, a directory, a .gguf or .safetensors file, or a hub id.", show_default=False),
]
LoadedDtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
WrittenDtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: each tensor's own dtype.")
]
Quantize = Annotated[
    str | None, typer.Option("--quantize", help="Quantize the base: nf4, fp4 or int8; keep: a GGUF file's own types.")
]
ChosenDevice = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]

JobsLibrary = Annotated[
    str | None,
    typer.Option("--library", envvar="VENEER_LIBRARY", help="Library of the jobs; default: the veneer home's library."),
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
        help="Database of tenants and their training limits; default: the veneer home's, if it exists.",
    ),
]


def chosen_base(base: str | None, adapters: list[str], fallback: str = "") -> str:
    """Return `base`, or else the first adapter's base, or else `fallback`.

    Raises AdapterError if an adapter does not exist, even if the adapters are not needed to find the base."""
    from veneer.adapters.use import adapter_path, stated_base

    for name in adapters:
        adapter_path(name)
    if base:
        return base
    if adapters and (stated := stated_base(adapters[0])):
        say(f"base {stated}: the adapter's own")
        return stated
    if fallback:
        say(f"base {fallback}: the default base")
    return fallback


def say_loaded(base: TextBase | ImageBase) -> None:
    """Print the base's dtype and device, the reason for this dtype, and any notes."""
    say(f"{base.name} in {str(base.dtype).removeprefix('torch.')} on {base.device}: {base.dtype_reason}")
    for note in base.notes:
        say(f"note: {note}")


Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [section.key=value]...",
        help="A configuration file, settings that override its values, or both.",
        show_default=False,
    ),
]


def is_config(word: str) -> bool:
    """Return whether a command-line word is a configuration file, not a setting."""
    return "=" not in word and (word.endswith((".yaml", ".yml")) or Path(word).is_file())


def files_and_settings(words: list[str] | None) -> tuple[list[Path], list[str]]:
    """Split command-line words into files and settings (`section.key=value`)."""
    files = [word for word in words or [] if "=" not in word or Path(word).is_file()]
    return [Path(file) for file in files], [word for word in words or [] if word not in files]


def file_and_settings(words: list[str] | None) -> tuple[Path | None, list[str]]:
    """Split command-line words into at most one configuration file and settings.

    Raises ConfigError if there is more than one file."""
    files, settings = files_and_settings(words)
    if len(files) > 1:
        raise ConfigError(f"{files[1]} is a second configuration, but this command takes only one", fix="leave it out")
    return (files[0] if files else None), settings
