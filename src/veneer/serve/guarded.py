"""Run a command that ends when the caller ends, even if the caller is killed.

    python guarded.py COMMAND ARGUMENT …      with a pipe as standard input, which the caller keeps open

The pipe closes when the caller ends. All processes of the command's group then get SIGTERM, and SIGKILL after
`GRACE` seconds. When the command ends by itself, the processes that it leaves behind are killed.

A script of the standard library only, so that it starts at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 15.0
"""Seconds between SIGTERM and SIGKILL."""


def _end_with_caller() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process ends last
    threading.Thread(target=_end_with_caller, daemon=True).start()
    print(f"exited with code {child.wait()}", flush=True)
    os.killpg(0, signal.SIGKILL)
