"""Checks of a server's settings, before the server listens and before heavy imports.

    opened = check_settings(settings)      refuses bad values, conflicting options, missing bases and adapters
    refuse_unused_options(settings, kind)  refuses options that have no effect on this kind of server

If the base is on the hub, only its configuration is downloaded. Checks that need the base's weights (memory,
adapters of another base) run while the server is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from veneer.errors import ConfigError, one_of, quoted
from veneer.library.library import Library, open_library
from veneer.models.config import read_config_json
from veneer.models.device import check_device_name, check_dtype_name
from veneer.models.sources import base_outline, is_image_base
from veneer.serve.settings import ComputeKind, LedgerSettings, QuantizeKind, ServeSettings
from veneer.serve.tenancy.keys import admin_hash, database_here
from veneer.serve.tenancy.store import SERVING_PATIENCE, Store

ServerKind = Literal["texts", "pictures", "upstream", "vllm"]
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@*\s]+", re.I)
"""An origin as browsers send it, or `*`. A page that was opened from a file has the origin `null`."""


@dataclass(frozen=True)
class Opened:
    """The stores that the check opened for the server to use. `store`: the tenants' database, or None."""

    library: Library
    store: Store | None

    def close(self) -> None:
        """Close the stores. Safe to call repeatedly, and on stores that are already closed."""
        self.library.close()
        if self.store is not None:
            self.store.close()


def open_stores(settings: ServeSettings) -> Opened:
    """Open the library and the tenants' database. Raises the errors of both."""
    address = _tenants_address(settings)
    store = None if address is None else Store(address, patience=SERVING_PATIENCE)
    try:
        return Opened(open_library(settings.library), store)
    except BaseException:
        if store is not None:
            store.close()
        raise


def needs_no_key(settings: ServeSettings, store: Store | None) -> bool:
    """Return whether the server accepts requests without a key. `store`: the tenants' database, or None."""
    if store is None:
        return not settings.keys and (settings.open or settings.admin_key is None)
    nobody = settings.tenants is None and settings.admin_key is None and not store.settings.tenants
    return settings.here and (settings.open or nobody)


def _tenants_address(settings: ServeSettings) -> str | None:
    """Return the address of the tenants' database, or None.

    This is the named database, or the default one if it exists and no other option controls access."""
    if settings.tenants is not None or settings.keys or (settings.open and not settings.here):
        return settings.tenants
    return database_here()


def check_settings(settings: ServeSettings, *, page: bool = False) -> Opened:
    """Check the settings and return the opened stores.

    `page`: whether the server has the Studio. Raises ConfigError, BaseError or AdapterError for invalid
    settings, and the errors of `open_stores`.
    """
    if settings.quantize is not None:
        one_of(settings.quantize, get_args(QuantizeKind), "a quantization", "--quantize")
    one_of(settings.engine.compute, get_args(ComputeKind), "an arithmetic", "--compute")
    check_dtype_name(settings.dtype, "--dtype")
    check_device_name(settings.device, "--device")
    for origin in settings.http.allowed_origins:
        if not _ORIGIN.fullmatch(origin):
            fix = "give an origin such as https://app.example.com, without a path, or * for any"
            raise ConfigError(f"{quoted(origin)} is not a valid origin", where="--allowed-origin", fix=fix)
    if settings.admin_key is not None:
        admin_hash(settings.admin_key)
    if settings.open and settings.tenants is not None and not settings.here:
        message = f"with --open, every client of {settings.host} would be the operator of these tenants"
        raise ConfigError(message, where="--open --tenants", fix="--host 127.0.0.1, or leave --open out")
    _check_fleet(settings)
    kind = _server_kind(settings)
    if kind is not None:
        refuse_unused_options(settings, kind)
    if _tenants_address(settings) is None:
        _refuse_ledger_options(settings.ledger)
        if settings.oidc is not None:
            message = "oidc gives tenants' users access, but this server has no tenants"
            raise ConfigError(message, where="oidc", fix="leave it out, or name a database with --tenants")
    if settings.engine.kv_replay and not settings.engine.kv_events:
        message = "kv_replay repeats the messages of kv_events, which is not set"
        raise ConfigError(message, where="kv_replay", fix="set kv_events, or leave kv_replay out")
    opened = open_stores(settings)
    try:
        _check_keyless(settings, opened.store, page)
        for each in settings.preload:
            if not any((Path(folder).expanduser() / each.reference).exists() for folder in settings.folders):
                _check_exists(opened.library, each.reference)
    except BaseException:
        opened.close()
        raise
    return opened


def _check_keyless(settings: ServeSettings, store: Store | None, page: bool) -> None:
    """Raise ConfigError for a server without keys that any web page could use.

    Also raises for a Studio without keys that other machines can reach.
    """
    if not needs_no_key(settings, store):
        return
    fix = "--api-keys or --tenants"
    if "*" in settings.http.allowed_origins:
        message = "any web page could use this server, because the server needs no key"
        raise ConfigError(message, where="--allowed-origin *", fix=f"name the origins, or {fix}")
    if page and not settings.here:
        message = "the Studio can train and remove adapters, so it needs a key if other machines can reach it"
        raise ConfigError(message, where=f"--host {settings.host}", fix=f"{fix}; or leave --host out")


def _server_kind(settings: ServeSettings) -> ServerKind | None:
    """Return the kind of server, or None if the base must be created first.

    Raises BaseError for a base that exists neither here nor on the hub.
    """
    base = base_outline(settings.base)
    if base is not None and (file := base / "config.json").is_file():
        read_config_json(file)
    if settings.fleet.upstream is not None:
        return "upstream"
    if settings.fleet.engine == "vllm":
        return "vllm"
    if base is None:
        return None
    return "pictures" if is_image_base(base) else "texts"


_HERE = "text bases on this server"
_OPTIONS: tuple[tuple[str, Callable[[ServeSettings], object], str, str], ...] = (
    ("--batch-invariant", lambda s: s.engine.batch_invariant, "texts", _HERE),
    ("--cache-memory", lambda s: s.engine.cache_bytes, "texts", _HERE),
    ("context", lambda s: s.engine.context, "texts", _HERE),
    ("kv_events", lambda s: s.engine.kv_events, "texts", _HERE),
    ("max_tokens", lambda s: s.http.max_tokens, "texts upstream vllm", "texts"),
    ("--adapter-memory", lambda s: s.engine.adapter_bytes, "texts pictures", "bases on this server"),
    ("--quantize", lambda s: s.quantize, "texts", _HERE),
    ("--compute", lambda s: s.engine.compute, "texts", _HERE),
    ("--dtype", lambda s: s.dtype, "texts pictures vllm", "bases on this server"),
    ("--device", lambda s: s.device, "texts pictures", "bases on this server"),
    ("tenant_mixes", lambda s: s.fleet.mixes, "upstream vllm", "mixes in vLLM"),
    ("mix_disk", lambda s: s.fleet.mix_bytes, "upstream vllm", "mixes in vLLM"),
    ("mix_days", lambda s: s.fleet.mix_days, "upstream vllm", "mixes in vLLM"),
    ("-- (flags for vLLM)", lambda s: s.fleet.vllm_flags, "vllm", "--engine vllm"),
)
"""Per row: option or --config key, function that reads its value, server kinds, purpose."""
_LEDGER_OPTIONS = {"days": "ledger_days", "room": "ledger_room", "folder": "ledger_folder", "synced": "ledger_sync"}


def refuse_unused_options(settings: ServeSettings, kind: ServerKind) -> None:
    """Raise ConfigError for an option that has no effect on this kind of server."""
    why = {"upstream": "the upstream server runs the model", "pictures": "this server has an image base"}
    why |= {"vllm": "vLLM runs the model", "texts": "this server's own engine runs the model"}
    if option := unused_option(settings, kind):
        purpose = next(purpose for each, _, _, purpose in _OPTIONS if each == option)
        raise ConfigError(f"{option} applies to {purpose}, but {why[kind]}", where=option, fix="leave it out")


def unused_option(settings: ServeSettings, kind: ServerKind) -> str:
    """Return the first option that is set but has no effect on this kind of server, or ""."""
    usual = ServeSettings("")
    return next((o for o, of, kinds, _ in _OPTIONS if kind not in kinds.split() and of(settings) != of(usual)), "")


def _refuse_ledger_options(ledger: LedgerSettings) -> None:
    """Raise ConfigError for a ledger option on a server without tenants."""
    usual = LedgerSettings()
    for name, option in _LEDGER_OPTIONS.items():
        if getattr(ledger, name) != getattr(usual, name):
            message = f"{option} applies to the ledger of tenants, which this server does not have"
            raise ConfigError(message, where=option, fix="leave it out, or name a database with --tenants")


def _check_fleet(settings: ServeSettings) -> None:
    """Raise ConfigError for a bad --upstream, or sources that vLLM cannot read."""
    fleet = settings.fleet
    if fleet.upstream is not None:
        from veneer.serve.upstream import upstream_url  # imports httpx

        upstream_url(fleet.upstream)
        if fleet.engine != "auto":
            message = "--engine and --upstream cannot be combined"
            raise ConfigError(message, where="--engine", fix="leave one of them out")
    if settings.folders and (fleet.upstream is not None or fleet.engine == "vllm"):
        purpose = "vLLM reads the library, not folders"
        raise ConfigError(purpose, where="--allow-folder", fix="veneer library add")


def _check_exists(library: Library, reference: str) -> None:
    """Raise ConfigError or NotInLibrary if a reference does not exist."""
    try:
        library.find(reference)
    except ConfigError:  # the text is not a library reference
        fix = "give a library reference, or a path inside an --allow-folder"
        raise ConfigError(f"there is no adapter {quoted(reference)}", where="--adapter", fix=fix) from None
