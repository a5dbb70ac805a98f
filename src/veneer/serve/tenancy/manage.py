"""All changes of settings, for the command line and the routes under /admin.

Each function checks the change, makes the change, and writes the audit entry in one transaction. `actor`: who
changed the setting, such as `cli:ana` or `admin`. Raises ConfigError for an unknown name (with the nearest
known name), a duplicate, or an invalid value.

The audit log records who changed what, when, and the values before and after; each entry contains the hash of
the previous entry.

    hash = sha256(number, at, who, what, subject, before, after, previous), as one JSON list

A changed, removed or inserted entry breaks the chain at its number, and the database itself rejects changes
and deletes. Cutting off the newest entries does not break the chain: to detect such a cut, store the head
(printed by `veneer tenant audit --verify`) elsewhere from time to time, and check it with `--expect`.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import Connection, Table, delete, func, insert, or_, select, update

from veneer.errors import ConfigError, one_of
from veneer.library.names import name_of
from veneer.serve.config import check_values
from veneer.serve.principal import ROLES, Role
from veneer.serve.tenancy import store as db
from veneer.serve.tenancy.feedback import EVERYTHING, delete_answers
from veneer.serve.tenancy.keys import hash_key, make_key
from veneer.serve.tenancy.store import ALL, EACH, KeyRow, Limit, Store, Tenant, TenantSettings, UnknownName

# -- the audit log -----------------------------------------------------------------------------------------------------


FIRST_HASH = "0" * 64
"""The previous hash in the first entry."""
_HASHED = ("number", "at", "who", "what", "subject", "before", "after", "previous")
"""The fields that an entry's hash covers."""


def append_audit(c: Connection, actor: str, action: str, subject: str, before: Any, after: Any) -> str:
    """Append an entry in a transaction of `Store.change`; return its hash, the new head.

    `before`, `after`: JSON values, or None for no value.
    """
    a = db.audit_table.c
    last = c.execute(select(a.number, a.hash).order_by(a.number.desc()).limit(1)).first()
    number, previous = (last.number + 1, last.hash) if last else (1, FIRST_HASH)
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    sides = [json.dumps(value, sort_keys=True, ensure_ascii=False) for value in (before, after)]
    line = dict(zip(_HASHED, (number, at, actor, action, subject, *sides, previous), strict=True))
    line["hash"] = _hash(line)
    c.execute(insert(db.audit_table), line)
    return str(line["hash"])


def audit_lines(
    c: Connection, *, subject: str = "", action: str = "", tenant: str = "", limit: int = 100, skip: int = 0
) -> list[dict[str, Any]]:
    """Return entries of the log, newest first.

    `action`: an action or its prefix, such as key or key.revoke. `tenant`: only entries about this tenant, its
    routes, and adapters in its namespace."""
    query = select(db.audit_table).order_by(db.audit_table.c.number.desc()).limit(limit).offset(skip)
    if tenant:
        about = db.audit_table.c.subject
        query = query.where((about == tenant) | about.startswith(f"{tenant}/", autoescape=True))
    if subject:
        query = query.where(db.audit_table.c.subject == subject)
    if action:
        what = db.audit_table.c.what
        query = query.where((what == action) | what.startswith(f"{action}.", autoescape=True))
    rows = [dict(row._mapping) for row in c.execute(query)]
    return [line | {side: json.loads(line[side]) for side in ("before", "after")} for line in rows]


def audit_faults(c: Connection, expect: str = "") -> tuple[str, int, list[str]]:
    """Verify the whole log; return (head, number of entries, faults).

    `expect`: an earlier head, which must be the hash of an entry.
    """
    previous, number, expected_found = FIRST_HASH, 0, expect in ("", FIRST_HASH)
    faults = []
    query = select(db.audit_table).order_by(db.audit_table.c.number)
    for line in c.execution_options(yield_per=1000).execute(query).mappings():
        if line["number"] != number + 1:
            faults.append(f"lines {number + 1} to {line['number'] - 1} are missing")
        elif line["previous"] != previous:
            faults.append(f"line {line['number']} does not contain the hash of the previous line")
        if line["hash"] != _hash(line):
            faults.append(f"line {line['number']} was changed")
        previous, number = line["hash"], line["number"]
        expected_found = expected_found or previous == expect
    if not expected_found:
        faults.append(f"no line has the hash {expect}: lines at the end are missing, or the whole log was rewritten")
    return previous, number, faults


def _hash(line: Mapping[Any, Any]) -> str:
    return hashlib.sha256(json.dumps([line[name] for name in _HASHED], ensure_ascii=False).encode()).hexdigest()


# -- tenants and their settings ----------------------------------------------------------------------------------------

_Count = Annotated[int, Field(ge=1, le=10**15)]
_Money = Annotated[int, Field(ge=0, le=10**15)]
_Pattern = Annotated[str, AfterValidator(db.check_pattern)]


class SettingsChange(BaseModel):
    """Settings of a tenant, of all tenants together (ALL), or of each tenant (EACH).

    A change contains only the keys to set; None removes a value. Limits and prices can be set for one
    adapter. Money is in millionths of the operator's currency.

    weight: share of the server while requests queue
    enabled: whether the tenant's keys are accepted
    adapters: patterns of visible adapters; with ALL: adapters that every tenant can see
    requests_per_minute … concurrency: limits; with ALL: totals over all tenants; with EACH: default for
        tenants without their own limit
    prompt_price, cached_price, completion_price: price per million tokens; an unset cached_price defaults to
        prompt_price
    training_price: price per million trained tokens; with ALL: default for each tenant
    training_budget: maximum cost per calendar month in UTC; with ALL: default for each tenant
    training_jobs: maximum jobs that run at once; with ALL: default for each tenant
    feedback_days: days for which chats are stored; with ALL: for chats sent without a key
    feedback_names: patterns of the routes and adapters whose chats are stored, [] for all
    shared_cache: only with ALL: patterns of the adapters (or of the base) whose prompt cache is shared by all
        tenants (tenants can then probe which prompts others have sent)
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    weight: float = Field(default=1.0, ge=0.001, le=1000)
    enabled: bool = True
    adapters: list[_Pattern] = []
    requests_per_minute: _Count | None = None
    requests_per_day: _Count | None = None
    tokens_per_minute: _Count | None = None
    tokens_per_day: _Count | None = None
    concurrency: _Count | None = None
    prompt_price: _Money | None = None
    cached_price: _Money | None = None
    completion_price: _Money | None = None
    training_price: _Money | None = None
    training_budget: _Money | None = None
    training_jobs: Annotated[int, Field(ge=0, le=10**15)] | None = None
    feedback_days: Annotated[float, Field(gt=0, le=3660)] | None = None
    feedback_names: list[_Pattern] = []
    shared_cache: list[_Pattern] = []


_PRICES = {"prompt_price": "prompt", "cached_price": "cached", "completion_price": "completion"}
_TRAINING = {"training_price": "price", "training_budget": "budget", "training_jobs": "jobs"}
_FEEDBACK = {"feedback_days": "days", "feedback_names": "names"}
_OF_TENANTS_ONLY, _OF_ALL_ONLY = {"weight", "enabled"}, {"shared_cache"}


def get_tenant(store: Store, name: str) -> Tenant:
    settings = store.refresh()
    if name not in settings.tenants:
        raise db.unknown_name("tenant", name, settings.tenants)
    return settings.tenants[name]


def show_settings(settings: TenantSettings, tenant: str) -> dict[str, Any]:
    """Return the settings of a tenant, ALL or EACH, by key.

    The key `by_adapter` contains settings of single adapters.
    """
    fields: dict[str, Any] = {"tenant": tenant or "all"}
    if tenant in settings.tenants:
        fields |= asdict(settings.tenants[tenant])
    elif tenant == ALL:
        fields |= {"adapters": settings.shared, "shared_cache": settings.common}
    by_adapter: dict[str, dict[str, Any]] = {ALL: asdict(Limit())}
    for prefix, settings_of in (("{}", settings.limits), ("{}_price", settings.prices)):
        for (owner, adapter), values in settings_of.items():
            if owner == tenant:
                by_adapter.setdefault(adapter, {}).update(_renamed(prefix, values))
    fields |= by_adapter.pop(ALL)
    if tenant in settings.training:
        fields |= _renamed("training_{}", settings.training[tenant])
    if tenant in settings.feedback:
        fields |= _renamed("feedback_{}", settings.feedback[tenant])
    return fields | {"by_adapter": by_adapter}


def _renamed(pattern: str, values: Any) -> dict[str, Any]:
    return {pattern.format(key): value for key, value in asdict(values).items()}


def add_tenant(store: Store, name: str, *, weight: float = 1.0, adapters: Iterable[str] = (), actor: str) -> Tenant:
    """Add a tenant.

    `weight`: the tenant's share of the engine under load. `adapters`: patterns of names that the tenant can
    see.
    """
    db.check_tenant(name)
    values = _validate({"weight": weight, "adapters": list(adapters)})
    row = {"name": name, "weight": 1.0, "enabled": True, "created": time.time()}
    with store.change() as c:
        if c.scalar(select(db.tenant_table.c.name).where(db.tenant_table.c.name == name)):
            raise ConfigError(f"tenant {name} already exists", where="tenant")
        c.execute(insert(db.tenant_table), row)
        _, after = _apply(c, name, ALL, values)
        append_audit(c, actor, "tenant.add", name, None, row | after)
    return get_tenant(store, name)


def change_settings(
    store: Store, tenant: str, values: Mapping[str, Any], *, adapter: str = ALL, actor: str
) -> dict[str, Any]:
    """Set `values` (see `SettingsChange`) for a tenant, ALL or EACH.

    Writes one audit entry; returns the new settings as in `show_settings`.

    adapter: the adapter, in any version, that the values apply to; ALL for all adapters
    """
    values = _validate(values)
    _check_scope(tenant, adapter, values)
    with store.change() as c:
        if tenant not in (ALL, EACH):
            db.tenant_row(c, tenant)
        before, after = _apply(c, tenant, adapter, values)
        subject = "/".join(filter(None, (tenant or "all", adapter)))
        append_audit(c, actor, "settings.change", subject, before, after)
    return show_settings(store.refresh(), tenant)


def grant_namespace(store: Store, tenant: str, *, actor: str) -> None:
    """Let a tenant see the adapters in its own namespace."""
    namespace = f"{tenant}/*"
    with store.change() as c:
        db.tenant_row(c, tenant)
        patterns = list(c.scalars(select(db.grant_table.c.pattern).where(db.grant_table.c.tenant == tenant)))
        if namespace not in patterns:
            before, after = _apply(c, tenant, ALL, {"adapters": [*patterns, namespace]})
            append_audit(c, actor, "settings.change", tenant, before, after)


def _validate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the validated values. Raises ConfigError that names the invalid key."""
    return check_values(SettingsChange, values, "settings").model_dump(exclude_unset=True)


def _check_scope(tenant: str, adapter: str, keys: Iterable[str]) -> None:
    """Raise ConfigError for an invalid scope, or for a key that the scope cannot have."""
    allowed = {*db.LIMITS, *_PRICES}
    if tenant == EACH:
        allowed = {*db.LIMITS}
    elif adapter == ALL:
        allowed = {*SettingsChange.model_fields} - (_OF_TENANTS_ONLY if tenant == ALL else _OF_ALL_ONLY)
    if tenant not in (ALL, EACH):
        db.check_tenant(tenant)
    if adapter != ALL:
        db.check_reference(adapter)
        if adapter != name_of(adapter):
            message = f"{adapter} is one version of an adapter"
            raise ConfigError(message, where="adapter", fix=f"use {name_of(adapter)}, which covers all versions")
    for key in keys:
        if key not in allowed:
            scope = f"adapter {adapter}" if adapter else {ALL: "all", EACH: "each tenant"}.get(tenant, "a tenant")
            raise ConfigError(f"{key} is not a setting of {scope}", where=key, fix=f"of {', '.join(sorted(allowed))}")


def _apply(
    c: Connection, tenant: str, adapter: str, values: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write validated values; return the values before and after."""
    before: dict[str, Any] = {}
    if tenant_values := {key: values[key] for key in ("weight", "enabled") if key in values}:
        before |= {key: value for key, value in db.tenant_row(c, tenant).items() if key in tenant_values}
        c.execute(update(db.tenant_table).where(db.tenant_table.c.name == tenant).values(**tenant_values))
    if "adapters" in values:
        here = db.grant_table.c.tenant == tenant
        before["adapters"] = sorted(c.scalars(select(db.grant_table.c.pattern).where(here)))
        c.execute(delete(db.grant_table).where(here))
        for pattern in sorted({*values["adapters"]}):
            c.execute(insert(db.grant_table), {"tenant": tenant, "pattern": pattern})
    if "shared_cache" in values:
        here = db.meta_table.c.key == db.COMMON
        before["shared_cache"] = json.loads(c.scalar(select(db.meta_table.c.value).where(here)) or "[]")
        c.execute(delete(db.meta_table).where(here))
        patterns = sorted({*values["shared_cache"]})
        c.execute(insert(db.meta_table), {"key": db.COMMON, "value": json.dumps(patterns)})
    scope = {"tenant": tenant, "adapter": adapter}
    of_tenant = {"tenant": tenant}
    before |= _replace(c, db.limit_table, scope, dict(zip(db.LIMITS, db.LIMITS, strict=True)), values)
    before |= _replace(c, db.price_table, scope, _PRICES, values, _price_row)
    before |= _replace(c, db.training_table, of_tenant, _TRAINING, values, _training_row)
    before |= _replace(c, db.feedback_terms_table, of_tenant, _FEEDBACK, values, _feedback_row)
    if (days := values.get("feedback_days")) is not None:  # with fewer days, stored completions expire earlier
        until, a = db.answer_table.c.at + days * 86400, db.answer_table.c
        c.execute(update(db.answer_table).where(a.tenant == tenant, a.expires > until).values(expires=until))
    return before, dict(values)


_Row = dict[str, Any]


def _replace(
    c: Connection,
    table: Table,
    scope: dict[str, str],
    columns: Mapping[str, str],
    values: Mapping[str, Any],
    finish: Callable[[_Row], _Row | None] = dict,
) -> dict[str, Any]:
    """Change the row of a scope; return the earlier values of the changed keys.

    columns: key -> column
    finish: returns the row to store, or None to delete the row; a row without values is always deleted
    """
    changed = {key: values[key] for key in columns if key in values}
    if not changed:
        return {}
    this_scope = [table.c[name] == value for name, value in scope.items()]
    stored = c.execute(select(table).where(*this_scope)).first()
    row = dict.fromkeys(columns.values()) if stored is None else {n: stored._mapping[n] for n in columns.values()}
    old_values = {key: row[columns[key]] for key in changed}
    row |= {columns[key]: value for key, value in changed.items()}
    after = finish(row) if any(value is not None for value in row.values()) else None
    c.execute(delete(table).where(*this_scope))
    if after is not None:
        c.execute(insert(table), scope | after)
    return old_values


def _price_row(row: _Row) -> _Row | None:
    prompt, completion = row["prompt"], row["completion"]
    if prompt is None and completion is None:
        return None
    if prompt is None or completion is None:
        raise ConfigError("a price needs both prompt_price and completion_price", where="prompt_price")
    return row | {"cached": prompt if row["cached"] is None else row["cached"]}


def _training_row(row: _Row) -> _Row:
    return row | {"price": row["price"] or 0}


def _feedback_row(row: _Row) -> _Row | None:
    names = row["names"] if isinstance(row["names"], str) else json.dumps(row["names"] or [])
    return None if row["days"] is None else {"days": row["days"], "names": names}


_OF_A_TENANT = ("grants", "limits", "prices", "training", "feedback_terms", "routes", "moves", "keys")


def remove_tenant(store: Store, name: str, *, actor: str) -> None:
    """Remove a tenant with its keys, settings, routes and stored completions.

    The tenant's usage stays in the ledger, and the tenant's history in the audit log.
    """
    with store.change() as c:
        row = db.tenant_row(c, name)
        for table in [db.meta_table.metadata.tables[f"tenant_{name}"] for name in _OF_A_TENANT]:
            c.execute(delete(table).where(table.c.tenant == name))
        delete_answers(c, name, EVERYTHING, time.time())
        c.execute(delete(db.tenant_table).where(db.tenant_table.c.name == name))
        append_audit(c, actor, "tenant.remove", name, row, None)


# -- keys --------------------------------------------------------------------------------------------------------------

MOST_KEYS = 1000
"""Maximum stored keys of a tenant, because each server keeps all keys in memory."""


def make_tenant_key(
    store: Store,
    tenant: str,
    *,
    label: str = "",
    expires: float | None = None,
    role: Role = "trainer",
    actor: str,
    now: float | None = None,
) -> tuple[KeyRow, str]:
    """Create a key; return the stored row and the key, which cannot be shown again.

    `expires`: seconds since 1970. Keys that ended 90 days ago are deleted; the audit log still has them.
    """
    one_of(role, ROLES, "a role", "role")
    with store.change() as c:
        db.tenant_row(c, tenant)
        created = time.time() if now is None else now
        k, ended = db.key_table.c, created - 90 * 86400
        c.execute(delete(db.key_table).where(k.tenant == tenant, or_(k.revoked < ended, k.expires < ended)))
        if (c.scalar(select(func.count()).where(k.tenant == tenant)) or 0) >= MOST_KEYS:
            problem = f"tenant {tenant} has {MOST_KEYS:,} keys, with those that ended in the last 90 days"
            raise ConfigError(problem, where="tenant", fix="revoke unused keys, and use keys for longer")
        if expires is not None and expires <= created:
            raise ConfigError("the expiry time is in the past", where="expires", fix="a time in the future")
        if len(label) > 200:
            raise ConfigError("the label is longer than 200 characters", where="label")
        identity, key = make_key()
        row = KeyRow(identity, tenant, hash_key(key, role), label, created, expires, None, role)
        c.execute(insert(db.key_table), asdict(row))
        append_audit(c, actor, "key.add", tenant, None, show_key(row))
    return row, key


def list_keys(store: Store, tenant: str | None = None) -> list[KeyRow]:
    """Return the keys of a tenant, or of all tenants, oldest first."""
    if tenant is not None:
        get_tenant(store, tenant)
    return [k for k in store.refresh().keys.values() if tenant in (None, k.tenant)]


def revoke_key(store: Store, key: str, *, tenant: str | None = None, actor: str) -> KeyRow:
    """Revoke a key; it is refused from the next request on.

    `key`: the key's id. `tenant`: the tenant that must own the key.
    """
    with store.change() as c:
        old_key = _key(c, key, tenant)
        if old_key.revoked is not None:
            return old_key
        revoked = time.time()
        c.execute(update(db.key_table).where(db.key_table.c.id == key).values(revoked=revoked))
        after = KeyRow(**{**asdict(old_key), "revoked": revoked})
        append_audit(c, actor, "key.revoke", old_key.tenant, show_key(old_key), show_key(after))
    return after


def show_key(key: KeyRow) -> dict[str, Any]:
    """Return a key's fields, except the hash."""
    return {name: value for name, value in asdict(key).items() if name != "hash"}


def _key(c: Connection, key: str, tenant: str | None) -> KeyRow:
    row = c.execute(select(db.key_table).where(db.key_table.c.id == key)).first()
    if row is None or tenant not in (None, row.tenant):
        raise UnknownName(f"there is no key {key[:20]!r}", where="key", fix="use a key id from veneer tenant key list")
    return KeyRow(**row._mapping)


# -- other changes, and parsing ----------------------------------------------------------------------------------------


def log_change(store: Store, actor: str, action: str, subject: str, before: Any = None, after: Any = None) -> None:
    """Write an audit entry for a change that other code makes, such as adapter.load."""
    with store.change() as c:
        append_audit(c, actor, action, subject, before, after)


def when(text: str, now: float) -> float:
    """Convert a time to seconds since 1970.

    `text`: `90d`, `12h` or `30m` from now, or a UTC day or time such as 2027-01-31.
    """
    units = {"d": 86400, "h": 3600, "m": 60}
    if match := re.fullmatch("([0-9]{1,6})([dhm])", text):
        return now + int(match[1]) * units[match[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a time", fix="90d, 12h, 30m, or 2027-01-31") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
