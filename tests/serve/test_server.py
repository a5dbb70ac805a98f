"""The states of a server: loading, ready, draining, stopped."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.cli.run import run
from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyText, free_port, toy_app
from veneer.errors import BaseError, ResourceError
from veneer.serve.build import Application
from veneer.serve.server import listen, serve
from veneer.serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[2]
TOY = """
import asyncio, gc, sys
from veneer.serve.server import serve
from veneer.serve.settings import ServeSettings

def make():
    from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyText, toy_app
    from veneer.serve.build import Application
    app = toy_app(ToyEngine(ToyText()), ToyCatalog())
    service = app.state.service
    service.phase, service.loaded = "loading", False
    async def load():
        await asyncio.sleep(1)
        assert not gc.isenabled()
        service.mark_ready()
    return Application(app, load=load)

serve(ServeSettings("toy", port=int(sys.argv[1]), drain=20), print, make)
assert gc.isenabled()
print("ended")
"""


def test_a_server_loads_serves_drains_and_ends() -> None:
    port = free_port()
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-c", TOY, str(port)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            seen: list[int] = []
            turned_away: list[int] = []
            end = time.monotonic() + 300
            while not seen or seen[-1] != 200:
                assert time.monotonic() < end
                try:
                    ready = client.get("/ready")
                    seen.append(ready.status_code)
                    if ready.status_code == 503:
                        assert ready.json() == {"status": "loading"}
                        assert client.get("/health").status_code == 200
                        turned_away.append(client.post("/v1/completions", json={"prompt": "Hi"}).status_code)
                except httpx.ConnectError:
                    pass
                time.sleep(0.05)
            assert seen[0] == turned_away[0] == 503
            body = {"prompt": "SLOW " + "word " * 20, "max_tokens": 100, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as other:
                    while (ready := other.get("/ready")).status_code == 200:
                        time.sleep(0.02)
                    assert ready.json() == {"status": "draining"}
                    refused = other.post("/v1/completions", json={"prompt": "Hi"})
                    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
                assert [line for line in lines if line][-1] == "data: [DONE]"  # the running request finishes
        assert process.wait(60) == 0
        assert process.stdout.read().strip().endswith("ended")
        assert "INFO veneer.serve: draining: 1 requests" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


async def no_base() -> None:
    raise BaseError("there is no such base")


def not_built() -> Application:
    raise BaseError("there is no such base")


@pytest.mark.parametrize(
    "make",
    [
        not_built,
        lambda: Application(toy_app(ToyEngine(ToyText()), ToyCatalog()), start=no_base),
        lambda: Application(toy_app(ToyEngine(ToyText()), ToyCatalog()), load=no_base),
    ],
)
def test_a_failed_start_reports_its_reason(make: Callable[[], Application]) -> None:
    said: list[str] = []
    level, interval = logging.getLogger("veneer").level, sys.getswitchinterval()
    try:
        with pytest.raises(BaseError, match="there is no such base"):
            serve(ServeSettings("toy", port=0), said.append, make)
    finally:
        logging.getLogger("veneer").setLevel(level)
        sys.setswitchinterval(interval)
        gc.unfreeze()
    assert gc.isenabled()
    assert len(said) == 1
    assert "listening on http://127.0.0.1:" in said[0]


def test_a_taken_port_is_refused_before_loading(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run(capsys, "serve", "--base", "smollm2-135m", "--port", str(port), code=2)
    assert f"cannot listen at 127.0.0.1:{port}: Address already in use" in result.err
    assert "listening on" not in result.err
    with pytest.raises(ResourceError, match=r"cannot listen at nowhere\.invalid:80"):
        listen("nowhere.invalid", 80)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--allow-folder", "nowhere"], "there is no folder nowhere"),
        (["--open", "--tenants", "t.sqlite", "--host", "0.0.0.0"], "every client of 0.0.0.0 would be the operator"),
        (["--open", "--api-keys", "keys"], "--open and --api-keys"),
    ],
)
def test_impossible_options_are_refused_without_a_traceback(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("sk-0123456789abcdef\n")
    ran = run(capsys, "serve", "--base", "smollm2-135m", *options, code=2)
    assert words in ran.err
    assert "Traceback" not in ran.err
