"""A toy engine, catalog and tenancy: completions follow a fixed rule, and prompts can trigger failures.

The completion of a prompt is "[mix] last line", where mix is "base" or "digest*strength+…". Words in the
prompt's last line trigger other behavior: FAIL (an error after three tokens), CRASH (an exception after the
first), FULL (refused at once), SLOW (0.05 s per token), TOOL (the completion is a tool call), SAY:text (the
completion is text).
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import uvicorn

from tests.tiny_base import tiny_tokenizer
from veneer.serve.access import ModelCard, NoWait, OpenAccess, ResolvedModel, Tenancy
from veneer.serve.http.app import create_app
from veneer.serve.http.prompts import TokenizedBase
from veneer.serve.http.service import Service
from veneer.serve.principal import Principal
from veneer.serve.request import (
    DigestMix,
    Engine,
    EngineEvent,
    EngineStats,
    Finished,
    Refused,
    Request,
    Started,
    Token,
    Usage,
    make_mix,
)
from veneer.serve.settings import HttpSettings

TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\ntools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ToyText(TokenizedBase):
    """A base that tokenizes prompts with the tiny tokenizer and has no model."""

    def __init__(self, tools: bool = False, context: int = 512) -> None:
        tokenizer = tiny_tokenizer()
        if tools:
            tokenizer.chat_template = TOOL_TEMPLATE
        super().__init__("toy", tokenizer, context, bool(tokenizer.chat_template))


@dataclass
class ToyEngine(Engine[Request, EngineEvent]):
    text: ToyText
    seen: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    running: int = 0
    prompt_tokens: int = 0
    made: int = 0

    def stats(self) -> EngineStats:
        return EngineStats(self.running, 0, 0.25, 3, 7, 1, 11, self.prompt_tokens, self.made)

    async def events(self, request: Request) -> AsyncIterator[EngineEvent]:
        self.seen.append(request)
        said = self.text.tokenizer.decode(request.prompt)
        last = _last_line(said)
        if "FULL" in last:
            raise Refused("the queue is full", status=429, code="overloaded", retry_after=2.5)
        await asyncio.sleep(0)
        self.running += 1
        done = False
        try:
            cached = len(request.prompt) // 2
            yield Started(cached)
            self.prompt_tokens += len(request.prompt)
            count = 0
            async for event in self._tokens(request, last):
                if isinstance(event, Token) and not count and request.sampling.prompt_logprobs:
                    first, *rest = request.prompt
                    told = (self._token(i, "", request.sampling.logprobs) for i in rest)
                    event = replace(event, prompt=(Token(first, ""), *told))
                count += isinstance(event, Token)
                if isinstance(event, Finished):
                    usage = Usage(len(request.prompt), cached, count, 0.001, 0.01, 0.02 * count)
                    done = True
                    yield Finished(event.reason, usage, event.stop, event.text, event.error)
                    return
                yield event
                if "CRASH" in last:
                    raise RuntimeError("secret details of the crash")
                if "FAIL" in last and count == 3:
                    done = True
                    error = Refused("the GPU fell off the bus", status=500, code="internal")
                    yield Finished("error", Usage(len(request.prompt), cached, count), error=error)
                    return
        finally:
            self.running -= 1
            if not done:
                self.cancelled.append(request.id)

    async def _tokens(self, request: Request, last: str) -> AsyncIterator[EngineEvent]:
        s, tokenizer = request.sampling, self.text.tokenizer
        answer = rule(request.mix, last) if s.grammar is None or "SAY:" in last else fitting(*s.grammar)
        if s.temperature > 0 and s.seed is not None and "SEED" in last:
            answer += f" seed {s.seed}"
        cut = min((at for stop in s.stop if (at := answer.find(stop)) >= 0), default=None)
        stop: Any = None if cut is None else next(t for t in s.stop if answer.startswith(t, cut))
        kept = answer if cut is None else answer[:cut]
        ids = tokenizer.encode(answer, add_special_tokens=False)
        told = ""
        for k, token in enumerate(ids):
            if k == s.max_tokens:
                yield Finished(
                    "length", Usage(0, 0, 0), text=kept[len(told) :] if kept.startswith(told) and k == 0 else ""
                )
                return
            await asyncio.sleep(0.05 if "SLOW" in last else 0)
            self.made += 1
            so_far = tokenizer.decode(ids[: k + 1])
            text = so_far[len(told) :] if not so_far.endswith("�") else ""
            if cut is not None and len(told + text) > cut:
                yield self._token(token, kept[len(told) :], s.logprobs)
                yield Finished("stop", Usage(0, 0, 0), stop=stop)
                return
            told += text
            yield self._token(token, text, s.logprobs)
        if len(ids) == s.max_tokens:
            yield Finished("length", Usage(0, 0, 0))
            return
        yield Token(2, "", -0.01 if s.logprobs is not None else None, special=True)
        yield Finished("stop", Usage(0, 0, 0), stop=2)

    def _token(self, id: int, text: str, logprobs: int | None) -> Token:
        if logprobs is None:
            return Token(id, text)
        size = len(self.text.tokenizer)
        top = tuple(((id + n) % size, "", -0.5 - n) for n in range(logprobs))
        return Token(id, text, -0.5, top)


def _last_line(said: str) -> str:
    """Return the last line of the user's last message, from a chat prompt or a plain prompt."""
    turns = re.findall(r"<\|im_start\|>(?:user|system)\n(.*?)<\|im_end\|>", said, re.S)
    return ["", *(turns[-1] if turns else said).strip().splitlines()][-1]


def rule(mix: DigestMix, last: str) -> str:
    if "SAY:" in last:
        return last.partition("SAY:")[2]
    if "TOOL" in last:
        return 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    return f"[{'+'.join(f'{d}*{s:g}' for d, s in mix) or 'base'}] {last}"


def fitting(kind: str, pattern: str) -> str:
    """Return a text that the grammar accepts. Supports only the grammars that the tests use."""
    if kind == "json_object":
        return '{"a": 1}'
    if kind == "regex":
        return re.sub(r"\\(.)", r"\1", pattern.strip("()").split("|")[0])
    return json.dumps(_instance(json.loads(pattern)))


def _instance(schema: Any) -> Any:
    if "const" in schema:
        return schema["const"]
    if "anyOf" in schema:
        return _instance(schema["anyOf"][0])
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: _instance(inner) for name, inner in schema.get("properties", {}).items()}
    return {"string": "text", "integer": 7, "number": 0.5, "boolean": True, "array": []}.get(str(kind))


# -- names -------------------------------------------------------------------------------------------------------------


@dataclass
class ToyCatalog:
    """Adapters by name, a route with a shadow, and sources that can be loaded or fail to load."""

    base: str = "toy"
    fingerprint: str = "sha256:toy"
    adapters: dict[str, ModelCard] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=lambda: {"lib/cat": "c4", "lib/dog": "d0", "lib/cow": "c0"})

    def __post_init__(self) -> None:
        for name, source in {"sql": "lib/sql", "polite": "lib/polite"}.items():
            self.adapters[name] = ModelCard(name, source, self.base, 1700000000, f"d-{name}")

    async def fresh(self) -> None:
        """Do nothing, because the names never change."""

    def in_memory(self) -> list[Any]:
        return []

    def loaded_names(self) -> list[str]:
        return sorted(self.adapters)

    def check(self, name: str) -> None:
        """Allow every name."""

    def resolve(self, model: str, caller: Principal) -> ResolvedModel:
        name = model.removeprefix(f"{self.base}:")
        if name in ("", self.base):
            return ResolvedModel((), self.base, self.base)
        if name == "stable":
            return ResolvedModel(make_mix([("d-sql", 1.0)]), model, "sql", ("polite", make_mix([("d-polite", 1.0)])))
        card = self._card(name, caller)
        return ResolvedModel(make_mix([(card.digest, 1.0)]), model, card.id)

    def resolve_mix(self, parts: Sequence[tuple[str, float]], caller: Principal) -> ResolvedModel:
        found = [(self._card(name, caller).digest, strength) for name, strength in parts]
        name = "+".join(f"{n}:{s:g}" for n, s in parts)
        return ResolvedModel(make_mix(found), name, name)

    def _card(self, name: str, caller: Principal) -> ModelCard:
        card = self.adapters.get(name)
        if card is None or not caller.sees(name):
            raise Refused(f"The model `{name}` does not exist.", status=404, code="model_not_found", param="model")
        return card

    def models(self, caller: Principal) -> list[ModelCard]:
        base = ModelCard(self.base, self.base, None, 1700000000)
        return [base, *(card for name, card in self.adapters.items() if caller.sees(name))]

    def card(self, model: str, caller: Principal) -> ModelCard:
        return next((c for c in self.models(caller) if c.id == model), None) or self._card(model, caller)

    def load(self, name: str, source: str, *, replace: bool = False) -> ModelCard:
        if name in self.adapters and not replace:
            raise Refused(f"{name} is loaded", status=400, code="adapter_exists")
        if source == "corrupt":
            raise Refused("adapter_config.json is not JSON.", status=422, code="adapter_unusable")
        if source not in self.sources:
            raise Refused(
                f"no adapter {source!r} in the library", status=404, code="model_not_found", param="lora_path"
            )
        self.adapters[name] = ModelCard(name, source, self.base, 1700000001, self.sources[source])
        return self.adapters[name]

    def unload(self, name: str) -> None:
        if name not in self.adapters:
            raise Refused(f"The lora adapter '{name}' cannot be found.", status=404, code="model_not_found")
        del self.adapters[name]


@dataclass
class ToyTenancy(Tenancy):
    """Two keys: `admin` sees everything; `acme` sees only sql and stable, with 40 tokens per completion."""

    bills: list[tuple[str, Usage]] = field(default_factory=list)
    inside: int = 0

    async def authenticate(self, key: str | None, user: str | None = None) -> Principal:
        if key == "admin":
            return Principal("operator", user=user)
        if key == "acme":
            return Principal("tenant", "acme", lambda name: name in ("sql", "stable"), user)
        raise Refused("this key is not known", status=401, code="unauthorized")

    def cache_scope(self, caller: Principal, served: ResolvedModel) -> str:
        return caller.tenant

    @asynccontextmanager
    async def admitted(
        self, caller: Principal, served: ResolvedModel, *, request: str, prompt_tokens: int, max_tokens: int
    ) -> AsyncIterator[ToyBill]:
        if caller.tenant and max_tokens > 40:
            raise Refused("beyond this minute's tokens", status=429, code="rate_limited", retry_after=7)
        self.inside += 1
        try:
            yield ToyBill(self, caller.tenant)
        finally:
            self.inside -= 1


@dataclass
class ToyBill:
    tenancy: ToyTenancy
    tenant: str

    def used(self, usage: Usage) -> NoWait:
        self.tenancy.bills.append((self.tenant, usage))
        return NoWait()


# -- a live server -----------------------------------------------------------------------------------------------------


@dataclass
class Live:
    """A server on a free port in a thread, with a client."""

    url: str
    app: Any
    engine: ToyEngine
    catalog: ToyCatalog
    client: httpx.Client

    @property
    def service(self) -> Any:
        return self.app.state.service

    def post(self, path: str, body: Any, key: str | None = None, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return self.client.post(path, json=body, headers=headers, **options)

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        return self.client.get(path, headers={"authorization": f"Bearer {key}"} if key else {})

    def events(self, path: str, body: Any) -> list[Any]:
        """Return the stream's events, parsed as JSON; "[DONE]" stays a string."""
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = [b.removeprefix("data:").strip() for b in answer.text.split("\n\n") if b]
        return [b if b == "[DONE]" else json.loads(b) for b in blocks]


def toy_app(engine: ToyEngine, catalog: ToyCatalog, tenancy: Any = None, settings: Any = None, **options: Any) -> Any:
    service = Service(engine, catalog, tenancy or OpenAccess(), engine.text, settings or HttpSettings())
    return create_app(service, **options)


@contextmanager
def live(engine: ToyEngine, catalog: ToyCatalog, *how: Any, **options: Any) -> Iterator[Live]:
    """Serve `toy_app` with the given arguments until the context ends."""
    app = toy_app(engine, catalog, *how, **options)
    with served(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield Live(url, app, engine, catalog, client)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an app on a free port in a thread. Yield the server's URL."""
    # uvicorn's own limit of 5 s closes a connection under the next request if the machine is busy
    patient = {"timeout_keep_alive": 300, "timeout_graceful_shutdown": 2}
    config = uvicorn.Config(app, port=0, log_level="critical", ws="none", lifespan="off", **patient)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started, 20)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def responses(app: Any, requests: Iterable[dict[str, Any]], base: str = "http://localhost", **how: Any) -> list[Any]:
    """Return the app's response to each request, given as httpx arguments. `how`: options of ASGITransport."""

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app, **how), base_url=base) as client:
            return [await client.request(**each) for each in requests]

    return asyncio.run(ask())


def fuzzed(url: str, ask: Callable[[Any], None], starts: tuple[str, ...] = ("/",)) -> None:
    """Call `ask` with test cases that schemathesis generates for each documented route.

    `starts`: prefixes of the paths to test.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode

    how = {"max_examples": 10, "deadline": None, "derandomize": True, "database": None}
    limits = settings(**how, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if found.ok().path.startswith(starts) else ():
            try:
                limits(given(case=found.ok().as_strategy(generation_mode=mode))(ask))()
            except Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE  # a route without input cannot receive invalid input


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def wait_for(ready: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait until `ready` returns a true value, and return the value."""
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return found
