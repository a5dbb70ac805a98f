"""The audit log: who changed what, when, from what to what; each line carries the hash of the line before it.

    hash = sha256(number, at, who, what, subject, before, after, previous), as one JSON list

A line that was changed, removed or put in between breaks the chain at its number, and the database itself refuses to
change or delete lines. Lines cut off at the end break nothing that is still there: keep the head (`veneer tenant audit
--verify` prints it) somewhere else from time to time, and give it back with `--expect`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, insert, select

from veneer.serve.tenancy.store import audit

__all__ = ["FIRST", "append", "faults", "lines"]

FIRST = "0" * 64
"""What the first line names as the hash before it."""


def append(c: Connection, who: str, what: str, subject: str, before: Any, after: Any) -> str:
    """Add a line within a transaction of `Store.change`, so that lines follow one another. Returns its hash, the head.
    `before` and `after`: anything that JSON can say; None for what was not or is no longer there."""
    last = c.execute(select(audit.c.number, audit.c.hash).order_by(audit.c.number.desc()).limit(1)).first()
    line = {
        "number": last.number + 1 if last else 1,
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "who": who,
        "what": what,
        "subject": subject,
        "before": _json(before),
        "after": _json(after),
        "previous": last.hash if last else FIRST,
    }
    line["hash"] = _hash(line)
    c.execute(insert(audit), line)
    return str(line["hash"])


def lines(c: Connection, *, subject: str = "", what: str = "", limit: int = 100, skip: int = 0) -> list[dict[str, Any]]:
    """The newest first. `what`: the action, or its beginning: key, key.revoke."""
    query = select(audit).order_by(audit.c.number.desc()).limit(limit).offset(skip)
    if subject:
        query = query.where(audit.c.subject == subject)
    if what:
        query = query.where((audit.c.what == what) | audit.c.what.startswith(f"{what}.", autoescape=True))
    found = [dict(row._mapping) for row in c.execute(query)]
    return [line | {side: json.loads(line[side]) for side in ("before", "after")} for line in found]


def faults(c: Connection, expect: str = "") -> tuple[str, int, list[str]]:
    """(head, lines, what is wrong with them) after reading the whole log. `expect`: a head that was seen earlier and
    has to be the hash of one of the lines."""
    previous, number, seen = FIRST, 0, expect in ("", FIRST)
    wrong = []
    for line in _all(c):
        if line["number"] != number + 1:
            wrong.append(f"lines {number + 1} to {line['number'] - 1} are missing")
        elif line["previous"] != previous:
            wrong.append(f"line {line['number']} does not follow the one before it")
        if line["hash"] != _hash(line):
            wrong.append(f"line {line['number']} was changed")
        previous, number = line["hash"], line["number"]
        seen = seen or previous == expect
    if not seen:
        wrong.append(f"no line has the hash {expect}: lines at the end are missing, or all were written anew")
    return previous, number, wrong


def _all(c: Connection) -> Iterator[dict[str, Any]]:
    for row in c.execution_options(yield_per=1000).execute(select(audit).order_by(audit.c.number)):
        yield dict(row._mapping)


def _hash(line: dict[str, Any]) -> str:
    names = ("number", "at", "who", "what", "subject", "before", "after", "previous")
    return hashlib.sha256(json.dumps([line[n] for n in names], ensure_ascii=False).encode()).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
