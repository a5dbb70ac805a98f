"""Routes: names with weighted targets.

For example, `support` can mean v1 for 90% of users and v2 for 10%. A user always gets the same target. A
route can also have a shadow: an adapter whose completion is compared with the target's, but never sent. Each
change of a route is a numbered move, and a rollback undoes the last move.

A route has 10,000 buckets, each owned by a target. A request's bucket is the hash of its user, or of its
tenant if the request has no user; a request with neither gets a random bucket. When weights change, as few
buckets as possible change their owner, so most users keep their target. A move stores the owner of each
bucket. A rollback makes the previous move current again, which restores every user's target.

A route belongs to one tenant, or to all (tenant ALL); a tenant's own route takes precedence. A tenant needs
no grant for its own routes and their targets. Targets are checked before a route moves to them. A library
alias such as `support@prod` is different: it points to one version.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, delete, func, insert, select

from veneer.errors import ConfigError, VeneerError
from veneer.serve.access import ShadowAnswer
from veneer.serve.principal import STRANGER, Principal
from veneer.serve.tenancy import store as db
from veneer.serve.tenancy.manage import append_audit
from veneer.serve.tenancy.store import ALL, Route, Store, UnknownName
from veneer.serve.transient import is_transient

BUCKETS = 10_000
Runs = tuple[tuple[str, int], ...]


class RouteMoved(ConfigError):
    """Raised if a route has changed since a move was planned."""


# -- choosing a target -------------------------------------------------------------------------------------------------


class TenantRoutes:
    """The routes as requests see them; each request first refreshes the settings."""

    def __init__(
        self, store: Store, put: Callable[..., Future[None]], *, keep: int = 10_000, pick: random.Random | None = None
    ) -> None:
        """`put`: the ledger's `Writer.put`. `keep`: number of stored shadow comparisons."""
        self._store, self._put, self._keep = store, put, keep
        self._pick = pick or random.Random()

    def find(self, route: str, principal: Principal) -> Route | None:
        """Return the route that `route` names for the principal, or None."""
        routes = self._store.settings.routes
        if principal.kind == "tenant" and (principal.tenant, route) in routes:
            return routes[principal.tenant, route]
        return routes.get((ALL, route)) if principal.sees(route) else None

    def names(self, principal: Principal) -> list[str]:
        """Return the names of all routes that the principal can see, for /v1/models."""
        visible = {name for tenant, name in self._store.settings.routes if tenant in (ALL, principal.tenant)}
        return sorted(name for name in visible if self.find(name, principal))

    def choose(self, route: str, principal: Principal) -> str | None:
        """Return the adapter for this principal, or None if the principal has no such route."""
        found_route = self.find(route, principal)
        if found_route is None:
            return None
        user = json.dumps([principal.tenant, principal.user]) if principal.user else principal.tenant
        return owner(found_route.runs, bucket(route, user) if user else self._pick.randrange(BUCKETS))

    def shadow(self, route: str, principal: Principal | None = None) -> str | None:
        """Return the shadow for this request, or None.

        None means that the route has no shadow, or that this request is not in the shadow's share.
        """
        found_route = self.find(route, principal or STRANGER)
        if found_route is None or found_route.shadow is None or self._pick.random() >= found_route.fraction:
            return None
        return found_route.shadow

    def record_shadow(self, answer: ShadowAnswer) -> Future[None]:
        """Record how two completions differ, without their texts."""
        failed = answer.outcome == "failed"
        row: dict[str, Any] = {
            "at": time.time(),
            "tenant": answer.tenant,
            "route": answer.name,
            "request": answer.request,
            "same": answer.outcome == "same",
            "first_difference": None if failed else _first_difference(answer.sent, answer.answer),
        }
        target = ("target", answer.target, answer.sent, answer.sent_usage)
        for side, adapter, text, usage in (target, ("shadow", answer.shadow, answer.answer, answer.usage)):
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
            row |= {side: adapter, f"{side}_sha256": digest, f"{side}_tokens": usage.completion}
            row[f"{side}_seconds"] = usage.prefill + usage.decode
        if failed:
            row["shadow_sha256"] = ""
        return self._put(self._write, row)

    def _write(self, c: Connection, rows: Sequence[dict[str, Any]]) -> None:
        c.execute(insert(db.shadow_table), list(rows))
        last = c.scalar(select(func.max(db.shadow_table.c.id))) or 0
        c.execute(delete(db.shadow_table).where(db.shadow_table.c.id <= last - self._keep))


def bucket(route: str, user: str) -> int:
    """Return a user's bucket, from 0 to BUCKETS - 1.

    Buckets are uniformly distributed, and independent between routes.
    """
    digest = hashlib.sha256(json.dumps([route, user]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % BUCKETS


def owner(runs: Sequence[tuple[str, int]], number: int) -> str:
    """Return the target that owns a bucket."""
    for name, count in runs:
        number -= count
        if number < 0:
            return name
    raise AssertionError("runs cover all buckets")


def assign_buckets(targets: Sequence[tuple[str, int]], previous: Sequence[tuple[str, int]] = ()) -> Runs:
    """Assign buckets to targets by weight, with the largest remainder method.

    As few buckets as possible change their owner in `previous`.
    """
    total = sum(weight for _, weight in targets)
    quota = {name: weight * BUCKETS // total for name, weight in targets}
    rest = sorted(targets, key=lambda t: (-(t[1] * BUCKETS % total), t[0]))
    for name, _ in rest[: BUCKETS - sum(quota.values())]:
        quota[name] += 1
    owners = _owners(previous) or [""] * BUCKETS
    free = []
    for number, name in enumerate(owners):
        if quota.get(name, 0) > 0:
            quota[name] -= 1
        else:
            free.append(number)
    new = (name for name, _ in targets for _ in range(quota[name]))
    for number, name in zip(free, new, strict=True):
        owners[number] = name
    return tuple((name, len([*run])) for name, run in groupby(owners))


def _owners(runs: Sequence[tuple[str, int]]) -> list[str]:
    """Return the owner of each bucket."""
    return [name for name, count in runs for _ in range(count)]


def _first_difference(left: str, right: str) -> int | None:
    """Return the index of the first differing character, or None for equal texts."""
    if left == right:
        return None
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


# -- planning a move ---------------------------------------------------------------------------------------------------


def route_change(now: Route | None, planned: Route) -> str:
    """Describe the effect on users when `planned` replaces `now`.

    `planned`: a route from `planned_route`, or an earlier move that a rollback would restore. Percentages are
    exact to one of the 10,000 buckets.
    """
    name, ended = planned.name, not planned.targets
    owners = zip(_owners(now.runs if now else ()), _owners(planned.runs), strict=False)
    if now is None or not now.targets:
        text = f"{name} begins: {_describe_shares(planned)}." if not ended else f"{name} has no targets."
    elif ended:
        text = f"{name} is removed: requests for {name} get 404."
    elif moved := Counter((old, new) for old, new in owners if old != new):
        parts = [f"{_percent(n)} move from {old} to {new}" for (old, new), n in moved.most_common()]
        text = f"Of the users of {name}, {_join_words(parts)}; all other users keep their target."
    else:
        text = f"No user of {name} changes target."
    return f"{text}{_shadow_change(now, planned)}"


def _shadow_change(now: Route | None, planned: Route) -> str:
    if planned.shadow is not None:
        same = now is not None and (now.shadow, now.fraction) == (planned.shadow, planned.fraction)
        return "" if same else f" {shadow_text(planned)}"
    return f" {now.shadow} is no longer a shadow." if now and now.shadow else ""


def shadow_text(route: Route) -> str:
    """Return a sentence about a route's shadow, or "" if the route has none."""
    if not route.shadow:
        return ""
    share = _percent(route.fraction * BUCKETS)
    return f"{route.shadow} also answers {share} of requests; clients never see these answers."


def _describe_shares(route: Route) -> str:
    counts = Counter(_owners(route.runs))
    if len(counts) == 1:
        return f"all users get {route.runs[0][0]}"
    return _join_words([f"{_percent(n)} of users get {name}" for name, n in counts.most_common()])


def _percent(buckets: float) -> str:
    return f"{buckets * 100 / BUCKETS:.4g}%"


def _join_words(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def planned_route(
    now: Route | None,
    route: str,
    targets: Iterable[tuple[str, int]],
    *,
    tenant: str = ALL,
    shadow: str | None = None,
    fraction: float = 1.0,
) -> Route:
    """Return the route that `set_route` would create, without writing the route.

    `now`: the current route. Raises ConfigError for an invalid route.
    """
    weighted = [(db.check_reference(name), int(weight)) for name, weight in targets if weight]
    db.check_route_name(route)
    if not 0 < len(weighted) <= 100 or len(dict(weighted)) != len(weighted):
        message = f"{route} needs at least one target, and each target only once"
        raise ConfigError(message, where="targets", fix="as in support@1=90 support@2=10")
    for name, weight in weighted:
        if not 0 < weight <= 1_000_000:
            raise ConfigError(f"the weight of {name} is {weight}", where="targets", fix="an integer, 1 or more")
        if name == route:
            raise ConfigError(f"{route} cannot have itself as a target", where="targets")
    if shadow is not None:
        db.check_reference(shadow)
    if not (math.isfinite(fraction) and 0 <= fraction <= 1):
        raise ConfigError(f"the fraction is {fraction}", where="fraction", fix="from 0 to 1")
    runs = assign_buckets(weighted, now.runs if now else ())
    return Route(tenant, route, now.move + 1 if now else 1, tuple(weighted), runs, shadow, float(fraction))


# -- moves -------------------------------------------------------------------------------------------------------------


def set_route(
    store: Store,
    route: str,
    targets: Iterable[tuple[str, int]],
    *,
    tenant: str = ALL,
    shadow: str | None = None,
    fraction: float = 1.0,
    actor: str,
    check: Callable[[str], object] | None = None,
    from_move: int | None = None,
) -> Route:
    """Point a route to its targets from the next request on.

    `targets`: (adapter, weight). `fraction`: share of requests that also go to `shadow`. `check`: called with
    each name before the route changes; raises for a name that cannot be served. `from_move`: the number of
    the move that must be current, 0 for none; raises RouteMoved if another move is current.
    """
    planned = planned_route(None, route, targets, tenant=tenant, shadow=shadow, fraction=fraction)
    _check([name for name, _ in planned.targets], shadow, check)
    with store.change() as c:
        if tenant != ALL:
            db.tenant_row(c, tenant)
        previous = _current(c, tenant, route)
        if from_move is not None and from_move != (previous.move if previous else 0):
            raise RouteMoved(f"{route} has changed in the meantime", where="route", fix="check the route and try again")
        runs = assign_buckets(planned.targets, previous.runs if previous else ())
        return _move(c, replace(planned, runs=runs), previous, "route.set", actor)


def remove_route(store: Store, route: str, *, tenant: str = ALL, actor: str) -> None:
    """Remove a route. The route's moves are kept, so that a rollback can restore it."""
    with store.change() as c:
        previous = _current(c, tenant, route)
        if previous is None or not previous.targets:
            raise _unknown_route(c, tenant, route)
        _move(c, Route(tenant, route, 0, (), (), None, 1.0), previous, "route.remove", actor)


def rollback_route(
    store: Store,
    route: str,
    *,
    tenant: str = ALL,
    actor: str,
    check: Callable[[str], object] | None = None,
    moves: Iterable[int] = (),
) -> Route:
    """Make the previous move current again; a second rollback goes back one more move.

    `check`: as in `set_route`. `moves`: moves to undo together, including the current move.
    """
    undone = set(moves)
    with store.reading() as c:
        _, restored = earlier_route(c, route, tenant=tenant, undone=undone)
    _check([name for name, _ in restored.targets], restored.shadow, check)
    with store.change() as c:
        now, earlier = earlier_route(c, route, tenant=tenant, undone=undone)
        _set_current(c, tenant, route, earlier.move)
        append_audit(c, actor, "route.rollback", _subject(tenant, route), _audit_fields(now), _audit_fields(earlier))
        return earlier


def earlier_route(c: Connection, route: str, *, tenant: str = ALL, undone: Collection[int] = ()) -> tuple[Route, Route]:
    """Return the current move, and the move to which a rollback returns.

    `undone`: moves to skip. Raises ConfigError if there is no earlier move.
    """
    now = _current(c, tenant, route)
    if now is None:
        raise _unknown_route(c, tenant, route)
    if undone and now.move not in undone:
        raise RouteMoved(
            f"{route} changed after it was read", where="route", fix=f"veneer tenant route history {route}"
        )
    of_route = _belongs_to(db.move_table, tenant, route)
    number: int | None = now.move
    while number is not None and number in {now.move, *undone}:
        number = c.scalar(select(db.move_table.c.before).where(of_route, db.move_table.c.move == number))
    row = c.execute(select(db.move_table).where(of_route, db.move_table.c.move == number)).first()
    if row is None:
        raise ConfigError(f"{route} has no earlier revision", where="route", fix="remove the route, or set new targets")
    return now, db.route_of(row)


def _check(targets: Sequence[str], shadow: str | None, check: Callable[[str], object] | None) -> None:
    """Raise ConfigError for a target or shadow that cannot be served, before a route moves to it."""
    if check is None:
        return
    for role, name in [*(("target", name) for name in targets), ("shadow", shadow)]:
        try:
            if name:
                check(name)
        except VeneerError as error:
            if is_transient(error) or getattr(error, "status", 0) >= 500:
                raise
            raise ConfigError(f"the {role} {name} cannot be served: {error.what}", where=role, fix=error.fix) from error


def route_fields(route: Route) -> dict[str, Any]:
    return {"route": route.name, "tenant": route.tenant, "move": route.move, **_audit_fields(route)}


def route_history(c: Connection, route: str, *, tenant: str = ALL, limit: int | None = None) -> list[dict[str, Any]]:
    """Return at most `limit` of a route's moves, newest first.

    The key `current` says whether the route still has the targets of this move.
    """
    now = _current(c, tenant, route)
    if now is None:
        raise _unknown_route(c, tenant, route)
    query = select(db.move_table).where(_belongs_to(db.move_table, tenant, route)).order_by(db.move_table.c.move.desc())
    rows = c.execute(query.limit(limit)).all()
    return [
        {"move": r.move, "before": r.before, "current": r.move == now.move, "at": r.at, "who": r.who}
        | _audit_fields(db.route_of(r))
        for r in rows
    ]


def shadow_log(c: Connection, *, route: str = "", limit: int = 100) -> list[dict[str, Any]]:
    """Return comparisons with shadows, newest first.

    The key `failed` tells whether the shadow produced nothing to compare.
    """
    query = select(db.shadow_table).order_by(db.shadow_table.c.id.desc()).limit(limit)
    if route:
        query = query.where(db.shadow_table.c.route == route)
    rows = (dict(row._mapping) for row in c.execute(query))
    return [{"route": row.pop("route"), **row, "failed": row["shadow_sha256"] == ""} for row in rows]


def shadow_summary(c: Connection, *, route: str = "") -> list[dict[str, Any]]:
    """Return totals of the stored comparisons, one row per (route, target, shadow).

    Each row counts all, equal, different and failed comparisons, and has the mean tokens and seconds. The
    means exclude failed comparisons, and are None if all comparisons failed.
    """
    s = db.shadow_table.c
    failed = s.shadow_sha256 == ""
    means = ("target_tokens", "shadow_tokens", "target_seconds", "shadow_seconds")
    key = (s.route, s.target, s.shadow)
    query = select(
        *key,
        func.count().label("compared"),
        func.count().filter(s.same).label("same"),
        func.count().filter(~s.same & ~failed).label("different"),
        func.count().filter(failed).label("failed"),
        *(func.avg(s[name]).filter(~failed).label(name) for name in means),
    )
    query = query.group_by(*key).order_by(*key)
    if route:
        query = query.where(s.route == route)
    out = [dict(row._mapping) for row in c.execute(query)]
    for row in out:
        row |= {name: None if row[name] is None else float(row[name]) for name in means}
    return out


def _belongs_to(table: Table, tenant: str, route: str) -> ColumnElement[bool]:
    return (table.c.tenant == tenant) & (table.c.route == route)


def _current(c: Connection, tenant: str, route: str) -> Route | None:
    row = c.execute(db.current_moves().where(_belongs_to(db.route_table, tenant, route))).first()
    return None if row is None else db.route_of(row)


def _move(c: Connection, route: Route, previous: Route | None, action: str, actor: str) -> Route:
    """Write a move to `route`, and return the route with the move's number."""
    tenant, name = route.tenant, route.name
    last = c.scalar(select(func.max(db.move_table.c.move)).where(_belongs_to(db.move_table, tenant, name)))
    after = replace(route, move=(last or 0) + 1)
    row = {"tenant": tenant, "route": name, "move": after.move, "before": previous.move if previous else None}
    spec = json.dumps({field: getattr(after, field) for field in ("targets", "runs", "shadow", "fraction")})
    c.execute(insert(db.move_table), row | {"at": time.time(), "who": actor, "spec": spec})
    _set_current(c, tenant, name, after.move)
    append_audit(c, actor, action, _subject(tenant, name), _audit_fields(previous), _audit_fields(after))
    return after


def _set_current(c: Connection, tenant: str, route: str, move: int) -> None:
    c.execute(delete(db.route_table).where(_belongs_to(db.route_table, tenant, route)))
    c.execute(insert(db.route_table), {"tenant": tenant, "route": route, "current": move})


def _audit_fields(route: Route | None) -> dict[str, Any]:
    if route is None or not route.targets:
        return {"targets": {}, "shadow": None, "fraction": 1.0}
    return {"targets": dict(route.targets), "shadow": route.shadow, "fraction": route.fraction}


def _subject(tenant: str, route: str) -> str:
    return f"{tenant or 'all'}:{route}"


def _unknown_route(c: Connection, tenant: str, route: str) -> UnknownName:
    names = c.scalars(select(db.route_table.c.route).where(db.route_table.c.tenant == tenant))
    return db.unknown_name(f"route of tenant {tenant}" if tenant else "route", route, names)
