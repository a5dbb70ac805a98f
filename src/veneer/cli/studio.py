"""`veneer studio`: the page over a server of one's own on this machine, opened in the browser."""

from __future__ import annotations

import webbrowser
from typing import Annotated

import typer

from veneer.cli.options import ChosenDevice, LoadedDtype
from veneer.cli.serve import serve_with
from veneer.serve.settings import ServeSettings
from veneer.serve.tenancy.keys import default_database

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: veneer studio --base smollm2-135m")
def studio(
    base: Annotated[
        str, typer.Option("--base", help="Built-in name, hub id, directory or .gguf file.")
    ] = "smollm2-135m",
    library: Annotated[
        str | None, typer.Option("--library", help="Where adapters are kept. Default: the veneer home's library.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on, on this machine alone.")] = 8000,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Whether jobs are trained too, in a process beside.")
    ] = True,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Whether the page is opened in the browser.")
    ] = True,
    dtype: LoadedDtype = ServeSettings.dtype,
    device: ChosenDevice = ServeSettings.device,
) -> None:
    """Look at adapters, compare, mix and train them, and let them go live: a page at http://127.0.0.1:8000/studio/.

    Everything on it is a command or a route too. For other people's browsers: `veneer serve --studio` with keys."""
    tenants = default_database()  # made where there is none: routes, votes and costs are in it
    settings = ServeSettings(base, port=port, library=library, tenants=tenants, open=True, dtype=dtype, device=device)
    serve_with(settings, train=train, studio=True, show=webbrowser.open if browser else lambda address: None)
