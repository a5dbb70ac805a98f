"""Objects that all routes of a server share: engine, names, tenancy, limits and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import Request as HttpRequest

from veneer.library.upload_stage import UploadStage
from veneer.serve.access import ResolvedModel, Tenancy
from veneer.serve.engine.admission import Admission, AdmittedRequest
from veneer.serve.http.guard import principal_of
from veneer.serve.http.metrics import Metrics
from veneer.serve.http.prompts import Prompts, TokenizedBase
from veneer.serve.http.stored_responses import StoredResponses
from veneer.serve.principal import Principal
from veneer.serve.quota import Quotas
from veneer.serve.request import Engine, EngineEvent, Request, check_strengths, invalid, not_ready, served_name
from veneer.serve.settings import HttpSettings

if TYPE_CHECKING:
    from veneer.serve.names.catalog import Catalog


# -- the service -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Service:
    """The parts of one server.

    `reader`: tokenizes prompts. `phase`: "draining" while the server shuts down. `inside`: number of
    requests in progress. `loaded`: whether the base is loaded. Before that, `engine` and `reader` are
    placeholders (see `use_base`), and `step` describes the loading progress. `shared_quotas`: the tenancy's
    quotas.
    """

    engine: Engine[Any, Any]
    catalog: Catalog
    tenancy: Tenancy
    reader: TokenizedBase
    settings: HttpSettings = field(default_factory=HttpSettings)
    phase: Literal["loading", "ready", "draining"] = "ready"
    inside: int = 0
    loaded: bool = True
    shared_quotas: Quotas | None = None
    step: str = ""
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        s = self.settings
        self.quotas = self.shared_quotas or Quotas(s.quotas)
        self.responses = StoredResponses(self.quotas)
        if self.loaded:
            self.prompts = Prompts(self.reader)
        engine, adapters = (lambda: self.engine.stats()), (lambda: self.catalog.in_memory())
        named = (self.catalog.base, engine, s.metric_adapters, self.tenancy.ledger_state, adapters)
        self.metrics = Metrics(*named, objectives=s.objectives)
        self.admission = _admission(s)
        self.shadows: set[asyncio.Task[None]] = set()
        self.staging = UploadStage(s.max_adapter)

    def use_base(self, engine: Engine[Any, Any], reader: TokenizedBase, settings: HttpSettings) -> None:
        """Replace the placeholders with the loaded base's engine and tokenizer."""
        self.engine, self.reader, self.prompts = engine, reader, Prompts(reader)
        if settings != self.settings:
            self.settings, self.admission = settings, _admission(settings)

    def mark_ready(self) -> None:
        """Start accepting requests."""
        self.loaded = True
        if self.phase == "loading":
            self.phase = "ready"

    def need_base(self) -> None:
        """Raise Refused (503) if the base is not loaded yet."""
        if not self.loaded:
            raise not_ready(self.phase)

    def choose(
        self,
        principal: Principal,
        *,
        model: str | None = None,
        mix: Sequence[tuple[str, float]] | None = None,
        lora_path: str | None = None,
    ) -> ResolvedModel:
        """Return the mix that a body names in `model`, `mix`, or SGLang's `lora_path`.

        An empty `mix` means the base. A `mix` together with an adapter in another field is refused; an
        unknown name is a 404. A `model` that names an adapter takes precedence over `lora_path`, as in
        SGLang.
        """
        named = model if model and model != self.catalog.base else None
        if mix is None:
            return self.catalog.resolve(named or lora_path or model or "", principal)
        resolved = self.catalog.resolve_mix(mix, principal) if named and named.startswith("veneer-mix-") else None
        if resolved is not None and served_name(resolved.mix) == named:  # from a server with an upstream
            return replace(resolved, name=named)
        if named or lora_path:
            fields = [*(["model"] if named else []), "mix", *(["lora_path"] if lora_path else [])]
            raise invalid(f"adapters are named in {len(fields)} fields: {', '.join(fields)}", "mix", "keep one")
        if not mix:
            return self.catalog.resolve("", principal)
        check_strengths(mix)
        return self.catalog.resolve_mix(mix, principal)

    def texts(self, request: Request) -> AsyncIterator[EngineEvent]:
        """Return the events of a text completion. Raises Refused (400) on an image server."""
        if self.engine.makes != "texts":
            raise invalid("this server has an image base", fix="use /v1/images/generations")
        return self.engine.events(request)


def _admission(settings: HttpSettings) -> Admission:
    return Admission(bodies=8 * settings.max_body, answers=settings.queue, texts=4 * settings.max_body)


# -- per request -------------------------------------------------------------------------------------------------------


def service_of(request: HttpRequest) -> Service:
    service: Service = request.app.state.service
    return service


def client_key(request: HttpRequest) -> str | None:
    """Return the client's key, from a bearer token or from a header such as Azure's `api-key`.

    Tinker's SDK sends only keys with the prefix tml-, so this prefix is removed.
    """
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    api_key = request.headers.get("x-api-key")
    return api_key.removeprefix("tml-") if api_key else request.headers.get("api-key")


def caller_of(request: HttpRequest, user: str | None = None) -> Principal:
    """Return the request's principal, as set by the middleware, with the body's `user`."""
    principal = principal_of(request.scope)
    return replace(principal, user=user) if user else principal


def admission_of(request: HttpRequest) -> AdmittedRequest:
    """Return the request's reservations, to which a route can add its own."""
    admitted: AdmittedRequest = request.scope["veneer.admitted"]
    return admitted
