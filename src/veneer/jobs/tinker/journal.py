"""What a training client asked and what it was told, on the disk before anybody hears of it.

    journal = Journal.open(folder / "journal")        what a kill cut off at its end is as if it had not come
    journal.asked(3, "forward_backward", body)        before the request is taken
    journal.told(3, FutureResult("proto", data))      before its answer can be had
    journal.trim(40)                                  a state holds all up to 40: its requests are not needed any more

A client's state is a function of the last state that was written and the requests after it, in the order of their
numbers. So whoever opens this again has all that is needed to be where the process before was killed: answers are found
and not computed again, and a request is never carried out twice. What was written outlives the process, as the system
has it; a loss of power may take the last seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from veneer.files.atomic import replace_file

KEPT = 512
"""Answers that are kept, the newest, for clients that ask for them again."""
_KEPT_BYTES = 64 << 20


@dataclass(frozen=True)
class FutureResult:
    """`kind`: what `data` is; of one that failed it is JSON with the error."""

    kind: Literal["proto", "json", "failed"]
    data: bytes


@dataclass(frozen=True)
class AskedRequest:
    """`seq`: its number among those of its client. `body`: as it came."""

    seq: int
    kind: str
    body: bytes


class Journal:
    """`requests`: since the last state, by number. `answers`: the newest. `last`: the greatest number that came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: dict[int, AskedRequest] = {}
        self.answers: dict[int, FutureResult] = {}
        self.last = 0
        self.bytes = 0
        """Of requests since the last state."""
        self._file: Any = None

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Makes it where there is none. Raises OSError."""
        made, whole = cls(path), 0
        if path.exists():
            for head, body, end in _records(path.read_bytes()):
                whole = end
                if head["k"] == "last":
                    made.last = head["seq"]
                elif head["k"] == "asked":
                    made._came(AskedRequest(head["seq"], head["op"], body))
                else:
                    made.answers[head["seq"]] = FutureResult(head["op"], body)
        made._file = path.open("ab")
        made._file.truncate(whole)
        return made

    def _came(self, request: AskedRequest) -> None:
        self.requests[request.seq] = request
        self.last = max(self.last, request.seq)
        self.bytes += len(request.body)

    def asked(self, seq: int, kind: str, body: bytes) -> AskedRequest:
        self._write("asked", seq, kind, body)
        made = AskedRequest(seq, kind, body)
        self._came(made)
        return made

    def told(self, seq: int, answer: FutureResult) -> None:
        self._write("told", seq, answer.kind, answer.data)
        self.answers[seq] = answer

    def trim(self, upto: int) -> None:
        """Requests up to that number are in a state; of answers the newest stay."""
        self.requests = {seq: request for seq, request in self.requests.items() if seq > upto}
        self.bytes = sum(len(request.body) for request in self.requests.values())
        newest = sorted(self.answers)[-KEPT:]
        size = sum(len(self.answers[seq].data) for seq in newest)
        while len(newest) > 1 and size > _KEPT_BYTES:
            size -= len(self.answers[newest.pop(0)].data)
        self.answers = {seq: self.answers[seq] for seq in newest}
        parts = [_record("last", self.last, "", b"")]
        parts += [_record("asked", r.seq, r.kind, r.body) for r in self.requests.values()]
        parts += [_record("told", seq, answer.kind, answer.data) for seq, answer in self.answers.items()]
        self._file.close()
        replace_file(self.path, parts)
        self._file = self.path.open("ab")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, what: str, seq: int, kind: str, body: bytes) -> None:
        """Raises OSError; then as if nothing had been written."""
        before = os.fstat(self._file.fileno()).st_size
        try:
            self._file.write(_record(what, seq, kind, body))
            self._file.flush()
        except OSError:
            self._file.truncate(before)
            raise


def _record(what: str, seq: int, kind: str, body: bytes) -> bytes:
    return json.dumps({"k": what, "seq": seq, "op": kind, "n": len(body)}).encode() + b"\n" + body


def _records(data: bytes) -> Iterator[tuple[dict[str, Any], bytes, int]]:
    """Each whole record: its head, its body, and where it ends."""
    at = 0
    while (line := data.find(b"\n", at)) >= 0:
        try:
            head = json.loads(data[at:line])
            end = line + 1 + int(head["n"])
        except (ValueError, KeyError, TypeError):
            return
        if end > len(data):
            return
        yield head, data[line + 1 : end], end
        at = end
