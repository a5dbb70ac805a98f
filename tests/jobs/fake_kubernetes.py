"""A small Kubernetes API: the five calls of `KubernetesExecutor`, and a kubelet that runs a Job's command.

Requests are checked with kubernetes-validate, and so are the answers' Jobs and pods, whose fields are those of
Kubernetes' API reference ("Job v1", "Pod v1", "Status v1"). A real API server is in no package index.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate

VERSION = "1.35"


@dataclass
class Cluster:
    """The state of the cluster.

    secret: variables of the Secret that the manifests name
    runs: whether pods run their command as a process; otherwise, tests set the pods' states
    away: whether the API answers 503"""

    log: Path
    secret: Mapping[str, str] = field(default_factory=dict)
    runs: bool = False
    url: str = ""
    away: bool = False
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)

    def create(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        kubernetes_validate.validate(body, VERSION, strict=True)
        name = body["metadata"]["name"]
        if name in self.jobs:
            return 409, status(409, "AlreadyExists")
        self.jobs[name] = body | {"status": {"active": 1, "startTime": "2026-12-02T05:00:00Z"}}
        template = body["spec"]["template"]
        metadata = {**template["metadata"], "name": f"{name}-x7k2p"}
        self.pods[name] = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        self.pods[name]["status"] = {"phase": "Pending"}
        if self.runs:
            (container,) = template["spec"]["containers"]
            env = {each["name"]: each["value"] for each in container.get("env", [])}
            if container.get("envFrom") == [{"secretRef": {"name": "veneer"}}]:
                env |= self.secret
            command = [sys.executable if word == "python" else word for word in container["command"]]
            with self.log.open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    command, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            self.state(name, "Running")
        return 201, self.jobs[name]

    def state(self, name: str, phase: str, reason: str = "", code: int = 0) -> None:
        """Set a pod's phase, and its container's reason and exit code."""
        container = {"name": "job", "image": "veneer", "imageID": "", "ready": False, "restartCount": 0}
        state = {"running": {}} if phase == "Running" else {"terminated": {"reason": reason, "exitCode": code}}
        self.pods[name]["status"] = {"phase": phase, "containerStatuses": [container | {"state": state}]}
        kubernetes_validate.validate(self.pods[name], VERSION, strict=True)

    def observe(self) -> None:
        for name, process in [*self.processes.items()]:
            if (code := process.poll()) is not None:
                del self.processes[name]
                if name in self.pods:
                    code = 128 - code if code < 0 else code
                    self.state(name, "Failed" if code else "Succeeded", "Error" if code else "Completed", code)
                    if name not in self.jobs:  # the Job was deleted: its pod goes once the process has ended
                        del self.pods[name]

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, dict[str, Any]]:
        self.observe()
        jobs, pods = "/apis/batch/v1/namespaces/veneer/jobs", "/api/v1/namespaces/veneer/pods"
        if self.away:
            return 503, status(503, "ServiceUnavailable")
        if (method, path) == ("POST", jobs):
            return self.create(body)
        if path == pods:
            key, _, value = query["labelSelector"][0].partition("=")
            chosen = [name for name, pod in self.pods.items() if pod["metadata"]["labels"].get(key) == value]
            if method == "DELETE":
                assert body == {"gracePeriodSeconds": 0}
                self.end(chosen, signal.SIGKILL)
            return 200, {
                "apiVersion": "v1",
                "kind": "PodList",
                "items": [self.pods[n] for n in chosen if n in self.pods],
            }
        name = path.removeprefix(f"{jobs}/")
        if name not in self.jobs:
            return 404, status(404, "NotFound")
        if method == "DELETE":
            assert body == {"propagationPolicy": "Background"}
            del self.jobs[name]
            self.end([name], signal.SIGTERM)
            return 200, status(200, "")
        return 200, self.jobs[name]

    def end(self, names: list[str], number: int) -> None:
        for name in names:
            if name in self.processes:
                self.processes[name].send_signal(number)
            elif name in self.pods and (number == signal.SIGKILL or self.pods[name]["status"]["phase"] != "Running"):
                self.pods.pop(name, None)


def status(code: int, reason: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Status", "status": "Failure" if code >= 400 else "Success", "code": code} | (
        {"reason": reason, "message": reason} if reason else {}
    )


@contextmanager
def kubernetes(log: Path, secret: Mapping[str, str] = {}, *, runs: bool = False) -> Iterator[Cluster]:
    cluster, lock = Cluster(log, secret, runs), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            address = urlsplit(self.path)
            sent = self.rfile.read(int(self.headers.get("content-length") or 0))
            body = json.loads(sent) if sent else None
            with lock:
                cluster.requests.append((self.command, self.path, body))
                code, content = cluster.answer(self.command, address.path, parse_qs(address.query), body)
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = handle_one

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    cluster.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield cluster
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        for process in cluster.processes.values():
            process.kill()
            process.wait()
