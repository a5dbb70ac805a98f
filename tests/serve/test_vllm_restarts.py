"""A vLLM that veneer runs is restarted and ended. A small program stands in for vLLM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.serve.test_engine_choice import running
from veneer.errors import ResourceError
from veneer.serve import vllm
from veneer.serve.fleet.mixes import Mixes
from veneer.serve.request import Finished, Refused, Request, Sampling, Token
from veneer.serve.vllm import Vllm

FAKE = """
import http.server, json, os, pathlib, subprocess, sys, time

folder, key = pathlib.Path(sys.argv[1]), "Bearer " + os.environ["VLLM_API_KEY"]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # vLLM has processes of its own
with (folder / "starts").open("a") as file:
    file.write(f"{os.getpid()} {child.pid} {time.monotonic()}\\n")
if (folder / "broken").exists():
    sys.exit("no memory for the KV cache")

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def send(self, text, kind):
        allowed = self.path == "/metrics" or self.headers["Authorization"] == key
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode() if allowed else b"{}")

    def do_GET(self):
        if self.path == "/metrics":
            return self.send(f"vllm:process {os.getpid()}\\n", "text/plain")
        self.send(json.dumps({"data": [{"id": "base", "max_model_len": 64}]}), "application/json")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "text": "hello", "token_ids": [7], "finish_reason": "length"}
        usage = {"prompt_tokens": 3, "completion_tokens": 1}
        lines = [{"model": "base", "choices": [choice]}, {"model": "base", "choices": [], "usage": usage}]
        self.send("".join(f"data: {json.dumps(line)}\\n\\n" for line in lines), "text/event-stream")

address = ("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))
http.server.ThreadingHTTPServer(address, Handler).serve_forever()
"""


class Fake:
    """Fake vLLM programs, which note their processes in the file `starts`, and exit at once if `broken` exists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "fake.py").write_text(FAKE)

    def engine(self) -> Vllm:
        command = [sys.executable, str(self.folder / "fake.py"), str(self.folder)]
        mixes = Mixes(lambda digest: self.folder, self.folder / "mixes")
        return Vllm(command, str(self.folder), mixes=mixes, decode=lambda ids: "")

    @property
    def starts(self) -> list[tuple[int, int, float]]:
        """The process, its child, and the time of each start."""
        file = self.folder / "starts"
        rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [(int(pid), int(child), float(at)) for pid, child, at in rows]

    @property
    def processes(self) -> list[int]:
        return [pid for parent, child, _ in self.starts for pid in (parent, child) if running(pid)]

    def run(self, work: Callable[[Vllm], Awaitable[None]]) -> None:
        """Run `work` with a started engine. Then end the engine, and check that it leaves no process."""

        async def live() -> None:
            engine = self.engine()
            try:
                await engine.begin()
                await work(engine)
            finally:
                await engine.end()

        asyncio.run(live())
        assert self.starts
        assert not self.processes


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


async def ask(engine: Vllm) -> str:
    events = [e async for e in engine.events(Request((1, 2, 3), Sampling(max_tokens=1)))]
    assert isinstance(events[-1], Finished)
    return "".join(e.text for e in events if isinstance(e, Token | Finished))


async def until(ready: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not ready():
            await asyncio.sleep(0.01)


async def served_again(engine: Vllm) -> str:
    """Ask until the engine answers. Each refusal before that must be a 503 with Retry-After."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await ask(engine)
            except Refused as error:
                refused = error
            assert (refused.status, refused.code) == (503, "unavailable")
            assert refused.retry_after


def test_a_killed_vllm_is_restarted_and_serves_again(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "RESTART_PAUSES", (0.05, 60.0))

    async def work(engine: Vllm) -> None:
        assert await ask(engine) == "hello"
        (pid, child, _) = fake.starts[0]
        assert await engine.metrics() == f"vllm:process {pid}\n"
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not running(child))
        assert await served_again(engine) == "hello"
        assert await engine.metrics() == f"vllm:process {fake.starts[-1][0]}\n"
        assert len(fake.starts) == 2

    fake.run(work)


def test_a_vllm_that_dies_at_each_start_is_restarted_with_longer_pauses(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "veneer.serve.vllm")
    monkeypatch.setattr(vllm, "RESTART_PAUSES", (0.1, 0.4))

    async def work(engine: Vllm) -> None:
        (fake.folder / "broken").touch()
        os.kill(fake.starts[0][0], signal.SIGKILL)
        await until(lambda: len(fake.starts) == 2)
        with pytest.raises(Refused) as refusal:
            await ask(engine)
        assert refusal.value.status == 503
        assert refusal.value.retry_after
        assert await engine.metrics() == ""
        await until(lambda: len(fake.starts) == 6)
        (fake.folder / "broken").unlink()
        assert await served_again(engine) == "hello"

    fake.run(work)
    times = [at for _, _, at in fake.starts]
    gaps = [after - before for before, after in pairwise(times[1:6])]
    assert all(gap >= pause for gap, pause in zip(gaps, (0.2, 0.4, 0.4, 0.4), strict=True))
    said = [record.message for record in caplog.records if "restarting it" in record.message]
    assert said[:5] == [f"vLLM exited; restarting it in {pause} s" for pause in ("0.1", "0.2", "0.4", "0.4", "0.4")]


def test_a_vllm_that_never_was_ready_ends_the_server_with_its_last_lines(fake: Fake) -> None:
    (fake.folder / "broken").touch()
    with pytest.raises(ResourceError, match="no memory for the KV cache") as error:
        fake.run(lambda engine: asyncio.sleep(0))
    assert "exited before it was ready" in str(error.value)
    assert len(fake.starts) == 1
    assert not fake.processes


def test_a_server_that_ends_while_vllm_starts_leaves_no_process(fake: Fake) -> None:
    text = (fake.folder / "fake.py").read_text()
    (fake.folder / "fake.py").write_text(text.replace("address =", "time.sleep(600)\naddress ="))

    async def live() -> None:
        engine = fake.engine()
        beginning = asyncio.create_task(engine.begin())
        await until(lambda: fake.starts)
        beginning.cancel()
        await asyncio.gather(beginning, return_exceptions=True)
        await engine.end()
        await until(lambda: not fake.processes)

    asyncio.run(live())
    assert fake.starts
