"""Routers run the files in deploy/routers, with only addresses and ports replaced.

Each test runs real processes: `veneer serve --upstream` (the door), a router, and three or four embedded engines
over one library.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from tests.forks import Forked
from tests.homes import home_with_kernels
from tests.serve.http.toy import free_port, wait_for
from tests.serve.http.toy import served as listening
from tests.serve.whole import ROOT, Said, Shop, asking, is_ready, make_shop, prompt, said

FILES = ROOT / "deploy" / "routers"
MIXES: tuple[tuple[tuple[str, float], ...], ...] = (
    (),
    *(((name, 1.0),) for name in ("plain", "rs", "patterns")),
    *((("plain", 0.5), ("rs", strength / 16)) for strength in range(-12, 13) if strength),
)
"""Many names, so that each of four replicas gets some of them."""
LONG = 300
"""Seconds: other processes can use the machine's cores."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return make_shop(tmp_path_factory.mktemp("routers"), ("plain", "rs", "patterns"))


def program(name: str, package: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:{Path(sys.executable).parent}")
    assert found, f"there is no {name}: install {package}"
    return found


@dataclass
class Engine:
    """`veneer serve` as a process that can be killed, drained and started again on its port."""

    shop: Shop
    home: Path
    port: int = field(default_factory=free_port)
    options: tuple[str, ...] = ("--dtype", "float32", "--device", "cpu")
    env: dict[str, str] = field(default_factory=dict)
    process: Forked | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")

    def start(self) -> Engine:
        settings = {"VENEER_HOME": str(home_with_kernels(self.home)), "OMP_NUM_THREADS": "1"}
        settings |= {"PYTHONPATH": str(ROOT / "src"), "VENEER_LIBRARY": self.shop.library.location}
        command = ["-c", "from veneer.cli.main import main; main()", "serve", "--base", str(self.shop.base_dir)]
        command += ["--port", str(self.port), "--library", self.shop.library.location, *self.options]
        self.process = Forked(command, env=os.environ | settings | self.env, log=self.home / "log")
        return self

    def ready(self) -> Engine:
        assert self.process is not None
        wait_for(lambda: self.process.poll() is not None or is_ready(self.url), LONG)
        assert self.process.poll() is None, self.log[-3000:]
        return self

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(LONG)


@contextmanager
def started(engines: Sequence[Engine]) -> Iterator[None]:
    try:
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.ready()
        yield
    finally:
        for engine in engines:
            if engine.process is not None:
                engine.kill()


@dataclass
class Router:
    process: subprocess.Popen[bytes]
    port: int
    reload: Callable[[], None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def with_addresses(file: str, urls: Sequence[str], port: int) -> str:
    """Return a file of deploy/routers with these engines' addresses and this port."""
    text = (FILES / file).read_text(encoding="utf-8")
    for number, url in enumerate(urls, 1):
        text, count = re.subn(rf"\bgpu{number}:8000\b", url.removeprefix("http://"), text)
        assert count
    text, count = re.subn(r"^(\s+)(bind :|listen )8000", rf"\g<1>\g<2>{port}", text, flags=re.M)
    assert count == 1
    return "\n".join(line for line in text.splitlines() if not re.search(r"\bserver .*gpu\d:8000", line)) + "\n"


@contextmanager
def router(kind: str, urls: Sequence[str], folder: Path) -> Iterator[Router]:
    port = free_port()
    if kind == "haproxy":
        file = folder / "haproxy.cfg"
        file.write_text(with_addresses("haproxy.cfg", urls, port))
        command = [program("haproxy", "haproxy"), "-W", "-f", str(file)]
    elif kind == "nginx":
        file = folder / "nginx.conf"
        # packaged nginx logs to /var/log, which only root can write
        file.write_text(f"daemon off;\npid {folder}/nginx.pid;\n{with_addresses('nginx.conf', urls, port)}")
        command = [program("nginx", "nginx"), "-p", str(folder), "-c", str(file), "-e", "stderr"]
    else:
        command = [str(FILES / f"{kind}.sh"), *urls]
        assert program(kind, "veneer[fleet-tests]")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (folder / f"{kind}.log").open("ab") as log:
        env = os.environ | {"PORT": str(port), "METRICS_PORT": str(free_port()), "PATH": path}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: process.poll() is not None or answers(url), 120)
        assert process.poll() is None, (folder / f"{kind}.log").read_text(errors="replace")[-3000:]
        number = {"haproxy": signal.SIGUSR2, "nginx": signal.SIGHUP}.get(kind, signal.SIGCONT)
        yield Router(process, port, lambda: process.send_signal(number))
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def door(shop: Shop, home: Path, upstream: str) -> Engine:
    return Engine(shop, home, options=("--upstream", upstream), env={"VENEER_VLLM_CACHE": str(home / "mixes")})


def body_of(mix: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Return the fields of a body that name a mix."""
    if len(mix) == 1 and mix[0][1] == 1:
        return {"model": mix[0][0]}
    return {"model": "tiny", "extra_body": {"mix": [{"adapter": n, "strength": s} for n, s in mix]} if mix else {}}


class Load:
    """OpenAI's client in several threads, with its own retries. Each answer is compared with the expected one."""

    def __init__(self, shop: Shop, url: str, threads: int = 6) -> None:
        self.shop, self.url = shop, url
        self.good, self.bad, self.lock, self.stop = 0, list[str](), threading.Lock(), threading.Event()
        self.prompt = prompt(20)
        self.wanted = {mix: shop.wanted(mix, self.prompt, 12) for mix in MIXES}
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(threads)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(LONG)
            assert not thread.is_alive()

    def _run(self, i: int) -> None:
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=5, timeout=LONG) as client:
            while not self.stop.is_set():
                mix, i = MIXES[i % len(MIXES)], i + 1
                try:
                    got = said(client.completions.create(**asking(ids=self.prompt, **body_of(mix))))
                    problem = "" if same(got, self.wanted[mix]) else f"{mix}: {got} instead of {self.wanted[mix]}"
                except Exception as error:
                    problem = f"{mix}: {type(error).__name__}: {error}"
                with self.lock:
                    self.good += not problem
                    self.bad += [problem] if problem else []

    def more(self, n: int = 20) -> None:
        """Wait for `n` more answers."""
        wanted = self.good + n
        wait_for(lambda: self.good >= wanted or self.bad, LONG)
        assert not self.bad, self.bad[:3]


def same(got: Said, wanted: Said) -> bool:
    """Compare texts and log-probabilities; a weighted mix is rounded differently by the engines."""
    return got.text == wanted.text and all(
        abs(a - b) < 1e-3 for a, b in zip(got.logprobs, wanted.logprobs, strict=True)
    )


@pytest.mark.fleet
@pytest.mark.parametrize("kind", ["haproxy", "nginx", "vllm-router"])
def test_no_request_is_lost_while_engines_are_killed_added_and_upgraded(shop, tmp_path, kind):
    engines = [Engine(shop, tmp_path / f"engine{i}") for i in range(4)]
    with ExitStack() as stack:
        stack.enter_context(started(engines[:3]))
        between = stack.enter_context(router(kind, [e.url for e in engines], tmp_path))
        front = door(shop, tmp_path / "door", between.url)
        stack.enter_context(started([front]))
        with Load(shop, front.url) as load:
            load.more()
            engines[0].kill()
            load.more()
            stack.enter_context(started([engines[3]]))  # added: the router knows the address
            wait_for(lambda: generated(engines[3].url) > 0 or load.bad, LONG)
            engines[1].kill(signal.SIGTERM)  # upgraded: drains, ends, and starts again
            load.more()
            engines[1].start().ready()
            load.more()
            for _ in range(3):
                between.reload()
                load.more()
        assert not load.bad, load.bad[:3]
        assert sum(generated(e.url) > 0 for e in engines[1:]) >= 2


def generated(url: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return sum(
        float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("vllm:generation_tokens")
    )


@dataclass
class Faulty:
    """A TCP server in front of an engine that breaks connections.

    `fault`: "" passes everything on; "hang" never responds; "500" responds with an error; "close" closes after the
    response's headers, and "cut" after the first event. `seen`: completion requests; `left`: requests that
    hung until the client disconnected.
    """

    url: str
    fault: str = ""
    seen: int = 0
    left: int = 0

    def app(self) -> FastAPI:
        once = httpx.Limits(max_keepalive_connections=0)  # nothing is left open when the test ends
        app, client = FastAPI(), httpx.AsyncClient(base_url=self.url, timeout=LONG, limits=once)

        @app.api_route("/{path:path}", methods=["GET", "POST"])
        async def proxy(request: Request, path: str) -> Response:
            body = await request.body()
            fault = self.fault if path == "v1/completions" else ""
            self.seen += path == "v1/completions"
            if fault == "500":
                return Response("broken", status_code=500)
            if fault == "hang":
                while not await request.is_disconnected():
                    await asyncio.sleep(0.02)
                self.left += 1
                return Response(status_code=499)
            headers = {"content-type": "application/json"}
            sent = client.build_request(request.method, path, content=body, headers=headers)
            answer = await client.send(sent, stream=True)

            async def chunks() -> AsyncIterator[bytes]:
                try:
                    async for chunk in answer.aiter_raw():
                        if fault != "close":
                            yield chunk
                        if fault in ("close", "cut"):
                            raise ConnectionAbortedError("closed by the test")
                finally:
                    await answer.aclose()

            return StreamingResponse(chunks(), answer.status_code, media_type=answer.headers.get("content-type"))

        return app


@pytest.mark.fleet
def test_faults_of_a_replica_reach_no_client_before_the_first_token(shop, tmp_path):
    """One of two replicas responds 500 or closes streams; the other answers requests without a first token."""
    engines = [Engine(shop, tmp_path / f"engine{i}") for i in range(2)]
    with ExitStack() as stack:
        stack.enter_context(started(engines))
        faulty = Faulty(engines[1].url)
        url = stack.enter_context(listening(faulty.app()))
        between = stack.enter_context(router("haproxy", [engines[0].url, url], tmp_path))
        front = door(shop, tmp_path / "door", between.url)
        stack.enter_context(started([front]))
        with Load(shop, front.url) as load:
            wait_for(lambda: faulty.seen > 3, LONG)
            for fault in ("500", "close", ""):
                faulty.fault, seen = fault, faulty.seen
                load.more(40)
                assert faulty.seen > seen, "the fault met no request"
        assert not load.bad, load.bad[:3]


@pytest.mark.fleet
@pytest.mark.parametrize("kind", ["haproxy", "nginx", "vllm-router"])
def test_a_client_that_leaves_a_hanging_replica_frees_it(shop, tmp_path, kind):
    engine = Engine(shop, tmp_path / "engine")
    with ExitStack() as stack:
        stack.enter_context(started([engine]))
        faulty = Faulty(engine.url)
        url = stack.enter_context(listening(faulty.app()))
        between = stack.enter_context(router(kind, [url], tmp_path))
        front = door(shop, tmp_path / "door", between.url)
        stack.enter_context(started([front]))
        faulty.fault = "hang"

        async def leave() -> None:
            async with httpx.AsyncClient(base_url=front.url, timeout=LONG) as client:
                task = asyncio.create_task(client.post("/v1/completions", json={"model": "plain", "prompt": "a"}))
                while not faulty.seen:
                    await asyncio.sleep(0.02)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(asyncio.wait_for(leave(), LONG))
        wait_for(lambda: faulty.left == faulty.seen == 1, LONG)


@pytest.mark.fleet
def test_a_router_without_engines_gives_503_with_retry_after(shop, tmp_path):
    engine = Engine(shop, tmp_path / "engine")
    with ExitStack() as stack:
        stack.enter_context(started([engine]))
        between = stack.enter_context(router("haproxy", [engine.url], tmp_path))
        front = door(shop, tmp_path / "door", between.url)
        stack.enter_context(started([front]))
        engine.kill()
        answer = httpx.post(f"{front.url}/v1/completions", json={"model": "plain", "prompt": "a"}, timeout=LONG)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert str(engine.port) not in answer.text
        engine.start().ready()
        wait_for(lambda: is_ready(front.url), LONG)
        httpx.post(
            f"{front.url}/v1/completions", json={"model": "plain", "prompt": "a"}, timeout=LONG
        ).raise_for_status()


@pytest.mark.fleet
@pytest.mark.parametrize("kind", ["haproxy", "nginx", "vllm-router"])
def test_an_adapter_stays_on_one_replica(shop, tmp_path, kind):
    """The engines' metrics show the router's affinity: each adapter is loaded once."""
    engines = [Engine(shop, tmp_path / f"engine{i}") for i in range(2)]
    with ExitStack() as stack:
        stack.enter_context(started(engines))
        between = stack.enter_context(router(kind, [e.url for e in engines], tmp_path))
        front = door(shop, tmp_path / "door", between.url)
        stack.enter_context(started([front]))
        names = ("plain", "rs", "patterns")
        for name in names * 4:
            answer = httpx.post(
                f"{front.url}/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 2}, timeout=LONG
            )
            assert answer.status_code == 200, answer.text
        loaded = [
            {m["id"] for m in httpx.get(f"{e.url}/v1/models").json()["data"] if m["id"].startswith("veneer-")}
            for e in engines
        ]
        assert sum(map(len, loaded)) == len(names)
        assert not loaded[0] & loaded[1]
