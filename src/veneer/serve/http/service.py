"""What every surface works with: the engine, names, tenancy, limits and counts of one server; and who asks of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import Request as HttpRequest

from veneer.ops.cpu.memory import give_back
from veneer.serve.access import SHADOWS, Bill, ModelCard, Served, ShadowAnswer, Tenancy
from veneer.serve.engine.admission import Admission, AdmittedRequest
from veneer.serve.http.errors import log
from veneer.serve.http.guard import principal_of
from veneer.serve.http.metrics import Metrics
from veneer.serve.http.prompts import Prompts, TokenizedBase
from veneer.serve.principal import Principal
from veneer.serve.quota import Quotas
from veneer.serve.request import Engine, EngineEvent, Refused, Request, check_strengths, invalid, not_ready
from veneer.serve.settings import HttpSettings
from veneer.serve.staging import Staging

if TYPE_CHECKING:
    from veneer.serve.names.catalog import Catalog


# -- parts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChosenMix:
    """What a body's names meant. `label`: the adapter for metrics, or "mix"."""

    served: Served
    label: str


class MixChooser:
    """Which mix of adapters a body means. A body names adapters in one way: `model`, `mix`, LoRAX's `adapter_id` or
    SGLang's `lora_path`. Two ways at once are refused, and an unknown name is 404: never the base.

    `default`: adapter -> strength for requests that name none, on every surface; the operator sets it at the start."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.default: dict[str, float] = {}

    def adapters(self, caller: Principal) -> list[ModelCard]:
        return [card for card in self.catalog.models(caller) if card.parent is not None]

    def choose(
        self,
        caller: Principal,
        *,
        model: str | None = None,
        mix: Sequence[tuple[str, float]] | None = None,
        lora_path: str | None = None,
    ) -> ChosenMix:
        """Return the mix that a body asks for. A body that names nothing gets `default`, as far as the caller can see
        it; an empty `mix` is the base.

        `lora_path` yields to a `model` that names an adapter itself, as SGLang has it."""
        named = model if model and model != self.catalog.base else None
        if mix is not None and (named or lora_path):
            ways = [*(["model"] if named else []), "mix", *(["lora_path"] if lora_path else [])]
            raise invalid(f"adapters are named in {len(ways)} ways: {', '.join(ways)}", "mix", "keep one")
        if mix is not None:
            return self._several(mix, caller)
        named = named or lora_path
        if named is None and self.default:
            visible = {card.id for card in self.adapters(caller)}
            return self._several([part for part in self.default.items() if part[0] in visible], caller)
        served = self.catalog.resolve(named or model or "", caller)
        return ChosenMix(served, served.target if served.mix else self.catalog.base)

    def _several(self, parts: Sequence[tuple[str, float]], caller: Principal) -> ChosenMix:
        if not parts:
            return ChosenMix(self.catalog.resolve("", caller), self.catalog.base)
        check_strengths(parts)
        served = self.catalog.resolve_mix(parts, caller)
        return ChosenMix(served, "mix" if len(served.mix) > 1 else parts[0][0] if served.mix else self.catalog.base)


class Shadows:
    """`most`: answers of shadows that may be computed at a time; beyond them requests go without."""

    def __init__(self, tenancy: Tenancy, metrics: Metrics, most: int) -> None:
        self.tenancy, self.metrics, self.most = tenancy, metrics, most
        self.running: set[asyncio.Task[None]] = set()

    def follow(self, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Whether `work` now runs behind a request: it does unless as many do already as may."""
        if len(self.running) >= self.most:
            return False
        task = asyncio.create_task(work())
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return True

    def admitted(self, served: Served, *, request: str, prompt: int, most: int) -> AbstractAsyncContextManager[Bill]:
        """Room under the limits for the answer of a route's shadow, and its bill. Raises Refused where it cannot be."""
        assert served.shadow is not None
        name, mix = served.shadow
        if isinstance(mix, Refused):
            raise mix
        own = Served(mix, served.name, name, adapters=(name,) if mix else ())
        return self.tenancy.admitted(SHADOWS, own, request=request, prompt_tokens=prompt, max_tokens=most)

    def answered(self, answer: ShadowAnswer) -> None:
        """A shadow has answered, or failed: it is counted, and the tenancy keeps how the two compare."""
        self.metrics.shadow(answer.name, answer.shadow, answer.outcome)
        if answer.error:  # nothing was compared: the log of shadows has that it failed, this one why
            log.warning("the shadow %s of %s failed (%s): %s", answer.shadow, answer.name, answer.request, answer.error)
        self.tenancy.note_shadow(answer)


# -- the service -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Service:
    """`reader`: how the base reads prompts. `phase`: ready, unless the server is not; who drains it sets it. `inside`:
    requests that are being answered. `fine_tunes`: whether POST /v1/fine_tuning/jobs accepts this server's models.
    `loaded`: whether the base is loaded; until then `engine` and `reader` stand in for it (`use_base`), and `step` says
    what loading does."""

    engine: Engine[Any, Any]
    catalog: Catalog
    tenancy: Tenancy
    reader: TokenizedBase
    settings: HttpSettings = field(default_factory=HttpSettings)
    phase: Literal["loading", "ready", "draining"] = "ready"
    inside: int = 0
    fine_tunes: bool = False
    loaded: bool = True
    step: str = ""
    began: float = field(default_factory=time.monotonic)
    _tidies: bool = False

    def __post_init__(self) -> None:
        s = self.settings
        if self.loaded:
            self.prompts = Prompts(self.reader)
        self.mixes = MixChooser(self.catalog)
        self.metrics = Metrics(
            self.catalog.base, lambda: self.engine.stats(), s.metric_adapters, self.tenancy.ledger_state
        )
        self.admission = _admission(s)
        self.shadows = Shadows(self.tenancy, self.metrics, s.shadows)
        self.staging = Staging(s.max_adapter)
        self.quotas = Quotas(s.quotas)

    def use_base(self, engine: Engine[Any, Any], reader: TokenizedBase, settings: HttpSettings) -> None:
        """Replace what stood in for the base while it was loading."""
        self.engine, self.reader, self.prompts = engine, reader, Prompts(reader)
        if settings != self.settings:
            self.settings, self.admission = settings, _admission(settings)

    def ready(self) -> None:
        """Take requests from now on."""
        self.loaded = True
        if self.phase == "loading":
            self.phase = "ready"

    def need_base(self) -> None:
        """Raises Refused (503) while the base is loading."""
        if not self.loaded:
            raise not_ready(self.phase)

    def texts(self, request: Request) -> AsyncIterator[EngineEvent]:
        """The events of a text's answer. Raises Refused (400) on a server that draws."""
        if self.engine.makes != "texts":
            raise invalid("this server draws pictures", fix="ask /v1/images/generations")
        return self.engine.events(request)

    def trouble(self) -> str:
        """Why requests had better go elsewhere for now; "" where they need not."""
        return self.engine.problem() or self.engine.trouble()

    def tidy(self) -> None:
        """Soon, and once for all who ask meanwhile, give the memory back that large bodies took: the C library keeps
        what was freed between things that were not."""
        if not self._tidies:
            self._tidies = True
            asyncio.get_running_loop().call_later(1.0, self._tidy)

    def _tidy(self) -> None:
        self._tidies = False
        asyncio.get_running_loop().run_in_executor(None, give_back)


def _admission(settings: HttpSettings) -> Admission:
    return Admission(bodies=8 * settings.max_body, answers=settings.queue, texts=4 * settings.max_body)


# -- of one request ----------------------------------------------------------------------------------------------------


def service_of(request: HttpRequest) -> Service:
    service: Service = request.app.state.service
    return service


def client_key(request: HttpRequest) -> str | None:
    """The client's key: a bearer token, or what Azure's and some older clients send. Tinker's SDK sends nothing that
    does not begin with tml-, so there the key is what follows that."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    found = request.headers.get("x-api-key")
    return found.removeprefix("tml-") if found else request.headers.get("api-key")


def caller_of(request: HttpRequest, user: str | None = None) -> Principal:
    """Who asks, as the door established it, with the body's `user`."""
    caller = principal_of(request.scope)
    return replace(caller, user=user) if user else caller


def admission_of(request: HttpRequest) -> AdmittedRequest:
    """What the request holds of the server, to which the surface adds what it is about to do."""
    place: AdmittedRequest = request.scope["veneer.place"]
    return place
