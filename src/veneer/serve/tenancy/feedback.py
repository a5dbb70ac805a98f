"""Feedback is data: answers that a tenant lets be kept, what its users say of them, and the rows that come of it.

    answered        `keeping` says whether the tenant lets it be kept; then the ledger's thread writes it into a SQLite
                    database, or an outbox on this machine's disk keeps it until PostgreSQL has it: no request waits
    feedback        on an answer by its id: a thumb, a correction, others that it was chosen over; the last word holds
    rows            what is exported, as `veneer train` reads it

    supervised      the correction of an answer, else one with a thumb up           messages, tools?
    preference      a correction against what it corrects; an answer against        prompt, chosen, rejected, tools?
                    each that it was chosen over
    unpaired        an answer with a thumb                                          prompt, completion, label, tools?

Nothing is kept of a tenant that has no `FeedbackTerms`. What is kept has the time until which it is: after it, it is
nobody's, and the next sweep removes it. Of the request's `user` a hash is kept, by which all answers of a user, those
without feedback too, are removed; answers that were asked for before that and have not come yet are not kept either.

While the database is unavailable, feedback returns 503. Answers for PostgreSQL wait in the outbox, up to a limit of
which one tenant can use half. A tenant's rows in the database are limited too (`files` and `disk` of QuotaLimits). Over
a limit, answers are sent but not kept, with an entry in the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sqlalchemy import Connection, Engine, delete, func, insert, select, tuple_, update

from veneer.errors import one_of, quoted
from veneer.library.database import reading, write_transaction
from veneer.library.names import name_of
from veneer.serve.access import KeepAnswer, Served, shadow_id
from veneer.serve.principal import Principal
from veneer.serve.quota import QuotaHold, Quotas
from veneer.serve.request import Refused, invalid
from veneer.serve.tenancy.ledger import Ledger
from veneer.serve.tenancy.outbox import Outbox, Sender, left_behind, outboxes, write_all
from veneer.serve.tenancy.store import Store, answer_table, feedback_table, forgotten_table

_log = logging.getLogger("veneer.serve.tenancy")

FeedbackKind = Literal["supervised", "preference", "unpaired"]
EVERYTHING = "*"
"""What of a tenant is forgotten: all its answers. Else the hash of a user, or the id of an answer."""
_ROOM = 256 << 20
"""Bytes of answers that wait for the database on this machine."""
_LOCK = 0x66656564  # "feed": the key of PostgreSQL's advisory lock
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_LARGEST = 1 << 20
"""Characters of JSON of an answer with its request; a larger one is not kept."""
_MOST, _PAGE = 100, 20
"""Answers in one transaction, and feedback that is read at once."""
_MEASURED = 60.0
"""Seconds after which a tenant's rows in the database are measured again."""
_REMEMBERED = 400 * 86400.0
"""Seconds for which it is remembered what was forgotten: for answers that wait somewhere."""

# -- what is kept ------------------------------------------------------------------------------------------------------


class KeptAnswers:
    """The answers that one process keeps, and the feedback on all. Thread-safe."""

    def __init__(self, store: Store, ledger: Ledger, wall: Callable[[], float]) -> None:
        """`ledger`: whose thread writes answers, and beside whose outbox answers for PostgreSQL wait."""
        self.store, self.ledger, self.wall = store, ledger, wall
        self.quotas = Quotas()
        self._logged = -10.0
        self._holds: dict[str, tuple[QuotaHold, float]] = {}
        self._waiting: Counter[str] = Counter()  # bytes in the outbox, by tenant
        self.outbox = self._sender = None
        if ledger.outbox:
            self.outbox = Outbox(ledger.folder / f"{ledger.server}.answers.sqlite", room=_ROOM, claim=False)
            self.recover()
            self._sender = Sender(self._send, "answers kept for feedback")

    def keeping(self, caller: Principal, served: Served, request: str) -> KeepAnswer | None:
        """What takes the answer to a request that comes now; None if the answer is not to be kept."""
        settings = self.store.settings
        keeps = settings.kept.get(caller.tenant)
        names = [name for _, name, _ in served.parts()]
        if keeps is None or not any(map(keeps, (served.name, *names))):
            return None
        at, terms = self.wall(), settings.feedback[caller.tenant]
        whose = user_hash(caller.tenant, caller.user) if caller.user else ""
        row = {"tenant": caller.tenant, "id": request, "at": at, "expires": at + terms.days * 86400, "whose": whose}
        row |= {"name": served.name, "adapters": names}

        def keep(asked: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> None:
            try:
                self._keep(json.dumps({**row, "asked": asked, "choices": choices}), row).add_done_callback(written)
            except ValueError as error:
                self._log_lost(error)

        def written(future: Future[None]) -> None:
            if error := future.exception():
                self._log_lost(error)
            elif self._sender:
                self._sender.wake()

        return keep

    def _keep(self, text: str, row: Mapping[str, Any]) -> Future[None]:
        """Raises ValueError for an answer over a limit."""
        tenant = row["tenant"]
        if len(text) > _LARGEST:
            raise ValueError(f"{row['id']} has {len(text):,} characters with its request; the limit is {_LARGEST:,}")
        if not self.outbox:
            return self.ledger.writer.put(self._write, text)
        if self._waiting[tenant] + len(text) > _ROOM // 2:
            waiting = f"{self._waiting[tenant]:,} bytes of {tenant or 'this server'}"
            raise ValueError(f"{waiting} are already waiting for the database")
        self._waiting[tenant] += len(text)
        return self.outbox.add(json.dumps([tenant, row["id"]]), text, final=True)

    def _log_lost(self, error: BaseException) -> None:
        """Log that answers are not kept, once in ten seconds."""
        if time.monotonic() - self._logged > 10.0:
            self._logged = time.monotonic()
            _log.error("answers are not kept for feedback: %s", error)

    def flush(self, seconds: float = 10.0) -> None:
        """Write what has come into the database. Raises the database's errors while it is unavailable."""
        if self.outbox and self._sender:
            self.outbox.writer.flush(seconds)
            self._sender.drain()
        else:
            self.ledger.writer.flush(seconds)

    def close(self) -> None:
        """What is not in the database by now waits for the next start. To be called before the ledger is closed."""
        if self.outbox and self._sender:
            self.outbox.writer.flush()
            self._sender.close()
            self.outbox.close()

    def recover(self) -> None:
        """Write the answers that dead processes left in their outboxes."""
        for path in outboxes(self.ledger.folder) if self.outbox else ():
            if path.stem.endswith(".answers") and self.outbox and path != self.outbox.path:
                with contextlib.suppress(BlockingIOError, FileNotFoundError), left_behind(path) as found:
                    for texts in found:
                        write_all(self._transaction, self._write, texts, _name)

    def _send(self) -> bool:
        """Send some answers of the outbox. Returns whether there can be more."""
        assert self.outbox is not None
        taken = self.outbox.take(_MOST)
        write_all(self._transaction, self._write, [text for _, text, _ in taken], _name)
        self.outbox.sent(taken)
        for key, text, _ in taken:
            tenant = json.loads(key)[0]
            self._waiting[tenant] = max(0, self._waiting[tenant] - len(text))
        return bool(taken)

    def _transaction(self) -> AbstractContextManager[Connection]:
        return write_transaction(self.store.engine, _LOCK)

    def _write(self, c: Connection, texts: Sequence[str]) -> int:
        """Write answers that the database does not have, that are not forgotten and that the quota has room for.
        Returns how many there are now."""
        a, g, count = answer_table.c, forgotten_table.c, 0
        for text in texts:
            row = json.loads(text)
            if c.scalar(select(a.id).where(a.tenant == row["tenant"], a.id == row["id"])) is not None:
                continue
            what = [EVERYTHING, row["id"], row["id"].removesuffix(shadow_id("")), row["whose"]]
            forgotten = c.scalar(select(func.max(g.at)).where(g.tenant == row["tenant"], g.what.in_(what)))
            if (forgotten or 0.0) < row["at"] and self._fits(c, row, len(text)):
                texts_of = {name: json.dumps(row[name]) for name in ("adapters", "asked", "choices")}
                c.execute(insert(answer_table), row | texts_of)
                count += 1
        return count

    def _fits(self, c: Connection, row: Mapping[str, Any], size: int) -> bool:
        """Whether the tenant's quota has room for an answer. Usage of the database is measured again after a while,
        because other servers add and remove rows too."""
        tenant = row["tenant"]
        hold, until = self._holds.get(tenant) or (self.quotas.take(tenant), 0.0)
        if time.monotonic() >= until:
            a = answer_table.c
            taken = select(func.count(), func.coalesce(func.sum(func.length(a.asked) + func.length(a.choices)), 0))
            files, disk = c.execute(taken.where(a.tenant == tenant)).one()
            hold.set(files=int(files), disk=int(disk))
            self._holds[tenant] = hold, time.monotonic() + _MEASURED
        try:
            hold.add(files=1, disk=size)
        except Refused as error:
            _log.error("answer %s is not kept for feedback: %s", row["id"], error.what)
            return False
        return True

    # -- feedback

    def give(self, tenant: str, feedback: AnswerFeedback) -> dict[str, Any]:
        """Keeps what is said of an answer; what was said before of what is said again is gone. Returns what holds.
        Raises Refused: not_found (404) for an answer that is not kept, whatever the reason; 400."""
        self._find(tenant, {feedback.id, *(other for other, _ in feedback.rejected or ())})
        with write_transaction(self.store.engine, _LOCK) as c:
            given = self._choice(c, tenant, feedback.id, feedback.choice, "choice")
            for other, choice in feedback.rejected or ():
                if (other, choice) == (feedback.id, feedback.choice):
                    raise invalid("an answer cannot be chosen over itself", "rejected")
                if self._choice(c, tenant, other, choice, "rejected")[0] != given[0]:
                    raise invalid(f"{other} answers another request", "rejected", "answers to the same messages")
            f = feedback_table.c
            here = (f.tenant == tenant) & (f.answer == feedback.id) & (f.choice == feedback.choice)
            values = feedback.values() | {"at": self.wall()}
            if c.execute(update(feedback_table).where(here).values(**values)).rowcount == 0:
                key = {"tenant": tenant, "answer": feedback.id, "choice": feedback.choice}
                c.execute(insert(feedback_table), {"up": None, "corrected": None, "rejected": None, **key, **values})
            row = c.execute(select(feedback_table).where(here)).one()
        thumb = None if row.up is None else "up" if row.up else "down"
        rejected = [{"id": other, "choice": choice} for other, choice in json.loads(row.rejected or "[]")]
        said = {"thumb": thumb, "corrected": json.loads(row.corrected or "null"), "rejected": rejected}
        return {"object": "feedback", "id": feedback.id, "choice": feedback.choice, **said}

    def _find(self, tenant: str, answers: set[str]) -> None:
        """Make sure that recent answers are in the database. Raises Refused for answers that cannot exist."""
        for answer in answers:
            if not _ID.fullmatch(answer):
                raise self._unknown(tenant, answer)
        a = answer_table.c
        with self.store.reading() as c:
            known = {*c.scalars(select(a.id).where(a.tenant == tenant, a.id.in_(answers)))}
        if known != answers:  # one check for all answers
            self.flush()

    def _choice(self, c: Connection, tenant: str, answer: str, choice: int, param: str) -> tuple[Any, Any]:
        """(what was asked, the answer)."""
        a = answer_table.c
        here = (a.tenant == tenant, a.id == answer, a.expires > self.wall())
        row = c.execute(select(a.asked, a.choices).where(*here)).first()
        if row is None:
            raise self._unknown(tenant, answer)
        choices = json.loads(row.choices)
        if not 0 <= choice < len(choices):
            raise invalid(f"{answer[:100]} has choices 0 to {len(choices) - 1}, not {choice}", param)
        return json.loads(row.asked), choices[choice]

    def _unknown(self, tenant: str, answer: str) -> Refused:
        """Of an answer that never was, is another tenant's, was not kept, or was removed: nobody can tell which."""
        fix = "the `id` of a chat completion of this tenant's that was kept, and whose time is not over"
        if tenant not in self.store.settings.feedback:
            fix = "none of this tenant's are kept; its operator changes that: veneer tenant feedback keep"
        what = f"no answer {quoted(answer, 100)} is kept"
        return Refused(what, status=404, code="not_found", param="id", fix=fix)

    # -- removal

    def forget(self, tenant: str, *, user: str | None = None, id: str | None = None) -> int:
        """Removes what is kept of a user, or one answer, or everything. Returns how many answers went."""
        if id is not None and not _ID.fullmatch(id):
            return 0
        what = user_hash(tenant, user) if user is not None else id if id is not None else EVERYTHING
        with contextlib.suppress(OSError, sqlite3.Error):  # else they are left out when they come
            self.flush()
        with write_transaction(self.store.engine, _LOCK) as c:
            gone = forget_answers(c, tenant, what, self.wall())
        if tenant in self._holds:
            self._holds[tenant] = self._holds[tenant][0], 0.0
        return gone

    def sweep(self) -> int:
        """Removes what has been kept for its time. Returns how many answers went."""
        a, f, now, gone = answer_table.c, feedback_table.c, self.wall(), 0
        while True:
            with write_transaction(self.store.engine, _LOCK) as c:
                _erase(c)
                old = c.execute(select(a.tenant, a.id).where(a.expires <= now).limit(_MOST)).all()
                for tenant, id in old:
                    c.execute(delete(feedback_table).where(f.tenant == tenant, f.answer == id))
                    c.execute(delete(answer_table).where(a.tenant == tenant, a.id == id))
                c.execute(delete(forgotten_table).where(forgotten_table.c.at < now - _REMEMBERED))
            gone += len(old)
            if len(old) < _MOST:
                return gone


def _name(text: str) -> str:
    return f"answer {json.loads(text)['id']}, which is not kept"


def user_hash(tenant: str, user: str) -> str:
    """As what a user is kept: SHA-256 of tenant and user."""
    return hashlib.sha256(json.dumps([tenant, user]).encode()).hexdigest()


def forget_answers(c: Connection, tenant: str, what: str, now: float) -> int:
    """Remove kept answers with what was said of them, within a transaction, and remember that those of before `now`
    which have not come yet are not to be kept. Returns how many went."""
    a, f = answer_table.c, feedback_table.c
    _erase(c)
    one = (a.whose == what) | a.id.in_((what, shadow_id(what)))
    these = a.tenant == tenant if what == EVERYTHING else (a.tenant == tenant) & one
    c.execute(delete(feedback_table).where(f.tenant == tenant, f.answer.in_(select(a.id).where(these))))
    gone = c.execute(delete(answer_table).where(these)).rowcount
    here = (forgotten_table.c.tenant == tenant) & (forgotten_table.c.what == what)
    c.execute(delete(forgotten_table).where(here))
    c.execute(insert(forgotten_table), {"tenant": tenant, "what": what, "at": now})
    return gone


def _erase(c: Connection) -> None:
    """What is deleted on this connection is overwritten in its file."""
    if c.dialect.name == "sqlite":
        c.exec_driver_sql("PRAGMA secure_delete = ON")


# -- what is said ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerFeedback:
    """What is said of a choice of an answer. `said`: which of the rest: what is in it replaces what was said before,
    None takes it back. `up`: a thumb up or down. `corrected`: the message that should have been the answer.
    `rejected`: (answer, choice) of each that it was chosen over."""

    id: str
    choice: int = 0
    up: bool | None = None
    corrected: Mapping[str, Any] | None = None
    rejected: tuple[tuple[str, int], ...] | None = None
    said: frozenset[str] = field(default=frozenset({"up", "corrected", "rejected"}))

    def values(self) -> dict[str, Any]:
        """As columns."""
        found: dict[str, Any] = {"up": self.up}
        found["corrected"] = None if self.corrected is None else json.dumps(self.corrected)
        found["rejected"] = json.dumps(self.rejected) if self.rejected else None
        return {name: value for name, value in found.items() if name in self.said}


# -- what comes of it --------------------------------------------------------------------------------------------------


def feedback_counts(c: Connection, tenant: str, now: float) -> dict[str, int]:
    """How many answers of a tenant are kept, and how many of them have what."""
    a, f = answer_table.c, feedback_table.c
    these = (a.tenant == tenant) & (a.expires > now)
    said = (
        select(
            func.count(f.up).label("n"),
            func.count().filter(f.up).label("up"),
            func.count(f.corrected).label("corrected"),
            func.count(f.rejected).label("chosen"),
        )
        .join(answer_table, (a.tenant == f.tenant) & (a.id == f.answer))
        .where(these)
    )
    row = c.execute(said).one()
    kept = int(c.scalar(select(func.count()).select_from(answer_table).where(these)) or 0)
    return {"answers": kept, "up": row.up, "down": row.n - row.up, "corrected": row.corrected, "chosen": row.chosen}


@dataclass(frozen=True)
class KeptAnswer:
    """An answer that is kept: what was asked, and the assistant's message of each choice."""

    messages: Sequence[Mapping[str, Any]]
    choices: Sequence[Mapping[str, Any]]


def kept_answers(c: Connection, tenant: str, ids: Sequence[str], now: float) -> dict[str, KeptAnswer]:
    """Those of `ids` that are kept of a tenant."""
    a = answer_table.c
    query = select(a.id, a.asked, a.choices).where(a.tenant == tenant, a.expires > now, a.id.in_(ids[:1000]))
    return {r.id: KeptAnswer(json.loads(r.asked)["messages"], json.loads(r.choices)) for r in c.execute(query)}


def feedback_rows(
    engine: Engine, tenant: str, kind: str, *, adapter: str | None = None, now: float | None = None
) -> Iterator[dict[str, Any]]:
    """Rows for training, in the order in which the feedback came, each once. `adapter`: of answers that were asked for
    under this name, or given by this adapter, whatever its version. Raises ConfigError for a kind that is none."""
    one_of(kind, get_args(FeedbackKind), "a kind of rows", "kind")
    return _rows(engine, tenant, kind, adapter, time.time() if now is None else now)


def _rows(engine: Engine, tenant: str, kind: str, adapter: str | None, now: float) -> Iterator[dict[str, Any]]:
    a, f = answer_table.c, feedback_table.c
    order = (f.at, f.answer, f.choice)
    query = (
        select(feedback_table, a.name, a.adapters, a.asked, a.choices)
        .join(answer_table, (a.tenant == f.tenant) & (a.id == f.answer))
        .where(f.tenant == tenant, a.expires > now)
        .order_by(*order)
        .limit(_PAGE)
    )
    after: tuple[Any, ...] | None = None
    while True:
        with reading(engine) as c:
            found = c.execute(query if after is None else query.where(tuple_(*order) > tuple_(*after))).all()
        for r in found:
            if adapter is None or adapter in {n for each in (r.name, *json.loads(r.adapters)) for n in _names(each)}:
                rejected = [other for other, _ in json.loads(r.rejected or "[]")] if kind == "preference" else []
                with reading(engine) as c:  # one row at a time: an answer can be a megabyte
                    others = _answers(c, tenant, rejected, now)
                yield from _rows_of(kind, r, others)
        if len(found) < _PAGE:
            return
        after = (found[-1].at, found[-1].answer, found[-1].choice)


def _names(name: str) -> tuple[str, str]:
    return name, name_of(name)


def _answers(c: Connection, tenant: str, ids: Sequence[str], now: float) -> dict[str, Any]:
    a = answer_table.c
    query = select(a.id, a.choices).where(a.tenant == tenant, a.expires > now)
    found: dict[str, Any] = {}
    for i in range(0, len(ids), 500):
        found |= {r.id: json.loads(r.choices) for r in c.execute(query.where(a.id.in_(ids[i : i + 500])))}
    return found


def _rows_of(kind: str, r: Any, others: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    asked, given = json.loads(r.asked), json.loads(r.choices)[r.choice]
    corrected = json.loads(r.corrected) if r.corrected else None
    tools = {"tools": asked["tools"]} if asked.get("tools") else {}
    if kind == "supervised":
        if corrected is not None or r.up:
            yield {"messages": [*asked["messages"], corrected or given], **tools}
    elif kind == "unpaired":
        if r.up is not None:
            yield {"prompt": asked["messages"], "completion": [given], "label": bool(r.up), **tools}
    else:
        pairs = [] if corrected is None else [(corrected, given)]
        pairs += [(given, others[other][n]) for other, n in json.loads(r.rejected or "[]") if other in others]
        for chosen, rejected in pairs:
            if chosen != rejected:
                yield {"prompt": asked["messages"], "chosen": [chosen], "rejected": [rejected], **tools}
