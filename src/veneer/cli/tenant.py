"""`veneer tenant …`: manage tenants, keys, routes, usage and the audit log.

The commands write to the server's database, and do not need a running server. A running server applies a
change from the next request on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.command import Result, command
from veneer.cli.options import AsJson, LibraryIndex
from veneer.cli.output import print_json, table

if TYPE_CHECKING:
    from veneer.jobs.store import JobStore
    from veneer.serve.tenancy.store import Store

_PLAIN: dict[str, Any] = {"no_args_is_help": True, "add_completion": False}
app = typer.Typer(**_PLAIN, help="Tenants of a server: keys, adapters, limits, prices, routes, usage.")
key_app = typer.Typer(**_PLAIN, help="API keys of tenants.")
app.add_typer(key_app, name="key")
route_app = typer.Typer(**_PLAIN, help="Routes: weighted versions, shadows, rollback.")
app.add_typer(route_app, name="route")

_database: dict[str, str | None] = {"at": None}
"""The value of `--at`: a SQLite file or a database URL; None for the default."""


@contextmanager
def _store() -> Iterator[Store]:
    from veneer.serve.tenancy.keys import default_database
    from veneer.serve.tenancy.store import Store

    store = Store(_database["at"] or default_database())
    try:
        yield store
    finally:
        store.close()


def _user() -> str:
    """Return the current user's name, in the form that the audit log records."""
    import getpass
    import os

    try:
        return f"cli:{getpass.getuser()}"
    except (ImportError, KeyError, OSError):  # the user has no name, as in some containers
        return f"cli:{os.getuid() if hasattr(os, 'getuid') else 'unknown'}"


tenant_command = partial(command, app, _store)
key_command = partial(command, key_app, _store)
route_command = partial(command, route_app, _store)


def _rows(value: Any, head: Sequence[str], rows: Sequence[Sequence[Any]], empty: str) -> Result:
    """Return a Result with `value` for JSON, and with a table of `rows` as text.

    The text is `empty` if there are no rows."""
    return Result(value, table(head, rows) if rows else empty)


def _day(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


Tenant = Annotated[str, typer.Argument(help="The tenant.", show_default=False)]
Scope = Annotated[
    str,
    typer.Argument(
        metavar="TENANT",
        help="A tenant; `all`: all tenants together; `*`: each tenant without limits of its own.",
        show_default=False,
    ),
]
AnyTenant = Annotated[str | None, typer.Argument(help="The tenant; default: all.", show_default=False)]
KeyId = Annotated[str, typer.Argument(help="The key's id: the part after vnr-.", show_default=False)]
Since = Annotated[str, typer.Option(help="First day to include, in UTC.")]
Until = Annotated[str, typer.Option(help="Last day to include, in UTC.")]
Route = Annotated[str, typer.Argument(help="The route.", show_default=False)]
RouteTenant = Annotated[
    str, typer.Option("--tenant", help="The tenant that owns the route; default: a route for all tenants.")
]
Library = Annotated[
    str | None,
    typer.Option("--library", envvar="VENEER_LIBRARY", help="Library that must contain the route's targets."),
]
Force = Annotated[bool, typer.Option("--force", help="Skip the check that the library contains the targets.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print which users would move; change nothing.")]


@app.callback()
def _set_database(
    at: Annotated[
        str | None,
        typer.Option(
            envvar="VENEER_TENANTS",
            help="A SQLite file or postgresql:// URL; default: `tenants.sqlite` in the veneer home.",
        ),
    ] = None,
) -> None:
    """Manage a server's tenants: keys, adapters, limits, prices, routes, usage."""
    _database["at"] = at


# -- tenants -----------------------------------------------------------------------------------------------------------


@tenant_command("list", "veneer tenant list")
def list_(store: Store) -> Result:
    """List tenants."""
    tenants = store.settings.tenants.values()
    keys = [k.tenant for k in store.settings.keys.values() if k.state(time.time()) == "active"]
    rows = [(t.name, t.weight, "yes" if t.enabled else "no", keys.count(t.name), " ".join(t.adapters)) for t in tenants]
    head = ("tenant", "weight", "enabled", "keys", "adapters")
    return _rows({"tenants": [asdict(t) for t in tenants]}, head, rows, "no tenants: veneer tenant add NAME")


@tenant_command("show", "veneer tenant show acme")
def show(store: Store, tenant: Scope) -> Result:
    """Show a tenant's settings. The JSON output gives amounts of money in millionths."""
    from veneer.serve.tenancy import manage

    name = "" if tenant == "all" else tenant
    if tenant not in ("all", "*"):
        manage.get_tenant(store, tenant)
    settings = manage.show_settings(store.settings, name)
    return Result(settings, "\n".join(_setting_lines(settings)))


def _setting_lines(settings: dict[str, Any], adapter: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if key == "by_adapter":
            for name, inner in value.items():
                yield from _setting_lines(inner, f"{name}: ")
        elif value is not None and key not in ("tenant", "name", "created"):
            text = " ".join(value) if isinstance(value, list | tuple) else value
            yield f"{adapter}{key}={_money(value) if _is_money(key) else text}"


@tenant_command("add", "veneer tenant add acme --see 'acme/*' --weight 2")
def add(
    store: Store,
    tenant: Tenant,
    see: Annotated[
        list[str] | None, typer.Option(help="Pattern of visible adapters, such as 'acme/*'; repeatable.")
    ] = None,
    weight: Annotated[float, typer.Option(help="Relative share of the server while requests are queued.")] = 1.0,
) -> Result:
    """Add a tenant, which sees shared adapters and adapters that match its patterns."""
    from veneer.serve.tenancy import manage

    row = manage.add_tenant(store, tenant, weight=weight, adapters=see or (), actor=_user())
    return Result(asdict(row), f"{tenant}: veneer tenant key add {tenant}")


@tenant_command("set", "veneer tenant set acme requests_per_minute=60 prompt_price=0.15 completion_price=0.60")
def set_(
    store: Store,
    tenant: Scope,
    values: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE …", help="KEY=none removes a setting.", show_default=False)
    ],
    adapter: Annotated[str, typer.Option(help="Set limits and prices of this adapter only.")] = "",
) -> Result:
    """Set a tenant's weight, visible adapters, limits, prices and other settings.

    Keys: weight, enabled, adapters, requests_per_minute, requests_per_day, tokens_per_minute, tokens_per_day,
    concurrency, prompt_price, cached_price, completion_price (per million tokens), training_price,
    training_budget (per month), training_jobs, feedback_days, feedback_names, shared_cache. Separate the
    items of a list with commas."""
    from veneer.serve.tenancy import manage

    pairs = [text.partition("=") for text in values]
    if any(not equals for _, equals, _ in pairs):
        raise typer.BadParameter("give key=value, such as weight=2")
    changes = {key: _value(key, text) for key, _, text in pairs}
    name = "" if tenant == "all" else tenant
    settings = manage.change_settings(store, name, changes, adapter=adapter, actor=_user())
    return Result(settings, "\n".join(_setting_lines(settings)))


def _value(key: str, text: str) -> Any:
    """Parse a setting's value: None, a list, text, or money in millionths."""
    if key in ("adapters", "feedback_names", "shared_cache"):
        return [] if text == "none" else [part for part in text.split(",") if part]
    if text == "none":
        return None
    return _millionths(text)[0] if _is_money(key) else text


def _is_money(key: str) -> bool:
    return key.endswith(("_price", "_budget"))


@tenant_command("remove", "veneer tenant remove acme")
def remove(store: Store, tenant: Tenant) -> Result:
    """Remove a tenant with its keys, settings and routes.

    The tenant's usage stays in the ledger."""
    from veneer.serve.tenancy import manage

    manage.remove_tenant(store, tenant, actor=_user())
    return Result({"removed": tenant}, f"removed {tenant}")


@tenant_command("feedback", "veneer tenant feedback acme --kind preference --adapter acme/support -o rows.jsonl")
def feedback(
    store: Store,
    tenant: Annotated[str, typer.Argument(help="A tenant, or `all` for requests without a key.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON Lines file to write.", show_default=False)],
    kind: Annotated[str, typer.Option(help="Kind of rows: supervised, preference or unpaired.")] = "supervised",
    adapter: Annotated[str | None, typer.Option(help="Only this adapter or route, with all versions.")] = None,
) -> Result:
    """Write users' feedback as training rows for `veneer train`.

    The rows are corrections and answers rated thumbs up (supervised), pairs of answers (preference), or rated
    answers (unpaired)."""
    from veneer.files.atomic import atomic_write
    from veneer.serve.tenancy import manage
    from veneer.serve.tenancy.feedback import feedback_rows

    name = "" if tenant == "all" else manage.get_tenant(store, tenant).name
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for row in feedback_rows(store.engine, name, kind, adapter=adapter):
            count += 1
            yield json.dumps(row).encode() + b"\n"

    atomic_write(output, lines())
    return Result({"rows": count, "output": str(output)}, f"{count:,} rows in {output}")


@app.command("admin-key", epilog="Example: veneer tenant admin-key")
def admin_key(as_json: AsJson = False) -> None:
    """Create an admin key for routes under /admin, and print the key and its hash.

    The hash is enough to configure a server."""
    from veneer.serve.tenancy.keys import hash_key, make_admin_key

    key = make_admin_key()
    key_hash = f"sha256:{hash_key(key)}"
    print_json({"key": key, "hash": key_hash}) if as_json else print(
        f"VENEER_ADMIN_KEY={key}\nVENEER_ADMIN_KEY_HASH={key_hash}"
    )


# -- keys --------------------------------------------------------------------------------------------------------------


@key_command("add", "veneer tenant key add acme --role caller --label web --expires 90d")
def key_add(
    store: Store,
    tenant: Tenant,
    label: Annotated[str, typer.Option(help="A note on the key's purpose.")] = "",
    expires: Annotated[str, typer.Option(help="Lifetime or last day: 90d, 12h or 2027-01-31.")] = "",
    role: Annotated[str, typer.Option(help="owner, trainer, caller or auditor.")] = "trainer",
) -> Result:
    """Create a key and print its secret, which cannot be shown again."""
    from veneer.serve.tenancy import manage

    until = manage.when(expires, time.time()) if expires else None
    more: dict[str, Any] = {"label": label, "expires": until, "role": role}
    row, key = manage.make_tenant_key(store, tenant, **more, actor=_user())
    return Result({**manage.show_key(row), "key": key}, key)


@key_command("list", "veneer tenant key list acme")
def key_list(store: Store, tenant: AnyTenant = None) -> Result:
    """List keys by id, without their secrets."""
    from veneer.serve.tenancy import manage

    now = time.time()
    keys = manage.list_keys(store, tenant)
    value = {"keys": [manage.show_key(k) | {"state": k.state(now)} for k in keys]}
    rows = [(k.id, k.tenant, k.role, k.label, k.state(now), _day(k.created), _day(k.expires)) for k in keys]
    head = ("id", "tenant", "role", "label", "state", "created", "expires")
    return _rows(value, head, rows, "no keys: veneer tenant key add NAME")


@key_command("revoke", "veneer tenant key revoke 3f9a0c21d4")
def key_revoke(store: Store, key: KeyId) -> Result:
    """Revoke a key. The server refuses the key from the next request on."""
    from veneer.serve.tenancy import manage

    row = manage.revoke_key(store, key, actor=_user())
    return Result(manage.show_key(row), f"revoked {key} of {row.tenant}")


def _millionths(*figures: str) -> list[int]:
    from decimal import Decimal, InvalidOperation

    from veneer.errors import ConfigError

    try:
        millionths = [Decimal(figure) * 1_000_000 for figure in figures]
    except InvalidOperation:
        raise ConfigError(f"not a price: {' '.join(figures)}", fix="as in 0.15") from None
    if any(not m.is_finite() or m != int(m) for m in millionths):
        raise ConfigError(f"more than six decimal places: {' '.join(figures)}", fix="use at most six decimal places")
    return [*map(int, millionths)]


def _money(millionths: int) -> str:
    return f"{millionths // 1_000_000:,}.{millionths % 1_000_000:06d}"


# -- records -----------------------------------------------------------------------------------------------------------


@tenant_command("usage", "veneer tenant usage acme --by adapter,day --since 2026-11-01 --csv")
def usage_(
    store: Store,
    tenant: AnyTenant = None,
    by: Annotated[
        str, typer.Option(help="Group by any of tenant, adapter, day; '' for one row.")
    ] = "tenant,adapter,day",
    adapter: Annotated[str | None, typer.Option(help="Only this adapter, with all its versions.")] = None,
    since: Since = "",
    until: Until = "",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> Result:
    """Show requests, tokens, seconds and cost as recorded in the ledger.

    In JSON and CSV, `cost` is in millionths."""
    from veneer.serve.tenancy import ledger

    names = [name for name in by.split(",") if name]
    with store.reading() as c:
        rows = ledger.usage(c, by=names, tenant=tenant, adapter=adapter, since=since, until=until)
    if as_csv:
        return Result({"usage": rows}, ledger.as_csv(rows, names).removesuffix("\n"))
    figures = ("requests", "interrupted", "open", "prompt", "cached", "completion")
    lines = [[*(r[n] for n in names), *(f"{r[f]:,}" for f in figures), _money(r["cost"])] for r in rows]
    return _rows({"usage": rows}, (*names, *figures, "cost"), lines, "no usage")


@tenant_command("economics", "veneer tenant economics acme --hour 2.50 --dedicated-hour 1.20 --since 2026-11-01")
def economics(
    store: Store,
    tenant: AnyTenant = None,
    hour: Annotated[
        str, typer.Option(envvar="VENEER_MACHINE_HOUR", help="Hourly cost of all serving machines.", show_default=False)
    ] = "",
    dedicated_hour: Annotated[
        str, typer.Option(help="Hourly cost of a machine dedicated to one adapter; default: --hour.")
    ] = "",
    training_hour: Annotated[str, typer.Option(help="Hourly cost of a training machine; default: --hour.")] = "",
    hours: Annotated[
        float | None, typer.Option(min=0, help="Hours the machine was paid for; default: the whole period.")
    ] = None,
    since: Since = "",
    until: Until = "",
    library: Annotated[
        str | None, typer.Option(envvar="VENEER_LIBRARY", help="Library that contains the jobs' bills.")
    ] = None,
    index: LibraryIndex = None,
) -> Result:
    """Show each adapter's cost, revenue and break-even against a dedicated machine.

    The figures come from the ledger and from the bills of training jobs. The JSON output gives amounts of
    money in millionths."""
    from veneer.cli.economics import economics as measure

    if not hour:
        raise typer.BadParameter("give the cost of a machine-hour: --hour or VENEER_MACHINE_HOUR")
    serving, dedicated, training = _millionths(hour, dedicated_hour or hour, training_hour or hour)
    more: dict[str, Any] = {"dedicated": dedicated, "training": training, "tenant": tenant, "hours": hours}
    with _jobs(library, index) as jobs:
        report = measure(store, jobs, serving, since=since, until=until, **more)
    rows = [
        (
            *(r["tenant"], r["adapter"], _cents(r["training"]), _cents(r["training_billed"]), f"{r['requests']:,}"),
            _cents(r["serving_thousand"]),
            _cents(round(1000 * r["billed"] / r["requests"]) if r["requests"] else None),
            *(_cents(r["dedicated_thousand"]), _count(r["dedicated_from"]), _count(r["paid_back_after"])),
        )
        for r in report["rows"]
    ]
    head = ["tenant", "adapter", "training", "billed", "requests", "1,000 cost", "1,000 revenue", "1,000 dedicated"]
    head += ["break-even a day", "paid back after"]
    period = f"{report['hours']:,.1f} hours from {report['since']} to {report['until'] or 'now'}"
    return Result(report, f"{table(head, rows)}\n{period}" if rows else "no usage or training")


@contextmanager
def _jobs(location: str | None, index: str | None) -> Iterator[JobStore | None]:
    """Yield the library's JobStore, or None if the library does not exist."""
    from veneer.jobs.store import JobStore
    from veneer.library.library import library_location, open_library

    where = location or library_location()
    if "://" not in where and not Path(where).expanduser().is_dir():
        yield None
        return
    with open_library(where, index) as library:
        yield JobStore(library)


def _cents(millionths: int | None) -> str:
    from veneer.jobs.store import money

    return "" if millionths is None else money(round(millionths, -4) if abs(millionths) >= 10_000_000 else millionths)


def _count(number: int | None) -> str:
    return "never" if number is None else f"{number:,}"


@tenant_command("audit", "veneer tenant audit --what key --limit 20")
def audit_(
    store: Store,
    what: Annotated[str, typer.Option(help="Only this kind of change: key, route, settings, adapter.load.")] = "",
    subject: Annotated[str, typer.Option(help="Only changes of this tenant, route or adapter.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of lines.")] = 50,
    verify: Annotated[bool, typer.Option("--verify", help="Check the hash chain and print its head.")] = False,
    expect: Annotated[str, typer.Option(help="With --verify: an earlier head that the chain must contain.")] = "",
) -> Result:
    """Show who changed what, newest first.

    With --verify, check the log instead; the exit code is 2 if a line is missing or altered, otherwise 0."""
    from veneer.serve.tenancy import manage

    with store.reading() as c:
        if verify or expect:
            head, count, faults = manage.audit_faults(c, expect)
            value = {"ok": not faults, "head": head, "lines": count, "faults": faults}
            return Result(value, "\n".join([f"{count:,} lines, head {head}", *faults]), 2 if faults else 0)
        entries = manage.audit_lines(c, action=what, subject=subject, limit=limit)
    lines = [
        f"{x['number']}  {x['at']}  {x['who']}  {x['what']}  {x['subject']}  "
        f"{json.dumps(x['before'])} -> {json.dumps(x['after'])}"
        for x in entries
    ]
    return Result({"lines": entries}, "\n".join(lines))


# -- routes ------------------------------------------------------------------------------------------------------------


@route_command("set", "veneer tenant route set support support@1=90 support@2=10")
def route_set(
    store: Store,
    route: Route,
    targets: Annotated[list[str], typer.Argument(help="adapter=weight pairs, or one adapter.", show_default=False)],
    tenant: RouteTenant = "",
    shadow: Annotated[
        str | None, typer.Option(help="Adapter that also answers, only to compare its responses in the log.")
    ] = None,
    fraction: Annotated[float, typer.Option(help="Fraction of requests sent to the shadow.")] = 1.0,
    library: Library = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> Result:
    """Point a route to one or more adapters, with a share of the traffic for each.

    Each user always gets the same adapter. A change of the shares moves as few users as possible to another
    adapter."""
    from veneer.serve.tenancy import routes

    split = [target.partition("=") for target in targets]
    pairs = [(name, int(weight) if weight.isdigit() else 0 if weight else 1) for name, _, weight in split]
    if any(not weight for _, weight in pairs):
        raise typer.BadParameter("weights are positive integers, as in support@1=90")
    more: dict[str, Any] = {"tenant": tenant, "shadow": shadow, "fraction": fraction}
    now = store.settings.routes.get((tenant, route))
    planned = routes.planned_route(now, route, pairs, **more)
    if not dry_run:
        planned = routes.set_route(store, route, pairs, actor=_user(), check=_check(library, force), **more)
    return _route_result(routes.route_fields(planned), routes.route_change(now, planned))


def _route_result(fields: dict[str, Any], change: str) -> Result:
    return Result({**fields, "change": change}, f"{_route_line(fields)}\n{change}")


def _check(location: str | None, force: bool) -> Callable[[str], None] | None:
    """Return a function that checks a route's target; None with `force`.

    The target must be a readable adapter in the library, a built-in base, or the base of an adapter in the
    library; otherwise the function raises AdapterError. The check does not need a running server."""
    from veneer.errors import AdapterError, ConfigError
    from veneer.library.library import library_location, open_library
    from veneer.models.builtin import BUILTIN, PACKAGED

    def check(name: str) -> None:
        folder = location or library_location()
        fix = "add the adapter with `veneer library add PATH NAME`, set --library, or use --force"
        if "://" not in folder and not Path(folder).expanduser().is_dir():  # opening would create a library
            raise AdapterError(f"there is no library at {folder}", fix=fix)
        with open_library(folder) as library:
            try:
                version = library.find(name)
            except (AdapterError, ConfigError) as error:  # the names of some bases are not valid references
                if name in BUILTIN or name in PACKAGED or library.knows_base(name):
                    return
                raise AdapterError(error.what, fix=f"{error.fix}; {fix}") from error
        if not version.digest:
            raise AdapterError(f"{version.reference} could not be read when it was added to the library", fix=fix)

    return None if force else check


def _route_line(fields: dict[str, Any]) -> str:
    total = sum(fields["targets"].values())
    parts = ", ".join(f"{name} {100 * weight / total:.3g}%" for name, weight in fields["targets"].items())
    shadow = f"; shadow {fields['shadow']} for {100 * fields['fraction']:.3g}%" if fields["shadow"] else ""
    owner = f" of {fields['tenant']}" if fields.get("tenant") else ""
    return f"{fields['route']}{owner} -> {parts or 'nothing'}{shadow}"


@route_command("list", "veneer tenant route list")
def route_list(store: Store) -> Result:
    """List routes and their targets."""
    from veneer.serve.tenancy import routes

    shown_routes = [routes.route_fields(route) for route in store.settings.routes.values()]
    return Result({"routes": shown_routes}, "\n".join(map(_route_line, shown_routes)) or "no routes")


@route_command("rollback", "veneer tenant route rollback support")
def route_rollback(
    store: Store,
    route: Route,
    tenant: RouteTenant = "",
    library: Library = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> Result:
    """Restore a route's previous targets, for the same users."""
    from veneer.serve.tenancy import routes

    with store.reading() as c:
        now, earlier = routes.earlier_route(c, route, tenant=tenant)
    if not dry_run:
        earlier = routes.rollback_route(store, route, tenant=tenant, actor=_user(), check=_check(library, force))
    return _route_result(routes.route_fields(earlier), routes.route_change(now, earlier))


@route_command("remove", "veneer tenant route remove support")
def route_remove(store: Store, route: Route, tenant: RouteTenant = "") -> Result:
    """Remove a route. `veneer tenant route rollback` restores a removed route."""
    from veneer.serve.tenancy import routes

    routes.remove_route(store, route, tenant=tenant, actor=_user())
    return Result({"removed": route}, f"removed {route}")


@route_command("history", "veneer tenant route history support")
def route_history(store: Store, route: Route, tenant: RouteTenant = "") -> Result:
    """List a route's revisions, newest first; * marks the current revision."""
    from veneer.serve.tenancy import routes

    with store.reading() as c:
        revisions = routes.route_history(c, route, tenant=tenant)
    lines = [
        f"{'*' if m['current'] else ' '} {m['move']}  {_day(m['at'])}  {m['who']}  {_route_line({'route': route, **m})}"
        for m in revisions
    ]
    return Result({"moves": revisions}, "\n".join(lines))
