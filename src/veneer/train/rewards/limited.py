"""A user's Python function in a separate process with time and memory limits.

    with LimitedFunction("score", file="score.py", timeout=10, memory=2e9) as function:
        (score,) = function.score([(sample, item)])

The process starts at the first call. If a call takes longer than `timeout`, the process is killed with its
process group, and a new process is started for the next call. The function can import installed packages and
modules next to its file. Text that the function prints is discarded. Random generators are seeded from the
arguments, so the same completion gets the same score.

These limits are for the operator's own functions and do not protect against malicious code, because the
process has the rights of the parent process. Python code from clients runs in a `sandbox` (see `sandbox.py`
and `working_sandbox`). In a sandbox, `memory` limits the total of all processes. If a call leaves other
processes running, the sandbox is ended. Between calls, the function's process is stopped (SIGSTOP).

Results are accepted only from the function's own process: on Linux, the kernel identifies the sender of each
message, and messages from other processes are dropped. Each result must repeat the token of its call.

Raises ConfigError if the file cannot be read or loaded, or does not define the function.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import queue
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError
from veneer.files.locks import POSIX
from veneer.models.home import veneer_home
from veneer.train.rewards.reward import RewardScore
from veneer.train.rewards.sandbox import (
    NOBODY,
    SANDBOX_VARIABLES,
    Sandbox,
    bubblewrap,
    descendants,
    sandbox_error,
    sandbox_memory,
    start_child,
)

_CHILD = Path(__file__).with_name("limited_child.py")
_LOADING = 120.0
"""Maximum seconds to load the file and its imports."""
_ANSWER = 1 << 20
"""Maximum bytes of a result."""
_MAX_FAILURES = 5
"""Consecutive failures in one call after which the remaining inputs are skipped."""
_WATCH = 0.02
"""Seconds between memory checks of a running sandbox."""
_CREDENTIALS = struct.Struct("3i")
"""Layout of a sender's credentials as reported by the kernel: process, user, group."""

ScoreInput = tuple[Mapping[str, Any], Mapping[str, Any]]
"""(sample, item), as in OpenAI's graders."""


class NoAnswer(Exception):
    """Raised if a function returns no result; `str(error)` is the reason."""


class LimitedFunction:
    """A function in separate processes. Thread-safe.

    file, source: where the function is defined. at_once: number of processes; each has its own limits."""

    def __init__(
        self,
        function: str,
        *,
        file: str | None = None,
        source: str | None = None,
        timeout: float = 10.0,
        memory: float = 2e9,
        at_once: int = 1,
        sandbox: Sandbox | None = None,
    ) -> None:
        if not POSIX:
            text, fix = "a Python function needs Linux or macOS, which limit its process", "use WSL, or another reward"
            raise ConfigError(text, where=file or function, fix=fix)
        if file is not None and not Path(file).is_file():
            text = f"the file of the function {function} does not exist"
            raise ConfigError(text, where=file, fix="give a Python file")
        self._first: dict[str, Any] = {"function": function, "memory": int(memory), "timeout": timeout}
        self._first |= {"file": os.path.abspath(file)} if file is not None else {"source": source}
        self._timeout, self._at_once, self._sandbox = timeout, at_once, sandbox
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(at_once):
            self._idle.put(None)

    def __enter__(self) -> LimitedFunction:
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes after their current calls."""
        for child in [self._idle.get() for _ in range(self._at_once)]:
            if child is not None:
                child.end()
            self._idle.put(None)

    def score(self, inputs: Sequence[ScoreInput]) -> list[RewardScore]:
        """Return the score of each input, in order, or the reason for a missing score.

        The user's function must return a number. Raises ConfigError if it cannot be loaded."""
        failed = 0

        def score_of(pair: ScoreInput) -> RewardScore:
            nonlocal failed
            if failed >= _MAX_FAILURES:
                return RewardScore(None, f"skipped after {_MAX_FAILURES} consecutive failures")
            try:
                score = _number_score(self._value(*pair))
                failed = 0
            except NoAnswer as error:
                score = RewardScore(None, str(error))
                failed += 1
            return score

        with ThreadPoolExecutor(self._at_once, "reward") as pool:
            return list(pool.map(score_of, inputs))

    def _value(self, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Any:
        """Return the function's JSON result.

        Raises NoAnswer if there is no result, and ConfigError if the function cannot be loaded."""
        text = json.dumps([sample, item], sort_keys=True, default=str)
        seed = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:7], "big")
        message = dict(zip(("sample", "item"), json.loads(text), strict=True)) | {"seed": seed}
        child = self._idle.get()
        try:
            if child is None or child.ended:
                child = None
                child = self._started()
            answer = child.ask(message, self._timeout, f"took longer than {self._timeout:g} s")
        finally:
            self._idle.put(child)
        # Check the types, because the user's code could have forged this message.
        if "value" in answer:
            return answer["value"]
        why = answer.get("error")
        raise NoAnswer(why[:2000] if isinstance(why, str) else "the function's process returned no result")

    def _started(self) -> _Child:
        try:
            child = _Child(self._first["memory"], self._sandbox)
            answer = child.ask(self._first, _LOADING, f"took longer than {_LOADING:g} s to load")
            if error := answer.get("error") or ("its source left other processes running" if child.ended else ""):
                child.end()
                raise NoAnswer(error)
        except NoAnswer as ended:
            where = str(self._first.get("file") or "the grader's source")
            message = f"the function {self._first['function']} cannot be loaded: {ended}"
            raise ConfigError(message, where=where) from None
        return child


def _number_score(number: Any) -> RewardScore:
    if not isinstance(number, int | float):
        return RewardScore(None, f"the function returned {repr(number)[:100]}, not a number")
    try:
        return RewardScore(float(number))
    except OverflowError:  # JSON integers can be arbitrarily large
        return RewardScore(math.inf if number > 0 else -math.inf)


class _Child:
    """A child process and the parent's end of its socket, used by one thread at a time.

    Raises NoAnswer if the process does not start."""

    def __init__(self, memory: int, sandbox: Sandbox | None) -> None:
        self._memory, self.ended = memory, False
        self._channel, child_end = socket.socketpair()
        if hasattr(socket, "SO_PASSCRED"):
            self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sender: int | None = None
        """Id of the process that sends results; None if the kernel does not report senders."""
        self._pidfds: list[int] = []
        """In a sandbox, the pidfds of two processes: the sandbox's init process, and the function's process.

        When the init process ends, the kernel kills all other processes of the sandbox."""
        command = [sys.executable, "-s", "-P", "-B", str(_CHILD)]
        with child_end, tempfile.TemporaryFile() as errors:
            try:
                if sandbox is not None:
                    self._process = sandbox.start(command, child_end, errors)
                else:
                    self._process = start_child(command, child_end, errors, env={**os.environ, "PYTHONHASHSEED": "0"})
            except OSError as error:
                self._channel.close()
                raise NoAnswer(f"the process did not start: {error}") from None
            child_end.close()
            try:
                # The child's script sends this message before it loads the user's function.
                self._receive(time.monotonic() + _LOADING)
                if sandbox is not None and self._sender is not None:
                    init = descendants(self._process.pid)[0]
                    self._pidfds = [os.pidfd_open(init), os.pidfd_open(self._sender)]
            except (OSError, EOFError, ValueError, IndexError, RecursionError, NoAnswer):
                self._wait()
                self.end()
                errors.seek(0)
                messages = errors.read(1000).decode(errors="replace").strip()
                raise NoAnswer(f"the process did not start{': ' if messages else ''}{messages}") from None

    def ask(self, message: Mapping[str, Any], seconds: float, late: str) -> dict[str, Any]:
        """Send a message to the function's process and return the result.

        If there is no result, ends the process and raises NoAnswer. If other processes remain in a sandbox,
        ends the sandbox."""
        ends, token = time.monotonic() + seconds, secrets.token_hex(16)
        try:
            self._signal(signal.SIGCONT)
            # A message can exceed the socket's buffer. The process reads the whole message before it runs
            # the user's code.
            data = json.dumps({**message, "token": token}).encode()
            self._channel.settimeout(seconds)
            self._channel.sendall(struct.pack(">I", len(data)) + data)
            answer = self._receive(ends)
            if not isinstance(answer, dict) or answer.pop("token", None) != token:
                raise NoAnswer("the function wrote to the socket that carries its results")
            if self._pidfds and descendants(self._process.pid)[1:] != [self._sender]:
                self.end()
            self._signal(signal.SIGSTOP)
            return answer
        except TimeoutError:
            why = f"the function {late}"
        except (OSError, EOFError):
            code = self._wait()
            how = "" if code is None else f", by {signal.Signals(-code).name}" if code < 0 else f", with code {code}"
            why = f"the function's process ended{how}"
        except (ValueError, RecursionError):
            why = "the function's process sent invalid JSON"
        except NoAnswer as ended:
            why = str(ended)
        self.end()
        raise NoAnswer(why)

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the function's process in a sandbox."""
        if self._pidfds:
            signal.pidfd_send_signal(self._pidfds[1], number)

    def _receive(self, ends: float) -> Any:
        """Return the next message.

        Raises EOFError if the socket is closed, TimeoutError after the time `ends`, ValueError for invalid
        JSON, and NoAnswer if the message is too large."""
        size = struct.unpack(">I", self._received(4, ends))[0]
        if size > _ANSWER:
            raise NoAnswer("the function's result exceeds the size limit")
        return json.loads(self._received(size, ends))

    def _received(self, count: int, ends: float) -> bytes:
        """Return `count` bytes from the function's process.

        Drops bytes from other processes that hold the same socket. The kernel never returns bytes of two
        senders in one read. Raises NoAnswer if a sandbox exceeds its memory limit."""
        received = bytearray()
        while len(received) < count:
            left = ends - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._channel.settimeout(min(left, _WATCH) if self._pidfds else left)
            try:
                part, ancillary, *_ = self._channel.recvmsg(count - len(received), socket.CMSG_SPACE(_CREDENTIALS.size))
            except TimeoutError:
                processes = descendants(self._process.pid) if self._pidfds else []
                if self._sender and processes and sandbox_memory(processes, self._sender) > self._memory:
                    raise NoAnswer(f"its processes used more than {self._memory / 1e9:g} GB in total") from None
                continue
            if not part:
                raise EOFError
            credentials = [data for _, kind, data in ancillary if kind == socket.SCM_CREDENTIALS]
            sender = _CREDENTIALS.unpack(credentials[0])[0] if credentials else None
            self._sender = self._sender or sender
            if sender == self._sender:
                received += part
        return bytes(received)

    def _wait(self) -> int | None:
        """Return the exit code of a process that has closed its socket, or None if it is still running."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=1)
        return None

    def end(self) -> None:
        """Kill the process and its group, or the whole sandbox, and wait until the process has ended."""
        if self.ended:
            return
        self.ended = True
        for descriptor in self._pidfds:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        if self._pidfds:
            poll = select.poll()
            poll.register(self._pidfds[0], select.POLLIN)
            poll.poll(10_000)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        while self._pidfds:
            os.close(self._pidfds.pop())
        self._channel.close()
        self._process.wait()


# -- testing this machine's sandbox ------------------------------------------------------------------------------------

_TRIAL = """
import os, socket

def works(do):
    try:
        do()
    except OSError:
        return False
    return True

def made(path):
    os.mkdir(path)
    os.rmdir(path)

def look(sample, item):
    seen = [path for path in sample["hidden"] if os.path.lexists(path)]
    written = [path for path in ("/", "/usr/lib/", "/dev/") if works(lambda: made(path + "trial"))]
    leaks = {
        "it runs as the server's user": os.getuid() in sample["users"],
        f"it sees {', '.join(seen[:3])}": seen,
        f"it can write to {', '.join(written)}": written,
        "it has network access": works(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
        "it has the server's environment variables": os.environ.keys() & set(sample["variables"]),
    }
    if leaked := [leak for leak, found in leaks.items() if found]:
        raise PermissionError(f"the sandbox leaks: {'; '.join(leaked)}")
    return 1
"""


@functools.cache
def working_sandbox() -> Sandbox:
    """Return this machine's sandbox after testing it for leaks. The result is cached.

    A function inside the sandbox performs the test. Raises ResourceError, with the reason, if no sandbox
    works.
    """
    sandbox = bubblewrap(_CHILD)
    users = {0, os.getuid()} - {NOBODY}
    variables = os.environ.keys() - SANDBOX_VARIABLES.keys()
    private: list[Path] = []  # the entries of the user's home and veneer's home that hold no Python packages
    for home in (Path("~").expanduser(), veneer_home()):
        with suppress(OSError):
            private += [p for p in home.iterdir() if not any(Path(each).is_relative_to(p) for each in sandbox.paths)]
    with tempfile.TemporaryDirectory() as folder:
        hidden = [folder, "/proc/self", "/etc/passwd", *map(str, private)]
        sample = {"hidden": hidden, "users": list(users), "variables": list(variables)}
        # No memory limit: if the sandbox does not isolate /tmp, the files in the machine's /tmp would count
        # toward the limit.
        with LimitedFunction("look", source=_TRIAL, sandbox=sandbox, timeout=30, memory=1e15) as function:
            try:
                (score,) = function.score([(sample, {})])
            except ConfigError as error:
                raise sandbox_error(error.what) from None
    if score.value != 1:
        raise sandbox_error(score.error)
    return sandbox
