"""`veneer export`: an adapter as a directory that another server serves as it is."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


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
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default each tensor keeps its own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter as a directory that vLLM or TGI serves with its full effect, or say why it cannot.

    Scales are folded into the weights and ranks padded to one, because TGI and older vLLM drop patterns silently.

    Example: veneer export support@prod --for vllm served/support"""
    from veneer.serve.fleet.export import export

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    done = export(name, server, folder, base=base, merge=merge, dtype=dtype, say=say)
    if as_json:
        print(json.dumps(done.to_dict(), indent=2, ensure_ascii=False))
        return
    print(f"wrote {done.folder} for {done.server}: {done.name}")
    for note in done.notes:
        print(f"note: {note}")
    print(f"serve it: {done.command}")
