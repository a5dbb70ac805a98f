"""Tinker's routes: what its SDK asks of a server (docs/notes/tinker.md), over `TinkerService`.

    TINKER_BASE_URL=http://localhost:8000 TINKER_API_KEY=tml-<key> python a_recipe.py

What a client asks for comes back as a request id, and its result from /api/v1/retrieve_future, which waits for it up to
`_WAIT` seconds and says 408 then, as the SDK wants it. A client's mistake in a numbered request is the result of that
request and no error of the route: the client's next requests have their numbers already. A request is billed before its
result can be had: forward passes as training of the run's name, with the tenant's price and budget of training, samples
as any other answer. A budget that is spent is 402, at which the SDK waits.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import tarfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from veneer.errors import ConfigError, VeneerError, quoted
from veneer.jobs.budget import ClientBudget, trained_name
from veneer.jobs.store import OverBudget
from veneer.jobs.tinker.checkpoints import SavedWeights, parse_path
from veneer.jobs.tinker.journal import FutureResult
from veneer.jobs.tinker.service import NotHere, SamplerSource, SessionOver, TinkerService, TrainingRun
from veneer.jobs.tinker.trainer import Lora
from veneer.jobs.tinker.wire import WireSample, read_head, sample_bytes
from veneer.library.library import Library
from veneer.library.store import CHUNK
from veneer.serve.access import Bill, Served
from veneer.serve.http.answers import TextAnswer, TextJob, run
from veneer.serve.http.bodies import BodyRoute, Strict, read_body
from veneer.serve.http.downloads import file_response
from veneer.serve.http.errors import Json, as_refused, in_thread, log, message_of
from veneer.serve.http.guard import needs
from veneer.serve.http.mixes import ChosenMix
from veneer.serve.http.service import Service, caller_of, service_of
from veneer.serve.names.shelf import AdapterPlace
from veneer.serve.outage import fault
from veneer.serve.principal import Principal
from veneer.serve.quota import QuotaHold, Quotas
from veneer.serve.request import Refused, Sampling, Usage, invalid
from veneer.serve.tenancy.store import Price
from veneer.serve.tenancy.tenants import Tenants

T = TypeVar("T")

FILES = "/api/v1/files"
"""Under which the files of exported weights are, for whoever has a signed URL."""
_WAIT = 20.0
_KEPT = 600.0
"""Seconds that the result of a sample is kept."""
_SAMPLE, _PROMPT_TOKEN, _ANSWER_TOKEN, _TOP_TOKEN = 2048, 64, 400, 100
"""Bytes in memory of a waiting sample, of each prompt token, of each sampled token, and of each requested top-k
logprob."""
_SIGNED = 3600.0
_TOP = 20
_NUMBERS = 10**9
"""Numbers of a session's clients and of a client's requests are below it."""


# -- bodies ------------------------------------------------------------------------------------------------------------


class SessionBody(Strict):
    tags: list[str] = Field(default_factory=list)
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = Field(default=None, max_length=500)
    type: str = ""


class HeartbeatBody(Strict):
    session_id: str
    type: str = ""


class LoraBody(Strict):
    rank: int
    seed: int | None = Field(default=None, ge=0, lt=1 << 62)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class ModelBody(Strict):
    session_id: str
    model_seq_id: int = Field(ge=0, lt=_NUMBERS)
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraBody | None = None
    optimizer_config: dict[str, Any] = Field(default_factory=dict)
    type: str = ""


class SamplerBody(Strict):
    session_id: str
    sampling_session_seq_id: int = Field(ge=0, lt=_NUMBERS)
    base_model: str | None = None
    model_path: str | None = None
    type: str = ""


class RunBody(Strict):
    model_id: str
    type: str = ""


class PathBody(Strict):
    tinker_path: str


class FutureBody(Strict):
    request_id: str
    allow_metadata_only: bool = False


class TtlBody(Strict):
    ttl_seconds: int | None = Field(default=None, ge=3600, le=10 * 366 * 86400)


class SamplingBody(Strict):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class ChunkBody(Strict):
    type: str = "encoded_text"
    tokens: list[int]


class PromptBody(Strict):
    chunks: list[ChunkBody]


class SampleBody(Strict):
    num_samples: int = Field(default=1, ge=1, le=4096)
    prompt: PromptBody
    sampling_params: SamplingBody
    sampling_session_id: str
    seq_id: int = Field(ge=0, lt=_NUMBERS)
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = Field(default=0, ge=0)
    topk_sample_logprobs: int = Field(default=0, ge=0)
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: int = 0
    record_stability_info: bool | None = None
    type: str = ""


# -- routes ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class TinkerRoutes:
    """What the routes share. `make`: the service, when it is first wanted: a server that nobody trains on by Tinker's
    API pays nothing for it."""

    make: Callable[[], TinkerService]
    budget: ClientBudget
    library: Library
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    samples: dict[str, _Sampled] = field(default_factory=dict)
    bills: set[asyncio.Task[None]] = field(default_factory=set)
    billed: dict[str, asyncio.Future[FutureResult]] = field(default_factory=dict)
    turn: asyncio.Condition = field(default_factory=asyncio.Condition)
    open: dict[str, _Open] = field(default_factory=dict)
    """What each tenant waits for that waits for samples."""
    _made: TinkerService | None = None
    _making: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def service(self) -> TinkerService:
        async with self._making:
            if self._made is None:
                self._made = await _asked(self.make)
            return self._made

    async def stop(self) -> None:
        """What runs is let finish as far as it is; states go to the disk."""
        if self._made is not None:
            await asyncio.to_thread(self._made.close)
        tasks = [task for task in (*self.bills, *(s.task for s in self.samples.values())) if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class _Open:
    """Of a tenant: requests that have no result yet, and its samples that are in the engine."""

    requests: int = 0
    drawing: int = 0


@dataclass(eq=False)
class _Sampled:
    """Requested samples of one prompt. `hold`: the tenant's quota used by the samples, and later by their result.
    `fetched`: whether the client has fetched the result."""

    tenant: str
    task: asyncio.Task[FutureResult]
    count: int
    hold: QuotaHold
    fetched: bool = False


def tinker_routes(own: TinkerRoutes) -> APIRouter:
    """All but the signed ones."""
    router = APIRouter(prefix="/api/v1", tags=["Tinker"], route_class=BodyRoute, dependencies=[needs("train")])
    _plain(router, own)
    _sequenced(router, own)
    _sampling(router, own)
    _saved(router, own)
    return router


def signed_routes(own: TinkerRoutes) -> APIRouter:
    """Files by signed URLs, which need no key."""
    router = APIRouter(prefix="/api/v1", tags=["Tinker"], route_class=BodyRoute, dependencies=[needs("public")])

    @router.get("/files/{reference:path}/{ends}/{signature}/{name}", summary="One of them.")
    async def file(reference: str, ends: int, signature: str, name: str) -> Response:
        right = hmac.compare_digest(signature.encode(), _sign(own, reference, ends).encode())
        if not right or ends < time.time():
            raise Refused("this URL is not valid, or not any more", status=403, code="forbidden")
        folder = await _asked(lambda: own.library.resolve(reference))
        if name not in {path.name for path in folder.iterdir()}:
            raise Refused("there is no such file", status=404, code="not_found")
        return FileResponse(folder / name)

    return router


def _plain(router: APIRouter, own: TinkerRoutes) -> None:
    @router.get("/healthz", summary="The server is there.")
    async def health() -> Response:
        return Json({"status": "ok"})

    @router.get("/get_server_capabilities", summary="The base.")
    async def capabilities(request: HttpRequest) -> Response:
        http, reader = service_of(request), service_of(request).reader
        names = dict.fromkeys([_model_name(await own.service(), http), http.catalog.base])
        shown = [
            {"model_name": name, "max_context_length": reader.context, "trainable": True, "sampleable": True}
            for name in names
        ]
        return Json({"supported_models": shown})

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
    async def create_session(request: HttpRequest, body: SessionBody) -> Response:
        caller, service = caller_of(request), await own.service()
        _check_trainable(service_of(request), caller)
        made = await _asked(lambda: service.create_session(caller.tenant, body.user_metadata, body.display_name))
        return Json({"type": "create_session", "session_id": made.id})

    @router.post("/session_heartbeat", summary="Whoever made it is still there.")
    async def heartbeat(request: HttpRequest, body: HeartbeatBody) -> Response:
        service = await own.service()
        await _asked(lambda: service.session(caller_of(request).tenant, body.session_id).seen())
        return Json({"type": "session_heartbeat"})

    @router.get("/sessions", summary="The caller's, the newest first.")
    async def sessions(
        request: HttpRequest, limit: int = Query(20, ge=1, le=1000), offset: int = Query(0, ge=0)
    ) -> Response:
        service = await own.service()
        found = await _asked(lambda: service.sessions_of(caller_of(request).tenant))
        return Json({"sessions": [each.id for each in found[offset : offset + limit]]})

    @router.get("/sessions/{id}", summary="One of them.")
    async def session(request: HttpRequest, id: str) -> Response:
        tenant, service = caller_of(request).tenant, await own.service()

        def look() -> dict[str, Any]:
            found = service.session(tenant, id)
            runs = [f"{id}:train:{number}" for number in sorted(found.runs)]
            return {
                "training_run_ids": runs,
                "sampler_ids": service.samplers_of(found),
                "user_metadata": found.metadata or None,
                "display_name": found.name,
            }

        return Json(await _asked(look))

    @router.post("/sessions/{id}/finish", summary="Its client is done; what it saved stays.")
    async def finish(request: HttpRequest, id: str) -> Response:
        service = await own.service()
        await _asked(lambda: service.finish(caller_of(request).tenant, id))
        return Response(status_code=204)

    @router.post("/create_model", summary="A training client of a LoRA.")
    async def create_model(request: HttpRequest, body: ModelBody) -> Response:
        caller, service, http = caller_of(request), await own.service(), service_of(request)
        _check_trainable(http, caller)
        _check_base(http, body.base_model)
        named = body.base_model
        await _asked(lambda: service.session(caller.tenant, body.session_id).keep_base_name(named))
        _check_adam(body.optimizer_config)
        given = body.lora_config
        if given is None:
            raise invalid("adapters alone are trained here", "lora_config", "create_lora_training_client(…)")
        lora = Lora(given.rank, given.seed, given.train_attn, given.train_mlp, given.train_unembed)

        def create() -> TrainingRun:
            if caller.tenant:
                http.tenancy.let_see_own(caller.tenant)
            return service.create_run(
                caller.tenant, body.session_id, body.model_seq_id, lora, body.user_metadata, caller.weight
            )

        made = await _asked(create)
        return _future(f"{made.id}:0", made.id)

    @router.post("/get_info", summary="What a training client is of.")
    async def info(request: HttpRequest, body: RunBody) -> Response:
        service, caller = await own.service(), caller_of(request)
        found = await _asked(lambda: service.described(caller.tenant, body.model_id))
        name = await _asked(lambda: _model_name(service, service_of(request), caller, found.session))
        about = {"arch": service.base.family, "model_name": name, "tokenizer_id": name}
        return Json(
            {
                "type": "get_info",
                "model_data": about,
                "model_id": found.id,
                "is_lora": True,
                "lora_rank": found.lora.rank,
                "model_name": name,
                "optimizer_config": {"type": "adamw"},
            }
        )

    @router.post("/unload_model", summary="A training client is done; its state stays on the disk.")
    async def unload(request: HttpRequest, body: RunBody) -> Response:
        service = await own.service()
        found = await _asked(lambda: service.run(caller_of(request).tenant, body.model_id))
        service.rest(found)
        return _future(f"{found.id}:unload", found.id)

    @router.post("/retrieve_future", summary="The result of a request; 408 while there is none yet.")
    async def retrieve(request: HttpRequest, body: FutureBody) -> Response:
        answer = await _result(own, request, body.request_id)
        if answer is None:
            waits = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
            return Json(waits, status_code=408)
        kind = "application/x-protobuf" if answer.kind == "proto" else "application/json"
        return Response(answer.data, media_type=kind)

    @router.post("/cancel_future", summary="Nobody waits for this sample any more.")
    async def cancel(request: HttpRequest, body: FutureBody) -> Response:
        found = own.samples.get(body.request_id)
        if found is not None and found.tenant == caller_of(request).tenant:
            found.task.cancel()
        return Response(status_code=204)


def _sequenced(router: APIRouter, own: TinkerRoutes) -> None:
    """What a training client numbers."""

    @router.post("/forward_backward", summary="Log-probabilities of rows, and a loss's gradient. The body is protobuf.")
    async def forward(request: HttpRequest) -> Response:
        data, caller, service = await request.body(), caller_of(request), await own.service()
        head = await _asked(lambda: read_head(data))
        found = await _asked(lambda: service.run(caller.tenant, head.model))
        return await _submit(own, request, found, head.seq, "forward", data, head.tokens)

    def numbered(what: str, summary: str) -> None:
        @router.post(f"/{what}", summary=summary, name=what)
        async def submitted(request: HttpRequest) -> Response:
            body, caller, service = await read_body(request), caller_of(request), await own.service()
            if not isinstance(body, dict):
                raise invalid("a JSON object is expected")
            if what == "load_weights" and body.get("session_id") is not None:
                return await _create_from(own, request, body)
            found = await _asked(lambda: service.run(caller.tenant, str(body.get("model_id"))))
            seq = body.get("seq_id")
            if type(seq) is not int:
                raise invalid("seq_id is no number", "seq_id")
            return await _submit(own, request, found, seq, what, json.dumps(body).encode(), 0)

    numbered("optim_step", "A step of AdamW by the gradients since the last.")
    numbered("save_weights", "A checkpoint to go on from.")
    numbered("save_weights_for_sampler", "Weights to sample from, with a name or without.")
    numbered("save_weights_external", "Weights to download.")
    numbered("load_weights", "Go on from a checkpoint, or make a client that does.")


async def _create_from(own: TinkerRoutes, request: HttpRequest, body: Mapping[str, Any]) -> Response:
    caller, service, http = caller_of(request), await own.service(), service_of(request)
    number, path, session = body.get("model_seq_id"), body.get("path"), str(body["session_id"])
    if type(number) is not int or not 0 <= number < _NUMBERS or not isinstance(path, str):
        raise invalid("model_seq_id and path are needed", "path")
    if body.get("base_model") is not None:
        _check_base(http, str(body["base_model"]))
    _check_adam(body.get("optimizer_config") or {"type": "adamw"})

    _check_trainable(http, caller)

    def create() -> TrainingRun:
        if caller.tenant:
            http.tenancy.let_see_own(caller.tenant)
        return service.create_from(
            caller.tenant, session, number, path, bool(body.get("optimizer")), body.get("user_metadata"), caller.weight
        )

    made = await _asked(create)
    return _future(f"{made.id}:0", made.id)


async def _submit(
    own: TinkerRoutes, request: HttpRequest, found: TrainingRun, seq: int, kind: str, data: bytes, tokens: int
) -> Response:
    if seq < 1:
        raise invalid(f"seq_id is {seq}", "seq_id", "from 1 on, one more for each request")
    caller, service, http = caller_of(request), await own.service(), service_of(request)
    number = f"{found.id}:{seq}"
    known = await _asked(lambda: service.answer(found, seq))
    if known is None and seq > found.applied:
        if not kind.startswith("save_"):  # a tenant can still save what it has trained
            _check_trainable(http, caller)
        service.tried(found)
        taken = await _take_budget(own, http, caller, tokens)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(_give_back, own, caller.tenant, taken)
            admission = await undo.enter_async_context(AsyncExitStack())
            bill: Bill | None = None
            if tokens:
                try:
                    bill = await admission.enter_async_context(_training(http, caller, found, seq, tokens))
                except Refused as error:
                    if error.status != 400:
                        raise
                    kind, data = "refused", message_of(error).encode()  # no limit will ever let it through
            try:
                await _asked(lambda: service.submit(found, seq, kind, data))
            except Refused as error:
                if error.code not in ("too_large", "storage_full"):
                    raise
                said, bill = message_of(error).encode(), None
                await _asked(lambda: service.submit(found, seq, "refused", said))
            if number not in own.billed:  # else it came twice at once
                undo.pop_all()
                _bill(own, service, found, seq, admission, bill, tokens, taken)
    return _future(number, found.id)


def _training(
    http: Service, caller: Principal, found: TrainingRun, seq: int, tokens: int
) -> AbstractAsyncContextManager[Bill]:
    number = f"{found.id}:{seq}-{secrets.token_hex(3)}"
    name = trained_name(found.name)
    served = Served((), name, name, trained=True)
    return http.tenancy.admitted(caller, served, request=number, prompt_tokens=tokens, max_tokens=0)


def _bill(
    own: TinkerRoutes,
    service: TinkerService,
    found: TrainingRun,
    seq: int,
    admission: AsyncExitStack,
    bill: Bill | None,
    tokens: int,
    taken: int = 0,
) -> None:
    """The request's result, once it is billed. `taken`: of the budget, given back where it failed."""
    number, loop = f"{found.id}:{seq}", asyncio.get_running_loop()
    shown: asyncio.Future[FutureResult] = loop.create_future()
    own.billed[number] = shown

    async def follow() -> None:
        try:
            future = await _asked(lambda: service.answer(found, seq))
            if future is None:
                what = f"the result of {quoted(number)} has expired"
                raise Refused(
                    what, status=410, code="gone", fix="the request was applied; its effect is in the training state"
                )
            answer = await asyncio.wrap_future(future)
            if bill is not None:
                await bill.used(Usage(tokens if answer.kind != "failed" else 0, 0, 0))
            if answer.kind == "failed":
                await _give_back(own, found.tenant, taken)
            if not shown.done():
                shown.set_result(answer)
        except Exception as error:  # whoever waits for the result is told
            if not shown.done():
                shown.set_exception(error if isinstance(error, Refused) else fault("the request", error))
                shown.exception()  # nobody may wait for it
                if seq > found.applied:  # what was trained is paid for, whatever became of its result
                    await _give_back(own, found.tenant, taken)
        finally:
            await admission.aclose()
            loop.call_later(_KEPT, own.billed.pop, number, None)

    task = loop.create_task(follow())
    own.bills.add(task)
    task.add_done_callback(own.bills.discard)


async def _result(own: TinkerRoutes, request: HttpRequest, number: str) -> FutureResult | None:
    """None while there is none. Raises Refused: 404 for a request that is not there, 410 for one that is gone."""
    caller, service = caller_of(request), await own.service()
    if ":sample:" in number:
        found = own.samples.get(number)
        if found is None or found.tenant != caller.tenant:
            raise Refused(
                f"the sample {quoted(number)} is not here any more", status=410, code="gone", fix="ask for it again"
            )
        try:
            answer = await _waited(service_of(request), found.task)
            found.fetched = found.fetched or answer is not None
            return answer
        except asyncio.CancelledError:
            if not found.task.cancelled():
                raise
            raise Refused("the sample was cancelled", status=410, code="gone") from None
    id, _, last = number.rpartition(":")
    owner = await _asked(lambda: service.run(caller.tenant, id))
    if last in ("0", "unload"):
        return FutureResult("json", json.dumps(_of_creation(owner, last)).encode())
    missing = Refused(f"there is no request {quoted(number)}", status=404, code="not_found", param="request_id")
    if not re.fullmatch("[1-9][0-9]{0,8}", last):
        raise missing
    seq = int(last)
    if number not in own.billed:  # done before, or taken by the process before
        future = await _asked(lambda: service.answer(owner, seq))
        if future is None and seq > owner.applied:
            raise missing
        if future is None:
            what = f"the result of {quoted(number)} has expired"
            raise Refused(
                what, status=410, code="gone", fix="the request was applied; its effect is in the training state"
            )
        if seq not in owner.unbilled:
            return await _waited(service_of(request), asyncio.wrap_future(future))
        await _bill_late(own, request, service, owner, seq)
    return await _waited(service_of(request), own.billed[number])


async def _bill_late(
    own: TinkerRoutes, request: HttpRequest, service: TinkerService, owner: TrainingRun, seq: int
) -> None:
    """Of a request that the process before took and did not do. Raises Refused where a limit is in its way."""
    asked, tokens = owner.journal.requests.get(seq), 0
    if asked is not None and asked.kind == "forward":
        tokens = (await _asked(lambda: read_head(owner.journal.body(seq)))).tokens
    async with AsyncExitStack() as undo:
        admission = await undo.enter_async_context(AsyncExitStack())
        bill: Bill | None = None
        if tokens:
            training = _training(service_of(request), caller_of(request), owner, seq, tokens)
            bill = await admission.enter_async_context(training)
        if f"{owner.id}:{seq}" not in own.billed:
            owner.unbilled.discard(seq)
            undo.pop_all()
            _bill(own, service, owner, seq, admission, bill, tokens)


async def _waited(http: Service, answer: asyncio.Future[FutureResult]) -> FutureResult | None:
    """For a while, or until the server is to end."""
    end = time.monotonic() + _WAIT
    while not answer.done() and http.phase == "ready" and time.monotonic() < end:
        await asyncio.wait({answer}, timeout=1.0)
    return answer.result() if answer.done() else None


def _of_creation(run: TrainingRun, seq: str) -> dict[str, Any]:
    if seq == "unload":
        return {"type": "unload_model", "model_id": run.id}
    start = run.folder / "start" / "start.json"
    if start.is_file():
        path = json.loads(start.read_text(encoding="utf-8"))["path"]
        return {"type": "load_weights", "model_id": run.id, "path": path}
    return {"type": "create_model", "model_id": run.id}


# -- sampling ----------------------------------------------------------------------------------------------------------


def _sampling(router: APIRouter, own: TinkerRoutes) -> None:
    @router.post("/create_sampling_session", summary="Something to sample from: the base, or a checkpoint.")
    async def create_sampler(request: HttpRequest, body: SamplerBody) -> Response:
        caller, service, http = caller_of(request), await own.service(), service_of(request)
        if body.model_path is None:
            if body.base_model is None:
                raise invalid("base_model or model_path is needed", "base_model")
            _check_base(http, body.base_model)
            named = body.base_model
            await _asked(lambda: service.session(caller.tenant, body.session_id).keep_base_name(named))
        made = await _asked(
            lambda: service.create_sampler(
                caller.tenant, body.session_id, body.sampling_session_seq_id, body.model_path
            )
        )
        return Json({"type": "create_sampling_session", "sampling_session_id": made.id})

    @router.get("/samplers/{id}", summary="What a sampling session is of.")
    async def sampler(request: HttpRequest, id: str) -> Response:
        service, caller = await own.service(), caller_of(request)
        found = await _asked(lambda: service.sampler(caller.tenant, id))
        session = id.partition(":")[0]
        name = await _asked(lambda: _model_name(service, service_of(request), caller, session))
        return Json({"sampler_id": found.id, "base_model": name, "model_path": found.path})

    @router.post("/asample", summary="Samples of one prompt.")
    async def sample(request: HttpRequest, body: SampleBody) -> Response:
        caller, service, http = caller_of(request), await own.service(), service_of(request)
        number = f"{body.sampling_session_id}:{body.seq_id}"
        if number not in own.samples:
            found = await _asked(lambda: service.sampler(caller.tenant, body.sampling_session_id))
            most, tokens = _most_samples(http), sum(len(chunk.tokens) for chunk in body.prompt.chunks)
            if body.num_samples > most:
                raise invalid(f"num_samples is {body.num_samples}", "num_samples", f"at most {most} at once")
            if not tokens:
                raise invalid("the prompt has no tokens", "prompt")
            if number not in own.samples:
                hold = _room_for_sample(own, http.quotas, caller.tenant, _SAMPLE + _PROMPT_TOKEN * tokens)
                own.open.setdefault(caller.tenant, _Open()).requests += 1
                task = asyncio.create_task(_sample(own, http, caller, found, body, hold))
                task.add_done_callback(lambda _: _close(own, caller.tenant, number))
                own.samples[number] = _Sampled(caller.tenant, task, body.num_samples, hold)
        known = own.samples[number]
        if known.tenant != caller.tenant:
            raise Refused(f"there is no sampling session {quoted(number)}", status=404, code="not_found")
        return _future(number, None, [f"{number}:{i}" for i in range(known.count)])


def _most_samples(http: Service) -> int:
    """Return the most samples per request: half of the queue, which is reserved for samples."""
    return max(1, http.settings.queue // 2)


def _room_for_sample(own: TinkerRoutes, quotas: Quotas, tenant: str, memory: int) -> QuotaHold:
    """Take quota for a sample; if needed, forget fetched results first, the oldest first. Raises Refused (429, 413)."""
    if not quotas.fits(tenant, requests=1, memory=memory):
        fetched = [number for number, each in own.samples.items() if each.tenant == tenant and each.fetched]
        for number in fetched:
            _forget(own, number)
            if quotas.fits(tenant, requests=1, memory=memory):
                break
    return quotas.take(tenant, requests=1, memory=memory)


def _close(own: TinkerRoutes, tenant: str, number: str) -> None:
    """Account for a finished sample and keep its result for `_KEPT` seconds."""
    mine = own.open[tenant]
    mine.requests -= 1
    if not mine.requests:
        del own.open[tenant]
    sample = own.samples[number]
    kept = 0 if sample.task.cancelled() else len(sample.task.result().data)
    sample.hold.set(memory=_SAMPLE + kept)
    asyncio.get_running_loop().call_later(_KEPT, _forget, own, number, sample)


def _forget(own: TinkerRoutes, number: str, sample: _Sampled | None = None) -> None:
    """Drop a sample's result. `sample`: drop the result only if it still belongs to this sample."""
    if sample is None or own.samples.get(number) is sample:
        own.samples.pop(number).hold.release()


async def _sample(
    own: TinkerRoutes, http: Service, caller: Principal, sampler: SamplerSource, body: SampleBody, hold: QuotaHold
) -> FutureResult:
    """The samples, or what was wrong with the request. What a limit does not let through now waits: the SDK takes a
    result that failed for the last word."""
    count, most = body.num_samples, _most_samples(http)
    try:
        job = await asyncio.to_thread(_job, http, caller, sampler, body)
        memory = _SAMPLE + count * (job.sampling.max_tokens or http.reader.context) * (
            _ANSWER_TOKEN + _TOP_TOKEN * (job.sampling.logprobs or 0)
        )
        mine = own.open[caller.tenant]
        async with own.turn:  # half of the queue is for all that wait for samples, and each has its share of it
            await own.turn.wait_for(lambda: not mine.drawing or (mine.drawing + count) * len(own.open) <= most)
            mine.drawing += count
        try:
            while True:
                try:
                    hold.change(memory=memory)
                    answers = await _drawn(http, job)
                    break
                except Refused as error:
                    if error.status != 429:
                        raise
                    await asyncio.sleep(error.retry_after or 0.5)
                    job = replace(job, id=secrets.token_hex(16))
        finally:
            mine.drawing -= count
            async with own.turn:
                own.turn.notify_all()
        data = await asyncio.to_thread(_sample_bytes, body, answers, len(job.prompts[0]))
        return FutureResult("proto", data)
    except Exception as error:
        refused = as_refused(error)
        category = "server" if refused.status >= 500 else "user"
        return FutureResult("failed", json.dumps({"error": message_of(refused), "category": category}).encode())


async def _drawn(http: Service, job: TextJob) -> list[TextAnswer]:
    answers = [TextAnswer() for _ in range(job.choices)]
    async with aclosing(run(http, job)) as events:
        async for i, event in events:
            answers[i].add(event)
    return answers


def _job(http: Service, caller: Principal, sampler: SamplerSource, body: SampleBody) -> TextJob:
    """Raises Refused."""
    asked = body.sampling_params
    not_here = {
        "target_prompt_logprobs": body.target_prompt_logprobs is not None,
        "prompt_alt_tokens_k": bool(body.prompt_alt_tokens_k),
        "record_stability_info": bool(body.record_stability_info),
    }
    if wrong := [name for name, given in not_here.items() if given]:
        raise invalid(f"this server does not know {wrong[0]}", wrong[0], "leave it out")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if getattr(body, name) > _TOP:
            raise invalid(f"{name} is {getattr(body, name)}", name, f"at most {_TOP}")
    prompt = tuple(token for chunk in body.prompt.chunks for token in chunk.tokens)
    last = body.prompt_logprobs_last_n
    if last is not None and not (body.prompt_logprobs and 1 <= last < len(prompt)):
        raise invalid(f"prompt_logprobs_last_n is {last}", "prompt_logprobs_last_n", "below the prompt's length")
    stop = [asked.stop] if isinstance(asked.stop, str) else list(asked.stop or [])
    room = max(1, http.reader.context - len(prompt))
    try:
        sampling = Sampling(
            max_tokens=room if asked.max_tokens is None else asked.max_tokens,
            temperature=asked.temperature,
            top_k=max(0, asked.top_k),
            top_p=asked.top_p,
            seed=asked.seed,
            stop=tuple(text for text in stop if isinstance(text, str)),
            stop_ids=tuple(token for token in stop if isinstance(token, int)),
            ignore_eos=asked.stop == [],
            logprobs=max(body.topk_prompt_logprobs, body.topk_sample_logprobs),
            prompt_logprobs=bool(body.prompt_logprobs or body.topk_prompt_logprobs),
        )
    except ConfigError as error:
        raise invalid(error.what, error.where, error.fix) from error
    served = _served(http, caller, sampler)
    return TextJob(caller, ChosenMix(served, "tinker"), [prompt], sampling, choices=body.num_samples)


def _served(http: Service, caller: Principal, sampler: SamplerSource) -> Served:
    if sampler.digest:
        if not Path(sampler.folder).is_dir():
            raise Refused(
                "the weights of this sampling client are kept no more: newer ones of its run took their place",
                status=410,
                code="gone",
                fix="save_weights_for_sampler(name) keeps what is to be asked for longer",
            )
        http.catalog.shelf.remember(sampler.digest, AdapterPlace(sampler.name, path=Path(sampler.folder)))
        return Served(((sampler.digest, 1.0),), sampler.name, sampler.name, adapters=(sampler.name,))
    if sampler.reference:
        return http.catalog.resolve(sampler.reference, caller)
    return http.catalog.resolve(http.catalog.base, caller)


def _sample_bytes(body: SampleBody, answers: Sequence[TextAnswer], prompt: int) -> bytes:
    def top(tokens: Sequence[Any], count: int) -> list[list[tuple[int, float]]]:
        return [[(i, p) for i, _, p in token.top[:count]] for token in tokens]

    samples = [
        WireSample(
            [token.id for token in answer.tokens],
            [token.logprob or 0.0 for token in answer.tokens],
            answer.finished.reason == "stop",
            top(answer.tokens, body.topk_sample_logprobs) if body.topk_sample_logprobs else None,
        )
        for answer in answers
    ]
    told = next((answer.tokens[0].prompt for answer in answers if answer.tokens), ())
    first = 1 if body.prompt_logprobs_last_n is None else prompt - body.prompt_logprobs_last_n
    logprobs = [token.logprob if i >= first else None for i, token in enumerate(told)] if body.prompt_logprobs else None
    count = body.topk_prompt_logprobs
    tops = [row if i >= first else None for i, row in enumerate(top(told, count))] if count else None
    cached = answers[0].cached
    return sample_bytes(samples, prompt=logprobs, top_prompt=tops, top=count, cached=cached)


# -- what was saved ----------------------------------------------------------------------------------------------------


def _saved(router: APIRouter, own: TinkerRoutes) -> None:
    _Limit, _Offset = Query(20, ge=1, le=1000), Query(0, ge=0)

    async def found(request: HttpRequest, id: str, checkpoint: str) -> tuple[TrainingRun, SavedWeights]:
        tenant, service = caller_of(request).tenant, await own.service()

        def look() -> tuple[TrainingRun, SavedWeights]:
            run = service.described(tenant, id)
            there = run.checkpoints.find(checkpoint)
            if there is None:
                raise NotHere(f"{id} has no checkpoint {checkpoint[:100]!r}", where="checkpoint_id")
            return run, there

        return await _asked(look)

    @router.post("/weights_info", summary="What a client needs that goes on from a checkpoint.")
    async def info(request: HttpRequest, body: PathBody) -> Response:
        run, _ = await found(request, *await _asked(lambda: parse_path(body.tinker_path)))
        lora, service, caller = run.lora, await own.service(), caller_of(request)
        name = await _asked(lambda: _model_name(service, service_of(request), caller, run.session))
        return Json(
            {
                "base_model": name,
                "is_lora": True,
                "lora_rank": lora.rank,
                "train_unembed": lora.unembed,
                "train_mlp": lora.mlp,
                "train_attn": lora.attention,
                "optimizer_config": {"type": "adamw"},
            }
        )

    @router.get("/training_runs", summary="The caller's, the newest first.")
    async def runs(request: HttpRequest, limit: int = _Limit, offset: int = _Offset) -> Response:
        service, caller = await own.service(), caller_of(request)
        ids = await _asked(lambda: service.runs_of(caller.tenant))
        http = service_of(request)

        def look() -> list[dict[str, Any]]:
            some = [service.described(caller.tenant, id) for id in ids[offset : offset + limit]]
            return [_shown_run(run, service, http, caller) for run in some]

        shown = await _asked(look)
        cursor = {"offset": offset, "limit": limit, "total_count": len(ids)}
        return Json({"training_runs": shown, "cursor": cursor})

    @router.get("/training_runs/{id}", summary="One of them.")
    async def one(request: HttpRequest, id: str) -> Response:
        service, caller = await own.service(), caller_of(request)
        return Json(
            await _asked(lambda: _shown_run(service.described(caller.tenant, id), service, service_of(request), caller))
        )

    @router.get("/training_runs/{id}/checkpoints", summary="What one saved, the oldest first.")
    async def checkpoints(request: HttpRequest, id: str) -> Response:
        service = await own.service()
        all_points = await _asked(lambda: service.described(caller_of(request).tenant, id).checkpoints.all())
        return Json({"checkpoints": [point.shown() for point in all_points]})

    @router.get("/checkpoints", summary="What all of the caller's runs saved, the newest first.")
    async def every(request: HttpRequest, limit: int = _Limit, offset: int = _Offset) -> Response:
        service, tenant = await own.service(), caller_of(request).tenant

        def look() -> list[SavedWeights]:
            runs = [service.described(tenant, id) for id in service.runs_of(tenant)]
            points = [point for run in runs for point in run.checkpoints.all()]
            return sorted(points, key=lambda point: point.made, reverse=True)

        all_points = await _asked(look)
        shown = [point.shown() for point in all_points[offset : offset + limit]]
        cursor = {"offset": offset, "limit": limit, "total_count": len(all_points)}
        return Json({"checkpoints": shown, "cursor": cursor})

    @router.get("/training_runs/{id}/checkpoints/{kind}/{name}/archive", summary="PEFT's files in a tar.")
    async def archive(request: HttpRequest, id: str, kind: str, name: str) -> Response:
        _, point = await found(request, id, f"{kind}/{name}")
        folder = await _asked(lambda: own.library.resolve(point.reference))
        hold = service_of(request).quotas.take(caller_of(request).tenant, descriptors=1)
        tar = _Tar(folder)
        disposition = f'attachment; filename="{name}.tar"'
        return file_response(tar, tar.size, disposition, media_type="application/x-tar", after=hold.release)  # type: ignore[arg-type]

    @router.get("/training_runs/{id}/checkpoints/{kind}/{name}/external_weights_urls", summary="A URL for each file.")
    async def urls(request: HttpRequest, id: str, kind: str, name: str) -> Response:
        _, point = await found(request, id, f"{kind}/{name}")
        folder = await _asked(lambda: own.library.resolve(point.reference))
        ends = int(time.time() + _SIGNED)
        base = str(request.base_url).rstrip("/")
        made = {
            path.name: f"{base}{FILES}/{point.reference}/{ends}/{_sign(own, point.reference, ends)}/{path.name}"
            for path in sorted(folder.iterdir())
            if path.is_file()
        }
        return Json({"urls": made, "expires": datetime.fromtimestamp(ends, UTC).isoformat()})

    @router.put("/training_runs/{id}/checkpoints/{kind}/{name}/ttl", summary="How long one is kept.")
    async def ttl(request: HttpRequest, id: str, kind: str, name: str, body: TtlBody) -> Response:
        run, point = await found(request, id, f"{kind}/{name}")
        await _asked(lambda: run.checkpoints.keep_for(point.id, body.ttl_seconds))
        return Response(status_code=204)

    @router.delete("/training_runs/{id}/checkpoints/{kind}/{name}", summary="Remove one.")
    async def remove(request: HttpRequest, id: str, kind: str, name: str) -> Response:
        run, point = await found(request, id, f"{kind}/{name}")
        service = await own.service()
        await _asked(lambda: service.remove(run, point.id))
        return Response(status_code=204)


def _shown_run(run: TrainingRun, service: TinkerService, http: Service, caller: Principal) -> dict[str, Any]:
    points = run.checkpoints.all()

    def newest(kind: str) -> dict[str, Any] | None:
        return next((point.shown() for point in reversed(points) if point.id.startswith(f"{kind}/")), None)

    name = _model_name(service, http, caller, run.session)
    journal = run.folder / "journal"
    asked = journal if journal.exists() else run.folder / "run.json"
    last = datetime.fromtimestamp(asked.stat().st_mtime, UTC).isoformat()
    return {
        "training_run_id": run.id,
        "base_model": name,
        "model_owner": caller.tenant or "veneer",
        "is_lora": True,
        "corrupted": False,
        "lora_rank": run.lora.rank,
        "last_request_time": last,
        "last_checkpoint": newest("weights"),
        "last_sampler_checkpoint": newest("sampler_weights"),
        "user_metadata": run.metadata,
    }


class _Tar:
    """A folder's files as a tar archive that is generated while it is read. `size`: bytes of the archive."""

    def __init__(self, folder: Path) -> None:
        self._files = [(path, path.stat()) for path in sorted(folder.iterdir())]
        blocks = sum(1 + -(-stat.st_size // tarfile.BLOCKSIZE) for _, stat in self._files) + 2
        self.size = -(-blocks * tarfile.BLOCKSIZE // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        self._parts = self._made()

    def read(self, size: int) -> bytes:
        """Return the next part, of any size (`size` is ignored); b"" at the end."""
        return next(self._parts, b"")

    def close(self) -> None:
        self._parts.close()

    def _made(self) -> Generator[bytes, None, None]:
        made = 0
        for path, stat in self._files:
            info = tarfile.TarInfo(path.name)
            info.size, info.mtime, info.mode = stat.st_size, int(stat.st_mtime), 0o644
            yield (head := info.tobuf(tarfile.GNU_FORMAT))
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk
            if stat.st_size % tarfile.BLOCKSIZE:
                yield bytes(-stat.st_size % tarfile.BLOCKSIZE)
            made += len(head) + stat.st_size + -stat.st_size % tarfile.BLOCKSIZE
        yield bytes(self.size - made)


def _sign(own: TinkerRoutes, reference: str, ends: int) -> str:
    return hmac.new(own.secret, f"{reference} {ends}".encode(), hashlib.sha256).hexdigest()


# -- what all of them need ---------------------------------------------------------------------------------------------


def _future(number: str, model: str | None, sequences: list[str] | None = None) -> Response:
    made: dict[str, Any] = {"request_id": number, "model_id": model}
    return Json(made if sequences is None else made | {"sample_sequence_ids": sequences})


def _model_name(
    service: TinkerService, http: Service, caller: Principal | None = None, session: str | None = None
) -> str:
    """Return the name by which a client can load the base's tokenizer: a hub ID, or the client's own name for the base.

    Only the operator gets the folder on this machine; other clients get the served name."""
    name = service.base.name.partition("@")[0]
    if "/" in name and not Path(name).expanduser().exists():
        return name
    if caller is not None and session is not None and (said := service.session(caller.tenant, session).base_name):
        return said
    return str(service.base.directory) if caller is not None and caller.can("operate") else str(http.catalog.base)


def _check_base(http: Service, name: str) -> None:
    """Raises Refused for a base that is not served here. Its last part is enough: a client's own folder of it, say."""
    if name.rstrip("/").rpartition("/")[2].lower() == http.catalog.base.lower():
        return
    what = f"The model {quoted(name)} is not served here"
    fix = f"base_model={http.catalog.base!r}"
    raise Refused(what, status=400, code="model_not_available", param="base_model", fix=fix)


def _check_adam(optimizer: Mapping[str, Any]) -> None:
    if optimizer.get("type", "adamw") != "adamw":
        raise invalid(f"there is no optimizer {quoted(str(optimizer['type']))} here", "optimizer_config", "adamw")


def _check_trainable(http: Service, caller: Principal) -> None:
    if isinstance(http.tenancy, Tenants) and http.tenancy.store.settings.training_terms(caller.tenant).jobs == 0:
        raise Refused("this tenant may not train", status=403, code="forbidden", fix="the operator can allow it")


async def _take_budget(own: TinkerRoutes, http: Service, caller: Principal, tokens: int) -> int:
    """What of the tenant's budget so many trained tokens are. Raises Refused (402) where it has no room for them."""
    if not tokens or not isinstance(http.tenancy, Tenants):
        return 0
    terms = http.tenancy.store.settings.training_terms(caller.tenant)
    cost, most = Price(terms.price).cost(tokens, 0, 0), terms.budget
    if most is None or not cost:
        return 0

    def take() -> None:
        try:
            own.budget.take(caller.tenant, cost, most)
        except OverBudget as error:
            raise Refused(error.what, status=402, code="over_budget", fix=error.fix) from error

    await _asked(take)
    return cost


async def _give_back(own: TinkerRoutes, tenant: str, taken: int) -> None:
    """Give back the budget that a failed request took. If the database is unavailable, the budget stays taken."""
    try:
        await _asked(lambda: own.budget.give_back(tenant, taken))
    except Refused as error:
        log.warning("%d millionths of the budget of tenant %r could not be given back: %s", taken, tenant, error.what)


async def _asked(do: Callable[[], T]) -> T:
    """`do` in a thread; what is not there is 404, and what cannot be the client's mistake."""

    def run() -> T:
        try:
            return do()
        except NotHere as error:
            raise Refused(error.what, status=404, code="not_found", param=error.where, fix=error.fix) from error
        except SessionOver as error:
            raise Refused(error.what, status=410, code="gone", param=error.where, fix=error.fix) from error
        except ConfigError as error:
            raise invalid(error.what, error.where, error.fix) from error
        except VeneerError as error:
            if isinstance(error, Refused):
                raise
            raise as_refused(error) from error

    return await in_thread("what training clients left", run)
