"""The process that a user's function runs in: started as a script by `limited`, and imports nothing of veneer.

Messages are JSON, each behind its length in 4 bytes (big-endian), on the descriptors that were 0 and 1; in their places
the function finds an empty input and an output that goes nowhere, so what it prints disturbs nobody.

    first     {"file" or "source", "function", "memory" (bytes), "timeout" (seconds)}    -> {} or {"error"}
    then      {"sample", "item", "seed"}                                                 -> {"value"} or {"error"}
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


def _main() -> None:
    source, sink, own = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"), os.getpid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for place in (0, 1, 2):
        os.dup2(nowhere, place)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    first = _read(source)
    assert first is not None
    function, found = None, dict[str, Any]()
    try:
        _limit(resource.RLIMIT_DATA, first["memory"])  # private memory, mapped or not: what numpy reserves is not used
        _limit(resource.RLIMIT_CORE, 0)
        function = _loaded(first)
    except BaseException as error:
        found = {"error": _told(error, first)}
    _write(sink, json.dumps(found), own)
    cores = os.cpu_count() or 1
    while function is not None and (asked := _read(source)) is not None:
        # Whoever loses its parent in the middle of a loop that never ends is ended by the system.
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + (first["timeout"] + 1) * cores) + 1)
        try:
            _seed(asked["seed"])
            data = json.dumps({"value": function(asked["sample"], asked["item"])}, default=float)  # numpy's numbers
        except BaseException as error:
            data = json.dumps({"error": _told(error, first)})
        _write(sink, data, own)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _limit(which: int, most: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


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
    sys.modules["reward"] = module  # dataclasses look their module up
    exec(compile(text, _name(first), "exec"), module.__dict__)
    function = getattr(module, first["function"], None)
    if not callable(function):
        raise LookupError(f"there is no function {first['function']!r}")
    return function


def _name(first: dict[str, Any]) -> str:
    return str(first.get("file") or "source")


def _seed(seed: int) -> None:
    """For what draws: of the libraries that the function has loaded, each is seeded."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


def _told(error: BaseException, first: dict[str, Any]) -> str:
    """The error in a line, with the last line of the user's own code that it came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _name(first)]
    at = f"line {lines[-1]} of {os.path.basename(_name(first))}: " if lines else ""
    return f"{at}{type(error).__name__}: {error}"[:2000]


def _read(source: BinaryIO) -> Any:
    """The next message; None at the end."""
    head = source.read(4)
    return json.loads(source.read(struct.unpack(">I", head)[0])) if len(head) == 4 else None


def _write(sink: BinaryIO, text: str, own: int) -> None:
    """`own`: the process that is asked. A fork of the user's that went on ends here: what it says would be taken for
    the answer to the next question."""
    if os.getpid() != own:
        os._exit(0)
    data = text.encode()
    sink.write(struct.pack(">I", len(data)) + data)
    sink.flush()


if __name__ == "__main__":
    _main()
