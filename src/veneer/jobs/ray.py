"""Executor that runs jobs as Ray Jobs.

    RayExecutor("http://head:8265", gpus=1)

The cluster's machines need veneer, the base, and one veneer home on a shared file system. A job's process
reads its lease and the queue's addresses from a file there; Ray's dashboard shows neither.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from veneer.errors import MissingExtraError, UnavailableError
from veneer.jobs.executors import Executor, ExitStatus, memory_of, write_handover
from veneer.jobs.store import JobLease

_ALIVE = frozenset({"PENDING", "RUNNING"})


class RayExecutor(Executor):
    """Runs jobs as Ray Jobs.

    `address`: URL of the dashboard. `gpus`, `cpus`: resources per job. `python`: Python interpreter on the
    cluster. `grace`: seconds that a process has to save its state."""

    def __init__(
        self, address: str, *, gpus: int = 0, cpus: int = 1, python: str = "python", grace: float = 60.0
    ) -> None:
        """Raises MissingExtraError without Ray, UnavailableError without a cluster."""
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise MissingExtraError("jobs on Ray need Ray", fix="pip install 'veneer[ray]'") from error
        self.address, self.gpus, self.cpus, self.python, self.grace = address, gpus, cpus, python, grace
        try:
            self._dashboard: Any = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError) as error:
            raise self._away(error) from error

    def start(self, lease: JobLease, environment: Mapping[str, str]) -> str:
        job = lease.job
        handle, command = f"{job.id}-{job.attempt}", write_handover(lease, environment)
        # Ray sends SIGTERM and, after this many seconds, SIGKILL
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(round(self.grace))}
        try:
            self._dashboard.submit_job(
                entrypoint=shlex.join([self.python, *command]),
                submission_id=handle,
                runtime_env={"env_vars": variables},
                metadata={"tenant": job.tenant, "adapter": job.name},
                entrypoint_num_cpus=self.cpus,
                entrypoint_num_gpus=self.gpus or None,
                entrypoint_memory=memory_of(job) or None,
            )
        except (RuntimeError, OSError) as error:
            if "already exists" not in str(error):
                raise self._away(error) from error
        return handle

    def poll(self, handle: str) -> ExitStatus | None:
        try:
            info = self._dashboard.get_job_info(handle)
        except (RuntimeError, OSError) as error:
            if "does not exist" in str(error):
                return ExitStatus("Ray does not know it (any more)")
            raise self._away(error) from error
        state = str(getattr(info.status, "value", info.status))
        if state in _ALIVE:
            return None
        why = " ".join(str(info.message or "").split())[:500]
        return ExitStatus(f"Ray says {state.lower()}: {why}", memory="OutOfMemory" in why)

    def stop(self, handle: str, *, hard: bool = False) -> None:
        """Stop the job. Ray always sends SIGTERM first, also with `hard`."""
        try:
            self._dashboard.stop_job(handle)
        except (RuntimeError, OSError) as error:
            if "does not exist" not in str(error):
                raise self._away(error) from error

    def _away(self, error: object) -> UnavailableError:
        return UnavailableError(
            f"Ray does not answer: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}",
            where=self.address,
            fix="the address of its dashboard, as http://head:8265; is the cluster up?",
        )
