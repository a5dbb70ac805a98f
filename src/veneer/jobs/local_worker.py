"""A worker process beside a server on the same machine, with a lower priority.

    with background_worker(library="…", tenants="…", log=print): …       serve

The worker is restarted if it exits, and stops when the server stops for any reason. It then saves its jobs
and returns them to the queue, so that a restarted server continues them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NICE = 15
_AGAIN = 5.0
"""Seconds before a worker that exited is restarted."""
_PATIENCE = 70.0
"""Maximum seconds to wait for the worker to stop; a training process gets 60 s to save."""


@contextmanager
def background_worker(
    *, library: str | None, tenants: str | None, log: Callable[[str], None], at_once: int = 1
) -> Iterator[None]:
    """Run a worker process for the length of the `with` block.

    library, tenants: the same as the server's."""
    command = [sys.executable, "-m", "veneer.cli.main", "worker", "--tied", "--nice", str(_NICE)]
    command += ["--at-once", str(at_once)]
    # passed as environment variables, because a database URL can contain a password
    settings = {"VENEER_LIBRARY": library, "VENEER_TENANTS": tenants}
    environment = {**os.environ, **{name: value for name, value in settings.items() if value is not None}}
    stopping, children = threading.Event(), list[subprocess.Popen[bytes]]()

    def keep() -> None:
        while not stopping.is_set():
            # The pipe on standard input lets the worker notice that this process ended. The new session keeps
            # the terminal's Ctrl-C from the worker; the server terminates the worker itself.
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, start_new_session=os.name == "posix", env=environment
            )
            children[:] = [child]
            code = child.wait()
            if child.stdin is not None:
                child.stdin.close()
            if not stopping.is_set():
                log(f"the server's worker exited with code {code}; restarting it in {_AGAIN:g} s")
                stopping.wait(_AGAIN)

    keeper = threading.Thread(target=keep, name="veneer-worker", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stopping.set()
        for child in children:
            child.terminate()
        keeper.join(_PATIENCE)
        for child in children:
            if child.poll() is None:
                child.kill()
