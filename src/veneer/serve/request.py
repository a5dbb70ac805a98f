"""Requests and events of an engine: types that all of `serve` shares.

    HTTP route -> catalog (name -> mix of digests) -> Request -> engine
               <- Started, Token …, Finished <-

A mix consists of digests, not names. So if a name starts to refer to another adapter, running requests keep
the old adapter. This module is independent of tensors and HTTP.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, TypeVar

from veneer.core.adapter import check_strength
from veneer.errors import ConfigError, VeneerError, quoted

DigestMix = tuple[tuple[str, float], ...]
"""(adapter digest, strength), sorted by digest, unique, with nonzero strengths; () is the base."""

BASE: DigestMix = ()


def make_mix(parts: Iterable[tuple[str, float]]) -> DigestMix:
    """Return a mix in canonical form.

    Strengths are added per digest, zeros are removed, and digests are sorted.
    """
    sums: dict[str, float] = {}
    for digest, strength in parts:
        sums[digest] = sums.get(digest, 0.0) + float(strength)
    return tuple((digest, s) for digest, s in sorted(sums.items()) if s)


def check_strengths(parts: Iterable[tuple[str, float]]) -> None:
    """Raise Refused for an invalid strength (see `check_strength`).

    parts: (name, strength)
    """
    try:
        for name, strength in parts:
            check_strength(quoted(name), strength)
    except ConfigError as error:
        raise invalid(error.what, "mix", error.fix) from error


def mix_digest(mix: DigestMix) -> bytes:
    """Return a mix's digest for cache keys: equal only for equal mixes, b"" for the base."""
    return hashlib.sha256(repr(mix).encode()).digest() if mix else b""


def is_weighted(mix: DigestMix) -> bool:
    """Return whether a mix is neither the base nor one adapter at strength 1."""
    return len(mix) > 1 or any(strength != 1 for _, strength in mix)


def served_name(mix: DigestMix) -> str:
    """Return the name of a mix between servers: a server with an upstream sends this name as `model`."""
    if is_weighted(mix):
        return f"veneer-mix-{mix_digest(mix).hex()[:32]}"
    return f"veneer-{mix[0][0].removeprefix('sha256:')}"


def served_digest(name: str) -> str:
    """Return the digest in a `served_name` of one adapter; "" for other names."""
    return f"sha256:{name[7:]}" if re.fullmatch("veneer-[0-9a-f]{64}", name) else ""


def cache_root(mix: DigestMix, salt: str = "") -> bytes:
    """Return the cache key that precedes a prompt's first block.

    Only requests with equal roots can share cached blocks. Roots are equal only if the mixes are equal and
    the salts are equal.
    """
    if not salt:
        return mix_digest(mix)
    # The prefix and the fixed width prevent a client's salt from forging another mix's digest.
    return hashlib.sha256(b"salted" + mix_digest(mix).rjust(32, b"\0") + salt.encode("utf-8", "surrogatepass")).digest()


class Refused(VeneerError):
    """An error response.

    `status`: the HTTP status. `code`: the error code, for programs. Codes: model_not_found (404),
    adapter_unusable, adapter_exists, invalid_request (400), context_exceeded (400), overloaded (429, 503),
    unavailable (503: a store or a database does not answer), rate_limited (429, with `retry_after` seconds),
    unauthorized (401), too_large (413), storage_full (400), too_slow (408), shutting_down (503), internal
    (500).
    """

    def __init__(
        self,
        what: str,
        *,
        status: int,
        code: str,
        param: str | None = None,
        retry_after: float | None = None,
        where: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


def invalid(what: str, param: str | None = None, fix: str | None = None) -> Refused:
    """Return the error for an invalid request (400)."""
    return Refused(what, status=400, code="invalid_request", param=param, fix=fix)


def shutting_down() -> Refused:
    return Refused("the server is shutting down", status=503, code="shutting_down")


def not_ready(phase: str) -> Refused:
    """Return the error for requests to a server in this phase: 503 with Retry-After.

    phase: loading or draining
    """
    code = "shutting_down" if phase == "draining" else "unavailable"
    return Refused(f"the server is {phase}", status=503, code=code, retry_after=5.0)


GrammarSpec = tuple[Literal["json_schema", "json_object", "regex"], str]
"""A constraint on a completion.

One of: a JSON schema as text, any JSON object, a regular expression.
"""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request.

    They apply in this order: grammar, logit bias, penalties, temperature, top-k, min-p, top-p.

    `temperature`: 0 is greedy. `top_k`: 0 for all tokens. `seed`: None for a random seed. `logprobs`: number
    of alternatives to report in addition to the sampled token, or None for no log-probabilities; they are
    from the model's distribution before any of the above. `sampled_logprob`: with logprobs, also report the
    sampled token's log-probability in the final distribution. `prompt_logprobs`: also report the prompt's
    tokens, which disables the prefix cache for the prompt. `stop`: texts that end the completion and are not
    part of it. `grammar`: constraint on the completion.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    sampled_logprob: bool = False
    prompt_logprobs: bool = False
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        self._need(self.max_tokens >= 1, "max_tokens", "1 or more")
        self._need(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "from 0 to max_tokens")
        self._need(0 <= self.temperature <= 100, "temperature", "from 0 (greedy) to 100")
        self._need(self.top_k >= 0, "top_k", "0 (all) or more")
        self._need(0 < self.top_p <= 1, "top_p", "above 0, at most 1")
        self._need(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        self._need(-2 <= self.presence_penalty <= 2, "presence_penalty", "from -2 to 2")
        self._need(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "from -2 to 2")
        self._need(0.01 <= self.repetition_penalty <= 10, "repetition_penalty", "from 0.01 to 10")
        self._need(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "from 0 to 20")

    def _need(self, fine: bool, name: str, expected: str) -> None:
        if not fine:
            raise ConfigError(f"{name} is {getattr(self, name)}", where=name, fix=f"{name} must be {expected}")


_numbers = itertools.count()


@dataclass(eq=False)
class Request:
    """A request for one completion of one prompt.

    `prompt`: token ids, at least one. `tenant`, `weight`: owner and share, for fair queueing. `name`: the
    client's name for the mix; used in metrics and messages, but never as a cache key. `salt`: requests share
    cached prompt blocks only if their salts are equal. `router_name`: the value of `model` by which a router
    identifies the request; None for a mix, which has no such name. `user`: the tenant's end user, for routers.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    mix: DigestMix = BASE
    tenant: str = ""
    weight: float = 1.0
    name: str = ""
    salt: str = ""
    id: str = field(default_factory=lambda: f"r{next(_numbers)}")
    router_name: str | None = None
    user: str = ""


@dataclass(frozen=True)
class Started:
    """The engine has started on the prompt. `cached`: number of prompt tokens in the cache."""

    cached: int


@dataclass(frozen=True)
class Token:
    """One token of the completion.

    `text`: the text that the token adds. The completion is all these texts joined. A token adds no text if
    its character is incomplete, if its text is held back because a stop text can begin in it, or if the token
    ended the completion. `logprob` and `top` ((id, text, logprob), best first) are from the model's
    distribution, and `sampled_logprob` is from the final distribution; all are set only if requested.
    `prompt`: on the first token, the prompt's tokens, if their log-probabilities were requested; the first
    prompt token has no log-probability.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()
    special: bool = False
    prompt: tuple[Token, ...] = ()
    sampled_logprob: float | None = None


@dataclass(frozen=True)
class Usage:
    """Token counts, and times in seconds.

    `queued`: until the first step. `prefill`: then until the first token. `decode`: then until the last
    token.
    """

    prompt: int
    cached: int
    completion: int
    queued: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Finished:
    """The last event of a completion.

    `reason`: stop, length, cancelled or error. `stop`: the stop text or token id that ended the completion.
    `text`: text that was held back and belongs to the completion. `error`: the error, if `reason` is error.
    """

    reason: Literal["stop", "length", "cancelled", "error"]
    usage: Usage
    stop: str | int | None = None
    text: str = ""
    error: Refused | None = None


EngineEvent = Started | Token | Finished


@dataclass(frozen=True)
class EngineStats:
    """Counters of an engine.

    `forced_tokens`: generated without a forward pass, because a grammar allowed nothing else.
    `drafted_tokens`, `accepted_tokens`: drafts that were verified, and those that became generated tokens.
    `cache_used`: share of key-value blocks in use. `blocks`, `block_size`: number of these blocks, and tokens
    per block; 0 for an engine without a cache of its own. `adapters`, `adapter_bytes`: adapters in memory now.
    `slow_adapters`: adapters in slower memory, which must be moved before they run. `adapter_slots`: number of
    adapters that fit in memory. `evictions`: number of adapters evicted to make room for others.
    """

    running: int = 0
    waiting: int = 0
    cache_used: float = 0.0
    prefix_hits: int = 0
    prefix_lookups: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    forced_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    adapters: int = 0
    adapter_bytes: int = 0
    evictions: int = 0
    slow_adapters: int = 0
    adapter_slots: int = 0
    blocks: int = 0
    block_size: int = 0

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hits / self.prefix_lookups if self.prefix_lookups else 0.0


_RequestT = TypeVar("_RequestT", contravariant=True)
_EventT = TypeVar("_EventT", covariant=True)


class Engine(Protocol[_RequestT, _EventT]):
    """The part of a server that computes: text engine, upstream, or image engine.

    Text engines are `Engine[Request, EngineEvent]`. Engines inherit the default methods of this class.

    `events`: yields the events of a request until the request ends; closing the iterator (after a disconnect)
    cancels the request. Raises Refused before the first event for errors that are found at once: a prompt
    that does not fit (context_exceeded), a full queue (overloaded), or a server that is shutting down. Later
    errors of a text request arrive as Finished with `error`.
    """

    makes: ClassVar[Literal["texts", "pictures"]] = "texts"

    def events(self, request: _RequestT, /) -> AsyncIterator[_EventT]: ...

    def stats(self) -> EngineStats: ...

    async def metrics(self) -> str:
        """Return the metrics of a separate engine process in Prometheus's text format, or ""."""
        return ""

    async def begin(self) -> None:
        """Start the engine. Called on the server's event loop, before the first request."""
        return None

    async def end(self) -> None:
        """Refuse new requests, cancel running ones, and stop."""
        return None

    def problem(self) -> str:
        """Return why the engine is unhealthy, or "".

        Causes are a stuck step, an ended thread, or a failing device.
        """
        return ""

    def trouble(self) -> str:
        """Return why new requests should go to another server for now, or "".

        One cause is an upstream that does not respond.
        """
        return ""


class LoadingEngine(Engine[Request, EngineEvent]):
    """The engine of a server whose base is still loading."""

    def events(self, request: Request) -> AsyncIterator[EngineEvent]:
        raise not_ready("loading")

    def stats(self) -> EngineStats:
        return EngineStats()
