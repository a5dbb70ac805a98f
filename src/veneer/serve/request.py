"""What is asked of an engine and what it answers: the words that all of `serve` shares.

    surface -> catalog (name -> mix of digests) -> Request -> engine -> Started, Token …, Finished -> surface

A mix is made of digests, never of names: whatever a name means later, a request keeps what it meant when it came in.
Knows no tensors, no HTTP.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, TypeVar

from veneer.core.adapter import check_strength
from veneer.errors import ConfigError, VeneerError, quoted

DigestMix = tuple[tuple[str, float], ...]
"""(adapter digest, strength), sorted by digest, each digest once, no strength 0; () is the base alone."""

BASE: DigestMix = ()


def make_mix(parts: Iterable[tuple[str, float]]) -> DigestMix:
    """The one form of a mix: strengths of one digest are added, zeros are left out, the order is by digest."""
    sums: dict[str, float] = {}
    for digest, strength in parts:
        sums[digest] = sums.get(digest, 0.0) + float(strength)
    return tuple((digest, s) for digest, s in sorted(sums.items()) if s)


def check_strengths(parts: Iterable[tuple[str, float]]) -> None:
    """Raises Refused for a strength that there is not (`check_strength`); parts: (name, strength)."""
    try:
        for name, strength in parts:
            check_strength(quoted(name), strength)
    except ConfigError as error:
        raise invalid(error.what, "mix", error.fix) from error


def mix_digest(mix: DigestMix) -> bytes:
    """What keys of caches carry: equal exactly where the mixes are equal; b"" for the base."""
    return hashlib.sha256(repr(mix).encode()).digest() if mix else b""


def cache_root(mix: DigestMix, salt: str = "") -> bytes:
    """The key before a prompt's first block: equal exactly where two requests may share what was computed, which is
    under equal mixes and with equal salts."""
    if not salt:
        return mix_digest(mix)
    # The word in front and the fixed width keep what a client writes from ever being another mix's digest.
    return hashlib.sha256(b"salted" + mix_digest(mix).rjust(32, b"\0") + salt.encode("utf-8", "surrogatepass")).digest()


class Refused(VeneerError):
    """A request that is answered with an error: `status` is HTTP's, `code` a word that programs test.

    Codes: model_not_found (404), adapter_unusable, adapter_exists, invalid_request (400), context_exceeded (400),
    overloaded (429, 503), unavailable (503: a store or a database does not answer), rate_limited (429, with
    `retry_after` seconds), unauthorized (401), too_large (413),
    storage_full (400), too_slow (408), shutting_down (503), internal (500)."""

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
    """A request that asks for what cannot be: 400."""
    return Refused(what, status=400, code="invalid_request", param=param, fix=fix)


def shutting_down() -> Refused:
    return Refused("the server is shutting down", status=503, code="shutting_down")


def not_ready(phase: str) -> Refused:
    """The error of a request that a server in this phase (loading, draining) does not take: 503 with Retry-After."""
    return Refused(f"the server is {phase}", status=503, code="shutting_down", retry_after=5.0)


GrammarSpec = tuple[Literal["json_schema", "json_object", "regex"], str]
"""What an answer must match: a JSON schema as text, any JSON object, or a regular expression."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. In this order: grammar, logit bias, penalties, temperature, top-k, min-p, top-p.

    `temperature` 0 is greedy. `top_k` 0: all. `seed` None: one from the system. `logprobs`: None for none, else how
    many alternatives beside the chosen token's own; they are of the model's distribution before any of the above.
    `drawn_logprob`: with them, the chosen token's in the distribution that all of the above leave to draw from.
    `prompt_logprobs`: those of the prompt's tokens too, which is then computed whole, whatever the cache knows of it.
    `stop`: texts that end the answer and are not part of it. `grammar`: what the answer must match."""

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
    drawn_logprob: bool = False
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

    def _need(self, fine: bool, name: str, wanted: str) -> None:
        if not fine:
            raise ConfigError(f"{name} is {getattr(self, name)}", where=name, fix=f"{name} must be {wanted}")


_numbers = itertools.count()


@dataclass(eq=False)
class Request:
    """One answer to one prompt. `prompt`: token ids, at least one. `tenant` and `weight`: whose it is and its share,
    for fair queueing; `name`: what the client called the mix, for metrics and messages, never for a cache. `salt`:
    prompts that begin alike share what was computed where it is equal too."""

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    mix: DigestMix = BASE
    tenant: str = ""
    weight: float = 1.0
    name: str = ""
    salt: str = ""
    id: str = field(default_factory=lambda: f"r{next(_numbers)}")


@dataclass(frozen=True)
class Started:
    """The first part of the prompt is being computed. `cached`: prompt tokens whose keys and values were there."""

    cached: int


@dataclass(frozen=True)
class Token:
    """One token. `text` is what it adds to the answer; the texts of all tokens joined are the answer. It may be empty:
    a character in parts, a text held back because a stop text may begin in it, or the token that ended the answer.
    `logprob` and `top` ((id, text, logprob), best first) are of the model's distribution, `drawn` of the one that it
    was drawn from, where asked for. `prompt`: with an answer's first token those of the prompt, where their logprobs
    were asked for; the very first has none."""

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()
    special: bool = False
    prompt: tuple[Token, ...] = ()
    drawn: float | None = None


@dataclass(frozen=True)
class Usage:
    """`queued`, `prefill`, `decode`: seconds until the first step, until the first token, until the last."""

    prompt: int
    cached: int
    completion: int
    queued: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Finished:
    """The last event. `reason`: stop (`stop`: the text or token id that did it), length, cancelled, or error with
    `error`. `text`: what was held back and belongs to the answer."""

    reason: Literal["stop", "length", "cancelled", "error"]
    usage: Usage
    stop: str | int | None = None
    text: str = ""
    error: Refused | None = None


EngineEvent = Started | Token | Finished


@dataclass(frozen=True)
class EngineStats:
    """`cache_used`: share of the blocks of keys and values; `adapters`, `adapter_bytes`: in memory now (of a fleet: on
    replicas, each once); `evictions`: adapters that made room."""

    running: int = 0
    waiting: int = 0
    cache_used: float = 0.0
    prefix_hits: int = 0
    prefix_lookups: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    adapters: int = 0
    adapter_bytes: int = 0
    evictions: int = 0


_Asked = TypeVar("_Asked", contravariant=True)
_Happened = TypeVar("_Happened", covariant=True)


class Engine(Protocol[_Asked, _Happened]):
    """What a server asks of whatever does its work: the embedded engine and a fleet (`Engine[Request, EngineEvent]`),
    and the engine that draws. Engines derive from it, for its defaults.

    `events`: what happens to a request until it is answered; a consumer that closes the iterator (a client that left)
    cancels it. Raises Refused before the first event for what can be known at once: a prompt that does not fit
    (context_exceeded), a full queue (overloaded), shutting down. What goes wrong with a text later is a Finished with
    `error`."""

    makes: ClassVar[Literal["texts", "pictures"]] = "texts"

    def events(self, request: _Asked, /) -> AsyncIterator[_Happened]: ...

    def stats(self) -> EngineStats: ...

    async def begin(self) -> None:
        """On the server's event loop, before the first request."""
        return None

    async def end(self) -> None:
        """Take no more requests, cancel what runs, and end."""
        return None

    def problem(self) -> str:
        """Why nobody is served, if nobody is: a step that does not end, a thread that has, a device that fails."""
        return ""

    def trouble(self) -> str:
        """Why requests had better go elsewhere for now, although the engine works: no replica answers."""
        return ""


class LoadingEngine(Engine[Request, EngineEvent]):
    """The engine of a server whose base is not loaded yet."""

    def events(self, request: Request) -> AsyncIterator[EngineEvent]:
        raise not_ready("loading")

    def stats(self) -> EngineStats:
        return EngineStats()
