"""Routes of Tinker's API (docs/notes/tinker.md), on top of `TinkerService`.

    TINKER_BASE_URL=http://localhost:8000 TINKER_API_KEY=tml-<key> python a_recipe.py

The server answers a request with an id. /api/v1/retrieve_future returns the request's result; it waits up to
`_WAIT` seconds and then returns 408, as the SDK expects. Results stay in memory for `_RESULT_SECONDS`; if a
tenant's quota is full, results that the tenant has fetched are dropped earlier. An error in a numbered request
becomes the request's result, not an HTTP error, because the client has already numbered its next requests.

A request is billed before its result is available. Forward passes are billed as training under the run's
name, with the tenant's training price and budget; samples are billed like other completions. If the budget is
spent, the server returns 402, and the SDK waits.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer.errors import quoted
from veneer.jobs.account import TrainingAccount, trained_name
from veneer.jobs.http.route import blocking, thread_route
from veneer.jobs.tinker.service import FutureResult, TinkerService, TrainingRun, not_found
from veneer.jobs.tinker.trainer import Lora
from veneer.jobs.tinker.wire import read_head
from veneer.serve.access import ResolvedModel
from veneer.serve.http.bodies import Body, Strict, read_body
from veneer.serve.http.errors import Json, answering, log, message_of
from veneer.serve.http.guard import needs
from veneer.serve.http.service import Service, caller_of, service_of
from veneer.serve.principal import Principal
from veneer.serve.quota import QuotaHold
from veneer.serve.request import Refused, Usage, invalid

T = TypeVar("T")

_WAIT = 20.0
_RESULT_SECONDS = 600.0
_STOP_SECONDS = 5.0
_REQUEST_BYTES = 2048
"""Memory charged per request in bytes, in addition to its body or result."""
MAX_NUMBER = 10**9
"""Client numbers in a session and request numbers in a client are below this."""
TINKER_ROUTE = thread_route("the training clients")


class TinkerBody(Body):
    """A request body of the SDK, which can include a type name."""

    type: str = ""


class HeartbeatBody(TinkerBody):
    session_id: str


class LoraBody(Strict):
    rank: int
    seed: int | None = Field(default=None, ge=0, lt=1 << 62)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class ModelBody(TinkerBody):
    session_id: str
    model_seq_id: int = Field(ge=0, lt=MAX_NUMBER)
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraBody | None = None
    optimizer_config: dict[str, Any] = Field(default_factory=dict)


class RunBody(TinkerBody):
    model_id: str


# -- requests and results ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One request of a client, with its server, principal and training service."""

    http: Service
    principal: Principal
    service: TinkerService

    @property
    def tenant(self) -> str:
        return self.principal.tenant

    def model_name(self, client_name: str | None = None) -> str:
        """Return a name with which the client can load the base's tokenizer.

        This is the base's hub id, if it has one; else `client_name`, the client's own name for the base; else
        the base's folder on this machine (for the operator) or the served name (for other clients)."""
        base = self.service.base
        name = base.name.partition("@")[0]
        if "/" in name and not Path(name).expanduser().exists():
            return name
        operator = client_name is not None and self.principal.can("operate")
        return client_name or (str(base.directory) if operator else str(self.http.catalog.base))

    def use_base(self, session_id: str, name: str) -> None:
        """Record the client's name of the base in the session.

        Raises Refused if this server does not serve the base. Compares only the last part of the name, because
        a client can pass a path on its own machine."""
        base, session = self.http.catalog.base, self.service.session(self.tenant, session_id)
        if name.rstrip("/").rpartition("/")[2].lower() != base.lower():
            message, fix = f"The model {quoted(name)} is not served here", f"base_model={base!r}"
            raise Refused(message, status=400, code="model_not_available", param="base_model", fix=fix)
        if "/" in name:
            session.base_name = name[:1000]


@dataclass(eq=False)
class _Pending:
    """An accepted request. `hold`: quota held for the request, and later for its result."""

    tenant: str
    task: asyncio.Future[FutureResult]
    hold: QuotaHold
    fetched: bool = False


@dataclass(eq=False)
class TinkerRoutes:
    """The state that the routes share.

    make: creates the service when the first request arrives, so that a server without Tinker clients does not
        need the service's memory.
    results: accepted requests by id, until their results expire."""

    make: Callable[[], TinkerService]
    account: TrainingAccount
    results: dict[str, _Pending] = field(default_factory=dict)
    _service: TinkerService | None = None
    _making: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def call(self, request: HttpRequest) -> Call:
        async with self._making:
            if self._service is None:
                self._service = await tinker_blocking(self.make)
        return Call(service_of(request), caller_of(request), self._service)

    async def stop(self) -> None:
        """Stop training, wait briefly for pending requests, and cancel the rest.

        During the wait, failed requests release their budget."""
        if self._service is not None:
            await asyncio.to_thread(self._service.close)
        tasks = [pending.task for pending in self.results.values() if not pending.task.done()]
        if tasks:
            await asyncio.wait(tasks, timeout=_STOP_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def take_quota(self, call: Call, size: int) -> QuotaHold:
        """Take quota for a request of `size` bytes. Raises Refused.

        If there is not enough quota, first drops results that the tenant has fetched, oldest first."""
        tenant, quotas, amounts = call.tenant, call.http.quotas, {"requests": 1, "memory": _REQUEST_BYTES + size}
        fetched = [number for number, each in self.results.items() if each.tenant == tenant and each.fetched]
        while fetched and not quotas.fits(tenant, **amounts):
            self._drop(fetched.pop(0))
        return quotas.take(tenant, **amounts)

    def add(self, call: Call, number: str, hold: QuotaHold, work: Awaitable[FutureResult]) -> None:
        """Start an accepted request's work; keep the result for `_RESULT_SECONDS`."""
        pending = self.results[number] = _Pending(call.tenant, asyncio.ensure_future(work), hold)

        def done(task: asyncio.Future[FutureResult]) -> None:
            failed = task.cancelled() or task.exception() is not None
            hold.set(memory=_REQUEST_BYTES + (0 if failed else len(task.result().data)))
            asyncio.get_running_loop().call_later(_RESULT_SECONDS, self._drop, number, pending)

        pending.task.add_done_callback(done)

    def _drop(self, number: str, pending: _Pending | None = None) -> None:
        """Drop a result; if `pending` is given, only while `pending` is the entry."""
        if pending is None or self.results.get(number) is pending:
            self.results.pop(number).hold.release()

    async def result(self, call: Call, number: str) -> FutureResult | None:
        """Return a request's result, or None if it is not ready within `_WAIT` seconds.

        Raises Refused: 404 for an unknown request, 410 if the result expired or the request was cancelled."""
        pending = self.results.get(number)
        if pending is None or pending.tenant != call.tenant:
            raise self._missing(call, number)
        end = time.monotonic() + _WAIT
        while not pending.task.done() and call.http.phase == "ready" and time.monotonic() < end:
            await asyncio.wait({pending.task}, timeout=1.0)
        if not pending.task.done():
            return None
        if pending.task.cancelled():
            raise Refused("the request was cancelled", status=410, code="gone")
        pending.fetched = True
        return pending.task.result()

    def _missing(self, call: Call, number: str) -> Refused:
        """Return the error for a request that has no stored result.

        Raises Refused for an unknown or closed client."""
        id, _, seq = number.rpartition(":")
        if ":sample:" not in number:
            run = call.service.run(call.tenant, id)
            call.service.check_open(run)
            if not re.fullmatch("0|[1-9][0-9]{0,8}", seq) or int(seq) > run.applied:
                return not_found(f"there is no request {quoted(number)}", "request_id")
        message = f"the result of {quoted(number)} has expired"
        return Refused(message, status=410, code="gone", fix="sample again; training requests have been applied")

    # -- numbered requests ---------------------------------------------------------------------------------------------

    async def submit(
        self, call: Call, run: TrainingRun, seq: int, kind: str, body: bytes, tokens: int = 0, memory: int = 0
    ) -> Response:
        """Accept a numbered request, unless it was accepted before.

        `memory`: bytes of memory for the unpacked body."""
        async with run.lock:
            if await tinker_blocking(lambda: call.service.is_new(run, seq)):
                await self._accept(call, run, seq, kind, body, tokens, memory)
        return future_response(f"{run.id}:{seq}", run.id)

    async def _accept(
        self, call: Call, run: TrainingRun, seq: int, kind: str, body: bytes, tokens: int, memory: int
    ) -> None:
        """Reserve the cost of a request and submit the request. Raises Refused."""
        if not kind.startswith("save_"):  # a tenant that is no longer allowed to train can still save its weights
            await tinker_blocking(lambda: self.account.check_allowed(call.tenant))
        async with AsyncExitStack() as undo:
            hold = self.take_quota(call, len(body) + memory)
            undo.callback(hold.release)
            cost = await tinker_blocking(lambda: self.account.reserve(call.tenant, tokens)) if tokens else 0
            undo.push_async_callback(self._give_back, call.tenant, cost)
            admission, bill = await undo.enter_async_context(AsyncExitStack()), None
            name, number = trained_name(run.checkpoints.name), f"{run.id}:{seq}"
            try:
                if tokens:
                    model, id = ResolvedModel((), name, name, trained=True), f"{number}-{secrets.token_hex(3)}"
                    charge: dict[str, Any] = {"request": id, "prompt_tokens": tokens, "max_tokens": 0}
                    admitted = call.http.tenancy.admitted(call.principal, model, **charge)
                    bill = await admission.enter_async_context(admitted)
            except Refused as error:
                if error.status != 400:
                    raise
                # The request exceeds a limit that waiting cannot lift. It is accepted, and the error becomes
                # its result, so that the sequence of numbers has no gap.
                kind, body = "refused", message_of(error).encode()
            done = asyncio.wrap_future(call.service.submit(run, seq, kind, body))
            undo.pop_all()

        async def billed() -> FutureResult:
            async with admission:
                with answering("the request"):
                    result = await done
                    failed = result.kind == "failed"
                    if bill is not None:
                        await bill.used(Usage(0 if failed else tokens, 0, 0))
            if failed:
                await self._give_back(call.tenant, cost)
            return result

        self.add(call, number, hold, billed())

    async def _give_back(self, tenant: str, cost: int) -> None:
        """Release a failed request's budget.

        If the database is down, the budget stays reserved and a warning is logged."""
        try:
            if cost:
                await tinker_blocking(lambda: self.account.jobs.release_budget(tenant, cost))
        except Refused as error:
            log.warning("%d millionths of tenant %r's budget were not returned: %s", cost, tenant, error.what)

    async def created(
        self, call: Call, session: str, number: int, start: Lora | str, metadata: Any, optimizer: bool = False
    ) -> Response:
        """Create a training client.

        Also grants the tenant access to the client's adapters."""

        def do() -> TrainingRun:
            self.account.check_allowed(call.tenant)
            if call.tenant:
                call.http.tenancy.grant_namespace(call.tenant)
            options: dict[str, Any] = {"weight": call.principal.weight, "optimizer": optimizer}
            return call.service.create_run(call.tenant, session, number, start, metadata, **options)

        run = await tinker_blocking(do)
        if (request := f"{run.id}:0") not in self.results:
            self.add(call, request, self.take_quota(call, 0), asyncio.wrap_future(run.created))
        return future_response(request, run.id)


async def tinker_blocking(do: Callable[[], T]) -> T:
    """Run `do` in a thread; see `blocking`."""
    return await blocking("the training clients", do)


def future_response(number: str, model: str | None, sequences: list[str] | None = None) -> Response:
    """Return a response with a request's id, in the SDK's format."""
    body: dict[str, Any] = {"request_id": number, "model_id": model}
    return Json(body if sequences is None else body | {"sample_sequence_ids": sequences})


# -- routes ------------------------------------------------------------------------------------------------------------


def tinker_router() -> APIRouter:
    return APIRouter(prefix="/api/v1", tags=["Tinker"], route_class=TINKER_ROUTE, dependencies=[needs("train")])


def training_routes(state: TinkerRoutes) -> APIRouter:
    """Return the routes for sessions, training clients and numbered requests."""
    router, current_call = tinker_router(), Depends(state.call)

    @router.get("/healthz", summary="Check that the server runs")
    async def health() -> Response:
        return Json({"status": "ok"})

    @router.get("/get_server_capabilities", summary="Get the served base")
    def capabilities(call: Call = current_call) -> Any:
        names = dict.fromkeys([call.model_name(), call.http.catalog.base])
        model = {"max_context_length": call.http.reader.context, "trainable": True, "sampleable": True}
        return {"supported_models": [{"model_name": name, **model} for name in names]}

    @router.post("/client/config", summary="Get the SDK's configuration")
    async def config(request: HttpRequest) -> Response:
        most = service_of(request).settings.max_body
        return Json({"pjwt_auth_enabled": False, "fwdbwd_max_chunk_bytes_count": min(5_000_000, most // 2)})

    @router.post("/client/dynamic_config", summary="Get the part of the SDK's configuration that can change")
    async def dynamic() -> Response:
        return Json({"sample_cancel_enabled": False})

    @router.post("/telemetry", summary="Accept and ignore the SDK's telemetry")
    async def telemetry() -> Response:
        return Json({"status": "accepted"})

    @router.post("/create_session", summary="Create a session of a ServiceClient")
    def create_session(call: Call = current_call) -> Any:
        state.account.check_allowed(call.tenant)
        session = call.service.create_session(call.tenant)
        return {"type": "create_session", "session_id": session.id}

    @router.post("/session_heartbeat", summary="Keep a session alive")
    def heartbeat(body: HeartbeatBody, call: Call = current_call) -> Any:
        call.service.session(call.tenant, body.session_id).use()
        return {"type": "session_heartbeat"}

    @router.post("/sessions/{id}/finish", summary="End a session; saved checkpoints stay")
    def finish(id: str, call: Call = current_call) -> None:
        call.service.session(call.tenant, id).ended = time.time()

    @router.post("/create_model", summary="Create a LoRA training client")
    async def create_model(body: ModelBody, call: Call = current_call) -> Response:
        call.use_base(body.session_id, body.base_model)
        _check_optimizer(body.optimizer_config)
        if (config := body.lora_config) is None:
            raise invalid("this server trains only adapters", "lora_config", "create_lora_training_client(…)")
        lora = Lora(config.rank, config.seed, config.train_attn, config.train_mlp, config.train_unembed)
        return await state.created(call, body.session_id, body.model_seq_id, lora, body.user_metadata)

    @router.post("/get_info", summary="Get a training client's base and rank")
    def info(body: RunBody, call: Call = current_call) -> Any:
        run = call.service.run(call.tenant, body.model_id)
        name = call.model_name(run.base_name)
        return {
            "type": "get_info",
            "model_data": {"arch": call.service.base.family, "model_name": name, "tokenizer_id": name},
            "model_id": run.id,
            "is_lora": True,
            "lora_rank": run.lora.rank,
            "model_name": name,
            "optimizer_config": {"type": "adamw"},
        }

    @router.post("/forward_backward", summary="Compute log-probabilities and gradients; the body is protobuf")
    async def forward(request: HttpRequest, call: Call = current_call) -> Response:
        data = await request.body()
        head = await tinker_blocking(lambda: read_head(data))
        run = call.service.run(call.tenant, head.model)
        return await state.submit(call, run, head.seq, "forward", data, head.tokens, head.memory)

    def numbered(kind: str, summary: str) -> None:
        @router.post(f"/{kind}", summary=summary, name=kind)
        async def submit(request: HttpRequest, call: Call = current_call) -> Response:
            body = await read_body(request)
            if not isinstance(body, dict):
                raise invalid("a JSON object is expected")
            if kind == "load_weights" and body.get("session_id") is not None:
                return await _create_from(state, call, body)
            run = call.service.run(call.tenant, str(body.get("model_id")))
            seq = body.get("seq_id")
            if type(seq) is not int:
                raise invalid(f"seq_id is {str(seq)[:50]}", "seq_id", "an integer, at least 1")
            return await state.submit(call, run, seq, kind, json.dumps(body).encode())

    numbered("optim_step", "Run an AdamW step with the gradients since the last step")
    numbered("save_weights", "Save a checkpoint to continue from")
    numbered("save_weights_for_sampler", "Save weights to sample from")
    numbered("load_weights", "Load a checkpoint, or create a client from a checkpoint")
    return router


async def _create_from(state: TinkerRoutes, call: Call, body: Mapping[str, Any]) -> Response:
    number, path, session = body.get("model_seq_id"), body.get("path"), str(body["session_id"])
    if type(number) is not int or not 0 <= number < MAX_NUMBER or not isinstance(path, str):
        raise invalid("model_seq_id and path are needed", "path")
    if body.get("base_model") is not None:
        call.use_base(session, str(body["base_model"]))
    _check_optimizer(body.get("optimizer_config") or {})
    optimizer, metadata = bool(body.get("optimizer")), body.get("user_metadata")
    return await state.created(call, session, number, path, metadata, optimizer)


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, dict):
        raise invalid("optimizer_config is not an object", "optimizer_config")
    if optimizer.get("type", "adamw") != "adamw":
        raise invalid(f"there is no optimizer {quoted(str(optimizer['type']))} here", "optimizer_config", "adamw")
