"""Every change of settings, for the command line and the routes under /admin.

Each function checks, changes, and writes the audit entry, in one transaction. `who`: the actor, such as
`cli:ana` or `admin`. Raises ConfigError for an unknown name (with the nearest known), a duplicate, or an
invalid value.

The audit log records who changed what, when, and the values before and after; each entry contains the hash of
the previous one.

    hash = sha256(number, at, who, what, subject, before, after, previous), as one JSON list

A changed, removed or inserted entry breaks the chain at its number, and the database itself rejects changes
and deletes. Entries cut off at the end break nothing: store the head (`veneer tenant audit --verify` prints
it) elsewhere from time to time, and check it with `--expect`.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Table, delete, insert, select, update

from veneer.errors import ConfigError
from veneer.library.names import name_of
from veneer.serve.tenancy.feedback import EVERYTHING, forget_answers, user_hash
from veneer.serve.tenancy.keys import hash_key, make_key
from veneer.serve.tenancy.store import (
    ALL,
    COMMON,
    EACH,
    LIMITS,
    FeedbackTerms,
    KeyRow,
    Limit,
    Price,
    Store,
    Tenant,
    TrainingTerms,
    UnknownName,
    answer_table,
    audit_table,
    check_pattern,
    check_reference,
    check_tenant,
    feedback_terms_table,
    grant_table,
    key_table,
    limit_table,
    meta_table,
    move_table,
    price_table,
    route_table,
    tenant_row,
    tenant_table,
    training_table,
    unknown_name,
)

# -- the audit log -----------------------------------------------------------------------------------------------------


FIRST_HASH = "0" * 64
"""The first entry's previous hash."""


def append_audit(c: Connection, who: str, what: str, subject: str, before: Any, after: Any) -> str:
    """Append an entry within a transaction of `Store.change`.

    Returns its hash, the head. `before`, `after`: JSON values; None if there was or is nothing.
    """
    last = c.execute(
        select(audit_table.c.number, audit_table.c.hash).order_by(audit_table.c.number.desc()).limit(1)
    ).first()
    line = {
        "number": last.number + 1 if last else 1,
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "who": who,
        "what": what,
        "subject": subject,
        "before": _json(before),
        "after": _json(after),
        "previous": last.hash if last else FIRST_HASH,
    }
    line["hash"] = _hash(line)
    c.execute(insert(audit_table), line)
    return str(line["hash"])


def audit_lines(
    c: Connection, *, subject: str = "", what: str = "", limit: int = 100, skip: int = 0
) -> list[dict[str, Any]]:
    """Entries of the log, newest first.

    `what`: an action or its prefix: key, key.revoke.
    """
    query = select(audit_table).order_by(audit_table.c.number.desc()).limit(limit).offset(skip)
    if subject:
        query = query.where(audit_table.c.subject == subject)
    if what:
        query = query.where((audit_table.c.what == what) | audit_table.c.what.startswith(f"{what}.", autoescape=True))
    found = [dict(row._mapping) for row in c.execute(query)]
    return [line | {side: json.loads(line[side]) for side in ("before", "after")} for line in found]


def audit_faults(c: Connection, expect: str = "") -> tuple[str, int, list[str]]:
    """Verify the whole log: (head, number of entries, faults).

    `expect`: an earlier head, which must be the hash of an entry.
    """
    previous, number, seen = FIRST_HASH, 0, expect in ("", FIRST_HASH)
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
    for row in c.execution_options(yield_per=1000).execute(select(audit_table).order_by(audit_table.c.number)):
        yield dict(row._mapping)


def _hash(line: dict[str, Any]) -> str:
    names = ("number", "at", "who", "what", "subject", "before", "after", "previous")
    return hashlib.sha256(json.dumps([line[n] for n in names], ensure_ascii=False).encode()).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


# -- tenants -----------------------------------------------------------------------------------------------------------


def get_tenant(store: Store, name: str) -> Tenant:
    settings = store.look()
    if name not in settings.tenants:
        raise unknown_name("tenant", name, settings.tenants)
    return settings.tenants[name]


def add_tenant(
    store: Store, name: str, *, weight: float = 1.0, adapters: Iterable[str] = (), who: str, now: float | None = None
) -> Tenant:
    """Add a tenant.

    `weight`: its share of the engine under load. `adapters`: patterns of the names it sees.
    """
    check_tenant(name)
    _check_weight(weight)
    patterns = sorted({check_pattern(p) for p in adapters})
    made = Tenant(name, float(weight), True, time.time() if now is None else now, tuple(patterns))
    with store.change() as c:
        if c.scalar(select(tenant_table.c.name).where(tenant_table.c.name == name)):
            raise ConfigError(f"there is a tenant {name} already", where="tenant")
        c.execute(insert(tenant_table), {"name": name, "weight": made.weight, "enabled": True, "created": made.created})
        for pattern in patterns:
            c.execute(insert(grant_table), {"tenant": name, "pattern": pattern})
        append_audit(c, who, "tenant.add", name, None, _shown(made))
    return made


def change_tenant(
    store: Store, name: str, *, weight: float | None = None, enabled: bool | None = None, who: str
) -> Tenant:
    """Change a tenant's weight, or disable it.

    A disabled tenant keeps its data, and its keys are rejected.
    """
    values: dict[str, Any] = {}
    if weight is not None:
        values["weight"] = _check_weight(weight)
    if enabled is not None:
        values["enabled"] = enabled
    with store.change() as c:
        before = tenant_row(c, name)
        if values:
            c.execute(update(tenant_table).where(tenant_table.c.name == name).values(**values))
        append_audit(c, who, "tenant.change", name, {k: before[k] for k in values}, values)
    return get_tenant(store, name)


_OF_A_TENANT = (
    grant_table,
    limit_table,
    price_table,
    training_table,
    feedback_terms_table,
    route_table,
    move_table,
    key_table,
)


def remove_tenant(store: Store, name: str, *, who: str) -> None:
    """Remove a tenant with its keys, grants, limits, prices, routes and answers.

    Its usage stays in the ledger, and its history in the audit log.
    """
    with store.change() as c:
        before = tenant_row(c, name)
        for table in _OF_A_TENANT:
            c.execute(delete(table).where(table.c.tenant == name))
        forget_answers(c, name, EVERYTHING, time.time())
        c.execute(delete(tenant_table).where(tenant_table.c.name == name))
        append_audit(c, who, "tenant.remove", name, before, None)


def grant(
    store: Store, tenant: str, *, add: Iterable[str] = (), remove: Iterable[str] = (), who: str
) -> tuple[str, ...]:
    """Change the patterns of names that a tenant sees, or with ALL, every tenant.

    Returns the patterns.
    """
    with store.change() as c:
        if tenant != ALL:
            tenant_row(c, tenant)
        before = list(c.scalars(select(grant_table.c.pattern).where(grant_table.c.tenant == tenant)))
        after = _patterns(before, add, remove)
        c.execute(delete(grant_table).where(grant_table.c.tenant == tenant))
        for pattern in after:
            c.execute(insert(grant_table), {"tenant": tenant, "pattern": pattern})
        append_audit(c, who, "adapters.change", tenant or "everybody", sorted(before), after)
    return tuple(after)


def share_prefixes(store: Store, *, add: Iterable[str] = (), remove: Iterable[str] = (), who: str) -> tuple[str, ...]:
    """Change the patterns of adapters (and the base) whose prompt cache tenants share.

    Returns the patterns. A tenant that shares the cache can probe which prompts others have sent.
    """
    with store.change() as c:
        row = c.scalar(select(meta_table.c.value).where(meta_table.c.key == COMMON))
        before: list[str] = json.loads(row or "[]")
        after = _patterns(before, add, remove)
        c.execute(delete(meta_table).where(meta_table.c.key == COMMON))
        c.execute(insert(meta_table), {"key": COMMON, "value": json.dumps(after)})
        append_audit(c, who, "cache.change", "everybody", before, after)
    return tuple(after)


def _patterns(before: list[str], add: Iterable[str], remove: Iterable[str]) -> list[str]:
    """The changed patterns.

    Raises ConfigError for an invalid pattern, or for removing an unknown one.
    """
    more, fewer = {check_pattern(p) for p in add}, set(remove)
    for pattern in sorted(fewer - set(before)):
        raise unknown_name("pattern", pattern, before)
    return sorted({*before, *more} - fewer)


# -- keys --------------------------------------------------------------------------------------------------------------


def make_tenant_key(
    store: Store, tenant: str, *, label: str = "", expires: float | None = None, who: str, now: float | None = None
) -> tuple[KeyRow, str]:
    """Create a key; returns the stored row and the key itself.

    The key cannot be shown again. `expires`: seconds since 1970.
    """
    with store.change() as c:
        tenant_row(c, tenant)
        made, key = _new_key(c, tenant, label, expires, time.time() if now is None else now)
        append_audit(c, who, "key.add", tenant, None, show_key(made))
    return made, key


def list_keys(store: Store, tenant: str | None = None) -> list[KeyRow]:
    """The keys of a tenant, or of all tenants, oldest first."""
    if tenant is not None:
        get_tenant(store, tenant)
    return [k for k in store.look().keys.values() if tenant in (None, k.tenant)]


def revoke_key(store: Store, key: str, *, tenant: str | None = None, who: str, now: float | None = None) -> KeyRow:
    """Revoke `key` (an id) from the next request on. `tenant`: its required owner."""
    with store.change() as c:
        before = _key(c, key, tenant)
        revoked = before.revoked if before.revoked is not None else (time.time() if now is None else now)
        c.execute(update(key_table).where(key_table.c.id == key).values(revoked=revoked))
        after = KeyRow(**{**asdict(before), "revoked": revoked})
        append_audit(c, who, "key.revoke", before.tenant, show_key(before), show_key(after))
    return after


def rotate_key(
    store: Store, key: str, *, grace: float = 0.0, tenant: str | None = None, who: str, now: float | None = None
) -> tuple[KeyRow, str]:
    """Replace `key` (an id) by a new key with its label and lifetime.

    The old key expires after `grace` seconds, or at its own expiry if that is earlier.
    """
    at = time.time() if now is None else now
    if not 0 <= grace <= 366 * 86400:
        raise ConfigError(f"the grace is {grace} seconds", where="grace", fix="from 0 to a year")
    with store.change() as c:
        before = _key(c, key, tenant)
        if before.state(at) != "active":
            raise ConfigError(f"key {key} is {before.state(at)}", where="key", fix="make a new one")
        life = None if before.expires is None else at + (before.expires - before.created)
        made, secret = _new_key(c, before.tenant, before.label, life, at)
        ends = at + grace if before.expires is None else min(at + grace, before.expires)
        c.execute(update(key_table).where(key_table.c.id == key).values(expires=ends))
        old = KeyRow(**{**asdict(before), "expires": ends})
        append_audit(c, who, "key.rotate", before.tenant, show_key(before), [show_key(old), show_key(made)])
    return made, secret


def show_key(key: KeyRow) -> dict[str, Any]:
    """The fields of a key that can be shown."""
    return {name: value for name, value in asdict(key).items() if name != "hash"}


def _new_key(c: Connection, tenant: str, label: str, expires: float | None, now: float) -> tuple[KeyRow, str]:
    if expires is not None and expires <= now:
        raise ConfigError("the key would have expired already", where="expires", fix="a time in the future")
    if len(label) > 200:
        raise ConfigError("the label is longer than 200 characters", where="label")
    identity, key = make_key()
    made = KeyRow(identity, tenant, hash_key(key), label, now, expires, None)
    c.execute(insert(key_table), asdict(made))
    return made, key


def _key(c: Connection, key: str, tenant: str | None) -> KeyRow:
    row = c.execute(select(key_table).where(key_table.c.id == key)).first()
    if row is None or tenant not in (None, row.tenant):
        raise UnknownName(f"there is no key {key[:20]!r}", where="key", fix="its id: veneer tenant key list")
    return KeyRow(**row._mapping)


# -- limits and prices -------------------------------------------------------------------------------------------------


def set_limit(store: Store, tenant: str, adapter: str, values: Mapping[str, int | None], *, who: str) -> Limit | None:
    """Set the limits named in `values`; None removes one.

    Returns the limits now in force; None if there are none. tenant: a name for this tenant; EACH for each
    tenant without limits of its own; ALL for all tenants together. adapter: for requests answered by any
    version of this adapter; ALL for all adapters together.
    """
    for name, value in values.items():
        if name not in LIMITS:
            raise unknown_name("limit", name, LIMITS)
        if value is not None and not 1 <= value <= 10**15:
            raise ConfigError(f"{name} is {value}", where=name, fix="1 or more; to shut a tenant out, disable it")
    scope = _scope(tenant, adapter, EACH)

    def changed(before: dict[str, Any] | None) -> dict[str, Any] | None:
        after = {name: (before or {}).get(name) for name in LIMITS} | dict(values)
        return after if any(v is not None for v in after.values()) else None

    after = _replace(store, limit_table, scope, changed, "limit", who)
    return None if after is None else Limit(**after)


def set_price(store: Store, tenant: str, adapter: str, price: Price | None, *, who: str) -> Price | None:
    """Set the price of a million tokens for this tenant and adapter, ALL for any.

    None removes the price.
    """
    if price is not None:
        for name, value in asdict(price).items():
            if not 0 <= value <= 10**12:
                raise ConfigError(f"the price is {value}", where=name, fix="millionths for a million tokens, 0 or more")
    after = _replace(
        store, price_table, _scope(tenant, adapter), lambda _: asdict(price) if price else None, "price", who
    )
    return None if after is None else Price(**after)


def set_training(store: Store, tenant: str, terms: TrainingTerms | None, *, who: str) -> TrainingTerms | None:
    """Set a tenant's price and limits of training; ALL: each tenant without its own.

    None removes them.
    """
    if tenant != ALL:
        check_tenant(tenant)
    for name, value in asdict(terms).items() if terms is not None else ():
        if value is not None and not 0 <= value <= 10**15:
            raise ConfigError(f"the {name} is {value}", where=name, fix="0 or more")
    _replace(store, training_table, {"tenant": tenant}, lambda _: asdict(terms) if terms else None, "training", who)
    return terms


def set_feedback(store: Store, tenant: str, terms: FeedbackTerms | None, *, who: str) -> FeedbackTerms | None:
    """Set which of a tenant's answers are stored, and how long.

    None: none from now on. Stored answers stay until they expire, which fewer days bring forward. `tenant`
    ALL: requests without a tenant, on an open server.
    """
    if terms is not None:
        if not 0 < terms.days <= 3660:
            raise ConfigError(f"answers are kept {terms.days:g} days", where="days", fix="more than 0, at most 3660")
        for pattern in terms.names:
            check_pattern(pattern)
    with store.change() as c:
        if tenant != ALL:
            tenant_row(c, tenant)
        row = c.execute(select(feedback_terms_table).where(feedback_terms_table.c.tenant == tenant)).first()
        c.execute(delete(feedback_terms_table).where(feedback_terms_table.c.tenant == tenant))
        if terms is not None:
            values = {"tenant": tenant, "days": float(terms.days), "names": json.dumps(terms.names)}
            c.execute(insert(feedback_terms_table), values)
            until, a = answer_table.c.at + terms.days * 86400, answer_table.c
            c.execute(update(answer_table).where(a.tenant == tenant, a.expires > until).values(expires=until))
        before = None if row is None else {"days": row.days, "names": json.loads(row.names)}
        append_audit(c, who, "feedback.set", tenant or "all", before, None if terms is None else asdict(terms))
    return terms


def remove_answers(store: Store, tenant: str, *, user: str | None = None, who: str, now: float | None = None) -> int:
    """Delete the stored answers of a tenant, or of one of its users.

    The audit log omits the user.
    """
    with store.change() as c:
        if tenant != ALL:
            tenant_row(c, tenant)
        what = EVERYTHING if user is None else user_hash(tenant, user)
        gone = forget_answers(c, tenant, what, time.time() if now is None else now)
        append_audit(c, who, "feedback.forget", tenant or "all", {"answers": gone, "all": user is None}, None)
    return gone


def _scope(tenant: str, adapter: str, *special: str) -> dict[str, str]:
    if tenant not in (ALL, *special):
        check_tenant(tenant)
    if adapter != ALL:
        check_reference(adapter)
        if adapter != name_of(adapter):
            raise ConfigError(
                f"{adapter} is one version of an adapter", where="adapter", fix=f"{name_of(adapter)}, for all of them"
            )
    return {"tenant": tenant, "adapter": adapter}


def _replace(
    store: Store,
    table: Table,
    key: dict[str, str],
    changed: Callable[[dict[str, Any] | None], dict[str, Any] | None],
    what: str,
    who: str,
) -> dict[str, Any] | None:
    """Replace the row of `key`, whose first part is a tenant, by `changed(row)`.

    None: no row.
    """
    here = [table.c[name] == value for name, value in key.items()]
    with store.change() as c:
        if key["tenant"] not in (ALL, EACH):
            tenant_row(c, key["tenant"])
        row = c.execute(select(table).where(*here)).first()
        before = None if row is None else {k: v for k, v in row._mapping.items() if k not in key}
        after = changed(before)
        c.execute(delete(table).where(*here))
        if after is not None:
            c.execute(insert(table), {**key, **after})
        append_audit(c, who, f"{what}.set", "/".join(part or "all" for part in key.values()), before, after)
    return after


# -- other changes, and parsing ----------------------------------------------------------------------------------------


def note(store: Store, who: str, what: str, subject: str, before: Any = None, after: Any = None) -> None:
    """Write an audit entry for a change made elsewhere: adapter.load, adapter.unload."""
    with store.change() as c:
        append_audit(c, who, what, subject, before, after)


def when(text: str, now: float) -> float:
    """Parse a time into seconds since 1970.

    `90d`, `12h`, `30m` from now, or a day or time such as 2027-01-31 (UTC).
    """
    units = {"d": 86400, "h": 3600, "m": 60}
    if text[-1:] in units and text[:-1].isascii() and text[:-1].isdigit() and len(text) <= 7:
        return now + int(text[:-1]) * units[text[-1]]
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a time", fix="90d, 12h, 30m, or 2027-01-31") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _check_weight(weight: float) -> float:
    if not (math.isfinite(weight) and 0.001 <= weight <= 1000):
        raise ConfigError(f"the weight is {weight}", where="weight", fix="from 0.001 to 1000; 1 is usual")
    return float(weight)


def _shown(tenant: Tenant) -> dict[str, Any]:
    return {**asdict(tenant), "adapters": list(tenant.adapters)}
