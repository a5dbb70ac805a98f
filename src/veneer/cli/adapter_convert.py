"""`veneer adapter convert`: write an adapter in another tool's layout."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.options import Alpha, AsJson, FromPickle, ShowAll, WrittenDtype
from veneer.cli.output import cut_list, print_json, say, set_show_all

if TYPE_CHECKING:
    from veneer.formats.convert import WriteReport
    from veneer.formats.reading import Reading


def convert_command(
    name: Annotated[str, typer.Argument(metavar="IN", help="An adapter's file, folder or name.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="peft, kohya, diffusers, comfyui, gguf or vllm.")],
    output: Annotated[
        str, typer.Option("-o", "--output", help="File to write; for peft and vllm a folder.", show_default=False)
    ],
    family: Annotated[
        str | None, typer.Option("--family", help="Image model family or GGUF architecture, if it cannot be detected.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="For gguf: the base, to read its architecture and head size.")
    ] = None,
    dtype: WrittenDtype = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Convert the readable tensors, and list the others.")
    ] = False,
    from_pickle: FromPickle = False,
    alpha: Alpha = None,
    show_all: ShowAll = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another tool's layout, exactly or not at all.

    If the layout cannot express some modules of the adapter, the error lists each of them with the reason and
    the closest alternative. The result is read back and compared before it is written to disk."""
    from veneer.adapters.convert import convert_adapter
    from veneer.adapters.use import adapter_path

    set_show_all(show_all)
    converted = convert_adapter(
        adapter_path(name),
        output,
        to,
        family=family,
        base=base,
        dtype=dtype,
        allow_partial=allow_partial,
        log=say,
        from_pickle=from_pickle,
        alpha=alpha,
    )
    reading, done = converted.reading, converted.written
    left = [*reading.unused, *reading.unpaired]
    if as_json:
        print_json(_to_dict(name, reading, done))
        return
    of_family = f" of {done.family}" if done.family else ""
    print(f"read {name}: {reading.format}; wrote {done.path}: {done.to}{of_family}")
    print(f"{'ranks':<8} " + (", ".join(f"{rank} ({count} modules)" for rank, count in done.ranks.items()) or "none"))
    print(f"{'digest':<8} {done.digest}")
    for file, digest in done.files.items():
        print(f"{'file':<8} {file} {digest}")
    if done.hashes is not None:
        kinds = {"AutoV2": done.hashes.autov2, "AutoV3": done.hashes.autov3}
        print(f"{'hashes':<8} " + ", ".join(f"{kind} {value}" for kind, value in kinds.items() if value))
    for note in cut_list([*reading.notes, *done.notes]):
        print(f"note: {note}")
    if left:
        say(f"left out: {len(left)} tensors of {name}: {', '.join(cut_list(left))}")


def _to_dict(name: str, reading: Reading, done: WriteReport) -> dict[str, object]:
    return {
        "from": {
            "adapter": name,
            "format": reading.format,
            "reasons": reading.reasons,
            "family": reading.family,
            "unused": reading.unused,
            "unpaired": reading.unpaired,
            "notes": reading.notes,
        },
        "to": done.to,
        "path": str(done.path),
        "family": done.family,
        "digest": done.digest,
        "files": done.files,
        "hashes": None if done.hashes is None else asdict(done.hashes),
        "ranks": {str(rank): count for rank, count in done.ranks.items()},
        "notes": done.notes,
    }
