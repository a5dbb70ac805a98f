"""`veneer serve`: serve a base and its adapters with OpenAI, vLLM and TGI APIs."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.options import ChosenDevice, LoadedDtype
from veneer.cli.output import say
from veneer.cli.vllm_flags import ServeCommand
from veneer.errors import ConfigError
from veneer.serve.settings import (
    EngineSettings,
    FleetSettings,
    HttpSettings,
    LedgerSettings,
    ServeSettings,
    bytes_of,
    keys_of,
    parse_preload,
    size_text,
)

if TYPE_CHECKING:
    from veneer.serve.build import Extend
    from veneer.serve.config import ServerConfig

app = typer.Typer(add_completion=False)


@app.command(
    cls=ServeCommand,
    epilog="Example: veneer serve --base smollm2-135m --adapter support=acme/support --port 8000",
)
def serve(
    ctx: typer.Context,
    base: Annotated[str, typer.Option("--base", help="Built-in name, hub id, directory or .gguf file.")],
    library: Annotated[
        str | None, typer.Option("--library", help="Library of adapters; default: the veneer home's library.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all addresses.")] = ServeSettings.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = ServeSettings.port,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", "-a", help="NAME[=REFERENCE]: load this adapter before the server is ready; repeatable."
        ),
    ] = None,
    allow_folder: Annotated[
        list[Path] | None,
        typer.Option("--allow-folder", help="Folder of adapters that can be loaded by path; repeatable."),
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", help="File of API keys, one per line; requests need a key.")
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            "--admin-key",
            envvar=["VENEER_ADMIN_KEY_HASH", "VENEER_ADMIN_KEY"],
            help="Admin key, or sha256:HASH; needed to load adapters. See `veneer tenant admin-key`.",
        ),
    ] = None,
    tenants: Annotated[
        str | None,
        typer.Option(
            "--tenants",
            envvar="VENEER_TENANTS",
            help="Database of tenants (SQLite file or postgresql://…) instead of --api-keys; see `veneer tenant`. "
            "Default: tenants.sqlite in the veneer home, if the file exists.",
        ),
    ] = None,
    open_to_all: Annotated[
        bool,
        typer.Option(
            "--open", help="Accept requests without a key even if tenants exist; tenants' routes only on localhost."
        ),
    ] = False,
    served_model_name: Annotated[
        str, typer.Option("--served-model-name", help="Name of the base in requests; default: the base's own name.")
    ] = ServeSettings.served_name,
    upstream: Annotated[
        list[str] | None,
        typer.Option("--upstream", help="Run inference on this vLLM server, or on a router in front of several."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            help="embedded; vllm: run vLLM, with the flags after --; auto: vLLM on a CUDA GPU, if it is installed.",
        ),
    ] = FleetSettings.engine,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, max=1 << 16, help="Maximum requests in a batch.")
    ] = EngineSettings.rows,
    cache_memory: Annotated[
        str, typer.Option("--cache-memory", help="Memory for the KV cache, such as 512M or 4G.")
    ] = size_text(EngineSettings.cache_bytes),
    adapter_memory: Annotated[
        str, typer.Option("--adapter-memory", help="Memory for adapters, such as 512M or 4G.")
    ] = size_text(EngineSettings.adapter_bytes),
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", help="Quantize the base: nf4, fp4 or int8; keep: a GGUF file's own types."),
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Make answers independent of the batch, bit for bit; slower.")
    ] = False,
    compute: Annotated[
        str, typer.Option("--compute", help="auto, or int8: process prompts with 8-bit products (faster, less exact).")
    ] = EngineSettings.compute,
    dtype: LoadedDtype = ServeSettings.dtype,
    device: ChosenDevice = ServeSettings.device,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-origin", help="CORS origin whose web pages can use this server; repeatable; * requires API keys."
        ),
    ] = None,
    train: Annotated[
        bool,
        typer.Option(
            "--train", help="Add routes for files and jobs, and train in a separate process; see `veneer jobs`."
        ),
    ] = False,
    python_graders: Annotated[
        bool,
        typer.Option(
            "--python-graders", help="With --train: run Python graders from clients in a sandbox (Linux, bubblewrap)."
        ),
    ] = False,
    studio: Annotated[
        bool,
        typer.Option("--studio", help="Add a web page under /studio to browse, compare, train and release adapters."),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file with rarely changed settings: timeouts, queues, the ledger."),
    ] = None,
) -> None:
    """Serve a base and its adapters over HTTP until Ctrl-C or SIGTERM."""
    if tenants is not None and api_keys is not None:
        raise ConfigError("--tenants and --api-keys cannot be combined", fix="keep one")
    if upstream and len(upstream) > 1:
        raise ConfigError("there can be only one --upstream", fix="the URL of a router in front of these servers")
    if open_to_all and api_keys is not None:
        raise ConfigError("--open and --api-keys cannot be combined", fix="keep one")
    for folder in allow_folder or []:
        if not folder.expanduser().is_dir():
            raise ConfigError(
                f"there is no folder {folder}", where="--allow-folder", fix="create the folder, or leave the option out"
            )
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        from veneer.errors import MissingExtraError

        raise MissingExtraError("serving needs FastAPI and uvicorn", extra="serve") from error
    more = _read_config(config)
    settings = ServeSettings(
        base=base,
        host=host,
        port=port,
        library=library,
        preload=tuple(map(parse_preload, adapter or [])),
        folders=tuple(map(str, allow_folder or [])),
        keys=tuple(keys_of(api_keys)) if api_keys else (),
        admin_key=admin_key,
        tenants=tenants,
        open=open_to_all,
        dtype=dtype,
        device=device,
        quantize=quantize,
        drain=more.drain_seconds,
        served_name=served_model_name,
        engine=EngineSettings(
            rows=max_batch,
            cache_bytes=bytes_of(cache_memory, "--cache-memory"),
            adapter_bytes=bytes_of(adapter_memory, "--adapter-memory"),
            batch_invariant=batch_invariant,
            compute=compute,  # type: ignore[arg-type]
            context=more.context,
            draft=more.draft_tokens,
            kv_events=more.kv_events,
            kv_replay=more.kv_replay,
        ),
        http=HttpSettings(
            max_tokens=more.max_tokens,
            slots=max_batch,
            allowed_origins=tuple(allowed_origin or []),
            # Kubernetes' controllers address pods by IP; an IP address cannot be another site's domain
            allowed_hosts=(host.lower(), *map(str.lower, more.allowed_hosts), *os.environ.get("POD_IP", "").split()),
            queue=more.queue,
            connections=more.max_connections,
            head_time=more.head_seconds,
            body_time=more.body_seconds,
            idle=more.idle_seconds,
            stall=more.stall_seconds,
            access_log=more.access_log,
            objectives=more.objectives,
        ),
        ledger=LedgerSettings(
            days=more.ledger_days, folder=more.ledger_folder, room=more.bytes("ledger_room"), synced=more.ledger_sync
        ),
        fleet=FleetSettings(
            upstream=upstream[0] if upstream else None,
            key=os.environ.get("VENEER_UPSTREAM_KEY"),
            mixes=more.tenant_mixes,
            mix_bytes=more.bytes("mix_disk"),
            mix_days=more.mix_days,
            engine=engine,  # type: ignore[arg-type]
            vllm_flags=tuple(ctx.args),
        ),
        oidc=more.oidc,
        redis=os.environ.get("VENEER_REDIS_URL"),
    )
    if python_graders and not train:
        raise ConfigError("--python-graders applies to training jobs", where="--python-graders", fix="add --train")
    if train and settings.keys and admin_key is None:
        raise ConfigError("keys from --api-keys cannot train", where="--train --api-keys", fix="add --admin-key")
    if python_graders:
        from veneer.train.rewards.limited import working_sandbox

        working_sandbox()  # fail now, not after loading the base
    serve_with(settings, train=train, python_graders=python_graders, session_days=more.session_days, studio=studio)


def _read_config(file: Path | None) -> ServerConfig:
    """Return the server configuration in `file`, or the default. Raises ConfigError."""
    from veneer.serve.config import ServerConfig, server_config  # imports pydantic
    from veneer.train.config.load import read_sections

    return ServerConfig.model_validate({}) if file is None else server_config(read_sections(file)[0], file)


def serve_with(
    settings: ServeSettings,
    *,
    train: bool,
    studio: bool,
    python_graders: bool = False,
    session_days: float = 30.0,
    show: Callable[[str], object] = lambda address: None,
) -> None:
    """Run a server, optionally with the routes of training and of the Studio.

    show: called with the Studio's address once the server is listening."""
    from veneer.serve import server

    extends: list[Extend] = []
    page = None
    with ExitStack() as resources:
        if train:
            from veneer.jobs.build import training
            from veneer.jobs.local_worker import background_worker

            extends.append(partial(training, python_graders=python_graders, session_days=session_days))
            resources.enter_context(background_worker(library=settings.library, tenants=settings.tenants, log=say))
        if studio:
            from veneer.studio.access import ROOT
            from veneer.studio.build import check_studio, studio_of

            check_studio()
            extends.append(partial(studio_of, trains=train))
            page = server.WebPage(ROOT, show)

        server.serve(settings, say, extends=extends, page=page)
