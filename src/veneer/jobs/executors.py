"""The executor runs jobs' processes on this machine.

    place = executor.start(lease, environment)          starts a `jobs.process` process for the lease
    place = executor.start(lease, environment, device, max_memory)                  the same, to validate the job
    executor.poll(place)                                None while the process runs, then how it ended
    executor.stop(place), .stop(place, hard=True)       SIGTERM, to save and exit; SIGKILL

The executor only starts, polls and stops processes; the queue manages leases. If there are several machines,
each machine runs its own worker, or one worker uses an executor of `jobs.cluster`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from veneer.jobs.store import Job, JobLease
from veneer.plan.tables import Device

_VALIDATION_NICE = 10
JOB_VARIABLE = "veneer_job"
"""Environment variable with the job's id and the lease's token.

When a job is validated, the variable also has the device to plan for. Command-line arguments would be visible
to other users; the environment is not."""


@dataclass(frozen=True)
class ExitStatus:
    """How a job's process ended.

    memory: whether the process exceeded its memory limit; a retry would exceed it again."""

    why: str
    memory: bool = False


_MEMORY_FACTOR, _MEMORY_EXTRA = 1.5, 512 << 20
"""Memory limit of a process: planned peak × factor + bytes. Plans are off by about 10 %."""


def memory_of(job: Job) -> int:
    """Return the limit on host memory for a job's process, in bytes, from the job's plan.

    Returns 0 (no limit) if the plan is for a GPU."""
    plan = job.plan or {}
    planned = int(plan.get("peak_bytes") or 0) if plan.get("device", {}).get("name") == "cpu" else 0
    return int(planned * _MEMORY_FACTOR) + _MEMORY_EXTRA if planned else 0


class LocalExecutor:
    """Runs jobs as child processes on this machine.

    A handle that has no process counts as ended and raises no error. The child processes end when this
    process ends. A child process that exceeds the memory limit from its job's plan is killed."""

    device: Device | None = None
    """Device for which jobs are planned; None: the worker's."""

    def __init__(self, *, nice: int = 0) -> None:
        """Create an executor whose child processes have the niceness `nice`."""
        self.nice = nice
        self._children: dict[str, tuple[subprocess.Popen[bytes], int]] = {}

    def start(
        self, lease: JobLease, environment: Mapping[str, str], device: Device | None = None, max_memory: int = 0
    ) -> str:
        """Start a process for this lease and return its handle. Raises ResourceError.

        The process trains the job or, if `device` is given, validates the job for that device. A validation
        is killed if it uses more than `max_memory` bytes. Its log goes to this process's output, so that no
        job folder is created for a rejected job."""
        job, trains = lease.job, device is None
        content = {"job": job.id, "token": lease.token, "device": device and asdict(device)}
        nice = self.nice if trains else max(self.nice, _VALIDATION_NICE)
        command = [sys.executable, "-m", "veneer.jobs.process"]
        if nice and os.name == "posix":
            command = ["nice", "-n", str(nice), *command]
        if trains:
            job.make_folder()
        with open(job.log, "ab") if trains else contextlib.nullcontext() as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # the child exits when this pipe closes
                stdout=log,
                stderr=log and subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment, JOB_VARIABLE: json.dumps(content)},
            )
        # The job and the attempt make the handle unique, because the system can reuse a pid.
        handle = f"{job.id}-{job.attempt if trains else 'validation'}, process {child.pid}"
        self._children[handle] = child, memory_of(job) if trains else max_memory
        return handle

    def poll(self, handle: str) -> ExitStatus | None:
        """Return None while the process runs, then how it ended."""
        if handle not in self._children:
            return ExitStatus("it is not a process of this worker")
        child, max_memory = self._children[handle]
        code = child.poll()
        resident = _resident(child.pid) if max_memory else 0
        if code is None and resident <= max_memory:
            return None
        del self._children[handle]
        with child:  # closes the pipe and waits for the process
            child.kill()
        if code is None:
            why = f"it used {resident / 1e9:.1f} GB of memory; the limit from its plan is {max_memory / 1e9:.1f} GB"
            return ExitStatus(why, memory=True)
        if code < 0:
            with contextlib.suppress(ValueError):
                return ExitStatus(f"ended by {signal.Signals(-code).name}")
        return ExitStatus(f"ended with exit code {code}")

    def stop(self, handle: str, *, hard: bool = False) -> None:
        if handle in self._children:
            child, _ = self._children[handle]
            child.kill() if hard else child.terminate()


def _resident(pid: int) -> int:
    """Return a process's resident memory in bytes; 0 if the process has ended."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
