"""`veneer image-quickstart`: run examples/campaign/run.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.quickstart import load_example
from veneer.errors import MissingExtraError


def command(
    base: Annotated[
        str, typer.Option("--base", help="catalogue-flux, catalogue-sdxl or a directory.")
    ] = "catalogue-flux",
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the run; earlier results there are removed.")
    ] = Path("runs/image-quickstart"),
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of both trainings.", show_default=False),
    ] = None,
) -> None:
    """Train adapters for a product and for a brand's look, and draw with both.

    Takes three to five minutes on two CPU cores.

    Example: veneer image-quickstart"""
    from veneer.models.builtin import packaged

    packaged(base)  # a missing base is reported before anything is imported
    try:
        campaign = load_example("campaign/run.py")
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the image quickstart needs {error.name}", extra="image,drawings") from error
    sets = [word for each in settings or [] for word in ("--set", each)]
    campaign.main(["--small", "--base", base, "--output", str(output), *sets])
