"""Fork processes from a program that has already imported the modules that they need.

`fork` and `expect` are called by such a program; `Forked` forks from a server that runs until the tests
end."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock


def fork(act: Callable[[], object]) -> int:
    """Run `act` in a forked process, and return its process id.

    The process exits with 0, or with 3 after printing a traceback."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def expect(pid: int, killed: bool | None) -> bool:
    """Wait for a process, and return whether it exited with 0.

    killed: whether the process must have been killed; None allows both. Any other end exits this program."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in ({-9} if killed else {0} if killed is False else {0, -9}):
        sys.exit(f"a process ended with {code}")
    return code == 0


# -- from a fork server ------------------------------------------------------------------------------------------------

_IMPORTED = [
    "veneer.train.text.task", "veneer.serve.build", "veneer.serve.server", "veneer.cli.train", "veneer.cli.serve",
    "torch._dynamo", "transformers.models.llama.modeling_llama",
]  # fmt: skip
_ENVIRONMENT = dict(os.environ)


@functools.cache
def _ready() -> ForkServerContext:
    """Start the fork server with the session's original environment, and return its context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with mock.patch.dict(os.environ, _ENVIRONMENT, clear=True):
        forkserver.ensure_running()
    return context


class Forked:
    """A process that runs `python ARGUMENTS`, but has already imported veneer's modules.

    This saves five seconds. The modules were imported with the session's environment, and `atexit` handlers
    do not run. The methods are those of subprocess.Popen.

    arguments: "-c" and a program, or "-m" and a module, and their arguments
    log: file to append the output to"""

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path | None = None) -> None:
        values = list(arguments), dict(env), str(cwd or Path.cwd()), str(log)
        self._process = _ready().Process(target=_python, args=values)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(["python"], timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _python(arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    gc.freeze()  # freeze imported modules, because each training run ends with a garbage collection
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for own in (1, 2):
        os.dup2(output, own)
    how, what, *sys.argv[1:] = arguments
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
