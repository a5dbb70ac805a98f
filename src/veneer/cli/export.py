"""`veneer export`: an adapter as a directory that another server serves as it is."""

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
        str | None, typer.Option("--base", help="Its base, where the adapter does not say; TGI's layout needs it.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="A full model with the adapter folded in, for what pairs cannot express.")
    ] = False,
    dtype: WrittenDtype = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as a directory that vLLM or TGI serves with its full effect, or say why it cannot.

    Scales are folded into the weights and ranks padded to one, because TGI and older vLLM drop patterns silently.

    Example: veneer export support@prod --for vllm served/support"""
    from veneer.serve.fleet.export import export

    done = export(name, server, folder, base=base, merge=merge, dtype=dtype, say=say)
    if as_json:
        print_json(done.to_dict())
        return
    print(f"wrote {done.folder} for {done.server}: {done.name}")
    for note in done.notes:
        print(f"note: {note}")
    print(f"serve it: {done.command}")
