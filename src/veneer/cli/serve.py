"""`veneer serve`: one base and any number of adapters behind OpenAI's, vLLM's and TGI's HTTP surfaces."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from veneer.cli.options import ChosenDevice, LoadedDtype
from veneer.cli.output import say
from veneer.errors import ConfigError, one_of
from veneer.serve.settings import (
    EngineSettings,
    FleetSettings,
    HttpSettings,
    LedgerSettings,
    ServeSettings,
    WeightKind,
    bytes_of,
    keys_of,
    parse_preload,
    size_text,
)

if TYPE_CHECKING:
    from veneer.library.library import Library
    from veneer.serve.build import Extend, Extension
    from veneer.serve.http.service import Service

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: veneer serve --base smollm2-135m --adapter support=acme/support --port 8000")
def serve(
    base: Annotated[str, typer.Option("--base", help="Built-in name, hub id, directory or .gguf file.")],
    library: Annotated[
        str | None, typer.Option("--library", help="Where adapters are kept. Default: the veneer home's library.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = ServeSettings.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = ServeSettings.port,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="NAME[=REFERENCE][:STRENGTH] to load before the server is ready; any number of times. With a strength "
            "it also acts on requests that name no adapter.",
        ),
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep these adapters in memory, whatever else is asked.")] = False,
    allow_folder: Annotated[
        list[Path] | None,
        typer.Option("--allow-folder", help="A folder whose adapters may be loaded by path; any number of times."),
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", help="A file of keys, a line each; requests need one of them.")
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            "--admin-key",
            envvar=["VENEER_ADMIN_KEY_HASH", "VENEER_ADMIN_KEY"],
            help="The key that may load and unload adapters, or sha256: and its hash; `veneer tenant admin-key`.",
        ),
    ] = None,
    tenants: Annotated[
        str | None,
        typer.Option(
            "--tenants",
            envvar="VENEER_TENANTS",
            help="A database of tenants (SQLite file or postgresql://…) instead of --api-keys; see `veneer tenant`. "
            "Without either it is tenants.sqlite in the veneer home, where there is one.",
        ),
    ] = None,
    open_to_all: Annotated[
        bool,
        typer.Option(
            "--open", help="Serve whoever asks, although there are tenants; on this machine alone with their routes."
        ),
    ] = False,
    ledger_days: Annotated[
        float,
        typer.Option(
            "--ledger-days", min=1, help="With --tenants: days that the ledger keeps its lines; sums by day stay."
        ),
    ] = LedgerSettings.days,
    ledger_room: Annotated[
        str,
        typer.Option(
            "--ledger-room", help="With --tenants: disk for the bills that wait while the database is away, as 64M."
        ),
    ] = size_text(LedgerSettings.room),
    ledger_folder: Annotated[
        Path | None,
        typer.Option(
            "--ledger-folder",
            help="With --tenants: where these bills wait, on a local disk. Default: beside the SQLite file.",
        ),
    ] = None,
    ledger_sync: Annotated[
        bool,
        typer.Option(
            "--ledger-sync", help="With --tenants: a bill waits for the disk, so that it outlives a loss of power too."
        ),
    ] = False,
    engine: Annotated[
        str, typer.Option("--engine", help="embedded: this process computes; openai: the servers of --upstream do.")
    ] = "embedded",
    upstream: Annotated[
        list[str] | None,
        typer.Option("--upstream", help="A vLLM, TGI or OpenAI-compatible server's URL; any number of times."),
    ] = None,
    upstream_key: Annotated[
        str | None,
        typer.Option(
            "--upstream-key", envvar="VENEER_UPSTREAM_KEY", help="The bearer token for the servers of --upstream."
        ),
    ] = None,
    mix_disk: Annotated[
        str, typer.Option("--mix-disk", help="With --upstream: disk for the mixes that clients make, as 16G.")
    ] = size_text(FleetSettings.mix_bytes),
    tenant_mixes: Annotated[
        int, typer.Option("--tenant-mixes", min=1, help="With --upstream: mixes that one tenant may have at a time.")
    ] = FleetSettings.mixes,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, max=1 << 16, help="Requests computed at once.")
    ] = EngineSettings.rows,
    cache_memory: Annotated[
        str, typer.Option("--cache-memory", help="Memory for keys and values, as 512M or 4G.")
    ] = size_text(EngineSettings.cache_bytes),
    context: Annotated[
        int,
        typer.Option("--context", min=0, help="Tokens of a sequence at most; 0: what base and cache have room for."),
    ] = EngineSettings.context,
    adapter_memory: Annotated[
        str, typer.Option("--adapter-memory", help="Memory for adapters, as 512M or 4G.")
    ] = size_text(EngineSettings.adapter_bytes),
    weights: Annotated[
        str,
        typer.Option("--weights", help="dense, or int8 or int4: projections are rounded to that, for small machines."),
    ] = EngineSettings.weights,
    quantise: Annotated[
        str | None, typer.Option("--quantise", help="The base in 4 or 8 bits: nf4, fp4, int8; or keep, as a GGUF is.")
    ] = None,
    batch_invariant: Annotated[
        bool,
        typer.Option("--batch-invariant", help="An answer is bit for bit that of the request alone; slower."),
    ] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, help="Tokens an answer may have at most; 0: what the context leaves.")
    ] = HttpSettings.max_tokens,
    dtype: LoadedDtype = ServeSettings.dtype,
    device: ChosenDevice = ServeSettings.device,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-origin",
            help="An origin whose web pages can use this server. Repeatable; * needs keys.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="Without keys: another Host to accept, besides localhost and --host. Repeatable.",
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option("--queue", min=2, help="Answers that may run or wait at once; a tenant may have half.")
    ] = HttpSettings.queue,
    max_connections: Annotated[
        int,
        typer.Option(
            "--max-connections", min=2, help="Connections at a time; beyond them the one idle longest is closed."
        ),
    ] = HttpSettings.connections,
    head_seconds: Annotated[
        float, typer.Option("--head-seconds", min=0.1, help="How long a request's first lines may take to come.")
    ] = HttpSettings.head_time,
    body_seconds: Annotated[
        float, typer.Option("--body-seconds", min=0.1, help="How long a request's body may take to come.")
    ] = HttpSettings.body_time,
    idle_seconds: Annotated[
        float, typer.Option("--idle-seconds", min=1, help="How long a connection is kept for its next request.")
    ] = HttpSettings.idle,
    stall_seconds: Annotated[
        float, typer.Option("--stall-seconds", min=0.1, help="How long a client may read nothing of its answer.")
    ] = HttpSettings.stall,
    train: Annotated[
        bool,
        typer.Option("--train", help="Train too: routes for files, and jobs in a process beside; see `veneer jobs`."),
    ] = False,
    python_graders: Annotated[
        bool,
        typer.Option(
            "--python-graders", help="With --train: run Python graders from clients in a sandbox (Linux, bubblewrap)."
        ),
    ] = False,
    session_days: Annotated[
        float,
        typer.Option(
            "--session-days", min=0.01, help="With --train: days that a Tinker client's state is kept unused."
        ),
    ] = 30.0,
    studio: Annotated[
        bool,
        typer.Option("--studio", help="A page under /studio to look at adapters, compare, train and release them."),
    ] = False,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", min=0, help="How long running answers may go on after SIGTERM.")
    ] = ServeSettings.drain,
) -> None:
    """Serve a base and its adapters over HTTP until Ctrl-C or SIGTERM."""
    if tenants is not None and api_keys is not None:
        raise ConfigError("--tenants and --api-keys both say who may ask", fix="keep one")
    if open_to_all and api_keys is not None:
        raise ConfigError("--open serves whoever asks, and --api-keys say who may", fix="keep one")
    for folder in allow_folder or []:
        if not folder.expanduser().is_dir():
            raise ConfigError(f"there is no folder {folder}", where="--allow-folder", fix="make it, or leave it out")
    one_of(engine, ("embedded", "openai"), "a way to compute", "--engine")
    if engine == "openai" and not upstream:
        what = "--engine openai asks servers that run elsewhere, and none is named"
        raise ConfigError(what, where="--engine", fix="--upstream http://host:port for each of them")
    if engine == "embedded" and upstream:
        what = "--upstream names servers that compute, and --engine embedded computes here"
        raise ConfigError(what, where="--upstream", fix="add --engine openai, or leave --upstream out")
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        from veneer.errors import MissingExtraError

        raise MissingExtraError("serving needs FastAPI and uvicorn", fix='pip install "veneer[serve]"') from error
    settings = ServeSettings(
        base=base,
        host=host,
        port=port,
        library=library,
        preload=tuple(map(parse_preload, adapter or [])),
        pin=pin,
        folders=tuple(map(str, allow_folder or [])),
        keys=tuple(keys_of(api_keys)) if api_keys else (),
        admin_key=admin_key,
        tenants=tenants,
        open=open_to_all,
        dtype=dtype,
        device=device,
        quantise=quantise,
        drain=drain_seconds,
        engine=EngineSettings(
            rows=max_batch,
            cache_bytes=bytes_of(cache_memory, "--cache-memory"),
            adapter_bytes=bytes_of(adapter_memory, "--adapter-memory"),
            weights=cast(WeightKind, weights),
            batch_invariant=batch_invariant,
            context=context,
        ),
        http=HttpSettings(
            max_tokens=max_tokens,
            slots=max_batch,
            allowed_origins=tuple(allowed_origin or []),
            allowed_hosts=(host.lower(), *map(str.lower, allowed_host or [])),
            queue=queue,
            connections=max_connections,
            head_time=head_seconds,
            body_time=body_seconds,
            idle=idle_seconds,
            stall=stall_seconds,
        ),
        ledger=LedgerSettings(
            days=ledger_days,
            folder=ledger_folder,
            room=bytes_of(ledger_room, "--ledger-room"),
            synced=ledger_sync,
        ),
        fleet=FleetSettings(
            upstreams=tuple(upstream or []),
            key=upstream_key,
            mixes=tenant_mixes,
            mix_bytes=bytes_of(mix_disk, "--mix-disk"),
        ),
    )
    if python_graders and not train:
        raise ConfigError("--python-graders is about training jobs", where="--python-graders", fix="add --train")
    if train and settings.keys and admin_key is None:
        raise ConfigError(
            "nobody could train: keys from --api-keys are read-only", where="--train --api-keys", fix="add --admin-key"
        )
    if python_graders:
        from veneer.train.rewards.limited import working_sandbox

        working_sandbox()  # checked before the base is loaded: the server does not start without a sandbox
    serve_with(settings, train=train, python_graders=python_graders, session_days=session_days, studio=studio)


def serve_with(
    settings: ServeSettings,
    *,
    train: bool,
    studio: bool,
    python_graders: bool = False,
    session_days: float = 30.0,
    show: Callable[[str], object] = lambda address: None,
) -> None:
    """A server with what the rooms above add to it. `show`: called with the Studio's address once it listens."""
    from veneer.serve import server

    extends: list[Extend] = []
    page = None
    with ExitStack() as beside:
        if train:
            from veneer.jobs.beside import worker_beside
            from veneer.jobs.build import training

            extends.append(partial(training, python_graders=python_graders, session_days=session_days))
            beside.enter_context(worker_beside(library=settings.library, tenants=settings.tenants, say=say))
        if studio:
            from veneer.studio.access import ROOT
            from veneer.studio.build import check_studio, studio_of

            check_studio()
            extends.append(partial(studio_of, trains=train))
            offers = "A base is downloaded once. Then the library, Compare, Train, Live and Doctor are here."
            page = server.WebPage(ROOT, show, offers)

        def extend(service: Service, library: Library) -> Extension:
            from veneer.serve.build import together  # late: torch comes with it

            return together(*extends)(service, library)

        server.serve(settings, say, extend=extend, page=page)
