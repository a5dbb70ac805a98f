"""`veneer tenant alias …`: which adapters a name leads to, for whom, and the way back."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from veneer.cli.tenant_common import AsJson, day, opened, print_json, table, who

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Aliases: weighted versions, shadows, rollback.")

_Of = Annotated[str, typer.Option("--tenant", help="Of this tenant alone; by default everybody's.")]
_Alias = Annotated[str, typer.Argument(help="The alias.", show_default=False)]


@app.command("set", epilog="Example: veneer tenant alias set support support@1=90 support@2=10")
def alias_set(
    alias: _Alias,
    targets: Annotated[list[str], typer.Argument(help="adapter=weight, or one adapter.", show_default=False)],
    tenant: _Of = "",
    shadow: Annotated[str | None, typer.Option("--shadow", help="Answers too, unseen; the log compares.")] = None,
    fraction: Annotated[float, typer.Option("--fraction", help="Of the requests that the shadow gets.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Point an alias to adapters by weight. A user stays with one; moving weights moves as few as can be."""
    from veneer.serve.tenancy import rollouts

    pairs = [
        (name, int(weight) if weight.isdigit() else 0 if weight else 1) for name, _, weight in map(_split, targets)
    ]
    if any(not weight for _, weight in pairs):
        raise typer.BadParameter("weights are whole numbers, 1 or more: support@1=90")
    with opened() as store:
        more = {"tenant": tenant, "fraction": fraction}
        made = rollouts.set_alias(store, alias, pairs, shadow=shadow, who=who(), **more)  # type: ignore[arg-type]
    print_json(rollouts.shown(made)) if as_json else print(_alias_line(rollouts.shown(made)))


def _split(text: str) -> tuple[str, str, str]:
    return text.partition("=")


def _alias_line(shown: dict[str, Any]) -> str:
    total = sum(shown["targets"].values())
    parts = ", ".join(f"{name} {100 * weight / total:.3g} %" for name, weight in shown["targets"].items())
    shadow = f"; shadow {shown['shadow']} for {100 * shown['fraction']:.3g} %" if shown["shadow"] else ""
    whose = f" of {shown['tenant']}" if shown.get("tenant") else ""
    return f"{shown['alias']}{whose} -> {parts or 'nothing'}{shadow}"


@app.command("list", epilog="Example: veneer tenant alias list")
def alias_list(as_json: AsJson = False) -> None:
    """Every alias and where it leads."""
    from veneer.serve.tenancy import rollouts

    with opened() as store:
        found = [rollouts.shown(a) for a in store.settings.aliases.values()]
    print_json({"aliases": found}) if as_json else print("\n".join(map(_alias_line, found)) or "no aliases")


@app.command("rollback", epilog="Example: veneer tenant alias rollback support")
def alias_rollback(alias: _Alias, tenant: _Of = "", as_json: AsJson = False) -> None:
    """Put back what the alias led to before its last move, for the same users, from the next request on."""
    from veneer.serve.tenancy import rollouts

    with opened() as store:
        after = rollouts.shown(rollouts.rollback(store, alias, tenant=tenant, who=who()))
    print_json(after) if as_json else print(_alias_line(after))


@app.command("remove", epilog="Example: veneer tenant alias remove support")
def alias_remove(alias: _Alias, tenant: _Of = "", as_json: AsJson = False) -> None:
    """Take an alias away; `rollback` brings it back."""
    from veneer.serve.tenancy import rollouts

    with opened() as store:
        rollouts.remove(store, alias, tenant=tenant, who=who())
    print_json({"removed": alias}) if as_json else print(f"removed {alias}")


@app.command("history", epilog="Example: veneer tenant alias history support")
def alias_history(alias: _Alias, tenant: _Of = "", as_json: AsJson = False) -> None:
    """Every move of an alias, the newest first; * is the one that holds."""
    from veneer.library.database import reading
    from veneer.serve.tenancy import rollouts

    with opened() as store, reading(store.engine) as c:
        found = rollouts.history(c, alias, tenant=tenant)
    if as_json:
        print_json({"moves": found})
        return
    for move in found:
        line = _alias_line({"alias": alias, **move})
        print(f"{'*' if move['current'] else ' '} {move['move']}  {day(move['at'])}  {move['who']}  {line}")


@app.command("shadows", epilog="Example: veneer tenant alias shadows support")
def alias_shadows(
    alias: Annotated[str, typer.Argument(help="The alias; by default all.", show_default=False)] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """How the answers of shadows differed, the newest first."""
    from veneer.library.database import reading
    from veneer.serve.tenancy import rollouts

    with opened() as store, reading(store.engine) as c:
        found = rollouts.shadow_log(c, alias=alias, limit=limit)
    if as_json:
        print_json({"comparisons": found})
        return
    rows = [
        (
            day(r["at"]), r["alias"], r["target"], r["shadow"],
            _difference(r),
            f"{r['target_tokens']}/{r['shadow_tokens']}", f"{r['target_seconds']:.2f}/{r['shadow_seconds']:.2f}",
        )
        for r in found
    ]  # fmt: skip
    table(("when", "alias", "target", "shadow", "answers", "tokens", "seconds"), rows, "no comparisons")


def _difference(r: dict[str, Any]) -> str:
    if r["same"]:
        return "same"
    return f"from character {r['first_difference']}" if r["distance"] is None else f"pixels {r['distance']:.1%} apart"
