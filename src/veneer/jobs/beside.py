"""A worker beside a server on one machine: a process of its own, which stands back behind the server.

    with worker_beside(library="…", tenants="…", say=print): …       serve

It is started again when it ends by itself, and ends when the server does, whatever ends that: its jobs are saved and
given back. So a server that is started again goes on with them.
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
"""Seconds until a worker that ended is started again."""
_PATIENCE = 70.0
"""Seconds in which it may save what it trains: a process has a minute for that."""


@contextmanager
def worker_beside(
    *, library: str | None, tenants: str | None, say: Callable[[str], None], at_once: int = 1
) -> Iterator[None]:
    """`library`, `tenants`: as the server was given them."""
    command = [sys.executable, "-m", "veneer.cli.main", "worker", "--tied", "--nice", str(_NICE)]
    command += ["--at-once", str(at_once)]
    given = {
        "VENEER_LIBRARY": library,
        "VENEER_TENANTS": tenants,
    }  # in the environment: a database URL contains a password
    environment = {**os.environ, **{name: value for name, value in given.items() if value is not None}}
    stopping, children = threading.Event(), list[subprocess.Popen[bytes]]()

    def keep() -> None:
        while not stopping.is_set():
            # by its standard input it is tied to this process; a Ctrl-C of the terminal is the server's to pass on
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, start_new_session=os.name == "posix", env=environment
            )
            children[:] = [child]
            code = child.wait()
            if child.stdin is not None:
                child.stdin.close()
            if not stopping.is_set():
                say(f"the worker beside this server ended with exit code {code}; another begins in {_AGAIN:g} s")
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
