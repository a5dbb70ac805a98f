"""A worker process on the same machine as a server, with lower priority.

    with background_worker(library="…", tenants="…", log=print): …       used by `veneer serve`

The worker is restarted if it exits. When the server stops for any reason, the worker saves its jobs, returns
them to the queue and stops, so that a restarted server continues the jobs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NICE = 15
_RESTART_SECONDS = 5.0
"""Seconds to wait before restarting a worker that exited."""
_STOP_SECONDS = 70.0
"""Maximum seconds to wait for the worker to stop; training processes get 60 s to save."""


@contextmanager
def background_worker(*, library: str | None, tenants: str | None, log: Callable[[str], None]) -> Iterator[None]:
    """Run a worker process for the duration of the `with` block.

    library, tenants: the same as the server's."""
    command = [sys.executable, "-m", "veneer.cli.main", "worker", "--tied", "--nice", str(_NICE)]
    # passed as environment variables, because a database URL can contain a password
    settings = {"VENEER_LIBRARY": library, "VENEER_TENANTS": tenants}
    environment = {**os.environ, **{name: value for name, value in settings.items() if value is not None}}
    stopping, children = threading.Event(), list[subprocess.Popen[bytes]]()

    def keep() -> None:
        while not stopping.is_set():
            # Through the pipe on standard input, the worker notices when this process ends. The new session
            # keeps the terminal's Ctrl-C from reaching the worker; the server terminates the worker itself.
            with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment) as child:
                children[:] = [child]
                code = child.wait()
            if not stopping.is_set():
                log(f"the server's worker exited with code {code}; restarting it in {_RESTART_SECONDS:g} s")
                stopping.wait(_RESTART_SECONDS)

    keeper = threading.Thread(target=keep, name="veneer-worker", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stopping.set()
        for child in children:
            child.terminate()
        keeper.join(_STOP_SECONDS)
        for child in children:
            child.kill()
