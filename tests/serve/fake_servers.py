"""A fake vLLM server that speaks real HTTP in a thread but has no model.

The first word of a completion is the name of the adapter's folder, which shows which adapter was used.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from tests.serve.http.toy import served

Fault = Literal["close", "hang", "text"]


@dataclass
class FakeVLLM:
    """A server that responds as vLLM does.

    `resolve`: stands in for the plug-in: adapter name -> folder or None. `load_fails`: respond as vLLM does
    if it cannot load the resolved folder. `wrong`: what the next requests get instead of an answer, in order: an
    error (status, message) or a fault. `breaks_after`: number of tokens before `breaks` happens to the stream.
    Faults: "close" closes the connection, "hang" sends nothing more, "text" sends what is no event. `delay`:
    seconds before each token. `calls`: bodies of the completion requests received; `headers`: their headers.
    `left`: number of streams whose client disconnected. `base`: the base's name.
    """

    resolve: Callable[[str], Path | None] = lambda name: None
    load_fails: bool = False
    wrong: list[tuple[int, str] | Fault] = field(default_factory=list)
    breaks_after: int | None = None
    breaks: Fault = "text"
    delay: float = 0.0
    context: int = 64
    calls: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    left: int = 0
    base: str = "base"

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> Any:
            base = {"id": self.base, "owned_by": "vllm", "root": "/b", "parent": None, "max_model_len": self.context}
            return {"object": "list", "data": [base]}

        app.post("/v1/completions")(self._complete)
        return app

    async def _complete(self, request: Request) -> Any:
        body = await request.json()
        self.calls.append(body)
        self.headers.append(dict(request.headers))
        wrong = self.wrong.pop(0) if self.wrong else None
        if isinstance(wrong, tuple):
            return _error(*wrong)
        if wrong is not None:
            return StreamingResponse(self._watched(_fail(wrong)), media_type="text/event-stream")
        model, folder = body["model"], None
        if model != self.base:
            if (folder := self.resolve(model)) is None:
                return _error(404, f"The model `{model}` does not exist.")
            if self.load_fails:
                return _error(400, f"LoRA adapter '{model}' was found but could not be loaded.")
        return StreamingResponse(self._watched(self._stream(body, folder)), media_type="text/event-stream")

    async def _watched(self, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async for piece in pieces:
                yield piece
        except asyncio.CancelledError:
            self.left += 1
            raise

    async def _stream(self, body: dict[str, Any], folder: Path | None) -> AsyncIterator[str]:
        model, count = body["model"], min(body["max_tokens"], 5)
        word = "base" if folder is None else folder.name
        for i in range(count):
            if self.breaks_after == i:
                async for piece in _fail(self.breaks):
                    yield piece
                return
            await asyncio.sleep(self.delay)
            choice: dict[str, Any] = {"index": 0, "text": f" {word}" if i == 0 else " x", "token_ids": [100 + i]}
            if body.get("logprobs") is not None:
                top = {f"token_id:{100 + i}": -0.5, "token_id:7": -1.5, "token_id:8": -0.25}
                choice["logprobs"] = {"token_logprobs": [-0.5], "top_logprobs": [top]}
            if i == count - 1:
                choice |= {"finish_reason": "length" if count == body["max_tokens"] else "stop"}
            yield f"data: {json.dumps({'model': model, 'choices': [choice]})}\n\n"
        usage = {"prompt_tokens": 3, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 2}}
        yield f"data: {json.dumps({'model': model, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


async def _fail(fault: Fault) -> AsyncIterator[str]:
    if fault == "close":
        raise ConnectionAbortedError("closed by the test")
    if fault == "hang":
        await asyncio.Event().wait()
    yield "data: {broken\n\n"


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "x", "code": status}}, status_code=status)


@contextmanager
def running(fake: FakeVLLM) -> Iterator[str]:
    """Yield the URL of `fake`, which runs until the context ends."""
    with served(fake.app()) as url:
        yield url
