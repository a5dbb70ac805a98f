"""A user's Python function in a separate process with time and memory limits.

    with LimitedFunction("score", file="score.py", timeout=10, memory=2e9) as function:
        (score,) = function.score([(sample, item)])

The process starts at the first call. If an answer takes longer than `timeout`, the process is killed with its
process group and started again for the next answer. The function can import installed packages and modules
next to its file. Its output is discarded. Its random numbers are seeded by the question, so the same answer
gets the same score.

These limits are for the operator's own functions and do not protect against malice: the process has the
rights of the parent process, even with `bare`, which removes environment variables. Python from clients runs
in a `sandbox` (see `sandbox.py` and `working_sandbox`). There, `memory` is for all processes together,
leftover processes at an answer end the sandbox, and the sandbox is stopped between calls.

Only the function's own process can answer: on Linux, the kernel identifies the sender of each message,
messages from other processes are dropped, and an answer repeats the token of its question.

Raises ConfigError if the file cannot be read or loaded, or lacks the function.
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
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from veneer.errors import ConfigError
from veneer.models.home import veneer_home
from veneer.train.rewards.reward import RewardScore
from veneer.train.rewards.sandbox import (
    NOBODY,
    SANDBOX_VARIABLES,
    Sandbox,
    bubblewrap,
    descendants,
    no_sandbox,
    sandbox_memory,
)

_CHILD = Path(__file__).with_name("limited_child.py")
_LOADING = 120.0
"""Maximum seconds to load the file, including its imports."""
_ANSWER = 1 << 20
"""Maximum bytes of an answer."""
_GIVES_UP = 5
"""Consecutive failures in one call after which the rest is skipped."""
_WATCH = 0.02
"""Seconds between memory checks of a running sandbox."""
_CREDENTIALS = struct.Struct("3i")
"""A message's sender as the kernel reports it: process, user, group."""

Asked = tuple[Mapping[str, Any], Mapping[str, Any]]
"""(sample, item), as in OpenAI's graders."""


class _Ended(Exception):
    """The process has ended or was killed; the text is the reason."""


class LimitedFunction:
    """A function in separate processes. Thread-safe.

    `file` or `source`: where the function is defined. `at_once`: number of processes; the limits hold for
    each."""

    def __init__(
        self,
        function: str,
        *,
        file: str | None = None,
        source: str | None = None,
        timeout: float = 10.0,
        memory: float = 2e9,
        at_once: int = 1,
        bare: bool = False,
        sandbox: Sandbox | None = None,
    ) -> None:
        assert (file is None) != (source is None)
        assert sandbox is None or source is not None, (
            "files on this machine are the operator's and run without a sandbox"
        )
        if file is not None and not Path(file).is_file():
            raise ConfigError(
                f"the file of the function {function} does not exist", where=file, fix="give a Python file"
            )
        self._first = {"function": function, "memory": int(memory), "timeout": timeout}
        self._first |= {"file": os.path.abspath(file)} if file is not None else {"source": source}
        self._free: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._all = [_Process(self._first, bare, sandbox) for _ in range(at_once)]
        for process in self._all:
            self._free.put(process)

    def __enter__(self) -> LimitedFunction:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for process in self._all:
            process.end()

    def score(self, asked: Sequence[Asked]) -> list[RewardScore]:
        """Return a score for each question, in order, or the reason for a missing score.

        The function returns a number, or a mapping with `score` and numeric parts. Raises ConfigError as
        above."""
        given = self.call(asked)
        return [RewardScore(None, each.why) if isinstance(each, NoAnswer) else _score_of(each) for each in given]

    def call(self, asked: Sequence[Asked]) -> list[Any]:
        """Return the function's JSON result for each question; NoAnswer if there is none.

        Raises the errors of `score`."""
        failed = _Row()

        def one(pair: Asked) -> Any:
            if failed.count >= _GIVES_UP:
                return NoAnswer(f"not asked: the {_GIVES_UP} before it failed one after the other")
            process = self._free.get()
            try:
                return failed.noted(_value_of(process.ask(*pair)))
            except _Ended as ended:
                return failed.noted(NoAnswer(str(ended)))
            finally:
                self._free.put(process)

        if len(self._all) == 1 or len(asked) < 2:
            return [one(pair) for pair in asked]
        with ThreadPoolExecutor(len(self._all), "reward") as pool:
            return list(pool.map(one, asked))


@dataclass(frozen=True)
class NoAnswer:
    """No result of a function; `why` is the reason."""

    why: str


class _Row:
    """Counts consecutive failures."""

    def __init__(self) -> None:
        self.count = 0

    def noted(self, value: Any) -> Any:
        self.count = self.count + 1 if isinstance(value, NoAnswer) else 0
        return value


def _value_of(answer: Any) -> Any:
    """Return the value in a process's answer, which user code can have forged."""
    if not isinstance(answer, dict) or not ("value" in answer or isinstance(answer.get("error"), str)):
        return NoAnswer("the function's process gave no answer")
    return answer["value"] if "value" in answer else NoAnswer(answer["error"][:2000])


def _score_of(value: Any) -> RewardScore:
    parts = {str(key): each for key, each in value.items() if key != "score"} if isinstance(value, dict) else {}
    number = value.get("score") if isinstance(value, dict) else value
    if wrong := [repr(each)[:100] for each in (number, *parts.values()) if not isinstance(each, int | float)]:
        what = "no number, nor a mapping with `score` and numbers" if number is value else "where a number belongs"
        return RewardScore(None, f"the function gave {wrong[0]}, {what}")
    assert isinstance(number, int | float)
    return RewardScore(_float(number), parts={key: _float(each) for key, each in parts.items()})


def _float(number: int | float) -> float:
    """Convert a JSON number to float; JSON integers have any size."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


class _Process:
    """One process; used by one thread at a time."""

    def __init__(self, first: Mapping[str, Any], bare: bool, sandbox: Sandbox | None) -> None:
        self._first, self._bare, self._sandbox = first, bare, sandbox
        self._running: _Running | None = None
        self._lock = threading.Lock()

    def ask(self, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Any:
        """Return the function's answer. Raises _Ended if there is none in time."""
        self._start()
        try:
            text = json.dumps([sample, item], sort_keys=True, default=str)
        except (TypeError, ValueError) as error:
            raise _Ended(f"the row cannot be handed to a process: {error}") from None
        seed = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:7], "big")
        sample, item = json.loads(text)
        timeout = self._first["timeout"]
        return self._told({"sample": sample, "item": item, "seed": seed}, timeout, f"took longer than {timeout:g} s")

    def end(self) -> None:
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            running.end()

    def _start(self) -> None:
        if self._running is not None and self._running.process.poll() is None:
            return
        self.end()
        where, what = str(self._first.get("file") or "the grader's source"), f"the function {self._first['function']}"
        try:
            self._running = _Running(self._sandbox, int(self._first["memory"]), self._bare)
            answer = self._told(self._first, _LOADING, f"took longer than {_LOADING:g} s to be loaded")
        except _Ended as ended:
            raise ConfigError(f"{what} cannot be loaded: {ended}", where=where) from None
        if error := answer.get("error") if isinstance(answer, dict) else "no answer":
            self.end()
            raise ConfigError(f"{what} cannot be loaded: {error}", where=where)
        if self._running is None:
            raise ConfigError(f"{what} cannot be loaded: its source left other processes running", where=where)

    def _told(self, message: Mapping[str, Any], seconds: float, late: str) -> Any:
        """Send a message and return the process's answer."""
        assert self._running is not None
        ends, token = time.monotonic() + seconds, secrets.token_hex(16)
        try:
            self._running.resume()
            # A message can exceed the socket's buffer: the process reads all of it before it runs anything.
            self._running.send({**message, "token": token}, ends)
            answer = self._running.receive(ends)
            if not isinstance(answer, dict) or answer.pop("token", None) != token:
                raise _Ended("the function wrote to the channel of its answers")
            if not self._running.suspend():
                self.end()  # the next call starts a new one
            return answer
        except TimeoutError:
            self.end()
            raise _Ended(f"the function {late}") from None
        except (OSError, EOFError):
            code = self._running.code()
            self.end()
            why = "" if code is None else f", by {signal.Signals(-code).name}" if code < 0 else f", with code {code}"
            raise _Ended(f"the function's process ended{why}") from None
        except (ValueError, RecursionError):
            self.end()
            raise _Ended("the function's process gave no JSON") from None
        except _Ended:
            self.end()
            raise


class _Running:
    """A child process and this side's end of its socket.

    Raises _Ended if the process does not start."""

    def __init__(self, sandbox: Sandbox | None, memory: int, bare: bool) -> None:
        self._sandboxed, self._memory = sandbox is not None, memory
        self._channel, other = socket.socketpair()
        self._channel.setblocking(False)
        if _says_who():
            self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._init: int | None = None
        """A pidfd of the sandbox's first process; all other processes end with it."""
        self._function: int | None = None
        """A pidfd of the process that runs the function in a sandbox."""
        with other, tempfile.TemporaryFile() as errors:
            try:
                if sandbox is None:
                    self.process = _plain(other, bare)
                else:
                    self.process = sandbox.start([sys.executable, "-s", "-P", "-B", str(_CHILD)], other, errors)
            except OSError as error:
                self._channel.close()
                raise _Ended(f"its process did not start: {error}") from None
            other.close()
            self.sender = None if sandbox is not None else self.process.pid
            try:
                self._began(errors)
            except BaseException:
                self.end()
                raise

    def _began(self, errors: IO[bytes]) -> None:
        """Wait for the first message.

        The child's own script sends it before any code of the function runs."""
        try:
            self.receive(time.monotonic() + _LOADING)
            if self._sandboxed and self.sender is not None:
                self._init = os.pidfd_open(descendants(self.process.pid)[0])
                self._function = os.pidfd_open(self.sender)
        except (OSError, EOFError, ValueError, IndexError, RecursionError):
            self.code()
            errors.seek(0)
            said = errors.read(1000).decode(errors="replace").strip()
            raise _Ended(f"its process did not start{': ' if said else ''}{said}") from None

    def send(self, message: Mapping[str, Any], ends: float) -> None:
        data = json.dumps(message).encode()
        rest = memoryview(struct.pack(">I", len(data)) + data)
        while rest:
            self._await(select.POLLOUT, ends)
            with suppress(BlockingIOError):
                rest = rest[self._channel.send(rest) :]

    def receive(self, ends: float) -> Any:
        """Return the next message.

        Raises EOFError at the end, TimeoutError, and ValueError for invalid JSON."""
        size = struct.unpack(">I", self._received(4, ends))[0]
        if size > _ANSWER:
            raise _Ended("the function's answer is over the size limit")
        return json.loads(self._received(size, ends))

    def _received(self, count: int, ends: float) -> bytes:
        """Return bytes from the function's process.

        Drops bytes from other processes that hold its descriptors. The kernel never combines bytes of two
        senders in one part."""
        found = bytearray()
        while len(found) < count:
            self._await(select.POLLIN, ends)
            with suppress(BlockingIOError):
                part, about, *_ = self._channel.recvmsg(count - len(found), socket.CMSG_SPACE(_CREDENTIALS.size))
                if not part:
                    raise EOFError
                sender = _sender(about)
                self.sender = self.sender or sender
                if sender is None or sender == self.sender:
                    found += part
        return bytes(found)

    def _await(self, event: int, ends: float) -> None:
        """Wait until the socket is ready.

        Uses poll, because a server can have more descriptors than select supports. Raises TimeoutError, and
        _Ended for a sandbox over its memory limit."""
        waiting = select.poll()
        waiting.register(self._channel, event)
        while not waiting.poll(
            max(0.0, min(ends - time.monotonic(), _WATCH if self._init is not None else math.inf)) * 1000
        ):
            if time.monotonic() >= ends:
                raise TimeoutError
            if self._init is not None and self.sender is not None:
                held = sandbox_memory(descendants(self.process.pid), self.sender)
                if held > self._memory:
                    raise _Ended(f"its processes used more than {self._memory / 1e9:g} GB in total")

    def resume(self) -> None:
        if self._function is not None:
            signal.pidfd_send_signal(self._function, signal.SIGCONT)

    def suspend(self) -> bool:
        """Stop a sandbox until the next call.

        Returns False if processes other than the function's are left."""
        if self._function is None:
            return True
        if descendants(self.process.pid)[1:] != [self.sender]:
            return False
        signal.pidfd_send_signal(self._function, signal.SIGSTOP)
        return True

    def code(self) -> int | None:
        """Return the exit code of a process that has closed its socket.

        None if the process is still running."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=1)
        return None

    def end(self) -> None:
        """Kill the process and its group, or the whole sandbox, and wait for the end."""
        for descriptor in (self._init, self._function):
            if descriptor is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        if self._init is not None:
            gone = select.poll()
            gone.register(self._init, select.POLLIN)
            gone.poll(10_000)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for descriptor in (self._init, self._function):
            if descriptor is not None:
                os.close(descriptor)
        self._init = self._function = None
        self._channel.close()
        self.process.wait()


def _plain(channel: socket.socket, bare: bool) -> subprocess.Popen[bytes]:
    kept = {"PATH", "LANG", "LC_ALL", "TMPDIR"} if bare else os.environ.keys()
    environment = {key: value for key, value in os.environ.items() if key in kept} | {"PYTHONHASHSEED": "0"}
    return subprocess.Popen(
        [sys.executable, "-s", "-P", str(_CHILD)],
        stdin=channel.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )


def _says_who() -> bool:
    """Return whether the kernel reports the sender of a message."""
    return sys.platform == "linux"


def _sender(about: Sequence[tuple[int, int, bytes]]) -> int | None:
    """Return the ID of a message's sender; None if the kernel does not report it."""
    for level, kind, data in about:
        if _says_who() and (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return int(_CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0])
    return None


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
    return {
        "user": os.getuid(),
        "variables": sorted(os.environ),
        "seen": [path for path in sample["hidden"] if os.path.lexists(path)],
        "network": works(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
        "written": [path for path in ("/", "/usr/lib/", "/dev/") if works(lambda: made(path + "trial"))],
    }
"""


@functools.cache
def working_sandbox() -> Sandbox:
    """Return this machine's sandbox, after testing it for leaks; cached.

    A function in the sandbox does the test. Raises ResourceError with the reason if no sandbox works."""
    sandbox = bubblewrap(_CHILD)
    with tempfile.TemporaryDirectory() as folder:
        hidden = [folder, "/proc/self", "/etc/passwd", *_private(sandbox)]
        # no memory limit: if the sandbox does not isolate /tmp, files in the machine's /tmp would count
        with LimitedFunction("look", source=_TRIAL, sandbox=sandbox, timeout=30, memory=1e15) as function:
            try:
                (found,) = function.call([({"hidden": hidden}, {})])
            except ConfigError as error:
                raise no_sandbox(error.what) from None
    if isinstance(found, NoAnswer):
        raise no_sandbox(found.why)
    leaks = {
        "it runs as the server's user": found["user"] in (0, os.getuid()) and os.getuid() != NOBODY,
        f"it sees {', '.join(found['seen'][:3])}": found["seen"],
        f"it can write to {', '.join(found['written'])}": found["written"],
        "it has network access": found["network"],
        "it has the server's environment variables": set(found["variables"])
        & (os.environ.keys() - SANDBOX_VARIABLES.keys()),
    }
    if found_leaks := [what for what, leaks_here in leaks.items() if leaks_here]:
        raise no_sandbox(f"the sandbox leaks: {'; '.join(found_leaks)}")
    return sandbox


def _private(sandbox: Sandbox) -> list[str]:
    """Return the entries of the user's and the veneer home without Python packages."""
    entries: list[str] = []
    for folder in (Path("~").expanduser(), veneer_home()):
        with suppress(OSError):
            entries += [str(each) for each in folder.iterdir()]
    return [each for each in entries if not any(Path(path).is_relative_to(each) for path in sandbox.paths)]
