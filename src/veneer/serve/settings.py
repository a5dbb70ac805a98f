"""Settings of a server: set by `veneer serve`, read by all parts of the server.

Imports nothing heavy, so that the command line can read its defaults from this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from veneer.errors import ConfigError, quoted

HERE = ("localhost", "127.0.0.1", "::1")
"""Hosts that only this machine can reach."""


@dataclass(frozen=True)
class QuotaLimits:
    """Limits for one owner (a tenant, or everyone on a server without tenants).

    See `serve.quota`.

    memory: bytes of waiting and unpacked requests, of results to be fetched, and of Tinker sessions
    disk: bytes; the limit applies separately to adapters, to uploaded files, and to everything else (training
        clients' states, checkpoints, and answers stored for feedback)
    files: number of files; the limit applies separately to uploaded files, and to everything else (training
        clients, their checkpoints, and answers stored for feedback)
    descriptors: concurrent archive downloads
    requests: Tinker requests that run, wait, or have a result to fetch
    threads, thread_share: threads for blocking work (databases, disks), for all owners and for one tenant
    jobs: training jobs that clients have queued and that have not finished
    metadata: bytes of JSON that a client can attach to a session, a run or a checkpoint
    """

    memory: int = 1 << 30
    disk: int = 64 << 30
    files: int = 100_000
    descriptors: int = 64
    requests: int = 16_384
    threads: int = 32
    thread_share: int = 8
    jobs: int = 1000
    metadata: int = 64 << 10


@dataclass(frozen=True)
class Objectives:
    """Service-level objectives, for the answers of each tenant.

    `first_token`: seconds to the first token. `between_tokens`: mean seconds between the tokens of an answer.
    `slow`: share of answers that can miss one of these times. `failed`: share of answers that can fail.
    """

    first_token: float = 5.0
    between_tokens: float = 0.25
    slow: float = 0.05
    failed: float = 0.01
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        if min(self.first_token, self.between_tokens) <= 0 or not all(0 <= s < 1 for s in (self.slow, self.failed)):
            raise ValueError("times must be above 0, and shares at least 0 and below 1")

    def allowed(self) -> dict[str, float]:
        """Return each objective's name and the share of answers that can miss it."""
        return {"first_token": self.slow, "between_tokens": self.slow, "errors": self.failed}


@dataclass(frozen=True)
class HttpSettings:
    """HTTP limits of one server. Times are in seconds.

    `max_adapter`: bytes of an uploaded adapter. `max_tokens`: tokens of a completion; 0 for as many as the
    context allows. `queue`: completions that run or wait, for all tenants together. `head_time`, `body_time`:
    time in which a request's head and body must arrive. `idle`: time for which an idle connection stays open.
    `stall`: time after which a connection is closed if its client does not read. `connections`: open
    connections; above this limit, the connection that has been idle longest is closed. `max_pixels`: pixels
    of an uploaded image. `max_pictures`: images per request. `metric_adapters`: maximum adapters with
    separate metric series. `allowed_origins`: origins whose pages can use this server from a browser; "*"
    (any) requires keys. `allowed_hosts`: values of Host, besides localhost, that a server without keys
    accepts. `access_log`: write a line to stderr per request. `objectives`: see Objectives. `quotas`: limits for
    each owner.
    """

    max_body: int = 8 << 20
    max_adapter: int = 2 << 30
    max_tokens: int = 0
    max_prompts: int = 256
    max_choices: int = 64
    max_stops: int = 16
    max_pixels: int = 1 << 24
    max_pictures: int = 10
    queue: int = 1024
    connections: int = 2000
    head_time: float = 20.0
    body_time: float = 60.0
    idle: float = 30.0
    stall: float = 60.0
    metric_adapters: int = 100
    shadows: int = 16
    slots: int = 256
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    access_log: bool = False
    objectives: Objectives = field(default_factory=Objectives)
    quotas: QuotaLimits = field(default_factory=QuotaLimits)


@dataclass(frozen=True)
class Preload:
    """An adapter to load before the server is ready."""

    name: str
    reference: str


QuantizeKind = Literal["nf4", "fp4", "int8", "keep"]
ComputeKind = Literal["auto", "int8"]
EngineKind = Literal["auto", "embedded", "vllm"]


@dataclass(frozen=True)
class EngineSettings:
    """Settings of the text engine.

    `rows`: maximum sequences in one step. `budget`: maximum tokens in one step. `cache_bytes`: memory for
    keys and values. `adapter_bytes`: memory for adapters, which is the only limit on their number. `queue`:
    maximum waiting requests. `batch_invariant`, `compute`: see Runner. `stuck_seconds`: if a step takes longer,
    the engine counts as stuck. `context`: maximum tokens of a sequence; 0 for as many as the base and the cache
    allow. `draft`: maximum drafted tokens of a sequence in a step (engine.drafts); 0 for no drafts.
    `kv_events`, `kv_replay`: ZeroMQ addresses on which changes of the cache are published and replayed
    (engine.kv_events), or "".
    """

    rows: int = 32
    budget: int = 512
    cache_bytes: int = 1 << 30
    adapter_bytes: int = 1 << 30
    queue: int = HttpSettings.queue
    batch_invariant: bool = False
    compute: ComputeKind = "auto"
    context: int = 0
    draft: int = 8
    kv_events: str = ""
    kv_replay: str = ""
    stuck_seconds: float = 120.0


@dataclass(frozen=True)
class LedgerSettings:
    """Settings of the ledger.

    `days`: how long lines are kept; daily sums are kept forever. `folder`: folder for journals, on a local
    disk; None for a folder next to the SQLite file, or in the veneer home. `room`: size of this server's
    journal in bytes, allocated at start. `synced`: whether usage also survives a power loss; usage survives a
    killed process in any case.
    """

    days: float = 400.0
    folder: Path | None = None
    room: int = 32 << 20
    synced: bool = False


@dataclass(frozen=True)
class OidcSettings:
    """An OpenID Connect issuer whose tokens are accepted beside API keys.

    `issuer`: an https:// URL, or http:// on localhost. `audience`: the token's `aud`. `tenant_claim`,
    `role_claim`: claims with the tenant and the roles; a name or a path with dots. `roles`: value of the role
    claim -> role, for values that are not names of roles.
    """

    issuer: str
    audience: str
    tenant_claim: str = "tenant"
    role_claim: str = "roles"
    roles: Mapping[str, Literal["owner", "trainer", "caller", "auditor"]] = field(default_factory=dict)
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012


@dataclass(frozen=True)
class FleetSettings:
    """Settings of a server whose inference runs in vLLM or on an upstream.

    `upstream`: URL of a vLLM server, or of a router in front of several; None to compute locally. `key`: sent
    to the upstream as a bearer token. `mixes`: maximum weighted mixes per tenant. `mix_bytes`: maximum bytes
    of all mixes on disk, and in a library on S3. `mix_days`: days for which a mix is kept after its last use.
    `engine`: the engine to use without an upstream; auto: `serve.engines` chooses before the server is built.
    `vllm_flags`: additional flags for vLLM. `vllm_python`: the interpreter that has vLLM, which `serve.engines` finds.
    """

    upstream: str | None = None
    engine: EngineKind = "auto"
    vllm_flags: tuple[str, ...] = ()
    vllm_python: str = ""
    key: str | None = None
    mixes: int = 64
    mix_bytes: int = 16 << 30
    mix_days: float = 7.0


@dataclass(frozen=True)
class ServeSettings:
    """All settings of a server.

    `folders`: folders from which clients can load adapters. `tenants`: the tenants' database. Without this
    database, `keys` are the only keys. If neither is set, the server uses tenants.sqlite in the veneer home
    if the file exists, and otherwise requires no key. `open`: require no key even if there are tenants; the
    tenants' routes, prices and ledger are then used only if the server listens on localhost. With an
    upstream, only the base's names and tokenizer are read. `quantize`: see models.text.base.load_text.
    `drain`: seconds that running requests have to finish after SIGTERM. `served_name`: the name under which
    the base is served; "" for the last part of the base's own name. `redis`: URL of the Redis server that
    counts limits for all servers.
    """

    base: str
    host: str = "127.0.0.1"
    port: int = 8000
    library: str | None = None
    preload: tuple[Preload, ...] = ()
    folders: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    admin_key: str | None = None
    tenants: str | None = None
    open: bool = False
    dtype: str = "auto"
    device: str = "auto"
    quantize: str | None = None
    drain: float = 30.0
    served_name: str = ""
    engine: EngineSettings = field(default_factory=EngineSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    ledger: LedgerSettings = field(default_factory=LedgerSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    oidc: OidcSettings | None = None
    redis: str | None = field(default=None, repr=False)

    @property
    def here(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in HERE


# -- parsing -----------------------------------------------------------------------------------------------------------


def parse_preload(text: str) -> Preload:
    """Parse NAME[=REFERENCE]. Raises ConfigError."""
    name, named, reference = text.partition("=")
    if not name or (named and not reference):
        raise ConfigError(f"{text!r} does not name an adapter", where="--adapter", fix="NAME or NAME=REFERENCE")
    return Preload(name, reference or name)


def bytes_of(text: str, where: str) -> int:
    """Return the bytes of a size such as 512M, 2G or 1.5GB. Raises ConfigError."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmgt]?)i?b?", text.strip(), re.I)
    try:
        assert match is not None
        size = int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))
    except (AssertionError, ValueError, OverflowError):
        raise ConfigError(f"{quoted(text)} is not a size", where=where, fix="as 512M or 2G") from None
    if size < 1:
        raise ConfigError(f"{quoted(text)} is too small", where=where, fix="as 512M or 2G")
    return size


def size_text(size: int) -> str:
    """Return a size in its largest whole unit: 32M, 1G."""
    power = max(n for n in range(5) if size % 1024**n == 0)
    return f"{size // 1024**power}{' KMGT'[power].strip()}"


def keys_of(file: Path) -> list[str]:
    """Return the keys in a file. Raises ConfigError.

    The file has one key per line. Lines that start with # are comments.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the keys: {error}", where=str(file)) from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or min(map(len, keys)) < 16:
        message = "the file has no key" if not keys else "a key in this file has fewer than 16 characters"
        raise ConfigError(message, where=str(file), fix="put each key on its own line, with 16 characters or more")
    return keys
