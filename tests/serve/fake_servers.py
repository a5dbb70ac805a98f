"""Servers that behave as vLLM and TGI do towards a client, without a model: real HTTP, in a thread each.

An answer's words say which adapter's they are, so that a test sees whose answer it got.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

__all__ = ["FakeTGI", "FakeVLLM", "running"]


@dataclass
class FakeVLLM:
    """`wrong`: (status, message) of the next answers, first to last. `breaks_after`: tokens before the stream dies.
    `delay`: seconds before each token. `left`: streams that their client left. `load_delay`, `load_refusal`: of POST
    /v1/load_lora_adapter."""

    owner: str = "vllm"
    adapters: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    wrong: list[tuple[int, str]] = field(default_factory=list)
    breaks_after: int | None = None
    delay: float = 0.0
    load_delay: float = 0.0
    load_refusal: str = ""
    left: int = 0
    room: int = 64
    url: str = ""

    def asked(self, what: str) -> list[Any]:
        return [body for name, body in self.calls if name == what]

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> Any:
            base = {"id": "base", "owned_by": self.owner, "root": "/b", "parent": None, "max_model_len": self.room}
            more = [{"id": n, "owned_by": self.owner, "root": p, "parent": "base"} for n, p in self.adapters.items()]
            return {"object": "list", "data": [base, *more]}

        if self.owner == "vllm":
            app.post("/v1/load_lora_adapter")(self._load)
            app.post("/v1/unload_lora_adapter")(self._unload)
        app.post("/v1/completions")(self._complete)
        return app

    async def _load(self, request: Request) -> Any:
        body = await request.json()
        self.calls.append(("load", body))
        await asyncio.sleep(self.load_delay)
        if self.load_refusal:
            return _error(500, self.load_refusal)
        if body["lora_name"] in self.adapters:
            return _error(400, "has already been loaded.")
        self.adapters[body["lora_name"]] = body["lora_path"]
        return "Success"

    async def _unload(self, request: Request) -> Any:
        body = await request.json()
        self.calls.append(("unload", body))
        return "Success" if self.adapters.pop(body["lora_name"], None) else _error(404, "cannot be found")

    async def _complete(self, request: Request) -> Any:
        body = await request.json()
        self.calls.append(("complete", body))
        if self.wrong:
            return _error(*self.wrong.pop(0))
        model = body["model"]
        if model != "base" and model not in self.adapters:
            return _error(404, f"The model `{model}` does not exist.")
        return StreamingResponse(self._watched(body), media_type="text/event-stream")

    async def _watched(self, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            async for piece in self._stream(body):
                yield piece
        except asyncio.CancelledError:
            self.left += 1
            raise

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        model, count = body["model"], min(body["max_tokens"], 5)
        said = "base" if model == "base" else Path(self.adapters[model]).name
        for i in range(count):
            if self.breaks_after == i:
                yield "data: {broken\n\n"
                return
            await asyncio.sleep(self.delay)
            choice: dict[str, Any] = {"index": 0, "text": f" {said}" if i == 0 else " x", "token_ids": [100 + i]}
            if body.get("logprobs") is not None:
                top = {f"token_id:{100 + i}": -0.5, "token_id:7": -1.5, "token_id:8": -0.25}
                choice["logprobs"] = {"token_logprobs": [-0.5], "top_logprobs": [top]}
            if i == count - 1:
                choice |= {"finish_reason": "length" if count == body["max_tokens"] else "stop"}
            if self.owner != "vllm":
                del choice["token_ids"]
            yield f"data: {json.dumps({'model': model, 'choices': [choice]})}\n\n"
        usage = {"prompt_tokens": 3, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 2}}
        yield f"data: {json.dumps({'model': model, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


@dataclass
class FakeTGI:
    """Answers an adapter it does not know as the base, as TGI does. Its words, one token each: `words`."""

    adapters: set[str] = field(default_factory=set)
    words: tuple[str, ...] = (" a", " STO", "P", " rest")
    calls: list[tuple[str, Any]] = field(default_factory=list)
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/info")
        async def info() -> Any:
            return {"model_id": "tgi-base", "router": "text-generation-router", "max_total_tokens": 50}

        @app.post("/generate")
        async def generate(request: Request) -> Any:
            body = await request.json()
            known = body["parameters"].get("adapter_id") in self.adapters
            return {"generated_text": "", "details": {"tokens": [{"id": 5, "logprob": -0.1 if known else -0.9}]}}

        @app.post("/generate_stream")
        async def stream(request: Request) -> Any:
            body = await request.json()
            self.calls.append(("stream", body))
            return StreamingResponse(self._stream(body), media_type="text/event-stream")

        return app

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        stop, sent = body["parameters"].get("stop"), ""
        for i, word in enumerate(self.words):
            sent += word
            ends = "stop_sequence" if stop and stop[0] in sent else "length" if i == len(self.words) - 1 else ""
            event: dict[str, Any] = {"token": {"id": i, "text": word, "logprob": -0.5, "special": False}}
            event |= {"generated_text": None, "details": None}
            if ends:
                event["details"] = {"finish_reason": ends, "generated_tokens": i + 1, "input_length": 3}
            yield f"data:{json.dumps(event)}\n\n"
            if ends:
                return


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "x", "code": status}}, status_code=status)


@contextmanager
def running(*fakes: FakeVLLM | FakeTGI) -> Iterator[list[str]]:
    """Their URLs, while they run."""
    servers = []
    for fake in fakes:
        place = socket.socket()
        place.bind(("127.0.0.1", 0))
        fake.url = f"http://127.0.0.1:{place.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([place],), daemon=True)
        thread.start()
        servers.append((server, thread))
    while not all(server.started for server, _ in servers):
        time.sleep(0.01)
    try:
        yield [fake.url for fake in fakes]
    finally:
        for server, _ in servers:
            server.should_exit = True
        for _, thread in servers:
            thread.join(timeout=5)
