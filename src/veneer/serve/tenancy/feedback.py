"""Feedback: stored completions, users' feedback, and training rows from both.

    completion    stored by the ledger's thread, if `keeping` finds that the tenant allows it
    feedback      refers to a completion's id: a thumb, a correction, or worse completions
    rows          exported for `veneer train`

    supervised    messages, tools?                     a correction, or a completion with a thumb up
    preference    prompt, chosen, rejected, tools?     a correction chosen over its original;
                                                       a completion chosen over a worse one
    unpaired      prompt, completion, label, tools?    a completion with a thumb

New feedback on a completion replaces earlier values of the same fields.

Nothing is stored for a tenant without `FeedbackTerms`. An expired completion is hidden until the next sweep
deletes it. The request's `user` is stored as a hash, so that all completions of a user can be deleted,
whether or not they have feedback. After such a deletion, a completion that arrives late is not stored if its
request came before the deletion.

While the database is unavailable, feedback returns 503, and completions are sent but not stored, which is
logged. Completions over a tenant's limits (`files` and `disk` of QuotaLimits) are also sent but not stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sqlalchemy import Connection, Engine, delete, func, insert, select, tuple_, update

from veneer.errors import one_of, quoted
from veneer.library.database import reading, write_transaction
from veneer.library.names import name_of
from veneer.serve.access import ResolvedModel, StoreAnswer, shadow_id
from veneer.serve.principal import Principal
from veneer.serve.quota import QuotaHold, Quotas
from veneer.serve.request import Refused, invalid
from veneer.serve.tenancy.journal import Writer
from veneer.serve.tenancy.store import Store, answer_table, deletion_table, feedback_table

_log = logging.getLogger("veneer.serve.tenancy")

FeedbackKind = Literal["supervised", "preference", "unpaired"]
EVERYTHING = "*"
"""The deletion target for all completions of a tenant.

Other targets are the hash of a user, or the id of a completion.
"""
_MAX_WAITING = 64 << 20
"""Maximum bytes of one tenant's completions that wait to be written to the database."""
_LOCK = 0x66656564  # "feed" in ASCII: the key of PostgreSQL's advisory lock
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_LARGEST = 1 << 20
"""Maximum characters of a completion with its request, as JSON.

Larger completions are not stored.
"""
_MOST, _PAGE = 100, 20
"""Completions per transaction, and feedback rows per read."""
_MEASURED = 60.0
"""Seconds between counts of a tenant's rows in the database."""
_REMEMBERED = 400 * 86400.0
"""Seconds for which deletions are remembered, for completions that arrive late."""

# -- storing answers ---------------------------------------------------------------------------------------------------


class StoredAnswers:
    """Stores this process's completions, and feedback on all stored completions.

    Thread-safe.
    """

    def __init__(
        self, store: Store, writer: Writer[Connection], wall: Callable[[], float], quotas: Quotas | None = None
    ) -> None:
        """`writer`: the ledger's writer, whose thread writes completions. `quotas`: limits of each tenant."""
        self.store, self.writer, self.wall = store, writer, wall
        self.quotas = quotas or Quotas()
        self._logged, self._lock = -10.0, threading.Lock()
        self._quota_holds: dict[str, tuple[QuotaHold, float]] = {}
        self._waiting: Counter[str] = Counter()  # tenant -> bytes of unwritten completions

    def keeping(self, principal: Principal, model: ResolvedModel, request: str) -> StoreAnswer | None:
        """Return a function that stores a new request's completions, or None.

        None means that the tenant's settings do not store them.
        """
        settings = self.store.settings
        keeps = settings.stores_answer.get(principal.tenant)
        names = [name for _, name, _ in model.parts()]
        if keeps is None or not any(map(keeps, (model.name, *names))):
            return None
        at, terms = self.wall(), settings.feedback[principal.tenant]
        user = user_hash(principal.tenant, principal.user) if principal.user else ""
        row = {"tenant": principal.tenant, "id": request, "at": at, "expires": at + terms.days * 86400, "whose": user}
        row |= {"name": model.name, "adapters": names}

        def store(request_body: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> None:
            text = json.dumps({**row, "asked": request_body, "choices": choices})
            size = len(text)
            if size > _LARGEST:
                self._log_lost(f"{request} has {size:,} characters including its request; the limit is {_LARGEST:,}")
            elif not self._reserve(principal.tenant, size):
                self._log_lost(f"{_MAX_WAITING:,} bytes of {principal.tenant or 'this server'} wait for the database")
            else:
                self.writer.put(self._write, text).add_done_callback(lambda future: written(future, size))

        def written(future: Future[None], size: int) -> None:
            self._reserve(principal.tenant, -size)
            if error := future.exception():
                self._log_lost(error)

        return store

    def _reserve(self, tenant: str, size: int) -> bool:
        """Reserve bytes for completions that wait for the database; return whether there was space."""
        with self._lock:
            fits = self._waiting[tenant] + size <= _MAX_WAITING
            self._waiting[tenant] += size if fits else 0
            return fits

    def _log_lost(self, error: object) -> None:
        """Log that completions are not stored, at most once in ten seconds."""
        if time.monotonic() - self._logged > 10.0:
            self._logged = time.monotonic()
            _log.error("answers are not stored for feedback: %s", error)

    def flush(self, seconds: float = 10.0) -> None:
        """Write pending completions to the database. Raises the database's errors while it is unavailable."""
        self.writer.flush(seconds)

    def _write(self, c: Connection, texts: Sequence[str]) -> int:
        """Write completions that are new, not deleted and within the quota; return their number."""
        a, g, count = answer_table.c, deletion_table.c, 0
        for text in texts:
            row = json.loads(text)
            if c.scalar(select(a.id).where(a.tenant == row["tenant"], a.id == row["id"])) is not None:
                continue
            deletions = [EVERYTHING, row["id"], row["id"].removesuffix(shadow_id("")), row["whose"]]
            forgotten = c.scalar(select(func.max(g.at)).where(g.tenant == row["tenant"], g.what.in_(deletions)))
            if (forgotten or 0.0) < row["at"] and self._fits(c, row, len(text)):
                texts_of = {name: json.dumps(row[name]) for name in ("adapters", "asked", "choices")}
                c.execute(insert(answer_table), row | texts_of)
                count += 1
        return count

    def _fits(self, c: Connection, row: Mapping[str, Any], size: int) -> bool:
        """Reserve quota for a completion; return False if the tenant's quota is used up.

        The database's usage is measured again after a while, because other servers add and remove rows too.
        """
        tenant = row["tenant"]
        hold, until = self._quota_holds.get(tenant) or (self.quotas.take(tenant), 0.0)
        if time.monotonic() >= until:
            a = answer_table.c
            taken = select(func.count(), func.coalesce(func.sum(func.length(a.asked) + func.length(a.choices)), 0))
            files, disk = c.execute(taken.where(a.tenant == tenant)).one()
            hold.set(files=int(files), disk=int(disk))
            self._quota_holds[tenant] = hold, time.monotonic() + _MEASURED
        try:
            hold.add(files=1, disk=size)
        except Refused as error:
            _log.error("answer %s is not stored for feedback: %s", row["id"], error.what)
            return False
        return True

    # -- giving feedback -----------------------------------------------------------------------------------------------

    def give(self, tenant: str, feedback: AnswerFeedback) -> dict[str, Any]:
        """Store feedback on a completion; return all feedback on the completion.

        New values replace earlier values of the same fields. Raises Refused: not_found (404) for a completion
        that is not stored, for whatever reason; 400 for invalid feedback.
        """
        self._flush_unless_stored(tenant, {feedback.id, *(answer_id for answer_id, _ in feedback.rejected or ())})
        with write_transaction(self.store.engine, _LOCK) as c:
            answered = self._choice(c, tenant, feedback.id, feedback.choice, "choice")
            for answer_id, choice in feedback.rejected or ():
                if (answer_id, choice) == (feedback.id, feedback.choice):
                    raise invalid("an answer cannot be preferred to itself", "rejected")
                if self._choice(c, tenant, answer_id, choice, "rejected")[0] != answered[0]:
                    raise invalid(
                        f"{answer_id} is an answer to another request", "rejected", "answers to the same messages"
                    )
            f = feedback_table.c
            this_choice = (f.tenant == tenant) & (f.answer == feedback.id) & (f.choice == feedback.choice)
            values = feedback.values() | {"at": self.wall()}
            if c.execute(update(feedback_table).where(this_choice).values(**values)).rowcount == 0:
                key = {"tenant": tenant, "answer": feedback.id, "choice": feedback.choice}
                c.execute(insert(feedback_table), {"up": None, "corrected": None, "rejected": None, **key, **values})
            row = c.execute(select(feedback_table).where(this_choice)).one()
        thumb = None if row.up is None else "up" if row.up else "down"
        rejected = [{"id": answer_id, "choice": choice} for answer_id, choice in json.loads(row.rejected or "[]")]
        values_after = {"thumb": thumb, "corrected": json.loads(row.corrected or "null"), "rejected": rejected}
        return {"object": "feedback", "id": feedback.id, "choice": feedback.choice, **values_after}

    def _flush_unless_stored(self, tenant: str, answers: set[str]) -> None:
        """Write pending completions, unless the database already has all of `answers`.

        Raises Refused for invalid ids.
        """
        for answer in answers:
            if not _ID.fullmatch(answer):
                raise self._unknown(tenant, answer)
        a = answer_table.c
        with self.store.reading() as c:
            stored_ids = {*c.scalars(select(a.id).where(a.tenant == tenant, a.id.in_(answers)))}
        if stored_ids != answers:
            self.flush()

    def _choice(self, c: Connection, tenant: str, answer: str, choice: int, param: str) -> tuple[Any, Any]:
        """Return (request, completion) for one choice. Raises Refused."""
        a = answer_table.c
        this_answer = (a.tenant == tenant, a.id == answer, a.expires > self.wall())
        row = c.execute(select(a.asked, a.choices).where(*this_answer)).first()
        if row is None:
            raise self._unknown(tenant, answer)
        choices = json.loads(row.choices)
        if not 0 <= choice < len(choices):
            raise invalid(f"{answer[:100]} has choices 0 to {len(choices) - 1}, not {choice}", param)
        return json.loads(row.asked), choices[choice]

    def _unknown(self, tenant: str, answer: str) -> Refused:
        """Return the error for a completion that the tenant cannot give feedback on.

        The client cannot tell whether the completion is unknown, not stored, or another tenant's.
        """
        fix = "use the `id` of a stored chat completion of this tenant that has not expired"
        if tenant not in self.store.settings.feedback:
            fix = "no answers of this tenant are stored; the operator can run veneer tenant set NAME feedback_days=30"
        message = f"no answer {quoted(answer, 100)} is stored"
        return Refused(message, status=404, code="not_found", param="id", fix=fix)

    # -- deletion ------------------------------------------------------------------------------------------------------

    def forget(self, tenant: str, *, user: str | None = None, id: str | None = None) -> int:
        """Delete a user's completions, one completion, or everything; return how many.

        `user`: the client's ID for its end user. `id`: the completion's id.
        """
        if id is not None and not _ID.fullmatch(id):
            return 0
        target = user_hash(tenant, user) if user is not None else id if id is not None else EVERYTHING
        with contextlib.suppress(OSError, sqlite3.Error):  # on failure, `_write` drops pending completions
            self.flush()
        with write_transaction(self.store.engine, _LOCK) as c:
            count = delete_answers(c, tenant, target, self.wall())
        if tenant in self._quota_holds:
            self._quota_holds[tenant] = self._quota_holds[tenant][0], 0.0
        return count

    def sweep(self) -> int:
        """Delete expired completions; return their number."""
        a, f, now, count = answer_table.c, feedback_table.c, self.wall(), 0
        while True:
            with write_transaction(self.store.engine, _LOCK) as c:
                _erase(c)
                expired = c.execute(select(a.tenant, a.id).where(a.expires <= now).limit(_MOST)).all()
                for tenant, id in expired:
                    c.execute(delete(feedback_table).where(f.tenant == tenant, f.answer == id))
                    c.execute(delete(answer_table).where(a.tenant == tenant, a.id == id))
                c.execute(delete(deletion_table).where(deletion_table.c.at < now - _REMEMBERED))
            count += len(expired)
            if len(expired) < _MOST:
                return count


def user_hash(tenant: str, user: str) -> str:
    """Return the hash that is stored for a user: SHA-256 of tenant and user."""
    return hashlib.sha256(json.dumps([tenant, user]).encode()).hexdigest()


def delete_answers(c: Connection, tenant: str, target: str, now: float) -> int:
    """Delete the completions of a target with their feedback; return how many.

    `target`: see `EVERYTHING`. Also records the deletion, so that completions of requests from before `now`
    are not stored if they arrive later.
    """
    a, f = answer_table.c, feedback_table.c
    _erase(c)
    matches = (a.whose == target) | a.id.in_((target, shadow_id(target)))
    selected = a.tenant == tenant if target == EVERYTHING else (a.tenant == tenant) & matches
    c.execute(delete(feedback_table).where(f.tenant == tenant, f.answer.in_(select(a.id).where(selected))))
    count = c.execute(delete(answer_table).where(selected)).rowcount
    this_deletion = (deletion_table.c.tenant == tenant) & (deletion_table.c.what == target)
    c.execute(delete(deletion_table).where(this_deletion))
    c.execute(insert(deletion_table), {"tenant": tenant, "what": target, "at": now})
    return count


def _erase(c: Connection) -> None:
    """Make SQLite overwrite data that this connection deletes."""
    if c.dialect.name == "sqlite":
        c.exec_driver_sql("PRAGMA secure_delete = ON")


# -- feedback values ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerFeedback:
    """Feedback on one choice of a completion.

    `changed`: the fields to change; a value replaces the earlier value, and None clears the field. `up`:
    thumb up or down. `corrected`: the message that the model should have sent. `rejected`: (completion,
    choice) of each completion that is worse than this one.
    """

    id: str
    choice: int = 0
    up: bool | None = None
    corrected: Mapping[str, Any] | None = None
    rejected: tuple[tuple[str, int], ...] | None = None
    changed: frozenset[str] = field(default=frozenset({"up", "corrected", "rejected"}))

    def values(self) -> dict[str, Any]:
        """Return the fields in `changed` as database columns."""
        columns: dict[str, Any] = {"up": self.up}
        columns["corrected"] = None if self.corrected is None else json.dumps(self.corrected)
        columns["rejected"] = json.dumps(self.rejected) if self.rejected else None
        return {name: value for name, value in columns.items() if name in self.changed}


# -- counts and rows ---------------------------------------------------------------------------------------------------


def feedback_counts(c: Connection, tenant: str, now: float) -> dict[str, int]:
    """Count a tenant's stored completions, and each kind of feedback on them."""
    a, f = answer_table.c, feedback_table.c
    stored = (a.tenant == tenant) & (a.expires > now)
    ups, corrected, chosen = func.count().filter(f.up), func.count(f.corrected), func.count(f.rejected)
    counts = (func.count(f.up).label("n"), ups.label("up"), corrected.label("corrected"), chosen.label("chosen"))
    figures = select(*counts).join(answer_table, (a.tenant == f.tenant) & (a.id == f.answer)).where(stored)
    row = c.execute(figures).one()
    answers = int(c.scalar(select(func.count()).select_from(answer_table).where(stored)) or 0)
    return {"answers": answers, "up": row.up, "down": row.n - row.up, "corrected": row.corrected, "chosen": row.chosen}


def feedback_rows(
    engine: Engine, tenant: str, kind: str, *, adapter: str | None = None, now: float | None = None
) -> Iterator[dict[str, Any]]:
    """Yield training rows in the order of feedback, without duplicates.

    `adapter`: use only completions that were requested under this name, or sampled from any version of this
    adapter. Raises ConfigError for an unknown kind, at the call.
    """
    one_of(kind, get_args(FeedbackKind), "a kind of training rows", "kind")
    return _read_rows(engine, tenant, kind, adapter, time.time() if now is None else now)


def _read_rows(engine: Engine, tenant: str, kind: str, adapter: str | None, now: float) -> Iterator[dict[str, Any]]:
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
            page = c.execute(query if after is None else query.where(tuple_(*order) > tuple_(*after))).all()
        for r in page:
            names = {r.name, *json.loads(r.adapters)}
            if adapter is None or adapter in {*names, *map(name_of, names)}:
                pairs = json.loads(r.rejected or "[]") if kind == "preference" else []
                other_answers = {}
                if pairs:  # one query per row, because a completion can be a megabyte long
                    others = select(a.id, a.choices).where(a.tenant == tenant, a.expires > now)
                    others = others.where(a.id.in_([answer_id for answer_id, _ in pairs]))
                    with reading(engine) as c:
                        other_answers = {other.id: json.loads(other.choices) for other in c.execute(others)}
                yield from _rows_of(kind, r, other_answers)
        if len(page) < _PAGE:
            return
        after = (page[-1].at, page[-1].answer, page[-1].choice)


def _rows_of(kind: str, r: Any, other_answers: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    request, answer = json.loads(r.asked), json.loads(r.choices)[r.choice]
    corrected = json.loads(r.corrected) if r.corrected else None
    tools = {"tools": request["tools"]} if request.get("tools") else {}
    if kind == "supervised":
        if corrected is not None or r.up:
            yield {"messages": [*request["messages"], corrected or answer], **tools}
    elif kind == "unpaired":
        if r.up is not None:
            yield {"prompt": request["messages"], "completion": [answer], "label": bool(r.up), **tools}
    else:
        pairs = [] if corrected is None else [(corrected, answer)]
        named = json.loads(r.rejected or "[]")
        pairs += [(answer, other_answers[id][n]) for id, n in named if id in other_answers]
        for preferred, rejected in pairs:
            if preferred != rejected:
                yield {"prompt": request["messages"], "chosen": [preferred], "rejected": [rejected], **tools}
