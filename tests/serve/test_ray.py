"""The Ray Serve application runs on a real Ray, with three replicas; one is killed under load."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from tests.homes import home_with_kernels
from tests.serve.http.toy import free_port, wait_for
from tests.serve.whole import ROOT, Shop, asking, make_shop, prompt, said
from veneer.errors import ConfigError
from veneer.serve.http.surfaces import vllm
from veneer.serve.ray import ONE_REPLICA, adapter_name, app, replica, serve_settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own modules
DEPLOYED = ROOT / "deploy" / "ray" / "serve.yaml"
REPLICAS = 3
SLOW_MACHINE = {"RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300", "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "300"}
"""Ray's own limits on the start of its dashboard are 60 and 30 seconds (ray_constants.py, dashboard/consts.py)."""
PASSWORD = "password-of-the-database"


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_TENANTS", f"postgresql://u:{PASSWORD}@db/t")
    monkeypatch.setenv("VENEER_REDIS_URL", f"redis://:{PASSWORD}@redis")
    settings = serve_settings({"base": "tiny"})
    assert settings.tenants == f"postgresql://u:{PASSWORD}@db/t"
    assert settings.redis == f"redis://:{PASSWORD}@redis"
    assert not settings.here  # so that tenants need keys
    for secret in ("tenants", "redis", "admin_key", "keys"):
        with pytest.raises(ConfigError, match=secret):
            serve_settings({"base": "tiny", secret: PASSWORD})


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model": "support"}', "support"),
        (b'{"inputs": "Hi", "parameters": {"adapter_id": "support"}}', "support"),
        (b'{"model": 3}', ""),
        (b"[1]", ""),
        (b"[" * 100_000, ""),
        (b"\xff", ""),
    ],
)
def test_adapter_name_is_read_from_any_body(body: bytes, name: str) -> None:
    assert adapter_name(body) == name


FAKE_VLLM = '''#!{python}
"""Answers veneer's search for vLLM; otherwise serves one token in vLLM's format, and writes its arguments."""
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
if sys.argv[1] == "-c":
    print(json.dumps(["0.32.0", True, ["LlamaForCausalLM"]]))
    sys.exit()
open({arguments!r}, "w").write(json.dumps(sys.argv[1:]))
name = sys.argv[sys.argv.index("--served-model-name") + 1]
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{"object": "list", "data": [{{"id": name, "root": "/b", "parent": None, "max_model_len": 64}}]}})
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        choice = {{"index": 0, "text": " vllm", "token_ids": [100], "finish_reason": "length"}}
        usage = {{"prompt_tokens": 3, "completion_tokens": 1}}
        events = [{{"model": name, "choices": [choice]}}, {{"model": name, "choices": [], "usage": usage}}]
        self.answer("".join(f"data: {{json.dumps(each)}}\\n\\n" for each in events) + "data: [DONE]\\n\\n")
    def answer(self, content):
        data = content if isinstance(content, str) else json.dumps(content)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if data is content else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
'''


def test_replica_computes_with_a_vllm_that_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop, arguments, python = make_shop(tmp_path, []), tmp_path / "arguments", tmp_path / "python"
    python.write_text(FAKE_VLLM.format(python=sys.executable, arguments=str(arguments)))
    python.chmod(0o755)
    monkeypatch.setenv("VENEER_VLLM_PYTHON", str(python))
    monkeypatch.setenv("VENEER_LIBRARY", shop.library.location)
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    values = {"base": str(shop.base_dir), "engine": "vllm", "vllm_flags": ["--max-loras", "3"]}

    async def ask() -> str:
        built = replica(values)
        await built.start()
        try:
            await built.load()
            transport = httpx.ASGITransport(built.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                body = {"model": "tiny", "prompt": "Hi", "max_tokens": 1}
                return (await client.post("/v1/completions", json=body)).text
        finally:
            await built.stop()

    answer = asyncio.run(ask())
    assert json.loads(answer)["choices"][0]["text"] == " vllm", answer
    sent = json.loads(arguments.read_text())
    assert sent[sent.index("--max-loras") + 1] == "3"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"engine": "tgi"}, "tgi"),
        ({"vllm_flags": ["--port=1"]}, "--port"),
        ({"vllm_flags": "--max-loras 3"}, "vllm_flags is not a list"),
        ({"allowed_hosts": "a.example"}, "allowed_hosts is not a list"),
        ({"rows": "many"}, "rows is not a whole number"),
        ({"context": -1}, "context is not a whole number"),
    ],
)
def test_wrong_value_is_refused_before_deployment(values: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        serve_settings({"base": "tiny", **values})


def test_numbers_can_be_texts_as_on_the_command_line() -> None:
    assert serve_settings({"base": "tiny", "rows": "4"}).engine.rows == 4


def test_routes_that_would_load_an_adapter_on_one_replica_are_refused() -> None:
    routers = (vllm.vllm_routes, vllm.sglang_routes, vllm.aibrix_routes, vllm.dynamo_routes)
    paths = {getattr(route, "path", "") for router in routers for route in router.routes}
    loads = {path.replace("{lora_name:path}", "acme/support") for path in paths if "lora" in path}
    assert len(loads) >= 8
    assert [path for path in loads if not ONE_REPLICA.fullmatch(path)] == []
    assert [path for path in paths if "token" in path and ONE_REPLICA.fullmatch(path)] == []


@pytest.mark.fleet
@pytest.mark.parametrize("values", [{"base": "tiny", "row": 3}, {"rows": 3}])
def test_wrong_argument_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"unknown or missing arguments: (base|row)"):
        app(values)


@dataclass
class Cluster:
    """A Ray cluster that runs the application."""

    url: str
    shop: Shop
    address: str
    head: str
    client: openai.OpenAI

    def replicas(self) -> dict[str, int]:
        """Return the process id of each replica of `Model`, by actor id."""
        from ray.util.state import list_actors

        found = list_actors(address=self.address, filters=[("state", "=", "ALIVE")], detail=True, limit=1000)
        return {each.actor_id: each.pid for each in found if ":Model" in each.class_name and each.pid}


def ray_command(*words: str) -> list[str]:
    return [str(Path(sys.executable).with_name(words[0])), *words[1:]]


@contextmanager
def ray_serve(folder: Path, shop: Shop, args: dict[str, Any], scaling: dict[str, Any], **env: str) -> Iterator[Cluster]:
    """Run Ray and the application of deploy/ray/serve.yaml, with other arguments and autoscaling."""
    port, dashboard, serving = free_port(), free_port(), free_port()
    config = yaml.safe_load(DEPLOYED.read_text())
    (application,) = config["applications"]
    application["args"] = {"base": str(shop.base_dir), "dtype": "float32", **args}
    for each in application["deployments"]:
        if each["name"] == "Model":
            each["autoscaling_config"] |= scaling
            each["ray_actor_options"]["num_cpus"] = 1
        else:
            each["num_replicas"] = 1
    config |= {"http_options": {"host": "127.0.0.1", "port": serving}, "proxy_location": "HeadOnly"}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    variables = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}",
        "VENEER_HOME": str(home_with_kernels(folder / "home")),
        "VENEER_LIBRARY": shop.library.location,
        "OMP_NUM_THREADS": "1",
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        **SLOW_MACHINE,
        **env,
    }
    log = (folder / "log").open("wb")
    short = Path("/tmp") / f"ray-{os.getpid()}-{port}"  # socket paths have a maximum length
    head = ["ray", "start", "--head", "--block", "--port", str(port), "--num-cpus", "8", "--temp-dir", str(short)]
    head += ["--include-dashboard", "true", "--dashboard-port", str(dashboard), "--disable-usage-stats"]
    head += ["--object-store-memory", str(100 << 20)]
    processes = [subprocess.Popen(ray_command(*head), env=variables, stdout=log, stderr=log, start_new_session=True)]
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(lambda: answers(f"{address}/api/version"), 180)
        run = ray_command("serve", "run", str(folder / "serve.yaml"))
        processes.append(subprocess.Popen(run, env=variables, stdout=log, stderr=log, start_new_session=True))
        url = f"http://127.0.0.1:{serving}"
        wait_for(lambda: answers(f"{url}/ready") or dead(processes, folder), 600)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            cluster = Cluster(url, shop, address, f"127.0.0.1:{port}", client)
            wait_for(lambda: len(cluster.replicas()) == scaling["min_replicas"], 300)
            yield cluster
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(processes):
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        log.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    shop, scaling = make_shop(folder, ["plain", "rs"]), {"min_replicas": REPLICAS, "max_replicas": REPLICAS}
    with ray_serve(folder, shop, {"device": "cpu", "cache_bytes": "16M"}, scaling) as cluster:
        yield cluster


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def dead(processes: list[Any], folder: Path) -> bool:
    assert all(each.poll() is None for each in processes), (folder / "log").read_text(errors="replace")[-3000:]
    return False


@pytest.mark.fleet
def test_requests_above_the_target_start_a_second_replica(tmp_path: Path) -> None:
    """Ray's own status counts the replicas. Every answer is the reference's, before and after the change."""
    import ray
    from ray import serve

    shop, ids, stop, done = make_shop(tmp_path, ["plain"]), prompt(9), threading.Event(), [0]
    expected = shop.wanted([("plain", 1.0)], ids, 40)
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1}
    with ray_serve(tmp_path, shop, {"device": "cpu", "cache_bytes": "16M"}, scaling) as cluster:

        def load() -> None:
            while not stop.is_set():
                assert said(cluster.client.completions.create(**asking("plain", ids, 40))).same(expected)
                done[0] += 1

        def running() -> int:
            states: Any = serve.status().applications["veneer"].deployments["Model"].replica_states
            return int(states.get("RUNNING", 0))

        ray.init(cluster.head, log_to_driver=False)
        try:
            assert running() == 1
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                futures = [pool.submit(load) for _ in range(8)]
                try:
                    wait_for(lambda: running() == 2 or any(future.done() for future in futures), 300)
                    more = done[0] + 8
                    wait_for(lambda: done[0] >= more or any(future.done() for future in futures), 300)
                finally:
                    stop.set()
                for future in futures:
                    future.result(300)
            assert running() == 2
        finally:
            ray.shutdown()


@pytest.mark.peers
@pytest.mark.slow
def test_vllm_in_a_replica_answers_as_the_reference(tmp_path: Path) -> None:
    """The replica starts a real vLLM, which finds the adapter in the library; vLLM ends with Ray."""
    from tests.serve.test_vllm import PYTHON

    shop, ids = make_shop(tmp_path, ["plain"], head_dim=32), prompt(9)  # the smallest heads of vLLM on a CPU
    flags = ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"]
    env = {"VENEER_VLLM_PYTHON": str(PYTHON), "VENEER_VLLM_CACHE": str(tmp_path / "mixes")}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    args, scaling = {"engine": "vllm", "vllm_flags": flags}, {"min_replicas": 1, "max_replicas": 1}
    with ray_serve(tmp_path, shop, args, scaling, **env) as cluster:
        (replica,) = map(psutil.Process, cluster.replicas().values())
        engines = [each for each in replica.children(recursive=True) if "vllm" in " ".join(each.cmdline())]
        assert engines
        for name in ("plain", "tiny"):
            expected = shop.wanted([("plain", 1.0)] if name == "plain" else [], ids, 12)
            assert said(cluster.client.completions.create(**asking(name, ids))).text == expected.text
    wait_for(lambda: not any(each.is_running() for each in engines), 120)


@pytest.mark.fleet
def test_openai_routes_work_through_ray(cluster: Cluster) -> None:
    client, ids = cluster.client, prompt(9)
    assert {"tiny", "plain", "rs"} <= {card.id for card in client.models.list()}
    for name in ("plain", "rs"):
        expected = cluster.shop.wanted([(name, 1.0)], ids, 12)
        assert said(client.completions.create(**asking(name, ids))).same(expected)
        stream = client.completions.create(**asking(name, ids, stream=True))
        assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == expected.text
    messages: Any = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model="plain", messages=messages, max_tokens=5, temperature=0)
    chunks = client.chat.completions.create(model="plain", messages=messages, max_tokens=5, temperature=0, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(**asking("missing", ids))
    assert refused.value.code == "model_not_found"
    for path in ("load_lora_adapter", "lora_adapter/load", "lora_adapter/unload", "loras", "loras/plain"):
        one = httpx.post(f"{cluster.url}/v1/{path}", json={})
        assert one.status_code == 404
        assert "only one of several replicas" in one.json()["error"]["message"], path
    big = httpx.post(f"{cluster.url}/v1/completions", content=b" " * (9 << 20), timeout=60)
    assert big.status_code == 413


@pytest.mark.fleet
def test_killed_replica_loses_no_request(cluster: Cluster) -> None:
    """A third of the requests stream. A stream that has begun may end with an error event, never silently."""
    client, ids, stop = cluster.client, prompt(9), threading.Event()
    expected = {name: cluster.shop.wanted([(name, 1.0)], ids, 40) for name in ("plain", "rs")}
    done, broken, killed = [0], list[str](), threading.Event()

    def load(number: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            name = ("plain", "rs")[count % 2]
            if number % 3:
                assert said(client.completions.create(**asking(name, ids, 40))).same(expected[name])
            else:
                try:
                    chunks = client.completions.create(**asking(name, ids, 40, stream=True))
                    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
                    assert text == expected[name].text
                except openai.APIError as error:
                    broken.append(str(error.body))
            done[0] += 1

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(load, number) for number in range(6)]
        try:
            wait_for(lambda: done[0] >= 6 or any(future.done() for future in futures), 300)
            before = cluster.replicas()
            (victim, pid), *_ = before.items()
            os.kill(pid, signal.SIGKILL)
            killed.set()
            wait_for(lambda: victim not in cluster.replicas(), 120)
            wait_for(lambda: len(cluster.replicas()) == REPLICAS or any(future.done() for future in futures), 300)
            more = done[0] + 6
            wait_for(lambda: done[0] >= more or any(future.done() for future in futures), 300)
        finally:
            stop.set()
        for future in futures:
            future.result(300)
    assert killed.is_set()
    assert len(broken) <= 2, broken  # the killed replica's own streams
    assert all("cannot be used at the moment" in text for text in broken), broken


@pytest.mark.fleet
def test_adapter_goes_to_the_replica_that_has_it(cluster: Cluster) -> None:
    """After its first answers, an adapter's requests reach one replica, which caches their prompts."""
    ids = prompt(64, seed=5)
    cached = [said(cluster.client.completions.create(**asking("rs", ids, 2))).cached for _ in range(12)]
    assert sum(each > 0 for each in cached) >= 12 - REPLICAS, json.dumps(cached)
