"""The process that runs a user's function.

`limited` starts this script, which does not import veneer.

    limited_child.py [--user ID] [--confined]

Messages are JSON, each preceded by its length in 4 bytes (big-endian), on the socket at descriptor 0. Before
the function is loaded, descriptors 0 to 2 are redirected to /dev/null. Every message contains a token, and
the result must repeat this token, so that data written earlier cannot pass for a result.

    start                                                                          -> {}
    first {"file" or "source", "function", "memory" (bytes), "timeout" (seconds)}  -> {} or {"error"}
    then  {"sample", "item", "seed"}                                               -> {"value"} or {"error"}

`--user`: first switch to this user, permanently. `--confined`: the process is in a sandbox, so the user's
function must not be able to raise the resource limits.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import struct
import sys
import threading
import time
import traceback
import types
from typing import Any, BinaryIO

_PROCESSES, _FILES = 32, 64
"""Maximum processes and threads of a sandbox; maximum open files of each process."""


def _main(arguments: list[str]) -> None:
    if "--user" in arguments:
        user = int(arguments[arguments.index("--user") + 1])
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    confined = "--confined" in arguments
    source, sink, process_id = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(0), "wb"), os.getpid()
    devnull = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(devnull, descriptor)
    os.close(devnull)
    if confined:
        _limit(resource.RLIMIT_NPROC, _PROCESSES, final=True)
        _limit(resource.RLIMIT_NOFILE, _FILES, final=True)
        os.nice(19)
    else:  # not needed in a sandbox, where no process outlives its parent
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _write(sink, "{}", process_id)
    first = _read(source)
    assert first is not None
    function, result = None, dict[str, Any]()
    try:
        # RLIMIT_DATA limits private memory, but not the address space that numpy reserves and never uses.
        _limit(resource.RLIMIT_DATA, first["memory"], final=confined)
        _limit(resource.RLIMIT_CORE, 0, final=confined)
        function = _loaded(first)
    except BaseException as error:
        result = {"error": _error_text(error, first)}
    _write(sink, json.dumps(result | {"token": first["token"]}), process_id)
    cores = os.cpu_count() or 1
    while function is not None and (question := _read(source)) is not None:
        # If the parent ends while the child is in an endless loop, this limit ends the child.
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + (first["timeout"] + 1) * cores) + 1)
        try:
            _seed(question["seed"])
            value = function(question["sample"], question["item"])
            text = json.dumps({"value": value, "token": question["token"]}, default=float)  # numpy's numbers
        except BaseException as error:
            text = json.dumps({"error": _error_text(error, first), "token": question["token"]})
        _write(sink, text, process_id)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _limit(kind: int, most: int, *, final: bool = False) -> None:
    """Set a resource limit. With `final`, the user's function cannot raise the limit."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most if final else hard))


def _loaded(first: dict[str, Any]) -> Any:
    file = first.get("file")
    if file is not None:
        sys.path.insert(0, os.path.dirname(file))
        with open(file, encoding="utf-8") as opened:
            text = opened.read()
    else:
        text = first["source"]
    module = types.ModuleType("reward")
    module.__file__ = file
    sys.modules["reward"] = module  # `dataclasses` looks up a class's module here
    exec(compile(text, _name(first), "exec"), module.__dict__)
    function = getattr(module, first["function"], None)
    if not callable(function):
        raise LookupError(f"there is no function {first['function']!r}")
    return function


def _name(first: dict[str, Any]) -> str:
    return str(first.get("file") or "source")


def _seed(seed: int) -> None:
    """Seed the random generators of the libraries that the function has imported."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


def _error_text(error: BaseException, first: dict[str, Any]) -> str:
    """Return the error's type and message, preceded by the last line number in the user's code."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _name(first)]
    at = f"line {lines[-1]} of {os.path.basename(_name(first))}: " if lines else ""
    return f"{at}{type(error).__name__}: {error}"[:2000]


def _read(source: BinaryIO) -> Any:
    """Return the next message, or None at the end of the stream."""
    head = source.read(4)
    return json.loads(source.read(struct.unpack(">I", head)[0])) if len(head) == 4 else None


def _write(sink: BinaryIO, text: str, process_id: int) -> None:
    """Write a message.

    process_id: id of the only process that is allowed to write. Any other process is a fork made by the
    user's function, and exits here."""
    if os.getpid() != process_id:
        os._exit(0)
    data = text.encode()
    sink.write(struct.pack(">I", len(data)) + data)
    sink.flush()


if __name__ == "__main__":
    _main(sys.argv[1:])
