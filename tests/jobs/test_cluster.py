"""Executors run jobs on Kubernetes (a fake API) and on Ray (real, marked fleet), without showing secrets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.jobs.fake_kubernetes import VERSION, Cluster, kubernetes
from tests.jobs.fakes import queued, worker_thread
from tests.jobs.small import STEPS, small_config
from tests.library.conftest import quick  # noqa: F401
from tests.serve.http.toy import wait_for
from tests.test_readme import ROOT
from veneer.errors import ConfigError, UnavailableError
from veneer.jobs import cluster as cluster_module
from veneer.jobs.cluster import ExecutorSettings, KubernetesExecutor, executor_at
from veneer.jobs.executors import ExitStatus, LocalExecutor, memory_of
from veneer.jobs.process import process_environment
from veneer.jobs.store import JobLease, JobStore, LeaseLost
from veneer.jobs.validate import validate_job
from veneer.library.library import Library, open_library
from veneer.plan.tables import device_named

JOBS = ROOT / "deploy" / "jobs"
PASSWORD = "password-of-the-database"


@pytest.fixture
def library(quick: Path) -> Iterator[Library]:  # noqa: F811
    with open_library(quick / "library") as opened:
        yield opened


def leased(store: JobStore, **more: Any) -> JobLease:
    job = queued(store, **more)
    return store.acquire("w", 600, only=job.id)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll Kubernetes without pauses."""
    monkeypatch.setattr(cluster_module, "POLL_SECONDS", 0.0)


def executor_of(cluster: Cluster, **more: Any) -> KubernetesExecutor:
    file = more.pop("manifest", JOBS / "job.yaml")
    settings = ExecutorSettings(kind="kubernetes", manifest=file, namespace="veneer", server=cluster.url, **more)
    return KubernetesExecutor(settings)


# -- Kubernetes --------------------------------------------------------------------------------------------------------


def test_manifests_are_valid() -> None:
    kinds = []
    for file in ("job.yaml", "worker.yaml"):
        for body in yaml.safe_load_all((JOBS / file).read_text()):
            kubernetes_validate.validate(body, VERSION, strict=True)
            kinds.append(body["kind"])
    assert kinds == ["Job", "ServiceAccount", "Role", "RoleBinding", "Deployment"]
    section = executor_at(JOBS / "kubernetes.yaml")
    assert isinstance(section, KubernetesExecutor)
    assert section.device == device_named("h100-80gb")


def test_role_permits_exactly_the_calls(library: Library, store: JobStore, tmp_path: Path, now: None) -> None:
    """Kubernetes names the verbs get, list, create, delete and deletecollection by method and path."""
    with kubernetes(tmp_path / "log") as cluster:
        executor = executor_of(cluster)
        handle = executor.start(leased(store), {})
        executor.poll(handle)
        cluster.pods.clear()
        executor.poll(handle)
        executor.stop(handle, hard=True)
        made = set()
        for method, path, _ in cluster.requests:
            resource, _, name = path.partition("?")[0].partition("/namespaces/veneer/")[2].partition("/")
            verb = {
                "POST": "create",
                "GET": "get" if name else "list",
                "DELETE": "delete" if name else "deletecollection",
            }
            made.add((resource, verb[method]))
    role = next(b for b in yaml.safe_load_all((JOBS / "worker.yaml").read_text()) if b["kind"] == "Role")
    assert made == {(r, verb) for rule in role["rules"] for r in rule["resources"] for verb in rule["verbs"]}


def test_manifest_of_a_job_has_no_secret(library: Library, store: JobStore, tmp_path: Path) -> None:
    lease = leased(store)
    environment = {"VENEER_LIBRARY_INDEX": f"postgresql://u:{PASSWORD}@db/veneer", "VENEER_TENANTS": PASSWORD}
    with kubernetes(tmp_path / "log") as cluster:
        executor_of(cluster).start(lease, environment)
        sent = json.dumps(cluster.requests)
    assert lease.job.id in sent
    assert PASSWORD not in sent
    assert lease.token not in sent


def test_url_in_a_manifest_is_refused(tmp_path: Path) -> None:
    body = yaml.safe_load((JOBS / "job.yaml").read_text())
    url = f"postgresql://u:{PASSWORD}@db/veneer"
    body["spec"]["template"]["spec"]["containers"][0]["env"] = [{"name": "VENEER_TENANTS", "value": url}]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(body))
    with pytest.raises(ConfigError, match="VENEER_TENANTS") as refused:
        KubernetesExecutor(
            ExecutorSettings(kind="kubernetes", manifest=tmp_path / "job.yaml", server="http://localhost")
        )
    assert PASSWORD not in str(refused.value)


@pytest.mark.parametrize(("code", "is_blamed"), [(403, True), (422, False), (500, False)])
def test_only_a_denied_request_blames_the_service_account(
    library: Library, store: JobStore, tmp_path: Path, code: int, is_blamed: bool
) -> None:
    with kubernetes(tmp_path / "log") as cluster:
        cluster.answer = lambda *request: (code, {})  # type: ignore[method-assign]
        with pytest.raises(UnavailableError, match=str(code)) as refused:
            executor_of(cluster).start(leased(store), {})
    assert ("service account" in str(refused.value)) == is_blamed


@pytest.mark.parametrize(
    ("pod", "message"),
    [
        ({"containers": [{"env": [{"value": "redis://h"}]}]}, "not a Job"),
        ({"containers": ["python"]}, "not a Job"),
    ],
)
def test_unsafe_manifest_is_refused(tmp_path: Path, pod: dict[str, Any], message: str) -> None:
    manifest = tmp_path / "job.yaml"
    manifest.write_text(yaml.safe_dump({"spec": {"template": {"spec": pod}}}))
    with pytest.raises(ConfigError, match=message):
        KubernetesExecutor(ExecutorSettings(kind="kubernetes", manifest=manifest, server="http://localhost"))


@pytest.mark.parametrize(
    ("phase", "reason", "code", "memory"),
    [("Succeeded", "Completed", 0, False), ("Failed", "OOMKilled", 137, True), ("Failed", "Error", 75, False)],
)
def test_end_of_a_pod_is_reported(
    library: Library, store: JobStore, tmp_path: Path, now: None, phase: str, reason: str, code: int, memory: bool
) -> None:
    with kubernetes(tmp_path / "log") as cluster:
        executor = executor_of(cluster)
        handle = executor.start(leased(store), {})
        assert executor.poll(handle) is None
        cluster.state(handle, "Running")
        assert executor.poll(handle) is None
        cluster.state(handle, phase, reason, code)
        ended = executor.poll(handle)
    assert ended is not None
    assert (ended.memory, str(code) in ended.why, reason in ended.why) == (memory, True, True)


def test_deleted_job_has_ended_only_without_pods(library: Library, store: JobStore, tmp_path: Path, now: None) -> None:
    with kubernetes(tmp_path / "log") as cluster:
        executor = executor_of(cluster)
        handle = executor.start(leased(store), {})
        cluster.state(handle, "Running")
        executor.stop(handle)
        assert handle not in cluster.jobs
        assert executor.poll(handle) is None  # the pod is saving its state
        executor.stop(handle, hard=True)
        assert executor.poll(handle) == ExitStatus("its Kubernetes Job was deleted")


def test_repeated_start_creates_one_job(library: Library, store: JobStore, tmp_path: Path) -> None:
    """The first answer can get lost."""
    lease = leased(store)
    with kubernetes(tmp_path / "log") as cluster:
        executor = executor_of(cluster)
        assert executor.start(lease, {}) == executor.start(lease, {})
        assert len(cluster.jobs) == 1


def test_outage_of_the_api_ends_no_job(library: Library, store: JobStore, tmp_path: Path, now: None) -> None:
    lease = leased(store)
    with kubernetes(tmp_path / "log") as cluster:
        executor = executor_of(cluster)
        handle = executor.start(lease, {})
        cluster.away = True
        assert executor.poll(handle) is None
        with pytest.raises(UnavailableError):
            executor.start(lease, {})
    assert executor.poll(handle) is None  # nothing listens any more
    with pytest.raises(UnavailableError):
        executor.start(lease, {})


def test_cpu_plan_limits_the_pods_memory(library: Library, store: JobStore, tmp_path: Path) -> None:
    plans = [{"peak_bytes": 1 << 30, "device": {"name": name}} for name in ("cpu", "h100-80gb")]
    with kubernetes(tmp_path / "log") as cluster:
        leases = [leased(store, plan=plan) for plan in plans]
        handles = [executor_of(cluster).start(lease, {}) for lease in leases]
        specs = [cluster.pods[handle]["spec"]["containers"][0]["resources"] for handle in handles]
    assert specs[0]["limits"]["memory"] == str(memory_of(leases[0].job))
    assert "memory" not in specs[1]["limits"]


def test_lease_is_claimed_once(library: Library, store: JobStore, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    lease = leased(store)
    for attempt in (lease.job.attempt + 1, lease.job.attempt - 1):
        with pytest.raises(LeaseLost):
            store.claim(lease.job.id, attempt)
    assert store.claim(lease.job.id, lease.job.attempt).token == lease.token
    with pytest.raises(LeaseLost):  # a second pod of the same Job
        store.claim(lease.job.id, lease.job.attempt)
    other = leased(store)
    store.cancel("acme", other.job.id)
    with pytest.raises(LeaseLost):
        store.claim(other.job.id, other.job.attempt)


@contextmanager
def working(library: Library, executor: LocalExecutor, **options: Any) -> Iterator[Callable[[], None]]:
    """Run a worker in a thread; yield a function that fails if the worker has failed."""
    settings = {"poll": 0.05, "grace": 60.0, "lease": 60.0} | options
    with worker_thread(library, executor, 120, **settings) as (_, check):
        yield check


def submitted(store: JobStore, folder: Path, **sections: Any) -> str:
    """Queue a small job, validated for a GPU, so that nothing is benchmarked; return its id."""
    from tests.jobs.fakes import FixedTerms

    job = store.create("acme", small_config(folder, **sections), name="support")
    lease = store.acquire("w", 60, "validating", only=job.id)
    assert validate_job(store, lease, FixedTerms(store), device_named("h100-80gb")).state == "queued"
    return job.id


@pytest.mark.slow
def test_pod_trains_a_job_with_the_operators_secret(
    library: Library, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: None
) -> None:
    """The pod's process finds the database by its Secret, claims the lease, trains, and ends the job."""
    body = yaml.safe_load((JOBS / "job.yaml").read_text())
    body["spec"]["template"]["spec"]["containers"][0]["env"] = []  # VENEER_HOME is this test's
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(body))
    secret = dict(process_environment(library)) | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    job = submitted(store, tmp_path)
    with kubernetes(tmp_path / "log", secret, runs=True) as cluster:
        with working(library, executor_of(cluster, manifest=tmp_path / "job.yaml")) as check:
            wait_for(lambda: check() or store.get(None, job).state not in ("queued", "running"), 300)
        sent = json.dumps(cluster.requests)
    ended = store.get(None, job)
    assert ended.state == "succeeded", (ended.error, (tmp_path / "log").read_text()[-2000:])
    assert (ended.step, ended.result["reference"]) == (STEPS, "acme/support@1")
    assert secret["VENEER_LIBRARY_INDEX"] not in sent
