"""Executors that run jobs on a Ray cluster or as Kubernetes Jobs; `veneer worker --executor FILE` picks one.

    {kind: ray, cpus: 4, gpus: 1}                         see `ExecutorSettings`
    {kind: kubernetes, manifest: job.yaml}

Jobs are validated on the worker's machine, as with `LocalExecutor`. The worker manages the leases.

Manifests, process arguments and Ray's runtime environments contain no secrets. On Ray, a job's
environment and its lease travel as arguments of an actor's method, which Ray does not list. On Kubernetes, the
manifest names the operator's Secret, and the job's process claims its lease in the database (JobStore.claim).
"""

from __future__ import annotations

import copy
import hashlib
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from veneer.errors import ConfigError, MissingExtraError, UnavailableError
from veneer.jobs.executors import ExitStatus, LocalExecutor, memory_of
from veneer.jobs.store import JobLease
from veneer.plan.tables import Device, device_named
from veneer.serve.config import check_values
from veneer.train.config.load import read_sections

POLL_SECONDS = 2.0
"""Maximum seconds to wait for an actor's answer, and minimum seconds between two polls of a Kubernetes Job."""
_LABEL = "veneer.dev/run"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Folder of a pod's service account (kubernetes.io/docs/tasks/run-application/access-api-from-pod)."""


class ExecutorSettings(BaseModel):
    """The keys of an executor file.

    kind: ray or kubernetes
    device: GPU for which jobs are planned, such as h100-80gb; default: this machine's device
    address: Ray: the cluster's address; auto: the cluster of this machine's node
    cpus, gpus, resources: Ray: what to reserve for each job
    manifest: Kubernetes: a Job's YAML file with one container; the executor sets the name, labels, command,
        args and, for jobs planned for CPUs, the memory limit
    namespace: Kubernetes: namespace of the Jobs
    server: Kubernetes: URL of the API, such as that of `kubectl proxy`; default: this pod's cluster"""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["ray", "kubernetes"]
    device: str | None = None
    address: str = "auto"
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    manifest: Path = Path("job.yaml")
    namespace: str = "default"
    server: str = "https://kubernetes.default.svc"


def executor_at(file: Path | None, *, nice: int = 0) -> LocalExecutor:
    """Return the executor that a YAML file describes, or this machine's executor for None.

    Raises ConfigError, MissingExtraError and UnavailableError."""
    if file is None:
        return LocalExecutor(nice=nice)
    settings = check_values(ExecutorSettings, read_sections(file)[0], str(file))
    settings.manifest = file.parent / settings.manifest
    executor: LocalExecutor
    executor = RayExecutor(settings, nice=nice) if settings.kind == "ray" else KubernetesExecutor(settings)
    executor.device = device_named(settings.device) if settings.device else None
    return executor


class RayExecutor(LocalExecutor):
    """Runs each job in a child process of a Ray actor, which is a `LocalExecutor` on some node.

    The process ends when its actor ends, and the actor ends when this process ends. The nodes need veneer and
    the same shared veneer home. A job that waits for a free node counts as running."""

    def __init__(self, settings: ExecutorSettings, *, nice: int = 0) -> None:
        """Connect to the cluster. Raises MissingExtraError and UnavailableError."""
        super().__init__(nice=nice)
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("jobs on Ray need Ray", extra="ray") from error
        from veneer.models.home import veneer_home

        try:
            ray.init(settings.address, namespace="veneer", log_to_driver=False, ignore_reinit_error=True)
        except (ConnectionError, RuntimeError) as error:
            message = f"cannot connect to Ray at {settings.address}: {type(error).__name__}"
            raise UnavailableError(message, fix="start a node here with `ray start`, or set `address`") from error
        home = {"VENEER_HOME": str(veneer_home())}
        self._actor: Any = ray.remote(
            num_cpus=settings.cpus, num_gpus=settings.gpus, resources=settings.resources, runtime_env={"env_vars": home}
        )(LocalExecutor)
        self._actors: dict[str, tuple[Any, Any]] = {}
        """Handle -> actor, and reference to the handle that the actor's own `start` returns."""

    def start(
        self, lease: JobLease, environment: Mapping[str, str], device: Device | None = None, max_memory: int = 0
    ) -> str:
        """Ask Ray for an actor that starts the job's process; return the handle before a node is free."""
        if device is not None:
            return super().start(lease, environment, device, max_memory)
        lease.job.make_folder()
        actor = self._actor.remote(nice=self.nice)
        handle = f"{lease.job.id}-{lease.job.attempt}, Ray actor {secrets.token_hex(8)}"
        self._actors[handle] = actor, actor.start.remote(lease, dict(environment))
        return handle

    def poll(self, handle: str) -> ExitStatus | None:
        """Return None while the process runs, waits for a node, or cannot be reached."""
        if handle not in self._actors:
            return super().poll(handle)
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        actor, started = self._actors[handle]
        status: ExitStatus | None
        try:
            if not ray.wait([started], timeout=0)[0]:
                return None
            status = ray.get(actor.poll.remote(ray.get(started)), timeout=POLL_SECONDS)
        except GetTimeoutError:
            return None
        except RayActorError:
            status = ExitStatus("its Ray node or actor ended")
        except RayTaskError as error:
            status = ExitStatus(f"could not be started: {type(error.cause).__name__}")
        if status is not None:
            del self._actors[handle]
            ray.kill(actor)
        return status

    def stop(self, handle: str, *, hard: bool = False) -> None:
        if handle not in self._actors:
            return super().stop(handle, hard=hard)
        import ray
        from ray.exceptions import RayError

        actor, started = self._actors[handle]
        try:
            if ray.wait([started], timeout=0)[0]:
                actor.stop.remote(ray.get(started), hard=hard)
                return None
        except RayError:
            pass
        ray.kill(actor)  # the actor waits for a node, or could not start its process
        return None


class KubernetesExecutor(LocalExecutor):
    """Runs each job as a Kubernetes Job made from the operator's manifest."""

    def __init__(self, settings: ExecutorSettings) -> None:
        """Read the manifest. Raises ConfigError and MissingExtraError."""
        super().__init__()
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("jobs on Kubernetes need httpx", extra="serve") from error

        self.manifest, where = read_sections(settings.manifest)[0], str(settings.manifest)
        try:
            (container,) = self.manifest["spec"]["template"]["spec"]["containers"]
            inline = [each["name"] for each in container.get("env") or () if "://" in str(each.get("value", ""))]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError("the manifest is not a Job with one container", where=where) from None
        if inline:
            fix = "put the values into a Secret, and name the Secret in envFrom"
            raise ConfigError(f"the manifest contains URLs, which can have passwords: {inline}", where=where, fix=fix)
        authority = _ACCOUNT / "ca.crt"
        self.namespace = settings.namespace
        verify = str(authority) if authority.exists() else True
        self.client = httpx.Client(base_url=settings.server, verify=verify, timeout=10.0)
        self._polled: dict[str, float] = {}

    def start(
        self, lease: JobLease, environment: Mapping[str, str], device: Device | None = None, max_memory: int = 0
    ) -> str:
        """Create the Job. Raises UnavailableError and ConfigError. The pod's Secret replaces `environment`."""
        if device is not None:
            return super().start(lease, environment, device, max_memory)
        job = lease.job
        job.make_folder()
        # Kubernetes names cannot have capital letters, and job ids can.
        name = f"veneer-{hashlib.sha256(f'{job.id} {job.attempt}'.encode()).hexdigest()[:32]}"
        body = copy.deepcopy(self.manifest)
        pod = body["spec"]["template"]
        for each in (body, pod):
            metadata = each.setdefault("metadata", {})
            metadata["labels"] = {**metadata.get("labels", {}), _LABEL: name, "veneer.dev/job": job.id}
        body["metadata"]["name"] = name
        container = pod["spec"]["containers"][0]
        container |= {"command": ["python", "-m", "veneer.jobs.process", job.id, str(job.attempt)], "args": []}
        if limit := memory_of(job):
            container.setdefault("resources", {}).setdefault("limits", {})["memory"] = str(limit)
        self._call("POST", f"/apis/batch/v1/namespaces/{self.namespace}/jobs", json=body)
        return name

    def poll(self, handle: str) -> ExitStatus | None:
        """Return None while a pod runs or is expected, or while the API does not answer."""
        now = time.monotonic()
        if not handle.startswith("veneer-"):
            return super().poll(handle)
        if now - self._polled.get(handle, 0.0) < POLL_SECONDS:
            return None
        self._polled[handle] = now
        try:
            status = self._status(handle)
        except UnavailableError:
            return None
        if status is not None:
            del self._polled[handle]
        return status

    def _status(self, name: str) -> ExitStatus | None:
        pods = self._call("GET", self._pods(), params={"labelSelector": f"{_LABEL}={name}"})["items"]
        if any(pod["status"].get("phase") not in ("Succeeded", "Failed") for pod in pods):
            return None
        for pod in pods:
            for container in pod["status"].get("containerStatuses", []):
                ended = container["state"].get("terminated", {})
                why = f"ended with exit code {ended.get('exitCode')}: {ended.get('reason', 'unknown')}"
                return ExitStatus(why, memory=ended.get("reason") == "OOMKilled")
            return ExitStatus(f"its pod failed: {pod['status'].get('reason', 'unknown')}")
        job = self._call("GET", self._job(name))
        if not job:
            return ExitStatus("its Kubernetes Job was deleted")
        failed = [each for each in job.get("status", {}).get("conditions", []) if each["type"] == "Failed"]
        return ExitStatus(f"its Kubernetes Job failed: {failed[0].get('reason')}") if failed else None

    def stop(self, handle: str, *, hard: bool = False) -> None:
        """Delete the Job, whose pods get SIGTERM; with `hard`, also delete the pods at once."""
        if not handle.startswith("veneer-"):
            return super().stop(handle, hard=hard)
        self._call("DELETE", self._job(handle), json={"propagationPolicy": "Background"})
        if hard:
            select = {"labelSelector": f"{_LABEL}={handle}"}
            self._call("DELETE", self._pods(), params=select, json={"gracePeriodSeconds": 0})

    def _job(self, name: str) -> str:
        return f"/apis/batch/v1/namespaces/{self.namespace}/jobs/{name}"

    def _pods(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods"

    def _call(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """Return the API's answer; {} for 404 (already gone) and 409 (already created)."""
        import httpx

        token = _ACCOUNT / "token"  # Kubernetes renews the file
        headers = {"Authorization": f"Bearer {token.read_text()}"} if token.exists() else {}
        try:
            answer = self.client.request(method, path, headers=headers, **more)
        except httpx.HTTPError as error:
            raise UnavailableError(f"the Kubernetes API does not answer: {type(error).__name__}") from error
        if answer.status_code in (404, 409) and (method, answer.status_code) != ("POST", 404):
            return {}
        if answer.is_error:
            what = f"the Kubernetes API refused {method} {path}: {answer.status_code} {answer.text[:300]}"
            fix = "allow create, get and delete for Jobs, and list and delete for pods, to the worker's service account"
            raise UnavailableError(what, fix=fix if answer.status_code in (401, 403) else None)
        return dict(answer.json())
