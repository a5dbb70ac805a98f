"""What all text surfaces share: engine, catalog, tenancy, text and limits; and which mix a request means.

A body names adapters in one way: `model`, `mix`, LoRAX's `adapter_id`, SGLang's `lora_path` or llama.cpp's `lora`. Two
ways at once that mean different things are refused, and a name that is not there is 404: never the base.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from starlette.requests import Request as HttpRequest

from veneer.serve.access import SHADOWS, Bill, Caller, Catalog, ModelCard, Served, Tenancy
from veneer.serve.engine.admission import Admission, Place
from veneer.serve.http.errors import as_refused, invalid, log, message_of
from veneer.serve.http.metrics import Metrics
from veneer.serve.http.prompts import Prompts, Text
from veneer.serve.outage import is_outage
from veneer.serve.request import Engine, Refused, Usage

__all__ = [
    "Chosen", "House", "HttpSettings", "ShadowAnswer", "caller_of", "client_key", "house_of", "load_adapter",
    "need_admin", "place_of",
]  # fmt: skip


@dataclass(frozen=True)
class HttpSettings:
    """Limits of one server. `max_tokens` 0: up to the context. `queue`: answers that may run or wait at once, of all
    tenants. In seconds: `head_time` and `body_time`, in which a request's head and its body have to come; `idle`, how
    long a connection is kept for the next one; `stall`, how long an answer may be unread before it ends. `connections`:
    how many there may be before the one that was idle longest is closed for another. `metric_adapters`: adapters with
    series of their own. `cors`: origins whose pages may ask from a browser."""

    max_body: int = 8 << 20
    max_tokens: int = 0
    max_prompts: int = 256
    max_choices: int = 64
    max_stops: int = 16
    max_best_of: int = 8
    queue: int = 1024
    connections: int = 2000
    head_time: float = 20.0
    body_time: float = 60.0
    idle: float = 30.0
    stall: float = 60.0
    metric_adapters: int = 100
    shadows: int = 16
    slots: int = 256
    cors: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Chosen:
    """What a body's names meant. `label`: the adapter for metrics, or "mix"."""

    served: Served
    label: str


class LoraNumbers:
    """llama.cpp's numbers for adapters, and its global scales, which act on its own routes alone. A number is given
    once and never to another name."""

    def __init__(self) -> None:
        self._of: dict[str, int] = {}
        self.scales: dict[str, float] = {}

    def of(self, name: str) -> int:
        return self._of.setdefault(name, len(self._of))

    def name(self, number: int, visible: Iterable[ModelCard]) -> str:
        for card in visible:
            if self.of(card.id) == number:
                return card.id
        raise Refused(f"invalid adapter id {str(number)[:20]}", status=404, code="model_not_found", param="lora")


@dataclass(eq=False)
class House:
    """`on_change`: told what an operator changes ("adapter.load" or "adapter.unload", name, what it is then), in a
    thread; for an audit log."""

    engine: Engine
    catalog: Catalog
    tenancy: Tenancy
    prompts: Prompts
    settings: HttpSettings
    on_shadow: Callable[[ShadowAnswer], None]
    on_change: Callable[[str, str, object], None] = lambda what, name, after: None
    started: float = field(default_factory=time.time)
    phase: Literal["loading", "ready", "draining"] = "ready"
    inside: int = 0
    loras: LoraNumbers = field(default_factory=LoraNumbers)
    default: dict[str, float] = field(default_factory=dict)
    """Adapter -> strength for requests that name none, on every surface; the operator's, at the start."""
    behind: set[asyncio.Task[None]] = field(default_factory=set)
    _tidies: bool = False

    def __post_init__(self) -> None:
        ledger = getattr(self.tenancy, "ledger_state", None)
        self.metrics = Metrics(self.catalog.base, self.engine.stats, self.settings.metric_adapters, ledger)
        s = self.settings
        self.admission = Admission(bodies=8 * s.max_body, answers=s.queue, texts=4 * s.max_body)

    async def fresh(self) -> None:
        """What names mean at this moment is known when it returns; before each request, once."""
        if (fresh := getattr(self.catalog, "fresh", None)) is not None:
            await fresh()

    @property
    def text(self) -> Text:
        return self.prompts.text

    def follow(self, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Whether `work` now runs behind a request: it does unless as many do already as may."""
        if len(self.behind) >= self.settings.shadows:
            return False
        task = asyncio.create_task(work())
        self.behind.add(task)
        task.add_done_callback(self.behind.discard)
        return True

    def problem(self) -> str:
        """Why the engine serves nobody; "" while it does."""
        problem: Callable[[], str] | None = getattr(self.engine, "problem", None)
        return problem() if problem is not None else ""

    def trouble(self) -> str:
        """Why requests had better go elsewhere for now: the engine's problem, or a fleet without a replica."""
        trouble: Callable[[], str] | None = getattr(self.engine, "trouble", None)
        return self.problem() or (trouble() if trouble is not None else "")

    def tidy(self) -> None:
        """Soon, and once for all who ask meanwhile, give the memory back that large bodies took: the C library keeps
        what was freed between things that were not."""
        if not self._tidies:
            self._tidies = True
            asyncio.get_running_loop().call_later(1.0, self._tidy)

    def _tidy(self) -> None:
        self._tidies = False
        asyncio.get_running_loop().run_in_executor(None, trim)

    def shadow_bill(self, served: Served, *, request: str, prompt: int, most: int) -> AbstractAsyncContextManager[Bill]:
        """A line of the ledger for the answer of a route's shadow: the operator's, under the shadow's name."""
        assert served.shadow is not None
        name, mix = served.shadow
        if isinstance(mix, Refused):
            raise mix
        own = Served(mix, served.name, name, adapters=(name,) if mix else ())
        return self.tenancy.admitted(SHADOWS, own, request=request, prompt_tokens=prompt, max_tokens=most)

    def shadowed(self, answer: ShadowAnswer) -> None:
        """A shadow has answered, or failed: it is counted and logged."""
        self.metrics.shadow(answer.name, answer.shadow, answer.outcome)
        self.on_shadow(answer)

    def adapters(self, caller: Caller) -> list[ModelCard]:
        return [card for card in self.catalog.models(caller) if card.parent is not None]

    def choose(
        self,
        caller: Caller,
        *,
        model: str | None = None,
        mix: Sequence[tuple[str, float]] | None = None,
        lora: Sequence[tuple[int, float]] | None = None,
        lora_path: str | None = None,
        default: Mapping[str, float] | None = None,
    ) -> Chosen:
        """The one mix that a body asks for. One that names nothing gets `default` (the house's own where it is None),
        as far as the caller may see it; an empty `mix` or `lora` is the base.

        `lora_path` yields to a `model` that names an adapter itself, as SGLang has it."""
        named = model if model and model != self.catalog.base else None
        several = [key for key, value in {"mix": mix, "lora": lora}.items() if value is not None]
        if len(several) > 1 or (several and (named or lora_path)):
            ways = [*(["model"] if named else []), *several, *(["lora_path"] if lora_path else [])]
            raise invalid(f"adapters are named in {len(ways)} ways: {', '.join(ways)}", several[0], "keep one")
        if lora is not None:
            cards = self.adapters(caller)
            mix = [(self.loras.name(number, cards), scale) for number, scale in lora]
        if mix is not None:
            return self._mixed(mix, caller)
        named = named or lora_path
        default = self.default if default is None else default
        if named is None and default:
            visible = {card.id for card in self.adapters(caller)}
            return self._mixed([part for part in default.items() if part[0] in visible], caller)
        served = self.catalog.resolve(named or model or "", caller)
        return Chosen(served, served.target if served.mix else self.catalog.base)

    def _mixed(self, parts: Sequence[tuple[str, float]], caller: Caller) -> Chosen:
        if not parts:
            return Chosen(self.catalog.resolve("", caller), self.catalog.base)
        for name, strength in parts:
            if not math.isfinite(strength) or abs(strength) > 1e4:
                raise invalid(f"the strength of {name!r} is {strength}", "mix", "a number from -10000 to 10000")
        served = self.catalog.resolve_mix(parts, caller)
        return Chosen(served, "mix" if len(served.mix) > 1 else parts[0][0] if served.mix else self.catalog.base)


def trim() -> None:
    """Freed memory goes back to the system, where the C library can do that."""
    with suppress(OSError):
        if (give := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            give(0)


def house_of(request: HttpRequest) -> House:
    house: House = request.app.state.house
    return house


def client_key(request: HttpRequest) -> str | None:
    """The client's key: a bearer token, or what Azure's and some older clients send."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    return request.headers.get("x-api-key") or request.headers.get("api-key")


def caller_of(request: HttpRequest, user: str | None = None) -> Caller:
    """Who asks, as the door established it, with the body's `user`."""
    caller: Caller = request.scope["veneer.caller"]
    return replace(caller, user=user) if user else caller


def place_of(request: HttpRequest) -> Place:
    """What the request holds of the server, to which the surface adds what it is about to do."""
    place: Place = request.scope["veneer.place"]
    return place


def need_admin(request: HttpRequest) -> Caller:
    caller = caller_of(request)
    if not caller.admin:
        raise Refused(
            "this changes the server for everybody", status=403, code="forbidden", fix="use an operator's key"
        )
    return caller


async def load_adapter(house: House, name: str, source: str, **options: Any) -> ModelCard:
    """Catalog.load in a thread. An error that is not Refused is told without where on the server it happened."""
    from veneer.errors import VeneerError

    try:
        card = await asyncio.to_thread(lambda: house.catalog.load(name, source, **options))
        after = {"digest": card.digest, "root": card.root}
        await asyncio.to_thread(house.on_change, "adapter.load", name, after)
        return card
    except Refused:
        raise
    except Exception as error:
        if not isinstance(error, VeneerError) or is_outage(error):
            raise as_refused(error) from error
        log.warning("adapter %r was not loaded: %s", name, error)
        raise Refused(message_of(error), status=422, code="adapter_unusable", param="lora_path") from error
