"""Routes of Tinker's API (docs/notes/tinker.md), on top of `TinkerService`.

    TINKER_BASE_URL=http://localhost:8000 TINKER_API_KEY=tml-<key> python a_recipe.py

The response to a request is an id. /api/v1/retrieve_future returns the result; it waits up to `_WAIT` seconds
and then returns 408, as the SDK expects. A mistake in a numbered request becomes the result of the request,
not an HTTP error, because the client's next requests already have numbers. A request is billed before its
result is visible: forward passes as training under the run's name, with the tenant's training price and
budget; samples like other completions. A spent budget is 402; the SDK then waits.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Query
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer.errors import quoted
from veneer.jobs.account import TrainingAccount, trained_name
from veneer.jobs.http.route import blocking, thread_route
from veneer.jobs.tinker.journal import FutureResult
from veneer.jobs.tinker.service import TinkerService, TrainingRun
from veneer.jobs.tinker.trainer import Lora
from veneer.jobs.tinker.wire import read_head
from veneer.library.library import Library
from veneer.serve.access import Bill, ResolvedModel
from veneer.serve.http.bodies import Strict, read_body
from veneer.serve.http.errors import Json, log, message_of
from veneer.serve.http.guard import needs
from veneer.serve.http.service import Service, caller_of, service_of
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Usage, invalid
from veneer.serve.transient import fault

T = TypeVar("T")

_WAIT = 20.0
KEPT = 600.0
"""Seconds for which a result stays in memory."""
NUMBERS = 10**9
"""Exclusive bound of a session's client numbers and a client's request numbers."""
TINKER_ROUTE = thread_route("what training clients left")


class TinkerBody(Strict):
    """A request body of the SDK, with an optional type name."""

    type: str = ""


class SessionBody(TinkerBody):
    tags: list[str] = Field(default_factory=list)
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = Field(default=None, max_length=500)


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
    model_seq_id: int = Field(ge=0, lt=NUMBERS)
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraBody | None = None
    optimizer_config: dict[str, Any] = Field(default_factory=dict)


class RunBody(TinkerBody):
    model_id: str


class FutureBody(Strict):
    request_id: str
    allow_metadata_only: bool = False


# -- what the routes share ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One request of a client: server, principal and training service."""

    http: Service
    caller: Principal
    service: TinkerService

    @property
    def tenant(self) -> str:
        return self.caller.tenant

    def model_name(self, session: str | None = None) -> str:
        """Return a name with which the client can load the base's tokenizer.

        The name is a hub ID, or the client's own name for the base. Only the operator gets the folder on this
        machine; other clients get the served name."""
        base = self.service.base
        name = base.name.partition("@")[0]
        if "/" in name and not Path(name).expanduser().exists():
            return name
        if session is not None and (said := self.service.session(self.tenant, session).base_name):
            return said
        return (
            str(base.directory) if session is not None and self.caller.can("operate") else str(self.http.catalog.base)
        )

    def check_base(self, name: str) -> None:
        """Check that a base is served here. Raises Refused.

        Compares only the last part of the name, because clients name their own folders."""
        served = self.http.catalog.base
        if name.rstrip("/").rpartition("/")[2].lower() != served.lower():
            what, fix = f"The model {quoted(name)} is not served here", f"base_model={served!r}"
            raise Refused(what, status=400, code="model_not_available", param="base_model", fix=fix)


@dataclass(eq=False)
class TinkerRoutes:
    """The state of the routes.

    `make`: creates the service on the first request, so that a server without Tinker clients pays nothing.
    `results`: request id -> result of a billed, numbered request."""

    make: Callable[[], TinkerService]
    account: TrainingAccount
    library: Library
    results: dict[str, asyncio.Future[FutureResult]] = field(default_factory=dict)
    _bills: set[asyncio.Task[None]] = field(default_factory=set)
    _made: TinkerService | None = None
    _making: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def call(self, request: HttpRequest) -> Call:
        async with self._making:
            if self._made is None:
                self._made = await tinker_blocking(self.make)
        return Call(service_of(request), caller_of(request), self._made)

    async def stop(self) -> None:
        """Write all states to disk and cancel pending bills."""
        if self._made is not None:
            await asyncio.to_thread(self._made.close)
        await cancelled(self._bills)

    # -- numbered requests ---------------------------------------------------------------------------------------------

    async def submit(self, call: Call, run: TrainingRun, seq: int, kind: str, data: bytes, tokens: int) -> Response:
        """Accept one numbered request, unless it was accepted before."""
        if seq < 1:
            raise invalid(f"seq_id is {seq}", "seq_id", "from 1 on, one more for each request")
        service, number = call.service, f"{run.id}:{seq}"
        if await tinker_blocking(lambda: service.answer(run, seq)) is None and seq > run.applied:
            if not kind.startswith("save_"):  # a tenant can still save what it has trained
                await tinker_blocking(lambda: self.account.check_allowed(call.tenant))
            service.tried(run)
            taken = await tinker_blocking(lambda: self.account.reserve(call.tenant, tokens)) if tokens else 0
            async with AsyncExitStack() as undo:
                undo.push_async_callback(self._give_back, call.tenant, taken)
                admission = await undo.enter_async_context(AsyncExitStack())
                bill: Bill | None = None
                try:
                    if tokens:
                        bill = await admission.enter_async_context(_training(call, run, seq, tokens))
                    await tinker_blocking(lambda: service.submit(run, seq, kind, data))
                except Refused as error:
                    # accept a request that exceeds every limit, and let it fail, so that no number is missing
                    if error.code not in ("too_large", "storage_full") and (bill or error.status != 400 or not tokens):
                        raise
                    said, bill = message_of(error).encode(), None
                    await tinker_blocking(lambda: service.submit(run, seq, "refused", said))
                if number not in self.results:  # otherwise the request arrived twice at once
                    undo.pop_all()
                    self._follow(service, run, seq, admission, bill, tokens, taken)
        return future(number, run.id)

    def _follow(
        self,
        service: TinkerService,
        run: TrainingRun,
        seq: int,
        admission: AsyncExitStack,
        bill: Bill | None,
        tokens: int,
        taken: int = 0,
    ) -> None:
        """Bill a request when it is done, then publish its result.

        `taken`: reserved budget, released if the request fails."""
        number, loop = f"{run.id}:{seq}", asyncio.get_running_loop()
        shown: asyncio.Future[FutureResult] = loop.create_future()
        self.results[number] = shown

        async def follow() -> None:
            try:
                done = await tinker_blocking(lambda: service.answer(run, seq))
                answer = await asyncio.wrap_future(_still_there(number, done))
                failed = answer.kind == "failed"
                if bill is not None:
                    await bill.used(Usage(0 if failed else tokens, 0, 0))
                if failed:
                    await self._give_back(run.tenant, taken)
                if not shown.done():
                    shown.set_result(answer)
            except Exception as error:
                if not shown.done():
                    shown.set_exception(error if isinstance(error, Refused) else fault("the request", error))
                    shown.exception()  # retrieve it, since possibly no caller waits
                    if seq > run.applied:  # training is billed even if the result failed
                        await self._give_back(run.tenant, taken)
            finally:
                await admission.aclose()
                loop.call_later(KEPT, self.results.pop, number, None)

        task = loop.create_task(follow())
        self._bills.add(task)
        task.add_done_callback(self._bills.discard)

    async def result(self, call: Call, number: str) -> FutureResult | None:
        """Return the result of a numbered request, or None if pending.

        Raises Refused: 404, 410."""
        id, _, last = number.rpartition(":")
        run = await tinker_blocking(lambda: call.service.run(call.tenant, id))
        if last in ("0", "unload"):
            return FutureResult("json", json.dumps(_of_creation(run, last)).encode())
        missing = Refused(f"there is no request {quoted(number)}", status=404, code="not_found", param="request_id")
        if not re.fullmatch("[1-9][0-9]{0,8}", last):
            raise missing
        seq = int(last)
        if number not in self.results:  # done earlier, or accepted by an earlier process
            done = await tinker_blocking(lambda: call.service.answer(run, seq))
            if done is None and seq > run.applied:
                raise missing
            done = _still_there(number, done)
            if seq not in run.unbilled:
                return await waited(call.http, asyncio.wrap_future(done))
            await self._bill_late(call, run, seq)
        return await waited(call.http, self.results[number])

    async def _bill_late(self, call: Call, run: TrainingRun, seq: int) -> None:
        """Bill a request that an earlier process accepted but did not execute.

        Raises Refused if a limit forbids the request."""
        asked, tokens = run.journal.requests.get(seq), 0
        if asked is not None and asked.kind == "forward":
            tokens = (await tinker_blocking(lambda: read_head(run.journal.body(seq)))).tokens
        async with AsyncExitStack() as undo:
            admission = await undo.enter_async_context(AsyncExitStack())
            bill = await admission.enter_async_context(_training(call, run, seq, tokens)) if tokens else None
            if f"{run.id}:{seq}" not in self.results:
                run.unbilled.discard(seq)
                undo.pop_all()
                self._follow(call.service, run, seq, admission, bill, tokens)

    async def _give_back(self, tenant: str, taken: int) -> None:
        """Release a failed request's budget; it stays reserved if the database is down."""
        try:
            await tinker_blocking(lambda: self.account.give_back(tenant, taken))
        except Refused as error:
            log.warning("%d millionths of the budget of tenant %r were not given back: %s", taken, tenant, error.what)


async def tinker_blocking(do: Callable[[], T]) -> T:
    """Call `do` in a thread with `blocking`, for files of training clients."""
    return await blocking("what training clients left", do)


def _training(call: Call, run: TrainingRun, seq: int, tokens: int) -> AbstractAsyncContextManager[Bill]:
    name = trained_name(run.name)
    served, number = ResolvedModel((), name, name, trained=True), f"{run.id}:{seq}-{secrets.token_hex(3)}"
    return call.http.tenancy.admitted(call.caller, served, request=number, prompt_tokens=tokens, max_tokens=0)


def _still_there(number: str, answer: T | None) -> T:
    """Return `answer`. Raises Refused (410) if the answer has expired."""
    if answer is None:
        fix = "the request was applied; its effect is in the training state"
        raise Refused(f"the result of {quoted(number)} has expired", status=410, code="gone", fix=fix)
    return answer


async def waited(http: Service, answer: asyncio.Future[FutureResult]) -> FutureResult | None:
    """Wait for a result, up to `_WAIT` seconds or until the server stops."""
    end = time.monotonic() + _WAIT
    while not answer.done() and http.phase == "ready" and time.monotonic() < end:
        await asyncio.wait({answer}, timeout=1.0)
    return answer.result() if answer.done() else None


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel running tasks and wait for them."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def future(number: str, model: str | None, sequences: list[str] | None = None) -> Response:
    """Return a response with a request id, in the SDK's format."""
    made: dict[str, Any] = {"request_id": number, "model_id": model}
    return Json(made if sequences is None else made | {"sample_sequence_ids": sequences})


def _of_creation(run: TrainingRun, what: str) -> dict[str, Any]:
    if what == "unload":
        return {"type": "unload_model", "model_id": run.id}
    start = run.folder / "start" / "start.json"
    if start.is_file():
        path = json.loads(start.read_text(encoding="utf-8"))["path"]
        return {"type": "load_weights", "model_id": run.id, "path": path}
    return {"type": "create_model", "model_id": run.id}


# -- routes ------------------------------------------------------------------------------------------------------------


def tinker_router(permission: Any = "train") -> APIRouter:
    return APIRouter(prefix="/api/v1", tags=["Tinker"], route_class=TINKER_ROUTE, dependencies=[needs(permission)])


def training_routes(own: TinkerRoutes) -> APIRouter:
    """Return the routes of sessions, training clients and numbered requests."""
    router, asked = tinker_router(), Depends(own.call)

    @router.get("/healthz", summary="The server is there.")
    async def health() -> Response:
        return Json({"status": "ok"})

    @router.get("/get_server_capabilities", summary="The base.")
    def capabilities(call: Call = asked) -> Any:
        names = dict.fromkeys([call.model_name(), call.http.catalog.base])
        context = call.http.reader.context
        shown = {"max_context_length": context, "trainable": True, "sampleable": True}
        return {"supported_models": [{"model_name": name, **shown} for name in names]}

    @router.post("/client/config", summary="How the SDK is to behave.")
    async def config(request: HttpRequest) -> Response:
        most = service_of(request).settings.max_body
        return Json({"pjwt_auth_enabled": False, "fwdbwd_max_chunk_bytes_count": min(5_000_000, most // 2)})

    @router.post("/client/dynamic_config", summary="The same, asked again and again.")
    async def dynamic() -> Response:
        return Json({"sample_cancel_enabled": True})

    @router.post("/telemetry", summary="Taken, and kept nowhere.")
    async def telemetry() -> Response:
        return Json({"status": "accepted"})

    @router.post("/create_session", summary="What all clients of one ServiceClient belong to.")
    def create_session(body: SessionBody, call: Call = asked) -> Any:
        own.account.check_allowed(call.tenant)
        made = call.service.create_session(call.tenant, body.user_metadata, body.display_name)
        return {"type": "create_session", "session_id": made.id}

    @router.post("/session_heartbeat", summary="Whoever made it is still there.")
    def heartbeat(body: HeartbeatBody, call: Call = asked) -> Any:
        call.service.session(call.tenant, body.session_id).seen()
        return {"type": "session_heartbeat"}

    @router.get("/sessions", summary="The caller's, the newest first.")
    def sessions(limit: int = Query(20, ge=1, le=1000), offset: int = Query(0, ge=0), call: Call = asked) -> Any:
        found = call.service.sessions_of(call.tenant)
        return {"sessions": [each.id for each in found[offset : offset + limit]]}

    @router.get("/sessions/{id}", summary="One of them.")
    def session(id: str, call: Call = asked) -> Any:
        found = call.service.session(call.tenant, id)
        return {
            "training_run_ids": [f"{id}:train:{number}" for number in sorted(found.runs)],
            "sampler_ids": call.service.samplers_of(found),
            "user_metadata": found.metadata or None,
            "display_name": found.name,
        }

    @router.post("/sessions/{id}/finish", summary="Its client is done; what it saved stays.")
    def finish(id: str, call: Call = asked) -> None:
        call.service.finish(call.tenant, id)

    @router.post("/create_model", summary="A training client of a LoRA.")
    def create_model(body: ModelBody, call: Call = asked) -> Any:
        own.account.check_allowed(call.tenant)
        call.check_base(body.base_model)
        call.service.session(call.tenant, body.session_id).keep_base_name(body.base_model)
        _check_adam(body.optimizer_config)
        given = body.lora_config
        if given is None:
            raise invalid("adapters alone are trained here", "lora_config", "create_lora_training_client(…)")
        lora = Lora(given.rank, given.seed, given.train_attn, given.train_mlp, given.train_unembed)
        make = partial(call.service.create_run, call.tenant, body.session_id, body.model_seq_id, lora)
        return _created(call, partial(make, body.user_metadata, call.caller.weight))

    @router.post("/get_info", summary="What a training client is of.")
    def info(body: RunBody, call: Call = asked) -> Any:
        found = call.service.described(call.tenant, body.model_id)
        name = call.model_name(found.session)
        return {
            "type": "get_info",
            "model_data": {"arch": call.service.base.family, "model_name": name, "tokenizer_id": name},
            "model_id": found.id,
            "is_lora": True,
            "lora_rank": found.lora.rank,
            "model_name": name,
            "optimizer_config": {"type": "adamw"},
        }

    @router.post("/unload_model", summary="A training client is done; its state stays on the disk.")
    def unload(body: RunBody, call: Call = asked) -> Any:
        found = call.service.run(call.tenant, body.model_id)
        call.service.rest(found)
        return future(f"{found.id}:unload", found.id)

    @router.post("/forward_backward", summary="Log-probabilities of rows, and a loss's gradient. The body is protobuf.")
    async def forward(request: HttpRequest, call: Call = asked) -> Response:
        data = await request.body()
        head = await tinker_blocking(lambda: read_head(data))
        found = await tinker_blocking(lambda: call.service.run(call.tenant, head.model))
        return await own.submit(call, found, head.seq, "forward", data, head.tokens)

    def numbered(what: str, summary: str) -> None:
        @router.post(f"/{what}", summary=summary, name=what)
        async def submitted(request: HttpRequest, call: Call = asked) -> Response:
            body = await read_body(request)
            if not isinstance(body, dict):
                raise invalid("a JSON object is expected")
            if what == "load_weights" and body.get("session_id") is not None:
                return await tinker_blocking(lambda: _create_from(own, call, body))
            found = await tinker_blocking(lambda: call.service.run(call.tenant, str(body.get("model_id"))))
            seq = body.get("seq_id")
            if type(seq) is not int:
                raise invalid("seq_id is no number", "seq_id")
            return await own.submit(call, found, seq, what, json.dumps(body).encode(), 0)

    numbered("optim_step", "A step of AdamW by the gradients since the last.")
    numbered("save_weights", "A checkpoint to go on from.")
    numbered("save_weights_for_sampler", "Weights to sample from, with a name or without.")
    numbered("save_weights_external", "Weights to download.")
    numbered("load_weights", "Go on from a checkpoint, or make a client that does.")
    return router


def _create_from(own: TinkerRoutes, call: Call, body: Mapping[str, Any]) -> Response:
    number, path, session = body.get("model_seq_id"), body.get("path"), str(body["session_id"])
    if type(number) is not int or not 0 <= number < NUMBERS or not isinstance(path, str):
        raise invalid("model_seq_id and path are needed", "path")
    if body.get("base_model") is not None:
        call.check_base(str(body["base_model"]))
    _check_adam(body.get("optimizer_config") or {"type": "adamw"})
    own.account.check_allowed(call.tenant)
    make = partial(call.service.create_from, call.tenant, session, number, path, bool(body.get("optimizer")))
    return _created(call, partial(make, body.get("user_metadata"), call.caller.weight))


def _created(call: Call, make: Callable[[], TrainingRun]) -> Response:
    """Create a training client, and grant its tenant access to its adapters."""
    if call.tenant:
        call.http.tenancy.let_see_own(call.tenant)
    made = make()
    return future(f"{made.id}:0", made.id)


def _check_adam(optimizer: Mapping[str, Any]) -> None:
    if optimizer.get("type", "adamw") != "adamw":
        raise invalid(f"there is no optimizer {quoted(str(optimizer['type']))} here", "optimizer_config", "adamw")
