"""A Ray Serve application: a front deployment, and a veneer server without a port in each replica.

    serve run veneer.serve.ray:app base=smollm2-135m
    serve run deploy/ray/serve.yaml

`Front` reads the adapter's name from the body and sends the request to a replica of `Model` with this name as
its multiplexed model id, so that Ray's router prefers replicas that have the adapter. Each replica loads
adapters from the shared library by name, and computes with its own engine or with a vLLM that it runs (the
argument `engine`, as `veneer serve --engine`). If a replica dies before it answers, `Front` sends the request to
another replica. Ray adds replicas if more than `rows` requests per replica run or wait.

Ray's dashboard shows arguments, so secrets come from the environment of Ray's nodes: VENEER_LIBRARY_INDEX,
VENEER_TENANTS, VENEER_REDIS_URL, VENEER_ADMIN_KEY_HASH.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, get_args

from veneer.errors import ConfigError, MissingExtraError, one_of
from veneer.serve.engines import check_flags, with_engine
from veneer.serve.settings import (
    EngineKind,
    EngineSettings,
    FleetSettings,
    HttpSettings,
    QuotaLimits,
    ServeSettings,
    bytes_of,
)

if TYPE_CHECKING:
    from veneer.serve.build import Application

_SCOPE = {"type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers"}
_SCOPE |= {"client", "server"}
_REPEATABLE = re.compile(r"/|/v1/(chat/)?completions(/render)?|/v1/images/\w+|/generate(_stream)?|/(de)?tokenize")
"""Paths of POST requests that another replica can repeat, because they change nothing."""
ONE_REPLICA = re.compile(r"/metrics|(/v1)?/(un)?load_lora_adapter|/v1/lora_adapter/(un)?load|/v1/loras(/.*)?")
"""Paths that would read or change only the replica that gets the request."""
_ATTEMPTS = 4
_NAMES = 1000
"""Maximum adapter names that a front remembers, and that Ray remembers for each replica."""


_KEYS = {"base", "library", "dtype", "device", "quantize", "allowed_hosts", "context"}
_KEYS |= {"rows", "cache_bytes", "adapter_bytes", "engine", "vllm_flags"}
"""The application's arguments: fields of ServeSettings, HttpSettings, EngineSettings and FleetSettings."""
_NUMBERS = {"rows", "context"}


def serve_settings(values: Mapping[str, Any]) -> ServeSettings:
    """Return the settings of a replica's server; secrets come from the environment. Raises ConfigError."""
    if wrong := sorted(values.keys() - _KEYS) or sorted({"base"} - values.keys()):
        what = f"unknown or missing arguments: {', '.join(wrong)}"
        raise ConfigError(what, where="veneer.serve.ray:app", fix=f"arguments are {', '.join(sorted(_KEYS))}")
    for key in ("allowed_hosts", "vllm_flags"):
        if not isinstance(values.get(key, ()), list | tuple):
            fix = "use a file, such as deploy/ray/serve.yaml"
            raise ConfigError(f"{key} is not a list", where="veneer.serve.ray:app", fix=fix)
    for key in _NUMBERS & values.keys():  # `serve run` passes texts
        if not re.fullmatch("[0-9]{1,9}", str(values[key])):
            raise ConfigError(f"{key} is not a whole number", where="veneer.serve.ray:app", fix=f"{key}: 32")
    given: dict[str, Any] = {
        key: bytes_of(str(value), key) if key.endswith("_bytes") else int(value) if key in _NUMBERS else value
        for key, value in values.items()
    }
    fleet = FleetSettings(engine=given.pop("engine", "auto"), vllm_flags=tuple(given.pop("vllm_flags", ())))
    one_of(str(fleet.engine), get_args(EngineKind), "an engine", "veneer.serve.ray:app")
    check_flags(fleet.vllm_flags)
    hosts = tuple(str(host).lower() for host in given.pop("allowed_hosts", ()))
    engine = EngineSettings(**{key: given.pop(key) for key in EngineSettings.__dataclass_fields__ if key in given})
    return ServeSettings(
        **given,
        host="0.0.0.0",  # not localhost: Ray's proxies can listen on all addresses, so tenants need keys
        admin_key=os.environ.get("VENEER_ADMIN_KEY_HASH"),
        tenants=os.environ.get("VENEER_TENANTS"),
        redis=os.environ.get("VENEER_REDIS_URL"),
        engine=engine,
        fleet=fleet,
        http=HttpSettings(slots=engine.rows, allowed_hosts=hosts),
    )


def replica(values: Mapping[str, Any]) -> Application:
    """Build a replica's server, without loading the base; the log says which engine runs, and why.

    Raises the errors of `serve_settings`, `with_engine` and `check_settings`."""
    from veneer.serve.build import build
    from veneer.serve.checks import check_settings

    settings = with_engine(serve_settings(values), print)
    return build(settings, print, check_settings(settings))


class Model:
    """A replica: a server's application, called without a socket."""

    async def __init__(self, values: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        from ray import serve

        async def announce(name: str) -> str:
            return name

        self.announce: Any = serve.multiplexed(announce, max_num_models_per_replica=_NAMES)
        """Tell Ray's router that this replica has a model of this name."""
        self.built = await asyncio.to_thread(replica, values)
        await self.built.start()
        await self.built.load()

    async def check_health(self) -> None:
        """Raise RuntimeError if the engine cannot answer, so that Ray replaces the replica."""
        if trouble := self.built.service.engine.trouble():
            raise RuntimeError(trouble)

    async def __del__(self) -> None:
        await self.built.stop()

    async def answer(self, scope: dict[str, Any], body: bytes, name: str) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the ASGI messages of one response."""
        messages: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue(16)
        waiting, gone = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            failure = None
            try:
                await self.built.app(scope, receive, messages.put)  # type: ignore[arg-type]  # a dict is a message
            except Exception as error:
                failure = error
            await messages.put(failure)

        task = asyncio.create_task(run())
        try:
            while isinstance(message := await messages.get(), dict):
                if name and message.get("status") == 200:
                    await self.announce(name)
                yield message
            if message is not None:
                raise message
        finally:
            gone.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def adapter_name(body: bytes) -> str:
    """Return the adapter's name in a request's body, or "" if there is none."""
    try:
        values = json.loads(body)
        name = values.get("model") or (values.get("parameters") or {}).get("adapter_id")
    except (ValueError, AttributeError, RecursionError):
        return ""
    return name if isinstance(name, str) and len(name) <= 256 else ""


def front() -> Callable[..., Awaitable[None]]:
    """Return the ASGI application of the front deployment. Ray calls this function in each of its replicas."""
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import RayServeException

    from veneer.serve.http.errors import answer_error, as_refused
    from veneer.serve.request import Refused
    from veneer.serve.transient import transient_error

    model = serve.get_deployment_handle("Model", serve.get_replica_context().app_name)
    settings, limits, held = HttpSettings(), QuotaLimits(), [0]
    names = set[str]()
    """Adapter names that a replica has answered for. Ray's router never forgets a name, so it gets no others."""

    async def read(receive: Any, parts: list[bytes]) -> bytes:
        async with asyncio.timeout(settings.body_time):
            more = True
            while more:
                message = await receive()
                more = message.get("more_body", False)
                parts.append(message.get("body", b""))
                held[0] += len(parts[-1])
                if sum(map(len, parts)) > settings.max_body:
                    fix = "add large adapters with `veneer library add`"
                    what = f"the body has more than {settings.max_body:,} bytes"
                    raise Refused(what, status=413, code="too_large", fix=fix)
                if held[0] > limits.memory:
                    raise transient_error("the front", f"it holds {held[0]:,} bytes of bodies")
        return b"".join(parts)

    async def answer(scope: dict[str, Any], body: bytes, send: Any) -> None:
        name = adapter_name(body)
        handle = model.options(stream=True, multiplexed_model_id=name if name in names else "").answer
        kept = {key: scope[key] for key in _SCOPE & scope.keys()}
        repeatable = scope["method"] in ("GET", "HEAD") or _REPEATABLE.fullmatch(scope["path"])
        start: dict[str, Any] = {}
        for attempt in range(_ATTEMPTS):
            sent = False
            try:
                async with aclosing(_messages(handle.remote(kept, body, name))) as messages:
                    async for message in messages:
                        if message["type"] == "http.response.start":  # sent with the first bytes of the body
                            start = message
                            continue
                        if not sent:
                            await send(start)
                        sent = True
                        await send(message)
                if name and start["status"] == 200:
                    if len(names) >= _NAMES:
                        names.clear()
                    names.add(name)
                return
            except (RayActorError, RayServeException) as error:
                refused = transient_error("the replica", type(error).__name__)
                if sent:
                    if not dict(start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream"):
                        raise  # closes the connection
                    problem = {"message": refused.what, "type": "server_error", "code": refused.code}
                    last = f"data: {json.dumps({'error': problem})}\n\n".encode()
                    await send({"type": "http.response.body", "body": last})
                    return
                if not repeatable or attempt == _ATTEMPTS - 1:
                    raise refused from error
                await asyncio.sleep(0.1 * 2**attempt)

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        parts: list[bytes] = []
        try:
            if ONE_REPLICA.fullmatch(scope["path"]):
                what, fix = "this route reaches only one of several replicas", "use the library, and Ray's own metrics"
                raise Refused(what, status=404, code="not_found", fix=fix)
            await answer(scope, await read(receive, parts), send)
        except Exception as error:
            await answer_error(as_refused(error), "OpenAI")(scope, receive, send)
        finally:
            held[0] -= sum(map(len, parts))

    return app


async def _messages(response: Any) -> AsyncGenerator[dict[str, Any], None]:
    """Yield a replica's messages; cancel the request in the replica if the client is gone."""
    try:
        async for message in response:
            yield message
    finally:
        response.cancel()


def app(values: dict[str, Any]) -> Any:
    """Return the Ray Serve application with these arguments. Raises ConfigError and MissingExtraError."""
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError("Ray Serve needs Ray", extra="ray") from error

    rows = serve_settings(values).engine.rows
    model: Any = serve.deployment(
        Model,
        max_ongoing_requests=HttpSettings.queue,  # the engine's own queue is fair to tenants
        autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": rows},
    )
    ingress: Any = serve.deployment(serve.ingress(front)(), name="Front", max_ongoing_requests=10 * HttpSettings.queue)
    return ingress.bind(model.bind(values))
