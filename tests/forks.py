"""Processes that are forks of a program that has imported what they need and computed nothing, and are killed."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def fork(act: Callable[[], object]) -> int:
    """A process that does this alone. It ends with 0, or with 3 and a traceback."""
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
    """Wait for a process. Whether it ended by itself; a process that failed ends the program."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in ({-9} if killed else {0} if killed is False else {0, -9}):
        sys.exit(f"a process ended with {code}")
    return code == 0
