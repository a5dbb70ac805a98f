"""Executor that runs jobs as Kubernetes Jobs.

    KubernetesExecutor(image="registry/veneer:1.0", namespace="training", claim="veneer-home",
    secret="veneer")

`image`: container image with veneer. `claim`: PersistentVolumeClaim of the veneer home, writable by all
nodes, mounted at the worker's path of the veneer home. A job's process reads its lease and the queue's
addresses from a file there; the Kubernetes Job has neither. `secret`: a Secret whose keys become environment
variables; VENEER_LIBRARY_INDEX, and VENEER_TENANTS if it is a URL, then come from the Secret. Uses the
official client, with the worker's service account or the kubeconfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.errors import ConfigError, MissingExtraError, UnavailableError
from veneer.jobs.executors import Executor, ExitStatus, memory_of, write_handover
from veneer.jobs.store import JobLease

_KEPT_SECONDS = 86400
"""Seconds for which Kubernetes keeps ended Jobs, for inspection."""
_LABEL = "veneer.dev/job"


class KubernetesExecutor(Executor):
    """Runs jobs as Kubernetes Jobs.

    `gpus`: GPUs per job. `grace`: seconds that a process has to save its state. `api`: the official client's
    ApiClient; default: in-cluster configuration, else the kubeconfig."""

    def __init__(
        self,
        *,
        image: str,
        namespace: str = "default",
        claim: str = "",
        secret: str = "",
        gpus: int = 0,
        grace: float = 60.0,
        api: Any = None,
    ) -> None:
        """Raises MissingExtraError without the client, ConfigError without a cluster."""
        try:
            from kubernetes import client
        except ImportError as error:
            raise MissingExtraError(
                "jobs on Kubernetes need its client", fix="pip install 'veneer[kubernetes]'"
            ) from error
        self.image, self.namespace, self.claim, self.secret = image, namespace, claim, secret
        self.gpus, self.grace = gpus, grace
        api = api or _configured()
        self._jobs, self._pods, self._error = client.BatchV1Api(api), client.CoreV1Api(api), client.ApiException

    def start(self, lease: JobLease, environment: Mapping[str, str]) -> str:
        handle = f"{lease.job.id.lower()}-{lease.job.attempt}"
        body = self._body(handle, lease, environment)
        self._ask(self._jobs.create_namespaced_job, self.namespace, body, also=409)
        return handle

    def _body(self, handle: str, lease: JobLease, environment: Mapping[str, str]) -> dict[str, Any]:
        hidden = {"VENEER_LIBRARY_INDEX"} if self.secret else set()
        hidden |= {"VENEER_TENANTS"} if self.secret and "://" in environment.get("VENEER_TENANTS", "") else set()
        variables = {name: value for name, value in environment.items() if name not in hidden}
        container: dict[str, Any] = {
            "name": "train",
            "image": self.image,
            "command": ["python", *write_handover(lease, variables)],
            "resources": {"limits": {}, "requests": {}},
        }
        if memory := memory_of(lease.job):
            container["resources"] = {"limits": {"memory": str(memory)}, "requests": {"memory": str(memory)}}
        if self.gpus:
            container["resources"]["limits"]["nvidia.com/gpu"] = str(self.gpus)
        if self.secret:
            container["envFrom"] = [{"secretRef": {"name": self.secret}}]
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": round(self.grace),
            "containers": [container],
        }
        if self.claim:
            container["volumeMounts"] = [{"name": "home", "mountPath": environment["VENEER_HOME"]}]
            pod["volumes"] = [{"name": "home", "persistentVolumeClaim": {"claimName": self.claim}}]
        labels = {_LABEL: lease.job.id}
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": handle, "labels": labels},
            # no retries by Kubernetes: the queue decides about retries
            "spec": {
                "backoffLimit": 0,
                "ttlSecondsAfterFinished": _KEPT_SECONDS,
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        }

    def poll(self, handle: str) -> ExitStatus | None:
        job = self._ask(self._jobs.read_namespaced_job_status, handle, self.namespace, also=404)
        if job is None:
            return ExitStatus("Kubernetes does not know it (any more)")
        if not (job.status.succeeded or job.status.failed):
            return None
        why = "; ".join(f"{c.reason}: {c.message}" for c in job.status.conditions or () if c.reason)
        pods = self._ask(self._pods.list_namespaced_pod, self.namespace, label_selector=f"job-name={handle}", also=404)
        reasons = [
            each.state.terminated.reason
            for pod in (pods.items if pods is not None else ())
            for each in pod.status.container_statuses or ()
            if each.state is not None and each.state.terminated is not None
        ]
        if "OOMKilled" in reasons:
            return ExitStatus("Kubernetes ended it: it took more memory than its plan says", memory=True)
        return ExitStatus(f"Kubernetes says {'; '.join(filter(None, [*reasons, why])) or 'it is over'}")

    def stop(self, handle: str, *, hard: bool = False) -> None:
        """Delete the Job in the foreground: the Job exists until its pod has ended."""
        options = {"grace_period_seconds": 0} if hard else {}
        delete = self._jobs.delete_namespaced_job
        self._ask(delete, handle, self.namespace, propagation_policy="Foreground", also=404, **options)

    def _ask(self, call: Any, *arguments: Any, also: int, **options: Any) -> Any:
        """Call the API and return its answer; None for the status `also`.

        Raises UnavailableError for no answer or a server error, ConfigError for a client error."""
        from urllib3.exceptions import HTTPError

        try:
            return call(*arguments, _request_timeout=30, **options)
        except self._error as error:
            if error.status == also:
                return None
            message = f"Kubernetes answered {error.status} {error.reason}"
            if error.status is not None and 400 <= error.status < 500 and error.status not in (408, 429):
                raise ConfigError(
                    message, where=f"namespace {self.namespace}", fix="the rights of this worker, or what it asks for"
                ) from error
            raise UnavailableError(message, where=f"namespace {self.namespace}") from error
        except HTTPError as error:
            raise UnavailableError(f"Kubernetes does not answer: {type(error).__name__}") from error


def _configured() -> Any:
    from kubernetes import client, config

    try:
        config.load_incluster_config()
    except config.ConfigException:
        try:
            config.load_kube_config()
        except config.ConfigException as error:
            raise ConfigError(
                f"no Kubernetes is configured here: {error}", where="KUBECONFIG", fix="kubectl get jobs has to work"
            ) from error
    return client.ApiClient()
