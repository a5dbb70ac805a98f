"""The Ray Serve application runs on a real Ray, with three replicas; one is killed under load."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.homes import home_with_kernels
from tests.serve.http.toy import free_port, wait_for
from tests.serve.whole import ROOT, Shop, asking, make_shop, prompt, said
from veneer.errors import ConfigError
from veneer.serve.ray import adapter_name, app, serve_settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own modules
DEPLOYED = ROOT / "deploy" / "ray" / "serve.yaml"
REPLICAS = 3
SLOW_MACHINE = {"RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300", "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "300"}
"""Ray's own limits on the start of its dashboard are 60 and 30 seconds (ray_constants.py, dashboard/consts.py)."""
PASSWORD = "password-of-the-database"


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_TENANTS", f"postgresql://u:{PASSWORD}@db/t")
    settings = serve_settings({"base": "tiny"})
    assert settings.tenants == f"postgresql://u:{PASSWORD}@db/t"
    assert not settings.here  # so that tenants need keys
    for secret in ("tenants", "admin_key", "keys"):
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
    client: openai.OpenAI

    def replicas(self) -> dict[str, int]:
        """Return the process id of each replica of `Model`, by actor id."""
        from ray.util.state import list_actors

        found = list_actors(address=self.address, filters=[("state", "=", "ALIVE")], detail=True, limit=1000)
        return {each.actor_id: each.pid for each in found if ":Model" in each.class_name and each.pid}


def ray_command(*words: str) -> list[str]:
    return [str(Path(sys.executable).with_name(words[0])), *words[1:]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    shop = make_shop(folder, ["plain", "rs"])
    port, dashboard, serving = free_port(), free_port(), free_port()
    config = yaml.safe_load(DEPLOYED.read_text())
    (application,) = config["applications"]
    application["args"] = {"base": str(shop.base_dir), "dtype": "float32", "device": "cpu", "cache_bytes": "16M"}
    for each in application["deployments"]:
        if each["name"] == "Model":
            each["autoscaling_config"] |= {"min_replicas": REPLICAS, "max_replicas": REPLICAS}
            each["ray_actor_options"]["num_cpus"] = 1
        else:
            each["num_replicas"] = 1
    config |= {"http_options": {"host": "127.0.0.1", "port": serving}, "proxy_location": "HeadOnly"}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    env = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}",
        "VENEER_HOME": str(home_with_kernels(folder / "home")),
        "VENEER_LIBRARY": shop.library.location,
        "OMP_NUM_THREADS": "1",
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        **SLOW_MACHINE,
    }
    log = (folder / "log").open("wb")
    short = Path("/tmp") / f"ray-{os.getpid()}"  # socket paths have a maximum length
    head = ["ray", "start", "--head", "--block", "--port", str(port), "--num-cpus", "8", "--temp-dir", str(short)]
    head += ["--include-dashboard", "true", "--dashboard-port", str(dashboard), "--disable-usage-stats"]
    head += ["--object-store-memory", str(100 << 20)]
    processes = [subprocess.Popen(ray_command(*head), env=env, stdout=log, stderr=log, start_new_session=True)]
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(lambda: answers(f"{address}/api/version"), 180)
        run = ray_command("serve", "run", str(folder / "serve.yaml"))
        processes.append(subprocess.Popen(run, env=env, stdout=log, stderr=log, start_new_session=True))
        url = f"http://127.0.0.1:{serving}"
        wait_for(lambda: answers(f"{url}/ready") or dead(processes, folder), 600)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            cluster = Cluster(url, shop, address, client)
            wait_for(lambda: len(cluster.replicas()) == REPLICAS, 300)
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


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def dead(processes: list[Any], folder: Path) -> bool:
    assert all(each.poll() is None for each in processes), (folder / "log").read_text(errors="replace")[-3000:]
    return False


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
    one = httpx.post(f"{cluster.url}/v1/load_lora_adapter", json={})
    assert one.status_code == 404
    assert "only one of several replicas" in one.json()["error"]["message"]
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
