"""A server process on a tiny base with two tenants, and monitors that run during attacks.

    with target(shop, home) as server:                     `veneer serve`, ready; tenant "a" attacks, "b" is monitored
        with server.watched() as b:                        streams of tenant b, one after another
            server.post("/v1/completions", body, "a")      bytes are sent unchanged, other values as JSON
        b.worst                                            maximum seconds between two events of b
        server.memory()                                    the process's resident memory in bytes

All requests use sockets to a separate process, so the measured times are those that a tenant's client sees.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.forks import Forked
from tests.serve.http.toy import wait_for
from tests.serve.tenancy.conftest import new_tenant
from tests.serve.whole import Shop, process, prompt
from veneer.serve.tenancy.tenants import Tenants

GAP = 0.25
"""Maximum seconds between two events of another tenant's stream."""
SOON = 1.0
"""Maximum seconds until an invalid request is refused."""
MEMORY = 64 << 20
"""Maximum growth of the process's memory in bytes, because allocators keep some freed memory."""
ADMIN = "an-admin-key-of-some-length"


_CROWD = """
import http.client, json, sys
from concurrent.futures import ThreadPoolExecutor

port, path, times, headers = sys.argv[1:]
body = sys.stdin.buffer.read()

def ask(_):
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=120)
    connection.request("POST", path, body, json.loads(headers))
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status

with ThreadPoolExecutor(int(times)) as pool:
    print(json.dumps(list(pool.map(ask, range(int(times))))))
"""


@dataclass
class Answer:
    status: int
    body: bytes
    seconds: float
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Return the error's code; only for routes that use OpenAI's error format."""
        return str(self.json["error"]["code"])


@dataclass
class Server:
    """A server process. `keys`: tenant -> API key. `log`: the process's output and standard error."""

    process: Forked
    port: int
    keys: dict[str, str]
    home: Path
    shop: Shop
    database: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")

    def memory(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def growth_from(self, earlier: int, seconds: float = 10.0) -> int:
        """Return the growth of memory since `earlier`.

        Waits up to `seconds` until the growth is at most MEMORY."""
        end = time.monotonic() + seconds
        while (more := self.memory() - earlier) > MEMORY and time.monotonic() < end:
            time.sleep(0.1)
        return more

    def headers(self, tenant: str | None) -> dict[str, str]:
        key = ADMIN if tenant == "admin" else self.keys[tenant] if tenant else ""
        return {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def send(self, method: str, path: str, body: Any = None, tenant: str | None = "a", timeout: float = 120) -> Answer:
        """Send one request on a new connection. `body`: bytes, or a value to send as JSON."""
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            # the server can refuse before the whole body is sent; its response can still be read
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, raw, self.headers(tenant))
            answer = connection.getresponse()
            content = answer.read()
            headers = {k.lower(): v for k, v in answer.getheaders()}
            return Answer(answer.status, content, time.monotonic() - began, headers)
        finally:
            connection.close()

    def post(self, path: str, body: Any, tenant: str | None = "a", timeout: float = 120) -> Answer:
        return self.send("POST", path, body, tenant, timeout)

    def get(self, path: str, tenant: str | None = "a", timeout: float = 120) -> Answer:
        return self.send("GET", path, None, tenant, timeout)

    def together(self, requests: Sequence[Callable[[], Any]]) -> list[Any]:
        """Send all requests concurrently, each from its own thread."""
        with ThreadPoolExecutor(max(1, len(requests))) as pool:
            return [each.result() for each in [pool.submit(work) for work in requests]]

    def crowd(self, path: str, body: bytes, times: int, tenant: str = "a") -> list[int]:
        """Send `times` equal POST requests at once, and return their statuses.

        They are sent from a separate process, because threads of this process would delay the monitor."""
        command = [sys.executable, "-c", _CROWD, str(self.port), path, str(times), json.dumps(self.headers(tenant))]
        statuses: list[int] = json.loads(subprocess.run(command, input=body, stdout=subprocess.PIPE, check=True).stdout)
        return statuses

    def raw(self, data: bytes = b"", timeout: float = 30) -> socket.socket:
        """Open a connection and send `data`."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        connection.sendall(data)
        return connection

    def sockets(self) -> list[Any]:
        """Return the clients' connections to the server."""
        return [c for c in psutil.Process(self.process.pid).net_connections("tcp") if c.status == "ESTABLISHED"]

    def series(self, name: str) -> float:
        """Return the sum of a metric's series."""
        lines = self.get("/metrics", "admin").body.decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0] == name)

    def wait(self, ready: Callable[[], bool], seconds: float = 30) -> None:
        wait_for(ready, seconds)

    @staticmethod
    def body(content: Any) -> bytes:
        return json.dumps(content).encode()

    def head(self, path: str, length: int, tenant: str = "a") -> bytes:
        """Return the head of a POST request with a body of `length` bytes, for a raw socket."""
        lines = [f"{k}: {v}" for k, v in {**self.headers(tenant), "content-length": str(length)}.items()]
        return "\r\n".join([f"POST {path} HTTP/1.1", "host: here", *lines, "", ""]).encode()

    def stream(self, tenant: str = "b", ids: Sequence[int] = (), n: int = 8, **more: Any) -> Iterator[float]:
        """Yield the time at which a request is sent, then the time of each event of its stream."""
        body = completion_body(ids or prompt(9), n, stream=True, **more)
        yield time.monotonic()
        with (
            httpx.Client(base_url=self.url, timeout=120) as client,
            client.stream("POST", "/v1/completions", json=body, headers=self.headers(tenant)) as answer,
        ):
            if answer.status_code != 200:
                raise AssertionError(f"{tenant}'s stream: {answer.status_code} {answer.read()[:500]!r}")
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield time.monotonic()

    def first_token(self, tenant: str = "b", ids: Sequence[int] = (), **more: Any) -> float:
        """Return the seconds between sending the request and receiving the first token."""
        moments = self.stream(tenant, ids, 2, **more)
        began = next(moments)
        first = next(moments) - began
        for _ in moments:
            pass
        return first

    @contextmanager
    def flooding(self, bodies: Sequence[Any], tenant: str = "a") -> Iterator[None]:
        """Stream completions of all `bodies` at once; disconnect when the block ends."""
        ends = threading.Event()

        def read(body: Any) -> None:
            with (
                httpx.Client(base_url=self.url, timeout=120) as client,
                client.stream("POST", "/v1/completions", json=body, headers=self.headers(tenant)) as answer,
            ):
                assert answer.status_code == 200, answer.read()
                for _ in answer.iter_raw():
                    if ends.is_set():
                        return

        with ThreadPoolExecutor(len(bodies)) as pool:
            running = [pool.submit(read, body) for body in bodies]
            try:
                yield
            finally:
                ends.set()
            for each in running:
                each.result()

    @contextmanager
    def watched(self, tenant: str = "b") -> Iterator[Watch]:
        """Stream completions of a tenant, one after another, while the block runs."""
        watch = Watch(self, tenant)
        watch.start()
        try:
            yield watch
        finally:
            watch.end()


class Watch:
    """Monitors one tenant's streams and /health; errors are raised at the end of the block.

    `worst`: maximum seconds between two events of a stream. `health`: maximum seconds of a /health
    request."""

    def __init__(self, server: Server, tenant: str) -> None:
        self.server, self.tenant = server, tenant
        self.gaps: list[float] = []
        self.health_took: list[float] = []
        self.events = 0
        self._ends = threading.Event()
        self._wrong: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(w,)) for w in (self._stream, self._health)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        wait_for(lambda: self.events > 3 or self._wrong, 60)

    def end(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(120)
        if self._wrong:
            raise self._wrong[0]

    @property
    def worst(self) -> float:
        return max(self.gaps)

    @property
    def health(self) -> float:
        return max(self.health_took)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            while not self._ends.is_set():
                work()
        except BaseException as error:
            self._wrong.append(error)

    def _stream(self) -> None:
        last = None
        for moment in self.server.stream(self.tenant, n=2000):
            if last is not None:
                self.gaps.append(moment - last)
            last = moment
            self.events += 1
            if self._ends.is_set():
                return

    def _health(self) -> None:
        answer = self.server.get("/health", None, timeout=60)
        assert answer.status == 200, answer.body
        self.health_took.append(answer.seconds)
        self._ends.wait(0.05)


def completion_body(ids: Sequence[int], n: int, **more: Any) -> dict[str, Any]:
    """Return the body of a request for exactly `n` tokens, none of them a special token."""
    body = {"model": "", "prompt": list(ids), "max_tokens": n, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    return body | {"logit_bias": {str(i): -100 for i in range(3)}} | more


def tenants_of(url: str, weights: dict[str, float]) -> dict[str, str]:
    """Create tenants in a new database; return tenant -> key."""
    tenants = Tenants(url, watch=False)
    keys = {name: new_tenant(tenants.store, name, ["*"], weight=weight) for name, weight in weights.items()}
    tenants.close()
    return keys


@contextmanager
def target(
    shop: Shop, home: Path, *options: str, tenants: dict[str, float] | None = None, threads: int = 1
) -> Iterator[Server]:
    """Start a server and wait until it is ready.

    `options`: further options of `veneer serve`. `tenants`: name -> weight; the default is "a" and "b" with
    equal weights."""
    database = str(home / "tenants.sqlite")
    keys = tenants_of(database, tenants or {"a": 1.0, "b": 1.0})
    more = {"OMP_NUM_THREADS": str(threads), "VENEER_ADMIN_KEY": ADMIN, "PYTHONUNBUFFERED": "1"}
    with process(shop, home, database, "--cache-memory", "64M", *options, **more) as (server, address):
        yield Server(server, int(address.rpartition(":")[2]), keys, home, shop, database)
