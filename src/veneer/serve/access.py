"""Access: the principal of a request, the meaning of a model name, and limits.

    principal = await tenancy.authenticate(key)                401 for an unknown key
    served = catalog.resolve(model, principal)                 404 if unknown or not visible
    async with tenancy.admitted(principal, served, …) as bill: 429 beyond a limit
        …                                                      bill.used(usage) once, at the end

An unknown name never falls back to the base. `OpenAccess` is the tenancy of a server without keys: everything
is visible and nothing is billed. `KeyAccess` is for a server whose keys all have the same permissions.
"""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from veneer.serve.principal import Principal
from veneer.serve.request import DigestMix, Refused, Usage
from veneer.serve.tenancy.keys import admin_hash, matches_hash

SHADOWS = Principal("operator", weight=0.1)
"""The principal of shadow requests, which are billed to the operator and use no tenant's share."""
BEHIND = "~shadows"
"""Pseudo-tenant that shadow requests are scheduled under, so they never use a real tenant's share."""
TRIALS = "~studio"
"""Pseudo-tenant for the operator's usage in the Studio, which is kept separate from clients' usage."""


@dataclass(frozen=True)
class ResolvedModel:
    """A model name, resolved when it was requested.

    `name`: the client's name, returned as `model`. `target`: the adapter that a route chose, otherwise
    `name`. `shadow`: the name and mix of a shadow, whose completion is only logged; if the shadow cannot run,
    an error with the reason takes the place of the mix. `adapters`: the operator's name for each part of
    `mix`, in order (the loaded name, or the library reference with its version), used by limits, prices and
    the ledger. `digests`: the digest of each name of a mix, in the client's order, "" for the base.
    `trained`: whether the request is for training, which has its own price. `trial`: whether the request
    comes from the Studio instead of a client. A trial has no shadow, and the operator's trials are booked on
    TRIALS.
    """

    mix: DigestMix
    name: str
    target: str
    shadow: tuple[str, DigestMix | Refused] | None = None
    adapters: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    trained: bool = False
    trial: bool = False

    @property
    def label(self) -> str:
        """The label in metrics: `target`, or "mix" for several adapters."""
        return "mix" if len(self.mix) > 1 else self.target

    @property
    def router_name(self) -> str | None:
        """The request's `model`, by which routers identify it; None if the client sent a mix."""
        return None if self.digests or len(self.mix) > 1 else self.name

    def as_trial(self) -> ResolvedModel:
        """Return this model as a trial in the Studio."""
        return replace(self, trial=True, shadow=None)

    def parts(self) -> list[tuple[str, str, float]]:
        """Return (digest, the operator's name, strength) of each part; ("", `target`, 1) for the base."""
        if not self.mix:
            return [("", self.target, 1.0)]
        names = dict(zip((digest for digest, _ in self.mix), self.adapters, strict=False))
        return [(digest, names.get(digest, digest), strength) for digest, strength in self.mix]


@dataclass(frozen=True)
class ModelCard:
    """An entry of /v1/models.

    `parent`: the base's name; None for the base. `root`: the operator's name for the source (a library
    reference, never a path). `digest`: the adapter's digest. `size`: bytes of the adapter's files, 0 if unknown.
    """

    id: str
    root: str
    parent: str | None
    created: int
    digest: str = ""
    size: int = 0


class Routes(Protocol):
    """Routes: names whose requests are distributed among weighted targets."""

    def choose(self, route: str, principal: Principal) -> str | None:
        """Return the target for this principal, or None if the principal has no such route."""
        ...

    def shadow(self, route: str, principal: Principal) -> str | None:
        """Return the target that also completes the request, only for the log, or None."""
        ...

    def names(self, principal: Principal) -> list[str]:
        """Return the names of the routes that are visible to this principal."""
        ...


def shadow_id(request: str) -> str:
    """Return the id under which a shadow's completion is stored for feedback."""
    return f"{request}-shadow"


@dataclass(frozen=True)
class ShadowAnswer:
    """Two completions of one request, for the log.

    `name`: the route. `target`, `sent`: the route's target, and its completion, which the client received.
    `shadow`, `answer`: the shadow and its completion.
    """

    request: str
    tenant: str
    name: str
    shadow: str
    target: str
    sent: str
    answer: str
    sent_usage: Usage
    usage: Usage
    error: str = ""

    @property
    def outcome(self) -> Literal["same", "different", "failed"]:
        return "failed" if self.error else "same" if self.sent == self.answer else "different"


class Bill(Protocol):
    def used(self, usage: Usage) -> Awaitable[None]:
        """Record a request's usage, even if the request failed or was cancelled. Called once.

        The usage counts as soon as this is called. The caller awaits the result before it sends the last
        event; from then on, the bill survives the end of the process.
        """
        ...


StoreAnswer = Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], None]
"""Stores {"messages", "tools"?} of a request and the assistant's message of each choice. Does not block."""


@dataclass(frozen=True)
class LedgerState:
    """How far the ledger is behind.

    `pending`: number of finished requests that are missing from the database. `lag`: age in seconds of the
    oldest of these requests. `unavailable`: whether the database is slow or does not answer.
    """

    pending: int
    lag: float
    unavailable: bool


class Tenancy(Protocol):
    """Access and billing.

    Tenancies derive from this class for its defaults: no ledger, no logs, no routes. `keyless`: whether
    requests without a key are accepted; their principals have the kind "open". `routes`: the operator's
    routes, or None if unsupported.
    """

    keyless: bool = False
    routes: Routes | None = None

    async def authenticate(self, key: str | None, user: str | None = None) -> Principal:
        """Return the principal of a key. Raises Refused (unauthorized, 401)."""
        ...

    def cache_scope(self, principal: Principal, model: ResolvedModel) -> str:
        """Return the cache scope of the principal's prompts: "" for the scope that all tenants share."""
        ...

    def admitted(
        self, principal: Principal, model: ResolvedModel, *, request: str, prompt_tokens: int, max_tokens: int
    ) -> AbstractAsyncContextManager[Bill]:
        """Reserve one request's share of every limit until the with-block ends.

        Raises Refused (rate_limited, 429)."""
        ...

    def ledger_state(self) -> LedgerState | None:
        """Return how far the ledger is behind, for metrics; None without a ledger."""
        return None

    def log_change(self, actor: str, action: str, subject: str, before: object = None, after: object = None) -> None:
        """Write an operator's change to the audit log. Can block.

        `action`: adapter.load or adapter.unload.
        """
        return None

    def grant_namespace(self, tenant: str) -> None:
        """Let a tenant see all names in its own namespace, such as its trained adapters. Can block."""
        return None

    def record_shadow(self, answer: ShadowAnswer) -> None:
        """Record how a shadow's completion compares with the completion that was sent."""
        return None

    def keeping(self, principal: Principal, model: ResolvedModel, request: str) -> StoreAnswer | None:
        """Return a function that stores a request's completion for feedback, or None."""
        return None

    def close(self) -> None:
        """Write pending records and stop."""
        return None


class _FreeBill:
    def used(self, usage: Usage) -> Awaitable[None]:
        return NoWait()


class NoWait:
    """An awaitable that is already complete and does not have to be awaited."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


class OpenAccess(Tenancy):
    """A tenancy without keys, limits or a ledger."""

    keyless = True

    async def authenticate(self, key: str | None, user: str | None = None) -> Principal:
        return Principal("open", user=user)

    def cache_scope(self, principal: Principal, model: ResolvedModel) -> str:
        return ""

    @asynccontextmanager
    async def admitted(
        self, principal: Principal, model: ResolvedModel, *, request: str, prompt_tokens: int, max_tokens: int
    ) -> AsyncIterator[Bill]:
        yield _FreeBill()


class KeyAccess(OpenAccess):
    """A tenancy whose keys can read everything, with an optional admin key.

    There are no limits and no ledger. `admin_key`: plain text or hash. `door_key`:
    the one of `keys` that front doors use, if any.
    """

    keyless = False

    def __init__(self, keys: Sequence[str], admin_key: str | None = None, door_key: str | None = None) -> None:
        self.keys, self.door_key = [key.encode() for key in keys], (door_key or "").encode()
        self.admin_hash = admin_hash(admin_key) if admin_key else None

    async def authenticate(self, key: str | None, user: str | None = None) -> Principal:
        encoded = (key or "").encode("utf-8", "replace")
        admin = self.admin_hash is not None and matches_hash(key or "", self.admin_hash)
        matches = [hmac.compare_digest(encoded, each) for each in self.keys]
        if not key or not (admin or any(matches)):
            raise Refused("no valid API key", status=401, code="unauthorized", fix="Authorization: Bearer KEY")
        door = hmac.compare_digest(encoded, self.door_key)
        return Principal("operator" if admin else "door" if door else "key", user=user)
