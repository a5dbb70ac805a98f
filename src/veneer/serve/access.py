"""Access checks for every surface: the principal of a request, the meaning of a name, and the limits.

    caller = await tenancy.caller(key)                        401 for an unknown key
    served = catalog.resolve(model, caller)                   404 for what is not there or not theirs: never the base
    async with tenancy.admitted(caller, served, …) as bill:   429 beyond a limit
        …                                                     bill.used(usage) once, at the end

`OpenAccess` is the tenancy of a server without tenants: everybody sees everything and nothing is counted; `KeyAccess`
that of one whose keys are all alike.
"""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from veneer.serve.principal import Principal
from veneer.serve.request import DigestMix, Refused, Usage
from veneer.serve.tenancy.keys import admin_hash, same

SHADOWS = Principal("operator", weight=0.1)
"""The principal of shadow requests: they are billed to the operator and use no tenant's share."""
BEHIND = "~shadows"
"""Pseudo-tenant that shadow requests are scheduled under, so they never use a real tenant's share."""
TRIALS = "~studio"
"""Pseudo-tenant that the ledger books the operator's trials in the Studio on, apart from the use of clients."""


@dataclass(frozen=True)
class Served:
    """What a name meant when it was asked. `name`: the client's own word, given back as `model`. `target`: the adapter
    that a route chose, else `name`. `shadow`: a mix whose answer is computed too, and logged, never sent; or why it
    cannot be. `adapters`: what the operator calls each part of `mix`, in its order, whatever the client called it: the
    name that was loaded, or the library's with its version. Limits, prices and the ledger know a request by these.
    `meant`: the digest that each name of a mix came to, in the client's order, "" for the base. `trained`: it is not
    asked but trained, which has a price of its own. `trial`: asked on a page of the Studio, by no client; it has no
    shadow, and a trial of the operator is booked on TRIALS."""

    mix: DigestMix
    name: str
    target: str
    shadow: tuple[str, DigestMix | Refused] | None = None
    adapters: tuple[str, ...] = ()
    meant: tuple[str, ...] = ()
    trained: bool = False
    trial: bool = False

    def as_trial(self) -> Served:
        """The same, asked on a page of the Studio."""
        return replace(self, trial=True, shadow=None)

    def parts(self) -> list[tuple[str, str, float]]:
        """(digest, the operator's name, strength) of each part; of the base alone ("", its name, 1)."""
        if not self.mix:
            return [("", self.target, 1.0)]
        names = dict(zip((digest for digest, _ in self.mix), self.adapters, strict=False))
        return [(digest, names.get(digest, digest), strength) for digest, strength in self.mix]


@dataclass(frozen=True)
class ModelCard:
    """A line of /v1/models. `parent`: the base's name; None for the base. `root`: where it came from, as the operator
    named it (a library reference, never a path). `digest`: of the adapter."""

    id: str
    root: str
    parent: str | None
    created: int
    digest: str = ""
    pinned: bool = False


class Routes(Protocol):
    """Names with weighted targets."""

    def choose(self, route: str, caller: Principal) -> str | None:
        """The name that answers this caller; None where there is no such route for them."""
        ...

    def shadow(self, route: str, caller: Principal) -> str | None:
        """The name whose answer is computed too."""
        ...

    def names(self, caller: Principal) -> list[str]:
        """The routes that exist for this caller."""
        ...


def shadow_id(request: str) -> str:
    """By which id the answer of a request's shadow is kept for feedback, where the request's own is."""
    return f"{request}-shadow"


@dataclass(frozen=True)
class ShadowAnswer:
    """What a shadow's answer was beside the one that was sent by `target`; for the log. `name`: the route. Of pictures
    `sent` and `answer` are the digests of their pixels, and `distance` is how far these are apart on average, 0 … 1."""

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
    distance: float | None = None

    @property
    def outcome(self) -> Literal["same", "different", "failed"]:
        return "failed" if self.error else "same" if self.sent == self.answer else "different"


class Bill(Protocol):
    def used(self, usage: Usage) -> Awaitable[None]:
        """What the request took, also of one that failed or was cancelled; called once. It holds from the call on; what
        comes back is awaited before the last word goes out, and is there when the bill outlives this process."""
        ...


KeepAnswer = Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], None]
"""Takes what was asked, {"messages", "tools"?}, and the assistant's message of each choice. Does not block."""


@dataclass(frozen=True)
class LedgerState:
    """`owed`: requests in the outbox, running ones included; with SQLite, ends that are being written. `lag`: seconds
    since the end of the oldest ended request that the database does not have. `away`: the database is unavailable, or
    takes long to answer."""

    owed: int
    lag: float
    away: bool


class Tenancy(Protocol):
    """Access and billing. Tenancies derive from this class for its defaults: no ledger, no logs, no routes. `keyless`:
    requests without a key are accepted, as principals of kind "open"."""

    keyless: bool = False

    async def caller(self, key: str | None, user: str | None = None) -> Principal:
        """Raises Refused(unauthorized, 401)."""
        ...

    def shares(self, caller: Principal, served: Served) -> str:
        """With whom the caller's prompts share what was computed: "" with everybody, else with those of this word."""
        ...

    def admitted(
        self, caller: Principal, served: Served, *, request: str, prompt_tokens: int, max_tokens: int
    ) -> AbstractAsyncContextManager[Bill]:
        """Room for one request under every limit, given back at the end. Raises Refused(rate_limited, 429)."""
        ...

    @property
    def routes(self) -> Routes | None:
        """The operator's routes, where there can be any."""
        return None

    def ledger_state(self) -> LedgerState | None:
        """How far the ledger is behind, where there is one; for metrics."""
        return None

    def note(self, who: str, what: str, subject: str, before: object = None, after: object = None) -> None:
        """A line of the audit log for what an operator changed (`what`: adapter.load, adapter.unload). May block."""
        return None

    def let_see_own(self, tenant: str) -> None:
        """From now on a tenant sees what is in the namespace of its name, as what it trains will be. May block."""
        return None

    def note_shadow(self, answer: ShadowAnswer) -> None:
        """Keep how a shadow's answer compares with the one that was sent."""
        return None

    def keeping(self, caller: Principal, served: Served, request: str) -> KeepAnswer | None:
        """What keeps the whole answer to a request that comes now, for feedback on it; None where it is not kept."""
        return None

    def close(self) -> None:
        """Write what has come, and end."""
        return None


class _FreeBill:
    def used(self, usage: Usage) -> Awaitable[None]:
        return NoWait()


class NoWait:
    """Nothing to wait for, whether it is awaited or not."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


class OpenAccess(Tenancy):
    """No keys, no limits, no ledger."""

    keyless = True

    async def caller(self, key: str | None, user: str | None = None) -> Principal:
        return Principal("open", user=user)

    def shares(self, caller: Principal, served: Served) -> str:
        return ""

    @asynccontextmanager
    async def admitted(
        self, caller: Principal, served: Served, *, request: str, prompt_tokens: int, max_tokens: int
    ) -> AsyncIterator[Bill]:
        yield _FreeBill()


class KeyAccess(OpenAccess):
    """Read-only keys that see everything, and one admin key, given as plain text or as its hash. No limits, no
    ledger."""

    keyless = False

    def __init__(self, keys: Sequence[str], admin_key: str | None = None) -> None:
        self.keys = [key.encode() for key in keys]
        self.admin_hash = admin_hash(admin_key) if admin_key else None

    async def caller(self, key: str | None, user: str | None = None) -> Principal:
        given = (key or "").encode("utf-8", "replace")
        admin = self.admin_hash is not None and same(key or "", self.admin_hash)
        known = [hmac.compare_digest(given, each) for each in self.keys]
        if not key or not (admin or any(known)):
            raise Refused("no valid API key", status=401, code="unauthorized", fix="Authorization: Bearer KEY")
        return Principal("operator" if admin else "key", user=user)
