"""`veneer studio`: run a local server with the Studio and open it in the browser."""

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
        str | None, typer.Option("--library", help="Library of adapters; default: the veneer home's library.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on, on localhost.")] = 8000,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Train jobs in a separate process, or not.")] = True,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in the browser, or not.")
    ] = True,
    dtype: LoadedDtype = ServeSettings.dtype,
    device: ChosenDevice = ServeSettings.device,
) -> None:
    """Browse, compare, mix, train and release adapters in the browser.

    The page is at http://127.0.0.1:8000/studio/. All its functions are also available as commands and HTTP
    routes. To give remote users access, run `veneer serve --studio` with keys."""
    tenants = default_database()  # stores routes, votes and costs; created if missing
    settings = ServeSettings(base, port=port, library=library, tenants=tenants, open=True, dtype=dtype, device=device)
    serve_with(settings, train=train, studio=True, show=webbrowser.open if browser else lambda address: None)
