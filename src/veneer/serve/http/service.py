"""What every surface works with: the engine, names, tenancy, limits and counts of one server; and who asks of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import Request as HttpRequest

from veneer.ops.cpu.memory import give_back
from veneer.serve.access import Tenancy
from veneer.serve.engine.admission import Admission, AdmittedRequest
from veneer.serve.http.guard import principal_of
from veneer.serve.http.metrics import Metrics
from veneer.serve.http.mixes import MixChooser
from veneer.serve.http.prompts import Prompts, TokenizedBase
from veneer.serve.http.shadows import Shadows
from veneer.serve.principal import Principal
from veneer.serve.quota import Quotas
from veneer.serve.request import Engine, EngineEvent, Request, invalid
from veneer.serve.settings import HttpSettings
from veneer.serve.staging import Staging

if TYPE_CHECKING:
    from veneer.serve.names.catalog import Catalog


@dataclass(eq=False)
class Service:
    """`reader`: how the base reads prompts. `phase`: ready, unless the server is not; who drains it sets it. `inside`:
    requests that are being answered. `fine_tunes`: whether POST /v1/fine_tuning/jobs accepts this server's models."""

    engine: Engine[Any, Any]
    catalog: Catalog
    tenancy: Tenancy
    reader: TokenizedBase
    settings: HttpSettings = field(default_factory=HttpSettings)
    phase: Literal["loading", "ready", "draining"] = "ready"
    inside: int = 0
    fine_tunes: bool = False
    _tidies: bool = False

    def __post_init__(self) -> None:
        s = self.settings
        self.prompts = Prompts(self.reader)
        self.mixes = MixChooser(self.catalog)
        self.metrics = Metrics(self.catalog.base, self.engine.stats, s.metric_adapters, self.tenancy.ledger_state)
        self.admission = Admission(bodies=8 * s.max_body, answers=s.queue, texts=4 * s.max_body)
        self.shadows = Shadows(self.tenancy, self.metrics, s.shadows)
        self.staging = Staging(s.max_adapter)
        self.quotas = Quotas(s.quotas)

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
