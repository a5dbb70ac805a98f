"""Journals of the ledger from before it had an outbox: what their servers had not yet written when they died.

    FOLDER/SERVER.lock, SERVER.0.jsonl …      one JSON object a line

Read once, at the first start of this veneer. A line that cannot be understood (cut off by a full disk, say) is said,
its request is interrupted like any that has no end, and its file is kept as `.torn`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from veneer.serve.request import Usage

__all__ = ["settle_old_journals"]

_log = logging.getLogger("veneer.serve.tenancy")


def settle_old_journals(folder: Path) -> Iterator[tuple[str, dict[str, tuple[float, Usage]]]]:
    """(server, {request: (when it ended, what it took)}) of each dead server; its files go when the caller has come
    back for the next."""
    for lock in sorted(folder.glob("*.lock")):
        server = lock.stem
        if not re.fullmatch(r"[0-9a-f]{16}", server):
            continue
        held = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            parts = sorted(folder.glob(f"{server}.*.jsonl"), key=lambda p: int(p.name.split(".")[1]))
            notes: dict[str, tuple[float, Usage]] = {}
            torn = [part for part in parts if not _read(part, notes)]
            yield server, notes
            for part in parts:
                part.replace(part.with_suffix(".torn")) if part in torn else part.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
        except BlockingIOError:
            continue  # an earlier veneer that still runs
        finally:
            os.close(held)


def _read(part: Path, notes: dict[str, tuple[float, Usage]]) -> bool:
    """Whether every line was understood."""
    whole = True
    for number, line in enumerate(part.read_bytes().splitlines(), 1):
        try:
            found = json.loads(line)
            notes.setdefault(str(found["request"]), (float(found["closed"]), Usage(**found["usage"])))
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("%s, line %d of the ledger's old journal cannot be understood: %s", part, number, error)
            whole = False
    return whole
