"""The server's configuration file, for settings that few deployments change.

    veneer serve --base smollm2-135m --config server.yaml

Each key is optional; `docs/how-to/serve.md` lists the keys. An unknown key is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from veneer.errors import ConfigError, nearest
from veneer.serve.settings import (
    EngineSettings,
    FleetSettings,
    HttpSettings,
    LedgerSettings,
    Objectives,
    OidcSettings,
    ServeSettings,
    bytes_of,
)

_Seconds = Annotated[float, Field(ge=0.1)]


class ServerConfig(BaseModel):
    """The keys of the configuration file. Sizes are numbers of bytes, or text such as 64M.

    access_log: whether to write one line of JSON per request to stderr
    allowed_hosts: accepted Host headers, besides localhost and --host, on a server without keys
    context: maximum tokens of a sequence; 0: as many as the base and the cache allow
    max_tokens: maximum tokens of a completion; 0: as many as the context allows
    draft_tokens: maximum tokens that n-gram speculation drafts per completion and step; 0: no speculation
    queue: maximum completions that run or wait at once; one tenant can use half
    max_connections: maximum open connections; above it, the longest-idle connection is closed
    head_seconds, body_seconds: time limits for receiving a request's head and body
    idle_seconds: how long an idle connection is kept open for the next request
    stall_seconds: close a connection whose client has not read for this long
    drain_seconds: how long running completions can continue after SIGTERM
    session_days: with --train, days for which an unused Tinker session is kept
    tenant_mixes, mix_disk: with vLLM or --upstream, maximum mixes per tenant, and total bytes of all mixes on disk
    mix_days: with vLLM or --upstream, days for which a mix is kept after its last use
    ledger_days: with tenants, days for which the ledger keeps its rows; daily sums are not deleted
    ledger_folder, ledger_room, ledger_sync: see `LedgerSettings`
    kv_events, kv_replay: ZeroMQ addresses, such as tcp://*:5557, for routers that follow the prompt cache
    objectives: times and shares that the answers of each tenant should keep, see `Objectives`
    oidc: the issuer of tokens, see `OidcSettings`
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    access_log: bool = False
    allowed_hosts: list[str] = Field(default_factory=list)
    context: int = Field(default=EngineSettings.context, ge=0)
    max_tokens: int = Field(default=HttpSettings.max_tokens, ge=0)
    draft_tokens: int = Field(default=EngineSettings.draft, ge=0, le=64)
    queue: int = Field(default=HttpSettings.queue, ge=2)
    max_connections: int = Field(default=HttpSettings.connections, ge=2)
    head_seconds: _Seconds = HttpSettings.head_time
    body_seconds: _Seconds = HttpSettings.body_time
    idle_seconds: float = Field(default=HttpSettings.idle, ge=1)
    stall_seconds: _Seconds = HttpSettings.stall
    drain_seconds: float = Field(default=ServeSettings.drain, ge=0)
    session_days: float = Field(default=30.0, ge=0.01)
    tenant_mixes: int = Field(default=FleetSettings.mixes, ge=1)
    mix_disk: int | str = FleetSettings.mix_bytes
    mix_days: float = Field(default=FleetSettings.mix_days, ge=0.01)
    ledger_days: float = Field(default=LedgerSettings.days, ge=1)
    ledger_folder: Path | None = None
    ledger_room: int | str = LedgerSettings.room
    ledger_sync: bool = False
    kv_events: str = ""
    kv_replay: str = ""
    objectives: Objectives = Field(default_factory=Objectives)
    oidc: OidcSettings | None = None

    def bytes(self, key: str) -> int:
        """Return the value of a size key in bytes. Raises ConfigError."""
        return bytes_of(str(getattr(self, key)), key)


_Model = TypeVar("_Model", bound=BaseModel)


def check_values(model: type[_Model], values: Mapping[str, Any], where: str) -> _Model:
    """Validate values with a flat model. Raises ConfigError that names the wrong key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(part for part in problem["loc"] if isinstance(part, str))
        if problem["type"] == "extra_forbidden":
            suggestions = nearest(key, model.model_fields, 1)
            fix = f"did you mean {suggestions[0]}?" if suggestions else f"there are {', '.join(model.model_fields)}"
            raise ConfigError(f"unknown key {key!r}", where=where, fix=fix) from None
        raise ConfigError(f"{key}: {problem['msg']}", where=where) from None


def server_config(values: Mapping[str, Any], file: Path) -> ServerConfig:
    """Validate a configuration file's values. Raises ConfigError that names the wrong key."""
    config = check_values(ServerConfig, values, str(file))
    if config.ledger_folder is not None:
        config.ledger_folder = file.parent / config.ledger_folder.expanduser()
    return config
