"""`veneer tenant route …`: which adapters a name leads to, for whom, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from veneer.cli.tenant_common import AsJson, day, opened, print_json, table, who

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Routes: weighted versions, shadows, rollback.")

_Of = Annotated[str, typer.Option("--tenant", help="Of this tenant alone; by default everybody's.")]
_Route = Annotated[str, typer.Argument(help="The route.", show_default=False)]
_Library = Annotated[
    str | None,
    typer.Option("--library", envvar="VENEER_LIBRARY", help="Where adapters are kept: it must have what is led to."),
]
_Force = Annotated[bool, typer.Option("--force", help="Move it unchecked: a server loads the adapters by itself.")]


@app.command("set", epilog="Example: veneer tenant route set support support@1=90 support@2=10")
def route_set(
    route: _Route,
    targets: Annotated[list[str], typer.Argument(help="adapter=weight, or one adapter.", show_default=False)],
    tenant: _Of = "",
    shadow: Annotated[str | None, typer.Option("--shadow", help="Answers too, unseen; the log compares.")] = None,
    fraction: Annotated[float, typer.Option("--fraction", help="Of the requests that the shadow gets.")] = 1.0,
    library: _Library = None,
    force: _Force = False,
    as_json: AsJson = False,
) -> None:
    """Point a route to adapters by weight. A user stays with one; moving weights moves as few as can be."""
    from veneer.serve.tenancy import routes

    pairs = [
        (name, int(weight) if weight.isdigit() else 0 if weight else 1) for name, _, weight in map(_split, targets)
    ]
    if any(not weight for _, weight in pairs):
        raise typer.BadParameter("weights are whole numbers, 1 or more: support@1=90")
    with opened() as store:
        more: dict[str, Any] = {"tenant": tenant, "fraction": fraction, "check": _kept_in(library, force)}
        made = routes.set_route(store, route, pairs, shadow=shadow, who=who(), **more)
    print_json(routes.route_shown(made)) if as_json else print(_line(routes.route_shown(made)))


def _split(text: str) -> tuple[str, str, str]:
    return text.partition("=")


def _kept_in(place: str | None, force: bool) -> Callable[[str], None] | None:
    """What a route is checked by before it moves where no server is asked: the library has it, and could read it."""
    from pathlib import Path

    from veneer.errors import AdapterError
    from veneer.library.library import library_place, open_library

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
            except AdapterError as error:
                raise AdapterError(error.what, fix=f"{error.fix}; {fix}") from error
        if not found.digest:
            raise AdapterError(f"nobody could read {found.reference} when it came into the library", fix=fix)

    return check


def _line(shown: dict[str, Any]) -> str:
    total = sum(shown["targets"].values())
    parts = ", ".join(f"{name} {100 * weight / total:.3g} %" for name, weight in shown["targets"].items())
    shadow = f"; shadow {shown['shadow']} for {100 * shown['fraction']:.3g} %" if shown["shadow"] else ""
    whose = f" of {shown['tenant']}" if shown.get("tenant") else ""
    return f"{shown['route']}{whose} -> {parts or 'nothing'}{shadow}"


@app.command("list", epilog="Example: veneer tenant route list")
def route_list(as_json: AsJson = False) -> None:
    """Every route and where it leads."""
    from veneer.serve.tenancy import routes

    with opened() as store:
        found = [routes.route_shown(route) for route in store.settings.routes.values()]
    print_json({"routes": found}) if as_json else print("\n".join(map(_line, found)) or "no routes")


@app.command("rollback", epilog="Example: veneer tenant route rollback support")
def route_rollback(
    route: _Route, tenant: _Of = "", library: _Library = None, force: _Force = False, as_json: AsJson = False
) -> None:
    """Put back what the route led to before its last move, for the same users, from the next request on."""
    from veneer.serve.tenancy import routes

    with opened() as store:
        check = _kept_in(library, force)
        after = routes.route_shown(routes.rollback_route(store, route, tenant=tenant, who=who(), check=check))
    print_json(after) if as_json else print(_line(after))


@app.command("remove", epilog="Example: veneer tenant route remove support")
def route_remove(route: _Route, tenant: _Of = "", as_json: AsJson = False) -> None:
    """Take a route away; `rollback` brings it back."""
    from veneer.serve.tenancy import routes

    with opened() as store:
        routes.remove_route(store, route, tenant=tenant, who=who())
    print_json({"removed": route}) if as_json else print(f"removed {route}")


@app.command("history", epilog="Example: veneer tenant route history support")
def route_history(route: _Route, tenant: _Of = "", as_json: AsJson = False) -> None:
    """Every move of a route, the newest first; * is the one that holds."""
    from veneer.library.database import reading
    from veneer.serve.tenancy import routes

    with opened() as store, reading(store.engine) as c:
        found = routes.route_history(c, route, tenant=tenant)
    if as_json:
        print_json({"moves": found})
        return
    for move in found:
        line = _line({"route": route, **move})
        print(f"{'*' if move['current'] else ' '} {move['move']}  {day(move['at'])}  {move['who']}  {line}")


@app.command("shadows", epilog="Example: veneer tenant route shadows support")
def route_shadows(
    route: Annotated[str, typer.Argument(help="The route; by default all.", show_default=False)] = "",
    limit: Annotated[int, typer.Option("--limit", min=0, help="Show at most so many one by one.")] = 20,
    as_json: AsJson = False,
) -> None:
    """How the answers of shadows differed: in sum, then the newest one by one."""
    from veneer.library.database import reading
    from veneer.serve.tenancy import routes

    with opened() as store, reading(store.engine) as c:
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
            day(r["at"]), r["route"], r["target"], r["shadow"],
            _difference(r),
            f"{r['target_tokens']}/{r['shadow_tokens']}", f"{r['target_seconds']:.2f}/{r['shadow_seconds']:.2f}",
        )
        for r in found
    ]  # fmt: skip
    empty = "" if summary else "no comparisons"
    table(("when", "route", "target", "shadow", "answers", "tokens", "seconds"), rows, empty)


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
