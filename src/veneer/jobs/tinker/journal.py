"""Write-ahead journal of a training client's requests and results.

    journal = Journal.open(folder / "journal")        ignores an incomplete record at the end, after a kill
    journal.asked(3, "forward_backward", body)        before the request is accepted
    journal.told(3, FutureResult("proto", data))      before the result is visible
    journal.trim(40)                                  a saved state includes requests up to 40: drop them

A client's state is a function of the last saved state and of the later requests in the order of their
numbers. So a new process can restore the state of a killed process: it reads results from the journal instead
of computing them again, and never executes a request twice. Records survive the process through the system's
page cache; a power failure can lose the last seconds.

Bodies and results are read from the file when needed, and no file stays open, so that a waiting client needs
no memory for them and no file descriptor.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from veneer.files.atomic import replace_file

KEPT = 512
"""Number of newest results to keep, for clients that retrieve a result again."""
_KEPT_BYTES = 64 << 20


@dataclass(frozen=True)
class FutureResult:
    """A result. `kind`: format of `data`; for `failed`, JSON with the error."""

    kind: Literal["proto", "json", "failed"]
    data: bytes


@dataclass(frozen=True)
class JournalEntry:
    """A request or a result in the journal.

    `seq`: the request's number within its client. `at`: offset of the bytes."""

    seq: int
    kind: Any
    at: int
    size: int


class Journal:
    """The journal of one training client. Thread-safe.

    requests: requests since the last saved state, by number
    answers: newest results, by number
    last: highest number received
    bytes: size of `requests`"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: dict[int, JournalEntry] = {}
        self.answers: dict[int, JournalEntry] = {}
        self.last = 0
        self.bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open a journal, or create it if missing. Raises OSError."""
        made, whole = cls(path), 0
        with path.open("a+b") as file:
            for head, at in _records(file):
                whole = at + head["n"]
                if head["k"] == "last":
                    made.last = head["seq"]
                else:
                    made._add(head["k"], JournalEntry(head["seq"], head["op"], at, head["n"]))
            file.truncate(whole)
        return made

    def _add(self, what: str, entry: JournalEntry) -> None:
        if what == "told":
            self.answers[entry.seq] = entry
            return
        self.requests[entry.seq] = entry
        self.last = max(self.last, entry.seq)
        self.bytes += entry.size

    def asked(self, seq: int, kind: str, body: bytes) -> None:
        self._write("asked", seq, kind, body)

    def told(self, seq: int, answer: FutureResult) -> None:
        self._write("told", seq, answer.kind, answer.data)

    def body(self, seq: int) -> bytes:
        """Return the body of a request in `requests`."""
        with self._lock:
            return self._read(self.requests[seq])

    def answer(self, seq: int) -> FutureResult | None:
        """Return a request's result; None if pending or expired."""
        with self._lock:
            found = self.answers.get(seq)
            return None if found is None else FutureResult(found.kind, self._read(found))

    def trim(self, upto: int) -> None:
        """Drop requests up to `upto`, and all but the newest KEPT results."""
        with self._lock:
            requests = [entry for seq, entry in self.requests.items() if seq > upto]
            newest = [self.answers[seq] for seq in sorted(self.answers)[-KEPT:]]
            size = sum(entry.size for entry in newest)
            while len(newest) > 1 and size > _KEPT_BYTES:
                size -= newest.pop(0).size
            kept = [("asked", entry) for entry in requests] + [("told", entry) for entry in newest]
            first = _head("last", self.last, "", 0)
            replace_file(self.path, self._copied(first, kept))
            self.requests, self.answers, self.bytes = {}, {}, 0
            end = len(first)
            for what, entry in kept:
                at = end + len(_head(what, entry.seq, entry.kind, entry.size))
                self._add(what, JournalEntry(entry.seq, entry.kind, at, entry.size))
                end = at + entry.size

    def _copied(self, first: bytes, kept: list[tuple[str, JournalEntry]]) -> Iterator[bytes]:
        yield first
        for what, entry in kept:
            yield _head(what, entry.seq, entry.kind, entry.size)
            yield self._read(entry)

    def _read(self, entry: JournalEntry) -> bytes:
        with self.path.open("rb") as file:
            file.seek(entry.at)
            return file.read(entry.size)

    def _write(self, what: str, seq: int, kind: str, body: bytes) -> None:
        """Append a record. On OSError, restores the file and raises."""
        head = _head(what, seq, kind, len(body))
        with self._lock, self.path.open("ab", buffering=0) as file:
            before, left = file.tell(), memoryview(head + body)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(before)
                raise
            self._add(what, JournalEntry(seq, kind, before + len(head), len(body)))


def _head(what: str, seq: int, kind: str, size: int) -> bytes:
    return json.dumps({"k": what, "seq": seq, "op": kind, "n": size}).encode() + b"\n"


def _records(file: IO[bytes]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (head of a complete record, offset of the record's bytes)."""
    end = file.seek(0, 2)
    at = file.seek(0)
    while (line := file.readline()).endswith(b"\n"):
        try:
            head = json.loads(line)
            size = int(head["n"])
        except (ValueError, KeyError, TypeError):
            return
        at += len(line)
        if at + size > end:
            return
        yield head, at
        at = file.seek(at + size)
