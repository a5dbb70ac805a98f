"""`veneer export`: write an adapter as a directory for vLLM or TGI."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli.options import AsJson, WrittenDtype
from veneer.cli.output import print_json, say


def command(
    name: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's name, folder or file.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder to write.")],
    server: Annotated[str, typer.Option("--for", help="vllm or tgi.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="The adapter's base, if the adapter does not state it; TGI's layout needs the base."
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a merged full model, for adapters that LoRA pairs cannot express.")
    ] = False,
    dtype: WrittenDtype = None,
    as_json: AsJson = False,
) -> None:
    """Export an adapter to vLLM or TGI with its full effect, or explain why not.

    Scales are folded into the weights and all ranks are padded to one rank, because TGI and older vLLM
    silently drop rank and alpha patterns.

    Example: veneer export support@prod --for vllm served/support"""
    from veneer.serve.fleet.export import export

    done = export(name, server, folder, base=base, merge=merge, dtype=dtype, log=say)
    if as_json:
        print_json(done.to_dict())
        return
    print(f"wrote {done.folder} for {done.server}: {done.name}")
    for note in done.notes:
        print(f"note: {note}")
    print(f"serve it: {done.command}")
