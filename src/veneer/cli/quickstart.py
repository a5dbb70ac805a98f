"""`veneer quickstart`: run examples/quickstart.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    base: Annotated[
        str, typer.Option("--base", help="Built-in name, hub id, directory or .gguf file.")
    ] = "smollm2-135m",
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the run; earlier results there are removed.")
    ] = Path("runs/quickstart"),
    config: Annotated[
        Path | None, typer.Option("--config", help="Another training configuration.", show_default=False)
    ] = None,
    tickets: Annotated[int, typer.Option("--tickets", min=1, help="Held-out tickets to answer.")] = 200,
) -> None:
    """Train an adapter on 1,200 support tickets, and test it on held-out ones.

    Takes three to six minutes on two CPU cores. The first run downloads the base (93 MB).

    Example: veneer quickstart"""
    given = ["--base", base, "--output", str(output), "--tickets", str(tickets)]
    load_example("quickstart.py").main([*given, *(["--config", str(config)] if config else [])])


def load_example(path: str) -> Any:
    """Return the module of a script in examples/.

    A wheel contains the scripts inside the package, where they find examples/ and bases/ as in a clone."""
    package = Path(__file__).resolve().parents[1]
    root = package if (package / "examples").is_dir() else package.parents[1]
    spec = importlib.util.spec_from_file_location("veneer_example", root / "examples" / path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses need the entry
    spec.loader.exec_module(module)
    return module
