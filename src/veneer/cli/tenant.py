"""`veneer tenant …`: who may use which adapter on a server, how much, for what price, and what was used.

Works on the server's own database, whether or not a server runs; a change holds from the next request on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import AsJson, LibraryIndex
from veneer.cli.output import print_json, print_table

if TYPE_CHECKING:
    from veneer.jobs.store import JobStore
    from veneer.serve.tenancy.store import Store

_PLAIN: dict[str, Any] = {"no_args_is_help": True, "add_completion": False}
app = typer.Typer(**_PLAIN, help="Tenants of a server: keys, adapters, limits, prices, routes, usage.")
key_app = typer.Typer(**_PLAIN, help="API keys of tenants.")
app.add_typer(key_app, name="key")
route_app = typer.Typer(**_PLAIN, help="Routes: weighted versions, shadows, rollback.")
app.add_typer(route_app, name="route")
feedback_app = typer.Typer(**_PLAIN, help="Answers that are kept, what users say of them, rows to train on.")
app.add_typer(feedback_app, name="feedback")

_place: dict[str, str | None] = {"at": None}
"""The database that the command was given."""


@contextmanager
def _opened() -> Iterator[Store]:
    from veneer.serve.tenancy.keys import default_database
    from veneer.serve.tenancy.store import Store

    store = Store(_place["at"] or default_database())
    try:
        yield store
    finally:
        store.close()


def _who() -> str:
    import getpass

    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a container without a name for its user
        import os

        return f"cli:{os.getuid()}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], empty: str) -> None:
    """`rows` under `head` in columns, or what to say where there are none."""
    print_table(head, rows) if rows else print(empty)


def _day(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


_Tenant = Annotated[str, typer.Argument(help="The tenant.", show_default=False)]
_Kept = Annotated[str, typer.Argument(help="The tenant; without one: whoever asks an open server.", show_default=False)]
_WHOEVER = "(whoever asks)"
_KeyId = Annotated[str, typer.Argument(help="The key's id, the part after vnr-.", show_default=False)]
_Adapter = Annotated[str, typer.Option("--adapter", help="For this adapter alone; by default all of them.")]
_Patterns = Annotated[
    list[str], typer.Argument(help="Names of adapters; * stands for any text: 'acme/*'.", show_default=False)
]
_Remove = Annotated[bool, typer.Option("--remove", help="Take these away.")]


@app.callback()
def _where(
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            envvar="VENEER_TENANTS",
            help="A SQLite file or postgresql:// URL; by default `tenants.sqlite` in the veneer home.",
        ),
    ] = None,
) -> None:
    """Tenants of a server: keys, the adapters they see, limits, prices, routes, usage and the audit log."""
    _place["at"] = at


# -- tenants -----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: veneer tenant add acme --see 'acme/*' --weight 2")
def add(
    tenant: _Tenant,
    see: Annotated[list[str] | None, typer.Option("--see", help="Names it sees, as 'acme/*'; repeatable.")] = None,
    weight: Annotated[float, typer.Option("--weight", help="Its share where requests wait.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Add a tenant. It sees the adapters that its patterns match, and those that are shared."""
    from veneer.serve.tenancy import manage

    with _opened() as store:
        made = manage.add_tenant(store, tenant, weight=weight, adapters=see or (), who=_who())
    print_json(asdict(made)) if as_json else print(f"{tenant}: veneer tenant key add {tenant}")


@app.command("list", epilog="Example: veneer tenant list")
def list_(as_json: AsJson = False) -> None:
    """All tenants, and what is shared with all of them."""
    with _opened() as store:
        settings = store.settings
    if as_json:
        print_json({"tenants": [asdict(t) for t in settings.tenants.values()], "shared": settings.shared})
        return
    keys = [k.tenant for k in settings.keys.values() if k.state(time.time()) == "active"]
    rows = [
        (t.name, t.weight, "yes" if t.enabled else "no", keys.count(t.name), " ".join(t.adapters))
        for t in settings.tenants.values()
    ]
    _table(("tenant", "weight", "enabled", "keys", "sees"), rows, "no tenants: veneer tenant add NAME")
    if settings.shared:
        print(f"shared: {' '.join(settings.shared)}")


@app.command(epilog="Example: veneer tenant change acme --weight 3")
def change(
    tenant: _Tenant,
    weight: Annotated[float | None, typer.Option("--weight", help="Its share where requests wait.")] = None,
    enabled: Annotated[bool | None, typer.Option("--enable/--disable", help="Whether its keys work.")] = None,
    as_json: AsJson = False,
) -> None:
    """Change a tenant's weight, or shut it out and let it in again."""
    from veneer.serve.tenancy import manage

    with _opened() as store:
        made = manage.change_tenant(store, tenant, weight=weight, enabled=enabled, who=_who())
    state = "enabled" if made.enabled else "disabled"
    print_json(asdict(made)) if as_json else print(f"{tenant}: weight {made.weight:g}, {state}")


@app.command(epilog="Example: veneer tenant remove acme")
def remove(tenant: _Tenant, as_json: AsJson = False) -> None:
    """Remove a tenant with its keys, limits, prices and routes. What it used stays in the ledger."""
    from veneer.serve.tenancy import manage

    with _opened() as store:
        manage.remove_tenant(store, tenant, who=_who())
    print_json({"removed": tenant}) if as_json else print(f"removed {tenant}")


@app.command(epilog="Example: veneer tenant see acme 'acme/*' support")
def see(tenant: _Tenant, patterns: _Patterns, remove: _Remove = False, as_json: AsJson = False) -> None:
    """Let a tenant see adapters. To everybody else they do not exist."""
    _let_see(tenant, patterns, remove, as_json)


@app.command(epilog="Example: veneer tenant share 'public/*'")
def share(patterns: _Patterns, remove: _Remove = False, as_json: AsJson = False) -> None:
    """Let every tenant see adapters. The base is there for everybody."""
    _let_see("", patterns, remove, as_json)


def _let_see(tenant: str, patterns: list[str], remove: bool, as_json: bool) -> None:
    from veneer.serve.tenancy import manage

    with _opened() as store:
        more = {"remove": patterns} if remove else {"add": patterns}
        after = manage.let_see(store, tenant, **more, who=_who())
    if as_json:
        print_json({"adapters": after})
    else:
        print(f"{tenant or 'everybody'} sees: {' '.join(after) or 'nothing'}")


@app.command(epilog="Example: veneer tenant cache support")
def cache(
    patterns: Annotated[list[str] | None, typer.Argument(help="Adapters, or the base; by default show them.")] = None,
    remove: _Remove = False,
    as_json: AsJson = False,
) -> None:
    """Let tenants share what was computed of prompts that begin alike, under these adapters; else each has its own.
    It is faster, and whoever may use them can find out by a prompt of its own what others have asked."""
    from veneer.serve.tenancy import manage

    with _opened() as store:
        after = store.settings.common
        if patterns:
            more = {"remove": patterns} if remove else {"add": patterns}
            after = manage.share_prefixes(store, **more, who=_who())
    print_json({"shared": after}) if as_json else print(f"shared between tenants: {' '.join(after) or 'nothing'}")


@app.command("admin-key", epilog="Example: veneer tenant admin-key")
def admin_key(as_json: AsJson = False) -> None:
    """Make a key for what is under /admin, and its hash, which is all that the server needs to know."""
    from veneer.serve.tenancy.keys import hash_key, make_admin_key

    key = make_admin_key()
    kept = f"sha256:{hash_key(key)}"
    print_json({"key": key, "hash": kept}) if as_json else print(
        f"VENEER_ADMIN_KEY={key}\nVENEER_ADMIN_KEY_HASH={kept}"
    )


# -- keys --------------------------------------------------------------------------------------------------------------


@key_app.command("add", epilog="Example: veneer tenant key add acme --label web --expires 90d")
def key_add(
    tenant: _Tenant,
    label: Annotated[str, typer.Option("--label", help="What it is for.")] = "",
    expires: Annotated[str, typer.Option("--expires", help="90d, 12h, or a day: 2027-01-31.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown now and never again."""
    from veneer.serve.tenancy import manage

    with _opened() as store:
        until = manage.when(expires, time.time()) if expires else None
        row, key = manage.make_tenant_key(store, tenant, label=label, expires=until, who=_who())
    print_json({**manage.show_key(row), "key": key}) if as_json else print(key)


@key_app.command("list", epilog="Example: veneer tenant key list acme")
def key_list(
    tenant: Annotated[str | None, typer.Argument(help="The tenant; by default all.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Keys by id, without what is secret in them."""
    from veneer.serve.tenancy import manage

    now = time.time()
    with _opened() as store:
        found = manage.list_keys(store, tenant)
    if as_json:
        print_json({"keys": [manage.show_key(k) | {"state": k.state(now)} for k in found]})
        return
    rows = [(k.id, k.tenant, k.label, k.state(now), _day(k.created), _day(k.expires)) for k in found]
    _table(("id", "tenant", "label", "state", "made", "expires"), rows, "no keys: veneer tenant key add NAME")


@key_app.command("revoke", epilog="Example: veneer tenant key revoke 3f9a0c21d4")
def key_revoke(key: _KeyId, as_json: AsJson = False) -> None:
    """Refuse a key from the next request on."""
    from veneer.serve.tenancy import manage

    with _opened() as store:
        row = manage.revoke_key(store, key, who=_who())
    print_json(manage.show_key(row)) if as_json else print(f"revoked {key} of {row.tenant}")


@key_app.command("rotate", epilog="Example: veneer tenant key rotate 3f9a0c21d4 --grace 24h")
def key_rotate(
    key: _KeyId,
    grace: Annotated[str, typer.Option("--grace", help="How long the old one still works: 24h, 30m.")] = "0m",
    as_json: AsJson = False,
) -> None:
    """Make a key in the place of another. It is shown now and never again."""
    from veneer.serve.tenancy import manage

    with _opened() as store:
        row, secret = manage.rotate_key(store, key, grace=manage.when(grace, 0.0), who=_who())
    print_json({**manage.show_key(row), "key": secret}) if as_json else print(secret)


# -- limits and prices -------------------------------------------------------------------------------------------------

_Count = Annotated[int | None, typer.Option(min=0, help="0: no limit.", show_default=False)]
_Whose = Annotated[str, typer.Argument(help="A tenant; '*': each that has none of its own; all: all of them together.")]


@app.command(epilog="Example: veneer tenant limit acme --requests-per-minute 60 --tokens-per-day 2000000")
def limit(
    tenant: _Whose = "",
    adapter: _Adapter = "",
    requests_per_minute: _Count = None,
    requests_per_day: _Count = None,
    tokens_per_minute: _Count = None,
    tokens_per_day: _Count = None,
    concurrency: _Count = None,
    as_json: AsJson = False,
) -> None:
    """Set limits, those that are named; without any, show what is set."""
    from veneer.serve.tenancy import manage
    from veneer.serve.tenancy.store import LIMITS

    given = (requests_per_minute, requests_per_day, tokens_per_minute, tokens_per_day, concurrency)
    values = {name: value or None for name, value in zip(LIMITS, given, strict=True) if value is not None}
    with _opened() as store:
        if values:
            if not tenant:
                raise typer.BadParameter("name whose limits to set: a tenant, '*' or all")
            manage.set_limit(store, "" if tenant == "all" else tenant, adapter, values, who=_who())
        found = store.look().limits
    if as_json:
        print_json({"limits": [{"tenant": t, "adapter": a, **asdict(row)} for (t, a), row in found.items()]})
        return
    rows = [
        (t or "all", a or "all", *("" if v is None else f"{v:,}" for v in asdict(row).values()))
        for (t, a), row in sorted(found.items())
    ]
    _table(("tenant", "adapter", *(n.replace("_per_", "/") for n in LIMITS)), rows, "no limits")


@app.command(epilog="Example: veneer tenant price all --prompt 0.15 --cached 0.015 --completion 0.60")
def price(
    tenant: Annotated[str, typer.Argument(help="A tenant; all: any of them.")] = "",
    adapter: _Adapter = "",
    prompt: Annotated[str | None, typer.Option(help="For a million tokens that are computed.")] = None,
    cached: Annotated[str, typer.Option(help="For a million of the prompt that were there already.")] = "",
    completion: Annotated[str | None, typer.Option(help="For a million tokens of answers.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take this price away.")] = False,
    as_json: AsJson = False,
) -> None:
    """Set what a million tokens cost, to a millionth; without any price, show what is set. `--cached` is as `--prompt`
    unless it is given."""
    from veneer.serve.tenancy import manage

    with _opened() as store:
        if remove or prompt is not None or completion is not None:
            if not tenant or (not remove and (prompt is None or completion is None)):
                raise typer.BadParameter("give a tenant or all, --prompt and --completion")
            made = None if remove else _price(prompt or "", cached or prompt or "", completion or "")
            manage.set_price(store, "" if tenant == "all" else tenant, adapter, made, who=_who())
        found = store.look().prices
    if as_json:
        print_json({"prices": [{"tenant": t, "adapter": a, **asdict(row)} for (t, a), row in found.items()]})
        return
    rows = [(t or "all", a or "all", *map(_money, asdict(row).values())) for (t, a), row in sorted(found.items())]
    _table(("tenant", "adapter", "prompt", "cached", "completion"), rows, "no prices: everything is free")


@app.command(epilog="Example: veneer tenant training acme --price 8.00 --budget 200 --at-once 2")
def training(
    tenant: Annotated[str, typer.Argument(help="A tenant; all: each that has no terms of its own.")] = "",
    price: Annotated[str | None, typer.Option(help="For a million tokens that are trained.")] = None,
    budget: Annotated[str | None, typer.Option(help="For a calendar month, in UTC; none: any amount.")] = None,
    at_once: Annotated[int | None, typer.Option("--at-once", min=0, help="Jobs that run at once; 0: none.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take these terms away.")] = False,
    as_json: AsJson = False,
) -> None:
    """Set what training costs and how much of it there may be, all three together; without any, show what is set."""
    from veneer.serve.tenancy import manage
    from veneer.serve.tenancy.store import TrainingTerms

    with _opened() as store:
        if remove or price is not None or budget is not None or at_once is not None:
            if not tenant:
                raise typer.BadParameter("name whose terms to set: a tenant, or all")
            (cost,) = _millionths(price or "0")
            most = None if budget in (None, "none") else _millionths(str(budget))[0]
            made = None if remove else TrainingTerms(cost, most, at_once)
            manage.set_training(store, "" if tenant == "all" else tenant, made, who=_who())
        found = store.look().training
    if as_json:
        print_json({"training": [{"tenant": t, **asdict(terms)} for t, terms in found.items()]})
        return
    rows = [
        (t or "all", _money(x.price), "" if x.budget is None else _money(x.budget), "" if x.jobs is None else x.jobs)
        for t, x in sorted(found.items())
    ]
    _table(("tenant", "price", "budget", "at once"), rows, "no terms: training is free, and as much as there is")


def _price(*figures: str) -> Any:
    from veneer.serve.tenancy.store import Price

    return Price(*_millionths(*figures))


def _millionths(*figures: str) -> list[int]:
    from decimal import Decimal, InvalidOperation

    from veneer.errors import ConfigError

    try:
        millionths = [Decimal(figure) * 1_000_000 for figure in figures]
    except InvalidOperation:
        raise ConfigError(f"not a price: {' '.join(figures)}", fix="as in 0.15") from None
    if any(not m.is_finite() or m != int(m) for m in millionths):
        raise ConfigError(f"finer than a millionth: {' '.join(figures)}", fix="at most six digits after the point")
    return [*map(int, millionths)]


def _money(millionths: int) -> str:
    return f"{millionths // 1_000_000:,}.{millionths % 1_000_000:06d}"


# -- records -----------------------------------------------------------------------------------------------------------


@app.command("usage", epilog="Example: veneer tenant usage acme --by adapter,day --since 2026-11-01 --csv")
def usage_(
    tenant: Annotated[str | None, typer.Argument(help="The tenant; by default all.", show_default=False)] = None,
    by: Annotated[str, typer.Option("--by", help="Of tenant, adapter, day; '' for one row.")] = "tenant,adapter,day",
    adapter: Annotated[str | None, typer.Option("--adapter", help="This adapter alone, all its versions.")] = None,
    since: Annotated[str, typer.Option("--since", help="The first day, in UTC.")] = "",
    until: Annotated[str, typer.Option("--until", help="The last day, in UTC.")] = "",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: AsJson = False,
) -> None:
    """What the ledger says: requests, tokens, seconds and cost. `cost` is in millionths in JSON and CSV."""
    from veneer.library.database import reading
    from veneer.serve.tenancy import ledger

    names = [name for name in by.split(",") if name]
    with _opened() as store, reading(store.engine) as c:
        rows = ledger.usage(c, by=names, tenant=tenant, adapter=adapter, since=since, until=until)
    if as_csv:
        print(ledger.as_csv(rows, names), end="")
    elif as_json:
        print_json({"usage": rows})
    else:
        figures = ("requests", "interrupted", "open", "prompt", "cached", "completion")
        shown = [[*(r[n] for n in names), *(f"{r[f]:,}" for f in figures), _money(r["cost"])] for r in rows]
        _table((*names, *figures, "cost"), shown, "nothing was used")


@app.command(epilog="Example: veneer tenant economics acme --hour 2.50 --dedicated-hour 1.20 --since 2026-11-01")
def economics(
    tenant: Annotated[str | None, typer.Argument(help="The tenant; by default all.", show_default=False)] = None,
    hour: Annotated[
        str,
        typer.Option(
            "--hour", envvar="VENEER_MACHINE_HOUR", help="What an hour of all that serves costs.", show_default=False
        ),
    ] = "",
    dedicated_hour: Annotated[
        str, typer.Option("--dedicated-hour", help="Of a machine for one adapter; default: --hour.")
    ] = "",
    training_hour: Annotated[
        str, typer.Option("--training-hour", help="Of a machine that trains; default: --hour.")
    ] = "",
    hours: Annotated[
        float | None, typer.Option("--hours", min=0, help="For which the machine was paid; by default all of the time.")
    ] = None,
    since: Annotated[str, typer.Option("--since", help="The first day, in UTC.")] = "",
    until: Annotated[str, typer.Option("--until", help="The last day, in UTC.")] = "",
    library: Annotated[
        str | None, typer.Option("--library", envvar="VENEER_LIBRARY", help="The library with the jobs' bills.")
    ] = None,
    index: LibraryIndex = None,
    as_json: AsJson = False,
) -> None:
    """What each tenant's adapters cost to train and to serve, what they bring, and when a machine of one's own pays.

    From the ledger and the jobs' bills. Money in JSON is in millionths."""
    from veneer.jobs.economics import MachinePrices
    from veneer.jobs.economics import economics as measured

    if not hour:
        raise typer.BadParameter("say what an hour of the machine costs: --hour, or VENEER_MACHINE_HOUR")
    more = {"dedicated": dedicated_hour, "training": training_hour}
    prices = MachinePrices(_millionths(hour)[0], **{name: _millionths(text)[0] for name, text in more.items() if text})
    with _opened() as store, _jobs(library, index) as jobs:
        found = measured(store, jobs, prices, tenant=tenant, since=since, until=until, hours=hours)
    if as_json:
        print_json({**asdict(found), "rows": [row.to_dict() for row in found.rows]})
        return
    rows = [
        (
            r.tenant,
            r.adapter,
            _cents(r.training),
            _cents(r.training_billed),
            f"{r.requests:,}",
            _cents(r.serving_thousand),
            _cents(round(1000 * r.billed / r.requests) if r.requests else None),
            _cents(r.dedicated_thousand),
            _count(r.dedicated_from),
            _count(r.paid_back_after),
        )
        for r in found.rows
    ]
    head = ("tenant", "adapter", "training", "billed", "requests", "1,000 cost", "1,000 bring", "1,000 alone")
    _table((*head, "alone from, a day", "paid back after"), rows, "nothing was used or trained")
    if rows:
        print(f"{found.hours:,.1f} hours from {found.since} to {found.until or 'now'}")


@contextmanager
def _jobs(place: str | None, index: str | None) -> Iterator[JobStore | None]:
    """The queue of the library; None where there is no library: asking does not make one."""
    from veneer.jobs.store import JobStore
    from veneer.library.library import library_place, open_library

    where = place or library_place()
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


@app.command("audit", epilog="Example: veneer tenant audit --what key --limit 20")
def audit_(
    what: Annotated[str, typer.Option("--what", help="These changes alone: key, route, limit, adapter.load.")] = "",
    subject: Annotated[str, typer.Option("--subject", help="Of this tenant, route or adapter.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 50,
    verify: Annotated[bool, typer.Option("--verify", help="Check the chain of hashes; print its head.")] = False,
    expect: Annotated[str, typer.Option("--expect", help="With --verify: a head that was seen earlier.")] = "",
    as_json: AsJson = False,
) -> None:
    """Who changed what, the newest first. With --verify: exit code 0 if no line is missing or changed, else 2."""
    from veneer.library.database import reading
    from veneer.serve.tenancy import manage

    with _opened() as store, reading(store.engine) as c:
        if not (verify or expect):
            found = manage.audit_lines(c, what=what, subject=subject, limit=limit)
        else:
            head, count, wrong = manage.audit_faults(c, expect)
    if verify or expect:
        if as_json:
            print_json({"ok": not wrong, "head": head, "lines": count, "faults": wrong})
        else:
            print("\n".join([f"{count:,} lines, head {head}", *wrong]))
        if wrong:
            raise typer.Exit(2)
    elif as_json:
        print_json({"lines": found})
    else:
        for line in found:
            change = f"{json.dumps(line['before'])} -> {json.dumps(line['after'])}"
            print(f"{line['number']}  {line['at']}  {line['who']}  {line['what']}  {line['subject']}  {change}")


# -- routes ------------------------------------------------------------------------------------------------------------

_Of = Annotated[str, typer.Option("--tenant", help="Of this tenant alone; by default everybody's.")]
_Route = Annotated[str, typer.Argument(help="The route.", show_default=False)]
_Library = Annotated[
    str | None,
    typer.Option("--library", envvar="VENEER_LIBRARY", help="Where adapters are kept: it must have what is led to."),
]
_Force = Annotated[bool, typer.Option("--force", help="Move it unchecked: a server loads the adapters by itself.")]

_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say who would move, and move nothing.")]


@route_app.command("set", epilog="Example: veneer tenant route set support support@1=90 support@2=10")
def route_set(
    route: _Route,
    targets: Annotated[list[str], typer.Argument(help="adapter=weight, or one adapter.", show_default=False)],
    tenant: _Of = "",
    shadow: Annotated[str | None, typer.Option("--shadow", help="Answers too, unseen; the log compares.")] = None,
    fraction: Annotated[float, typer.Option("--fraction", help="Of the requests that the shadow gets.")] = 1.0,
    library: _Library = None,
    force: _Force = False,
    dry_run: _DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Point a route to adapters by weight. A user stays with one; moving weights moves as few as can be."""
    from veneer.serve.tenancy import routes

    pairs = [
        (name, int(weight) if weight.isdigit() else 0 if weight else 1) for name, _, weight in map(_split, targets)
    ]
    if any(not weight for _, weight in pairs):
        raise typer.BadParameter("weights are whole numbers, 1 or more: support@1=90")
    more: dict[str, Any] = {"tenant": tenant, "shadow": shadow, "fraction": fraction}
    with _opened() as store:
        now = store.settings.routes.get((tenant, route))
        made = routes.planned_route(now, route, pairs, **more)
        if not dry_run:
            made = routes.set_route(store, route, pairs, who=_who(), check=_kept_in(library, force), **more)
    _moved(routes.route_shown(made), routes.route_change(now, made), as_json)


def _moved(shown: dict[str, Any], change: str, as_json: bool) -> None:
    print_json({**shown, "change": change}) if as_json else print(f"{_line(shown)}\n{change}")


def _split(text: str) -> tuple[str, str, str]:
    return text.partition("=")


def _kept_in(place: str | None, force: bool) -> Callable[[str], None] | None:
    """Return the check of a route's target that needs no server; None with `force`.

    The target must be a readable adapter in the library, a built-in base, or a base that adapters in the library
    belong to."""
    from veneer.errors import AdapterError, ConfigError
    from veneer.library.library import library_place, open_library
    from veneer.models.builtin import BUILTIN, PACKAGED

    if force:
        return None

    def check(name: str) -> None:
        where = place or library_place()
        fix = "veneer library add PATH NAME; --library says where else they are; --force where a server loads it itself"
        if "://" not in where and not Path(where).expanduser().is_dir():  # asking does not make one
            raise AdapterError(f"there is no library at {where}", fix=fix)
        with open_library(where) as library:
            try:
                found = library.find(name)
            except (AdapterError, ConfigError) as error:  # a base's name can be invalid as an adapter's name
                if name in BUILTIN or name in PACKAGED or library.knows_base(name):
                    return
                raise AdapterError(error.what, fix=f"{error.fix}; {fix}") from error
        if not found.digest:
            raise AdapterError(f"{found.reference} could not be read when it was added to the library", fix=fix)

    return check


def _line(shown: dict[str, Any]) -> str:
    total = sum(shown["targets"].values())
    parts = ", ".join(f"{name} {100 * weight / total:.3g} %" for name, weight in shown["targets"].items())
    shadow = f"; shadow {shown['shadow']} for {100 * shown['fraction']:.3g} %" if shown["shadow"] else ""
    whose = f" of {shown['tenant']}" if shown.get("tenant") else ""
    return f"{shown['route']}{whose} -> {parts or 'nothing'}{shadow}"


@route_app.command("list", epilog="Example: veneer tenant route list")
def route_list(as_json: AsJson = False) -> None:
    """Every route and where it leads."""
    from veneer.serve.tenancy import routes

    with _opened() as store:
        found = [routes.route_shown(route) for route in store.settings.routes.values()]
    print_json({"routes": found}) if as_json else print("\n".join(map(_line, found)) or "no routes")


@route_app.command("rollback", epilog="Example: veneer tenant route rollback support")
def route_rollback(
    route: _Route,
    tenant: _Of = "",
    library: _Library = None,
    force: _Force = False,
    dry_run: _DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Put back what the route led to before its last move, for the same users, from the next request on."""
    from veneer.library.database import reading
    from veneer.serve.tenancy import routes

    with _opened() as store:
        with reading(store.engine) as c:
            now, made = routes.earlier_route(c, route, tenant=tenant)
        if not dry_run:
            made = routes.rollback_route(store, route, tenant=tenant, who=_who(), check=_kept_in(library, force))
    _moved(routes.route_shown(made), routes.route_change(now, made), as_json)


@route_app.command("remove", epilog="Example: veneer tenant route remove support")
def route_remove(route: _Route, tenant: _Of = "", as_json: AsJson = False) -> None:
    """Take a route away; `rollback` brings it back."""
    from veneer.serve.tenancy import routes

    with _opened() as store:
        routes.remove_route(store, route, tenant=tenant, who=_who())
    print_json({"removed": route}) if as_json else print(f"removed {route}")


@route_app.command("history", epilog="Example: veneer tenant route history support")
def route_history(route: _Route, tenant: _Of = "", as_json: AsJson = False) -> None:
    """Every move of a route, the newest first; * is the one that holds."""
    from veneer.library.database import reading
    from veneer.serve.tenancy import routes

    with _opened() as store, reading(store.engine) as c:
        found = routes.route_history(c, route, tenant=tenant)
    if as_json:
        print_json({"moves": found})
        return
    for move in found:
        line = _line({"route": route, **move})
        print(f"{'*' if move['current'] else ' '} {move['move']}  {_day(move['at'])}  {move['who']}  {line}")


@route_app.command("shadows", epilog="Example: veneer tenant route shadows support")
def route_shadows(
    route: Annotated[str, typer.Argument(help="The route; by default all.", show_default=False)] = "",
    limit: Annotated[int, typer.Option("--limit", min=0, help="Show at most so many one by one.")] = 20,
    as_json: AsJson = False,
) -> None:
    """How the answers of shadows differed: in sum, then the newest one by one."""
    from veneer.library.database import reading
    from veneer.serve.tenancy import routes

    with _opened() as store, reading(store.engine) as c:
        summary = routes.shadow_summary(c, route=route)
        found = routes.shadow_log(c, route=route, limit=limit)
    if as_json:
        print_json({"summary": summary, "comparisons": found})
        return
    for r in summary:
        print(_summary_line(r))
    if summary and found:
        print()
    rows = [
        (
            _day(r["at"]),
            r["route"],
            r["target"],
            r["shadow"],
            _difference(r),
            f"{r['target_tokens']}/{r['shadow_tokens']}",
            f"{r['target_seconds']:.2f}/{r['shadow_seconds']:.2f}",
        )
        for r in found
    ]
    empty = "" if summary else "no comparisons"
    _table(("when", "route", "target", "shadow", "answers", "tokens", "seconds"), rows, empty)


def _summary_line(r: dict[str, Any]) -> str:
    answered = r["compared"] - r["failed"]
    parts = [f"{r['same']:,} of {answered:,} answers the same"] if answered else []
    if r["distance"] is not None:
        parts.append(f"pixels {r['distance']:.1%} apart")
    if answered:
        parts.append(f"tokens {r['target_tokens']:.3g} and {r['shadow_tokens']:.3g}")
        parts.append(f"seconds {r['target_seconds']:.2f} and {r['shadow_seconds']:.2f}")
    parts += [f"{r['failed']:,} failed"] if r["failed"] else []
    return f"{r['route']}: {r['target']} and its shadow {r['shadow']}: {', '.join(parts)}"


def _difference(r: dict[str, Any]) -> str:
    if r["failed"]:
        return "failed"
    if r["same"]:
        return "same"
    return f"from character {r['first_difference']}" if r["distance"] is None else f"pixels {r['distance']:.1%} apart"


# -- feedback ----------------------------------------------------------------------------------------------------------


@feedback_app.command("keep", epilog="Example: veneer tenant feedback keep acme --days 30 --name 'acme/*'")
def feedback_keep(
    tenant: _Kept = "",
    days: Annotated[float, typer.Option("--days", help="How long each answer is kept.")] = 30.0,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Of these routes or adapters alone; repeatable.")
    ] = None,
    off: Annotated[
        bool, typer.Option("--off", help="Keep none from now on; what is there stays until its time.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Keep a tenant's chats for feedback: messages, answers, a hash of `user`. Nothing is kept unless this says so."""
    from veneer.serve.tenancy import manage
    from veneer.serve.tenancy.store import FeedbackTerms

    with _opened() as store:
        made = None if off else FeedbackTerms(days, tuple(name or ()))
        manage.set_feedback(store, tenant, made, who=_who())
    if as_json:
        print_json({"tenant": tenant, "feedback": None if made is None else asdict(made)})
    else:
        print(f"{tenant or _WHOEVER}: {_kept(made)}")


def _kept(terms: Any) -> str:
    if terms is None:
        return "no answers are kept"
    return f"answers are kept for {terms.days:g} days: {' '.join(terms.names) or 'all'}"


@feedback_app.command("show", epilog="Example: veneer tenant feedback show")
def feedback_show(as_json: AsJson = False) -> None:
    """Whose answers are kept, and what was said of them."""
    from veneer.library.database import reading
    from veneer.serve.tenancy.feedback import feedback_counts

    with _opened() as store, reading(store.engine) as c:
        terms = store.settings.feedback
        names = [*([""] if "" in terms else []), *store.settings.tenants]
        found = {name: feedback_counts(c, name, time.time()) for name in names}
    if as_json:
        listed = [{"tenant": t, "feedback": asdict(terms[t]) if t in terms else None, **n} for t, n in found.items()]
        print_json({"tenants": listed})
        return
    rows = [(t or _WHOEVER, *n.values(), _kept(terms.get(t))) for t, n in found.items() if t in terms or n["answers"]]
    _table(("tenant", "answers", "up", "down", "corrected", "chosen", ""), rows, "no answers are kept")


@feedback_app.command(
    "export",
    epilog="Example: veneer tenant feedback export acme --kind preference --adapter acme/support -o rows.jsonl",
)
def feedback_export(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of JSON lines.", show_default=False)],
    tenant: _Kept = "",
    kind: Annotated[str, typer.Option("--kind", help="supervised, preference or unpaired.")] = "supervised",
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="Of this adapter or route alone, all versions.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what users said as rows for `veneer train`: thumbs up and corrections, pairs, or thumbs one by one."""
    from veneer.files.atomic import atomic_write
    from veneer.serve.tenancy import manage
    from veneer.serve.tenancy.feedback import feedback_rows

    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for row in found:
            count += 1
            yield json.dumps(row).encode() + b"\n"

    with _opened() as store:
        if tenant:
            manage.get_tenant(store, tenant)
        found = feedback_rows(store.engine, tenant, kind, adapter=adapter)
        atomic_write(output, lines())
    print_json({"rows": count, "output": str(output)}) if as_json else print(f"{count:,} rows in {output}")


@feedback_app.command("forget", epilog="Example: veneer tenant feedback forget acme --user u-17")
def feedback_forget(
    tenant: _Kept = "",
    user: Annotated[str | None, typer.Option("--user", help="All answers to requests of this `user`.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="All of the tenant's.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove answers that were kept, with what was said of them, and those that are still on their way."""
    from veneer.serve.tenancy import manage

    if (user is not None) == everything:
        raise typer.BadParameter("give --user or --everything")
    with _opened() as store:
        gone = manage.remove_answers(store, tenant, user=user, who=_who())
    print_json({"removed": gone}) if as_json else print(f"{gone:,} answers removed")
