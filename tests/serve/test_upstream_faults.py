"""What clients of `veneer serve --upstream` see if the upstream fails: real HTTP on both sides of the door."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from tests.serve.fake_servers import FakeVLLM, running
from tests.serve.http.toy import wait_for
from tests.tiny_base import tiny_base_dir
from veneer.serve.build import build
from veneer.serve.checks import check_settings
from veneer.serve.settings import FleetSettings, ServeSettings

ASKED = {"model": "tiny-base", "prompt": "a", "max_tokens": 5}
DEADLINE = 2.0
"""Seconds between two bytes of the upstream; a server's own deadline is minutes."""
LONG = 120.0


@contextmanager
def door(fake: FakeVLLM, folder: Path, deadline: float = DEADLINE) -> Iterator[httpx.Client]:
    with running(fake) as upstream:
        settings = ServeSettings(str(tiny_base_dir(folder)), fleet=FleetSettings(upstream=upstream))
        built = build(settings, lambda text: None, check_settings(settings))
        server = uvicorn.Server(uvicorn.Config(built.app, port=0, log_level="critical", ws="none", lifespan="off"))

        async def live() -> None:
            await built.start()
            await built.load()
            engine: Any = built.service.engine
            engine.client.timeout = httpx.Timeout(deadline)
            await server.serve()
            await built.stop()

        thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
        thread.start()
        try:
            wait_for(lambda: server.started, LONG)
            port = server.servers[0].sockets[0].getsockname()[1]
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LONG) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(LONG)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data:") and "[DONE]" not in line:
            yield json.loads(line.removeprefix("data:"))


@pytest.mark.parametrize("faults", [[(500, "CUDA error"), (503, "no engine")], ["close", "close"], ["hang"]])
def test_a_fault_before_the_first_token_is_retried(tmp_path, faults):
    with door(fake := FakeVLLM(wrong=list(faults)), tmp_path) as client:
        answer = client.post("/v1/completions", json=ASKED)
        assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, " base x x x x")
    assert len(fake.calls) == len(faults) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_lasting_fault_is_503_with_retry_after(tmp_path, stream):
    with door(fake := FakeVLLM(wrong=[(500, "CUDA error at 10.0.0.7"), "close", "hang"]), tmp_path) as client:
        answer = client.post("/v1/completions", json=ASKED | {"stream": stream})
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert not any(word in answer.text for word in ("CUDA", "10.0.0.7", "127.0.0.1"))
        assert client.post("/v1/completions", json=ASKED).status_code == 200
    assert len(fake.calls) == 4


@pytest.mark.parametrize("fault", ["close", "hang", "text"])
def test_a_fault_in_mid_stream_is_an_error_event(tmp_path, fault):
    with door(fake := FakeVLLM(breaks_after=2, breaks=fault), tmp_path) as client:
        with client.stream("POST", "/v1/completions", json=ASKED | {"stream": True}) as answer:
            assert answer.status_code == 200
            *chunks, last = events(answer)
        assert "".join(each["choices"][0]["text"] for each in chunks) == " base x"
        assert not any(each["choices"][0]["finish_reason"] for each in chunks)
        assert last["error"]["code"] == "unavailable"
        assert "127.0.0.1" not in json.dumps(last)
    assert len(fake.calls) == 1, "tokens that were sent cannot be taken back"


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_disconnected_client_closes_the_request_upstream(tmp_path, tokens):
    fake = FakeVLLM(breaks_after=tokens, breaks="hang")

    async def leave(url: httpx.URL) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=LONG) as client:
            task = asyncio.create_task(client.post("/v1/completions", json=ASKED))
            while not fake.calls:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    with door(fake, tmp_path, deadline=LONG) as client:
        asyncio.run(asyncio.wait_for(leave(client.base_url), LONG))
        wait_for(lambda: fake.left == 1, LONG)
    assert len(fake.calls) == 1
