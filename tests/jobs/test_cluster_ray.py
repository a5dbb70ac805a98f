"""A real Ray with two nodes trains jobs queued over HTTP, survives a killed node, and shows no secrets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.jobs.test_cluster import PASSWORD, leased, working
from tests.jobs.test_whole import ROWS
from tests.library.conftest import postgres, quick  # noqa: F401
from tests.serve.http.toy import free_port, wait_for
from tests.serve.tenancy.conftest import new_tenant
from tests.serve.test_ray import SLOW_MACHINE
from tests.serve.whole import ROOT, make_shop, served
from veneer.jobs.build import training
from veneer.jobs.cluster import executor_at
from veneer.jobs.executors import LocalExecutor
from veneer.jobs.process import process_environment
from veneer.jobs.store import JobLease, JobStore
from veneer.library.library import Library, open_library
from veneer.serve.tenancy.store import Store

pytestmark = [pytest.mark.fleet, pytest.mark.filterwarnings("ignore")]  # Ray warns while it starts and stops
TRAIN = "train"
"""Resource of the nodes that train; the head has none."""


@dataclass
class Ray:
    """A cluster: a head without resources, and nodes that train."""

    address: str
    dashboard: str
    folder: Path
    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    def section(self) -> str:
        """Return the name of an executor file for this cluster."""
        file = self.folder / "jobs.yaml"
        file.write_text(json.dumps({"kind": "ray", "address": self.address, "resources": {TRAIN: 1}}))
        return str(file)

    def node_of(self, process: psutil.Process) -> Any:
        """Return the node whose raylet started the process."""
        parents = {each.pid for each in process.parents()}
        return next(n for n in self.nodes if {p.process.pid for p in n.all_processes["raylet"]} & parents)


def job_processes() -> list[psutil.Process]:
    """Return the jobs' processes on this machine, except those that other tests' users run."""
    found = []
    for each in psutil.process_iter(["cmdline", "uids"]):
        if (each.info["cmdline"] or [])[-2:] == ["-m", "veneer.jobs.process"] and each.info["uids"].real == os.getuid():
            found.append(each)
    return found


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in SLOW_MACHINE.items():
            patch.setenv(name, seconds)
        import ray  # reads these variables
        from ray.cluster_utils import Cluster

        patch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        dashboard = free_port()
        head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": dashboard, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        whole = Ray(cluster.address, f"http://127.0.0.1:{dashboard}", tmp_path_factory.mktemp("ray"), cluster)
        try:
            for _ in range(2):
                add_node(whole)
            yield whole
        finally:
            ray.shutdown()
            cluster.shutdown()


def add_node(whole: Ray) -> None:
    whole.nodes.append(whole.cluster.add_node(num_cpus=1, resources={TRAIN: 1}, object_store_memory=100 << 20))


@pytest.fixture
def library(quick: Path, postgres: Any) -> Iterator[Library]:  # noqa: F811
    """A library whose database URL has a password."""
    with open_library(quick / "library", postgres().replace("postgres@", f"postgres:{PASSWORD}@")) as opened:
        yield opened


@pytest.fixture
def store(library: Library) -> JobStore:
    return JobStore(library)


def shown_by_ray(whole: Ray) -> str:
    """Return what Ray's state API, dashboard and log files show, and the arguments of all processes."""
    from ray.util.state import list_actors, list_jobs, list_runtime_envs, list_tasks, list_workers

    options: Any = {"address": whole.dashboard, "detail": True, "limit": 1000, "raise_on_missing_output": False}
    texts = [repr(call(**options)) for call in (list_actors, list_tasks, list_workers, list_jobs, list_runtime_envs)]
    texts += [httpx.get(f"{whole.dashboard}{path}", timeout=60).text for path in ("/logical/actors", "/api/jobs/")]
    logs = Path(whole.cluster.head_node.get_session_dir_path()) / "logs"
    texts += [file.read_text(errors="replace") for file in logs.rglob("*") if file.is_file()]
    for process in psutil.process_iter(["cmdline"]):
        texts.append(" ".join(process.info["cmdline"] or []))
    assert "LocalExecutor" in texts[0]  # the listing works
    return "\n".join(texts)


def test_processes_stop_and_secrets_stay_hidden(ray_cluster: Ray, library: Library, store: JobStore) -> None:
    """The executor's laws: a process runs, is terminated or killed, and its end is reported."""
    executor = executor_at(Path(ray_cluster.section()))
    environment = process_environment(library)
    assert PASSWORD in environment["VENEER_LIBRARY_INDEX"]
    for hard, number in ((False, "SIGTERM"), (True, "SIGKILL")):
        lease = leased(store)
        handle = executor.start(JobLease(lease.job, "token-of-the-lease"), environment)
        (process,) = wait_for(job_processes, 120)
        assert executor.poll(handle) is None
        listed = shown_by_ray(ray_cluster)
        assert PASSWORD not in listed
        assert "token-of-the-lease" not in listed
        executor.stop(handle, hard=hard)
        ended = wait_for(lambda: executor.poll(handle), 120)  # noqa: B023
        assert number in ended.why or "exit code" in ended.why
        assert not process.is_running()
    assert executor.poll("unknown") == LocalExecutor().poll("unknown")


def test_job_waits_for_a_free_node(ray_cluster: Ray, library: Library, store: JobStore) -> None:
    executor = executor_at(Path(ray_cluster.section()))
    environment = process_environment(library)
    jobs = [leased(store).job for _ in range(3)]
    handles = [executor.start(JobLease(job, "token"), environment) for job in jobs]
    assert executor.poll(handles[2]) is None
    executor.stop(handles[2])  # before the job has a node
    assert wait_for(lambda: executor.poll(handles[2]), 120).why == "its Ray node or actor ended"
    for handle in handles[:2]:
        wait_for(lambda: executor.poll(handle), 120)  # noqa: B023
    for job in jobs[:2]:  # the processes reached the database, which does not have this token
        assert "is no longer this worker's" in job.log.read_text()


def test_job_over_http_survives_its_node(ray_cluster: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One job is cancelled; another loses its node, and resumes on another node to the same bytes."""
    shop, where = make_shop(tmp_path, []), str(tmp_path / "tenants.sqlite")
    tenants = Store(where)
    key = new_tenant(tenants, "acme")
    monkeypatch.setenv("VENEER_LIBRARY", shop.library.location)
    monkeypatch.setenv("VENEER_TENANTS", where)
    jobs, executor = JobStore(shop.library), executor_at(Path(ray_cluster.section()))
    with (
        served(shop, extend=training, tenants=where, folders=()) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client,
        working(shop.library, executor, tenants=tenants) as check,
    ):
        data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        file = client.files.create(file=("tickets.jsonl", data), purpose="fine-tune").id
        hyper: Any = {"n_epochs": 40, "batch_size": 4, "learning_rate_multiplier": 10}
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyper}}

        def create() -> str:
            new = client.fine_tuning.jobs.create(model="tiny", training_file=file, method=method, seed=3)
            return str(new.id)

        def state(job: str) -> str:
            check()
            return jobs.get(None, job).state

        cancelled = create()
        wait_for(lambda: state(cancelled) == "running" and jobs.get(None, cancelled).step > 0, 300)
        assert len(job_processes()) == 1
        assert client.fine_tuning.jobs.cancel(cancelled).status == "cancelled"
        wait_for(lambda: check() or not job_processes(), 120)

        killed = create()
        wait_for(lambda: jobs.checkpoints("acme", killed) or state(killed) == "failed", 300)
        (process,) = job_processes()
        node = ray_cluster.node_of(process)
        ray_cluster.cluster.remove_node(node, allow_graceful=False)
        ray_cluster.nodes.remove(node)
        wait_for(lambda: jobs.get(None, killed).attempt == 2 and state(killed) == "running" and job_processes(), 300)
        resumed = wait_for(lambda: [p for p in job_processes() if p.pid != process.pid], 120)
        assert ray_cluster.node_of(resumed[0]) in ray_cluster.nodes
        add_node(ray_cluster)
        wait_for(lambda: state(killed) in ("succeeded", "failed"), 600)

        undisturbed = create()
        wait_for(lambda: state(undisturbed) in ("succeeded", "failed"), 600)
    ended = [jobs.get(None, job) for job in (killed, undisturbed)]
    assert [job.state for job in ended] == ["succeeded", "succeeded"], [job.error for job in ended]
    assert [job.attempt for job in ended] == [2, 1]
    steps = [e.data["step"] for e in jobs.events_of(None, killed, "metrics")]
    assert steps == [*range(1, ended[0].steps + 1)]
    files = [shop.library.resolve(job.result["reference"]) / "adapter_model.safetensors" for job in ended]
    assert files[0].read_bytes() == files[1].read_bytes()
    tenants.close()
