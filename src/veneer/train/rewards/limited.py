"""A user's Python function in a process of its own, within limits of time and memory.

    with LimitedFunction("score", file="score.py", timeout=10, memory=2e9) as function:
        (score,) = function.score([(sample, item)])

The process is started at the first call, killed with all that it started where an answer takes longer than `timeout`,
and started again for the next. It may import what is installed here, and what lies beside its file. Its prints go
nowhere, its random numbers are seeded by what it is asked, so that the same answer gets the same score. `bare`: the
environment's variables, in which keys are, stay here; for functions of people who are not the operator. It is a limit
and no jail: the process has this one's rights on the machine.

Raises ConfigError where the file cannot be read or loaded, or has no such function.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError
from veneer.train.rewards.reward import RewardScore

_CHILD = Path(__file__).with_name("limited_child.py")
_LOADING = 120.0
"""Seconds that the file may take to be loaded, its imports among them."""
_ANSWER = 1 << 20
"""Bytes that a process may answer."""
_GIVES_UP = 5
"""Failures of one call, one after the other, after which the rest of its answers are not asked about."""

Asked = tuple[Mapping[str, Any], Mapping[str, Any]]
"""(sample, item), as OpenAI's graders have them."""


class _Ended(Exception):
    """The process is no more, or had to be ended; its text says why."""


class LimitedFunction:
    """`file` or `source`: where the function is. `at_once`: so many processes, each within the limits. Thread-safe."""

    def __init__(
        self, function: str, *, file: str | None = None, source: str | None = None, timeout: float = 10.0,
        memory: float = 2e9, at_once: int = 1, bare: bool = False,
    ) -> None:  # fmt: skip
        assert (file is None) != (source is None)
        if file is not None and not Path(file).is_file():
            raise ConfigError(
                f"the file of the function {function} does not exist", where=file, fix="give a Python file"
            )
        self._first = {"function": function, "memory": int(memory), "timeout": timeout}
        self._first |= {"file": os.path.abspath(file)} if file is not None else {"source": source}
        self._bare = bare
        self._free: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._all = [_Process(self._first, bare) for _ in range(at_once)]
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
        """A score for each, in their order: the function gives a number, or a mapping with `score` and numbers that are
        its parts. Where there is none, why. Raises ConfigError as said above."""
        given = self.call(asked)
        return [RewardScore(None, each.why) if isinstance(each, NoAnswer) else _score_of(each) for each in given]

    def call(self, asked: Sequence[Asked]) -> list[Any]:
        """What the function gives for each, as it comes out of JSON; NoAnswer where it gives none. Raises as score."""
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
    """`why` a function gave nothing."""

    why: str


class _Row:
    """How many failed one after the other."""

    def __init__(self) -> None:
        self.count = 0

    def noted(self, value: Any) -> Any:
        self.count = self.count + 1 if isinstance(value, NoAnswer) else 0
        return value


def _value_of(answer: Any) -> Any:
    """What a process said, which a user's code may have had its hands in."""
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
    """JSON's whole numbers have any size."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


class _Process:
    """One process; used by one thread at a time."""

    def __init__(self, first: Mapping[str, Any], bare: bool) -> None:
        self._first, self._bare = first, bare
        self._running: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Any:
        """Raises _Ended, with the reason, where there is no answer in time."""
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
        if running is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(running.pid, signal.SIGKILL)  # with all that it started
        for stream in (running.stdin, running.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        running.wait()

    def _start(self) -> None:
        if self._running is not None and self._running.poll() is None:
            return
        self.end()
        kept = {"PATH", "LANG", "LC_ALL", "TMPDIR"} if self._bare else os.environ.keys()
        environment = {key: value for key, value in os.environ.items() if key in kept} | {"PYTHONHASHSEED": "0"}
        self._running = subprocess.Popen(
            [sys.executable, "-s", "-P", str(_CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=environment, start_new_session=True, bufsize=0,
        )  # fmt: skip
        where, what = str(self._first.get("file") or "the grader's source"), f"the function {self._first['function']}"
        try:
            answer = self._told(self._first, _LOADING, f"took longer than {_LOADING:g} s to be loaded")
        except _Ended as ended:
            raise ConfigError(f"{what} cannot be loaded: {ended}", where=where) from None
        if error := answer.get("error") if isinstance(answer, dict) else "no answer":
            self.end()
            raise ConfigError(f"{what} cannot be loaded: {error}", where=where)

    def _told(self, message: Any, seconds: float, late: str) -> Any:
        """What the process says to a message."""
        assert self._running is not None
        ends = time.monotonic() + seconds
        try:
            data = json.dumps(message).encode()
            # Larger than a pipe holds: the process reads it whole before it does anything.
            self._send(struct.pack(">I", len(data)) + data, ends)
            size = struct.unpack(">I", self._receive(4, ends))[0]
            if size > _ANSWER:
                raise _Ended("the function's process answered more than may be read")
            return json.loads(self._receive(size, ends))
        except TimeoutError:
            self.end()
            raise _Ended(f"the function {late}") from None
        except (OSError, EOFError):
            running = self._running
            code = None if running is None else _code(running)
            self.end()
            why = "" if code is None else f", by {signal.Signals(-code).name}" if code < 0 else f", with code {code}"
            raise _Ended(f"the function's process ended{why}") from None
        except ValueError:
            self.end()
            raise _Ended("the function's process gave no JSON") from None
        except _Ended:
            self.end()
            raise

    def _send(self, data: bytes, ends: float) -> None:
        assert self._running is not None
        assert self._running.stdin is not None
        place = self._running.stdin.fileno()
        os.set_blocking(place, False)
        rest = memoryview(data)
        while rest:
            _await(place, select.POLLOUT, ends)
            with suppress(BlockingIOError):
                rest = rest[os.write(place, rest) :]

    def _receive(self, count: int, ends: float) -> bytes:
        assert self._running is not None
        assert self._running.stdout is not None
        place = self._running.stdout.fileno()
        found = bytearray()
        while len(found) < count:
            _await(place, select.POLLIN, ends)
            part = os.read(place, count - len(found))
            if not part:
                raise EOFError
            found += part
        return bytes(found)


def _await(place: int, event: int, ends: float) -> None:
    """Until a descriptor is ready (poll, since a server has more of them than select takes). Raises TimeoutError."""
    waiting = select.poll()
    waiting.register(place, event)
    if not waiting.poll(max(0.0, ends - time.monotonic()) * 1000):
        raise TimeoutError


def _code(running: subprocess.Popen[bytes]) -> int | None:
    """How a process ended that has closed its pipe."""
    with suppress(subprocess.TimeoutExpired):
        return running.wait(timeout=1)
    return None
