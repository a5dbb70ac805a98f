"""Server extension for training: OpenAI and Tinker routes, and removal of expired files.

`serve(settings, say, extends=[training])`: see `serve.build.Extension`. Imports are inside the functions,
because a server listens before it loads torch.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.jobs.files import Files
    from veneer.jobs.store import JobStore
    from veneer.jobs.tinker.service import TinkerService
    from veneer.library.library import Library
    from veneer.serve.build import Extension
    from veneer.serve.http.service import Service

_log = logging.getLogger("veneer.jobs")

_SWEEP_SECONDS = 300.0
"""Seconds between sweeps that remove expired files."""


def training(
    service: Service, library: Library, *, python_graders: bool = False, session_days: float = 30.0
) -> Extension:
    """Return the extension that adds training to a server.

    python_graders: run clients' Python graders in a sandbox.
    session_days: remove Tinker sessions that have been unused for this many days.

    Raises ResourceError if `python_graders` is set but no sandbox works on this machine."""
    from veneer.jobs.account import TrainingAccount
    from veneer.jobs.files import open_files
    from veneer.jobs.http.files import file_routes, large_bodies
    from veneer.jobs.http.tinker import TinkerRoutes, training_routes
    from veneer.jobs.http.tinker_samples import sampling_routes
    from veneer.jobs.http.tinker_weights import weights_routes
    from veneer.jobs.http.tuning import TuningQueue, sample_routes, tuning_routes
    from veneer.jobs.store import JobStore
    from veneer.serve.build import Extension
    from veneer.serve.tenancy.tenants import Tenants
    from veneer.train.rewards.limited import working_sandbox

    sandbox = working_sandbox() if python_graders else None
    files, jobs = open_files(library, quotas=service.quotas), JobStore(library)
    sweeping: list[asyncio.Task[None]] = []
    tenancy = service.tenancy
    tenants = tenancy.store if isinstance(tenancy, Tenants) else None
    account = TrainingAccount(jobs, tenants)
    tinker = TinkerRoutes(lambda: _tinker(service, library, session_days), account)

    async def start() -> None:
        sweeping.append(asyncio.create_task(_sweep(files, jobs)))

    async def stop() -> None:
        await tinker.stop()
        for task in sweeping:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    queue = TuningQueue(jobs, files, tenants, sandbox)
    routers = [file_routes(files), tuning_routes(queue), sample_routes(jobs)]
    routers += [training_routes(tinker), sampling_routes(tinker), weights_routes(tinker)]
    return Extension(routers, large_bodies(files), (), start, stop)


def _tinker(service: Service, library: Library, days: float) -> TinkerService:
    """Return the Tinker service for the served base.

    Only one process at a time can use the service's folder. Raises ConfigError if this process does not run a
    text base."""
    from veneer.jobs.tinker.service import TinkerService
    from veneer.models.home import veneer_home
    from veneer.serve.engine.engine import TextEngine

    service.need_base()
    engine = service.engine
    if not isinstance(engine, TextEngine):
        raise ConfigError("this server does not run a text base itself, so it cannot train", fix="serve a text base")
    base = engine.base
    kind = f"{base.fingerprint.rpartition(':')[2][:16]}-{base.quantized or str(base.dtype).removeprefix('torch.')}"
    max_memory = engine.settings.adapter_bytes
    folder = veneer_home() / "tinker" / kind
    return TinkerService(base, library, folder, max_memory=max_memory, days=days, quotas=service.quotas)


async def _sweep(files: Files, jobs: JobStore) -> None:
    """Remove expired files now and every _SWEEP_SECONDS; log errors."""
    from veneer.jobs.input_files import sweep_inputs

    while True:
        try:
            await asyncio.to_thread(files.sweep)
            await asyncio.to_thread(sweep_inputs, jobs)
        except Exception as error:
            _log.warning("expired files could not be removed: %s", error)
        await asyncio.sleep(_SWEEP_SECONDS)
