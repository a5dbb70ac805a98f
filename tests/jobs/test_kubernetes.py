"""Kubernetes Jobs through the official client, against a server with Kubernetes' answers.

Bodies are from the API's reference (batch/v1 Job, core/v1 Pod), with what a cluster fills in."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="pip install 'veneer[kubernetes]'")

from kubernetes import client

from tests.jobs.fakes import queued, taken
from veneer.errors import ConfigError, UnavailableError
from veneer.jobs.kubernetes import KubernetesExecutor
from veneer.jobs.store import JobLease, JobStore
from veneer.library.library import open_library

ENVIRONMENT = {
    "VENEER_HOME": "/veneer",
    "VENEER_LIBRARY": "/veneer/library",
    "VENEER_LIBRARY_INDEX": "postgresql://u:secret@h/d",
}
REACHED = {"status": "True", "reason": "CompletionsReached", "message": "Reached expected number of succeeded pods"}
LIMIT = {"status": "True", "reason": "BackoffLimitExceeded", "message": "Job has reached the specified backoff limit"}
START = {"startTime": "2026-11-28T12:00:00Z"}
RUNNING = {"active": 1, "ready": 1, "terminating": 0, "uncountedTerminatedPods": {}, **START}
DONE = {"succeeded": 1, "conditions": [{"type": "Complete", **REACHED}], **START}
FAILED = {"failed": 1, "conditions": [{"type": "Failed", **LIMIT}], **START}


class Cluster:
    """The server's Jobs and received requests. `refuse`: status of every answer."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.reason = "Error"
        self.asked: list[tuple[str, str, Any]] = []
        self.refuse = 0

    def answer(self, verb: str, path: str, body: Any) -> tuple[int, Any]:
        self.asked.append((verb, path, body))
        if self.refuse:
            return self.refuse, status_of(self.refuse, "Forbidden" if self.refuse == 403 else "InternalError")
        if path.startswith("/api/v1/namespaces/training/pods"):
            terminated = {"exitCode": 137, "reason": self.reason, "startedAt": "2026-11-28T12:00:00Z"}
            container = {"name": "train", "image": "x", "imageID": "y", "ready": False, "restartCount": 0}
            container["state"] = {"terminated": terminated}
            pod = {"metadata": {"name": "a-pod"}, "status": {"phase": "Failed", "containerStatuses": [container]}}
            return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [pod]}
        handle = re.fullmatch(r"/apis/batch/v1/namespaces/training/jobs(?:/([a-z0-9-]+))?(/status)?(?:\?.*)?", path)
        assert handle is not None, path
        if verb == "POST":
            name = body["metadata"]["name"]
            if name in self.jobs:
                return 409, status_of(409, "AlreadyExists")
            self.jobs[name] = body | {"status": RUNNING}
            return 201, self.jobs[name]
        if handle[1] not in self.jobs:
            return 404, status_of(404, "NotFound")
        if verb == "DELETE":
            del self.jobs[handle[1]]
            return 200, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return 200, self.jobs[handle[1]]


def status_of(code: int, reason: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason, "code": code}


@pytest.fixture
def cluster() -> Iterator[tuple[Cluster, Any]]:
    state = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            code, answer = state.answer(self.command, self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = handle_any

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    settings = client.Configuration(host=f"http://127.0.0.1:{server.server_port}")
    settings.retries = False
    with client.ApiClient(settings) as api:
        yield state, api
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def lease(tmp_path: Path) -> JobLease:
    with open_library(tmp_path / "library") as library:
        store = JobStore(library)
        queued(store, plan={"peak_bytes": 2 << 30, "device": {"name": "cpu"}})
        return taken(store)


def executor_of(api: Any, **options: Any) -> KubernetesExecutor:
    return KubernetesExecutor(image="registry/veneer:1.0", namespace="training", api=api, **options)


def test_kubernetes_job_from_start_to_end(cluster: tuple[Cluster, Any], lease: JobLease) -> None:
    state, api = cluster
    executor = executor_of(api, claim="veneer-home", secret="veneer", gpus=1, grace=30)
    handle = executor.start(lease, ENVIRONMENT)
    assert executor.start(lease, ENVIRONMENT) == handle  # asked twice, started once
    body = state.jobs[handle]
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", handle)  # what may be a name there (RFC 1123)
    assert body["spec"]["backoffLimit"] == 0
    pod = body["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    python, dash, module, file = container["command"]
    assert (python, dash, module) == ("python", "-m", "veneer.jobs.process")
    assert oct(Path(file).stat().st_mode & 0o777) == "0o600"
    handover = json.loads(Path(file).read_text())
    assert (handover["job"], handover["token"]) == (lease.job.id, lease.token)
    assert handover["environment"] == {key: ENVIRONMENT[key] for key in ("VENEER_HOME", "VENEER_LIBRARY")}
    assert container["resources"]["limits"] == {"memory": str((3 << 30) + (512 << 20)), "nvidia.com/gpu": "1"}
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 30)
    assert container["volumeMounts"][0]["mountPath"] == "/veneer"
    assert "secret@" not in json.dumps(body)
    assert lease.token not in json.dumps(body)
    assert executor.poll(handle) is None
    body["status"] = DONE
    status = executor.poll(handle)
    assert not status.memory
    body["status"] = FAILED
    status = executor.poll(handle)
    assert "BackoffLimitExceeded: Job has reached the specified backoff limit" in status.why
    state.reason = "OOMKilled"
    status = executor.poll(handle)
    assert status.memory


def test_manifest_without_a_secret_has_no_password(cluster: tuple[Cluster, Any], lease: JobLease) -> None:
    state, api = cluster
    handle = executor_of(api).start(lease, ENVIRONMENT)
    assert "secret@" not in json.dumps(state.jobs[handle])
    file = Path(state.jobs[handle]["spec"]["template"]["spec"]["containers"][0]["command"][-1])
    assert json.loads(file.read_text())["environment"] == ENVIRONMENT


def test_soft_stop_waits_for_the_pod(cluster: tuple[Cluster, Any], lease: JobLease) -> None:
    state, api = cluster
    executor = executor_of(api)
    handle = executor.start(lease, ENVIRONMENT)
    executor.stop(handle)
    assert "propagationPolicy=Foreground" in state.asked[-1][1]
    assert "gracePeriodSeconds" not in state.asked[-1][1]
    status = executor.poll(handle)
    assert "does not know it" in status.why
    executor.stop(handle, hard=True)  # it is gone: nothing to do
    assert "gracePeriodSeconds=0" in state.asked[-1][1]


def test_errors_of_the_cluster_are_told_apart(cluster: tuple[Cluster, Any], lease: JobLease) -> None:
    state, api = cluster
    executor = executor_of(api)
    state.refuse = 403
    with pytest.raises(ConfigError, match=r"answered 403(.|\n)*the rights of this worker"):
        executor.start(lease, ENVIRONMENT)
    state.refuse = 500
    with pytest.raises(UnavailableError, match="answered 500"):
        executor.poll("a-place")
    settings = client.Configuration(host="http://127.0.0.1:9")
    settings.retries = False
    with client.ApiClient(settings) as nobody, pytest.raises(UnavailableError, match="does not answer"):
        executor_of(nobody).poll("a-place")
