"""Panels of the Live view: one per route, and a form for a new route.

A panel has the shares as a draggable bar, a description of the planned change, the revisions and a rollback.
A new route can start with a canary."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from veneer.errors import ConfigError
from veneer.library.database import reading
from veneer.library.names import parse_reference
from veneer.models.builtin import BUILTIN
from veneer.serve.request import Refused
from veneer.serve.tenancy import routes
from veneer.serve.tenancy.store import ALL, Route, Store
from veneer.studio.commands import command
from veneer.studio.frame import ViewPage
from veneer.studio.moving import WeightBar
from veneer.studio.parts import (
    Command,
    Fragment,
    box,
    button,
    confirm,
    enable,
    form_field,
    heading,
    line,
    link,
    mark,
    permit,
    place_at,
    put,
    show,
)

WHO = "studio"
_CANARY = 10.0
"""Initial share of a further version, in percent of users."""


class RouteMoves:
    """Changes a server's routes, for a permitted page. `again`: redraws the page."""

    def __init__(self, page: ViewPage, store: Store, again: Callable[[], Awaitable[None]]) -> None:
        self.page, self.store, self.again = page, store, again
        self.force = not (self.base in BUILTIN or page.studio.library.knows_base(self.base))
        """Whether commands need --force: no adapter in the library names the base."""

    @property
    def base(self) -> str:
        return self.page.studio.base

    def names(self) -> list[str]:
        """Return possible targets of a route.

        The base, loaded adapters, newest versions of this base in the library, and the link's version, which
        can be an older one."""
        catalog, wanted = self.page.studio.service.catalog, self.page.query.get("ref")
        cards = [card for card in catalog.models(self.page.caller) if card.parent is None or card.digest]
        found = list(dict.fromkeys(card.root if card.digest else card.id for card in cards))[:300]
        return found if wanted in found or not self._is_version(wanted) else [*found, wanted]

    def _is_version(self, name: str) -> bool:
        """Return whether a name is a version of this base."""
        try:
            return self.page.studio.service.catalog.resolve(name, self.page.caller).adapters == (name,)
        except Refused:
            return False

    def offered(self) -> str:
        """Return the link's adapter if no route targets it yet, else ""."""
        wanted = self.page.query.get("ref")
        leads = {name for route in self.store.settings.routes.values() for name, _ in route.targets}
        return "" if wanted in leads or wanted not in self.names() else wanted

    async def set(self, wanted: Route, from_move: int) -> None:
        """Set a route. Raises RouteMoved if the route changed meanwhile, ConfigError."""
        await asyncio.to_thread(
            routes.set_route,
            self.store,
            wanted.name,
            wanted.targets,
            tenant=wanted.tenant,
            shadow=wanted.shadow,
            fraction=wanted.fraction,
            who=WHO,
            check=self.page.studio.service.catalog.check,
            from_move=from_move,
        )
        self.page.keep(ref=None)
        await self.again()

    async def moved(self, now: Route, wanted: Route) -> None:
        """Apply a described change."""
        await self.set(wanted, now.move)
        self.page.say(f"{wanted.name} moved")

    async def back(self, route: Route) -> None:
        def read() -> tuple[Route, Route]:
            with reading(self.store.engine) as c:
                return routes.earlier_route(c, route.name, tenant=route.tenant)

        now, before = await asyncio.to_thread(read)
        check = self.page.studio.service.catalog.check

        async def do() -> None:
            await asyncio.to_thread(
                routes.rollback_route,
                self.store,
                route.name,
                tenant=route.tenant,
                who=WHO,
                check=check,
                moves=[now.move],
            )
            await self.again()
            self.page.say(f"{route.name} is as it was before")

        same = command("tenant", "route", "rollback", route.name, tenant=route.tenant)
        confirm(
            f"Roll {route.name} back",
            routes.route_change(now, before),
            permit("operate", do),
            button_text="Roll back",
            command=same,
        )

    def ended(self, route: Route) -> None:
        gone = replace(route, targets=(), runs=(), shadow=None)

        async def do() -> None:
            await asyncio.to_thread(routes.remove_route, self.store, route.name, tenant=route.tenant, who=WHO)
            await self.again()

        sentence = f"{routes.route_change(route, gone)} A rollback brings it back."
        same = command("tenant", "route", "remove", route.name, tenant=route.tenant)
        confirm(
            f"Remove {route.name}", sentence, permit("operate", do), button_text="Remove", command=same, danger=True
        )


class _Shares:
    """A route's bar of shares. Subclasses define `say`, which describes the change."""

    shares: list[tuple[str, float]]
    bar: WeightBar

    def dragged(self, shares: Sequence[float]) -> None:
        if len(shares) != len(self.shares):
            return  # another user changed the route meanwhile
        self.shares = [(name, float(share)) for (name, _), share in zip(self.shares, shares, strict=True)]
        self.say()

    def added(self, name: str) -> None:
        """Add a version with the canary's share."""
        if not name or name in dict(self.shares):
            return
        rest = 1 - _CANARY / 100
        self.shares = [*((each, share * rest) for each, share in self.shares), (name, _CANARY)]
        self.bar.put(self.shares)
        self.say()

    def weights(self) -> list[tuple[str, int]]:
        """Return integer weights: percent, or hundredths of a percent if necessary."""
        exact = [(name, round(share * 100)) for name, share in self.shares]
        whole = all(weight % 100 == 0 for _, weight in exact)
        return [(name, weight // 100) for name, weight in exact] if whole else exact

    def say(self) -> None:
        raise NotImplementedError


class NewRoute(_Shares):
    """The form of a new route. `offered`: adapter to propose as the canary."""

    def __init__(self, moves: RouteMoves, offered: str, *, opened: bool) -> None:
        self.moves = moves
        names = moves.names()
        name = parse_reference(offered, cased=True).name if offered else ""
        if (ALL, name) in moves.store.settings.routes:
            name = ""
        self.shares = [(moves.base, 100.0)]
        with box("details", "how", open=opened) as self.place:
            line("A new route", tag="summary")
            line(
                "A route is a name that clients ask for. What answers under it can change without them knowing: begin "
                "with a few of the users, and give it more, or take it back, with one click.",
                "soft small",
            )
            with box("section", "panel route", aria_label="A new route"):
                with box("div", "row foot"):
                    self.name = form_field(
                        "Name", name, permit("operate", lambda _: self.say()), hint="support", most=120
                    )
                    self.first = form_field(
                        "First target", moves.base, permit("operate", self._led), kind="choice", options=names
                    )
                    others = _or_none("nothing else", names)
                    self.other = form_field(
                        "Second target", offered, permit("operate", self._led), kind="choice", options=others
                    )
                self.bar = WeightBar(self.shares, permit("operate", self.dragged))
                self.sentence = line("", "sentence", role="status")
                self.same = Command("")
                with box("div", "row"):
                    self.does = button("Create route", permit("operate", self._begin), kind="filled")
        self._led(None)

    def offer(self, names: Sequence[str]) -> None:
        """Update the possible targets."""
        self.first.offer(names)
        self.other.offer(_or_none("nothing else", names))

    def _led(self, _: Any) -> None:
        self.shares = [(str(self.first.value), 100.0)]
        self.bar.put(self.shares)
        self.added(str(self.other.value or ""))
        self.say()

    def _wanted(self) -> Route:
        return routes.planned_route(None, str(self.name.value or "").strip(), self.weights())

    def say(self) -> None:
        wanted: Route | None = None
        words = "The route needs a name."
        if str(self.name.value or "").strip():
            try:
                wanted = self._wanted()
                words = routes.route_change(None, wanted)
            except ConfigError as error:
                words = error.what
        put(self.sentence, words)
        self.same.show(_set_command(wanted, self.moves) if wanted else "")
        enable(self.does, wanted is not None, "it has no name that can be one yet")

    async def _begin(self) -> None:
        wanted = self._wanted()
        if (ALL, wanted.name) in self.moves.store.settings.routes:
            raise ConfigError(f"there is a route {wanted.name} already", fix="move its shares above")
        await self.moves.set(wanted, 0)
        for each in (self.name, self.other):
            each.put("")
        self._led(None)
        mark(self.place, open=False)
        self.moves.page.say(f"{wanted.name} is live")


class RoutePanel(_Shares):
    """The panel of one route, at position `place`. `fill` updates the panel."""

    def __init__(self, moves: RouteMoves, route: Route, place: int) -> None:
        self.moves, self.route, self.wanted, self.offered = moves, route, route, ""
        with box("section", "panel route", aria_label=f"The route {route.name}") as self.panel:
            with box("div", "row"):
                heading(route.name, 2)
                if route.tenant:
                    line(f"of {route.tenant}", "chip", "span")
                with box("div", "row far"):
                    link("Try it", moves.page.link("compare", c=route.name), "button word")
                    self.back = button(
                        "Roll back", permit("operate", lambda: moves.back(self.route)), kind="word", key="r"
                    )
                    button(
                        "Remove",
                        permit("operate", lambda: moves.ended(self.route)),
                        kind="word",
                        aria_label=f"Remove {route.name}",
                    )
            self.bar = WeightBar([], permit("operate", self.dragged))
            acts = {
                "promote": permit("operate", lambda data: self._promote(data["name"])),
                "give": permit("operate", lambda data: self.added(data["name"])),
            }
            self.ways = Fragment("route_ways.html.j2", acts=acts, shares=[], offered="", canary=_CANARY)
            with box("details", "how"):
                line("Add a version or a shadow", tag="summary")
                with box("div", "row foot"):
                    self.other = form_field("Another version", "", permit("operate", self.added), kind="choice")
                    self.shadow = form_field(
                        "Shadow version", "", permit("operate", lambda _: self.say()), kind="choice"
                    )
                    self.fraction = form_field(
                        "Share of requests, in %",
                        100,
                        permit("operate", lambda _: self.say()),
                        kind="number",
                        low=0,
                        high=100,
                        step=1,
                    )
            with box("details", "how"):
                line("A request to copy", tag="summary")
                curl, client = request_texts(moves.page, route.name)
                Fragment("request.html.j2", requests=[("curl", curl), ("OpenAI's Python client", client)])
            with box("details", "how") as self.before:
                line("History", tag="summary")
                self.history = Fragment("route_moves.html.j2", moves=[])
                Command(command("tenant", "route", "history", route.name, tenant=route.tenant))
            self.sentence = line("", "sentence", role="status")
            self.same = Command("")
            self.does = box("div", "row")
            with self.does:
                button("Apply", permit("operate", lambda: moves.moved(self.route, self.wanted)), kind="filled")
                button("Cancel", permit("operate", self._left), kind="word")
        place_at(self.panel, place)

    def fill(self, route: Route, before: Sequence[dict[str, Any]]) -> None:
        """Show the current route. `before`: its revisions, newest first."""
        self.route = route
        for each in (self.back, self.before):
            show(each, len(before) > 1)
        self.history.show(moves=before)
        self._left()

    def offer(self, names: Sequence[str], wanted: str) -> None:
        """Update the possible targets. `wanted`: the adapter that the link proposes."""
        self.offered = wanted
        led = dict(self.route.targets)
        self.other.offer(_or_none("none", [name for name in names if name not in led]))
        unseen = [name for name in names if name != self.moves.base]
        if self.route.shadow and self.route.shadow not in unseen:
            unseen.append(self.route.shadow)
        self.shadow.offer(_or_none("nobody", unseen))
        self._show_ways()

    def end(self) -> None:
        """Remove the panel of a removed route."""
        self.panel.delete()

    def _left(self) -> None:
        """Reset the bar to the current route."""
        route = self.route
        total = sum(weight for _, weight in route.targets)
        self.shares = [(name, weight * 100 / total) for name, weight in route.targets]
        self.bar.put(self.shares)
        self.other.put("")
        self.shadow.put(route.shadow or "")
        self.fraction.put(route.fraction * 100)
        self._show_ways()
        self.say()

    def _show_ways(self) -> None:
        shares = [name for name, share in self.shares if share < 100] if len(self.shares) > 1 else []
        self.ways.show(shares=shares, offered=self.offered, canary=_CANARY)

    def _promote(self, name: str) -> None:
        now = self.route
        wanted = routes.planned_route(now, now.name, [(name, 100)], tenant=now.tenant)
        confirm(
            f"Promote {name}",
            routes.route_change(now, wanted),
            permit("operate", lambda: self.moves.moved(now, wanted)),
            button_text="Promote",
            command=_set_command(wanted, self.moves),
        )

    def say(self) -> None:
        """Describe the effect of the current shares."""
        route = self.route
        fraction = min(100.0, max(0.0, float(self.fraction.value or 0))) / 100
        shadow = str(self.shadow.value or "") or None
        wanted = self.wanted = routes.planned_route(
            route,
            route.name,
            self.weights(),
            tenant=route.tenant,
            shadow=shadow,
            fraction=fraction if shadow else 1.0,
        )
        moved = (wanted.runs, wanted.shadow, wanted.fraction) != (route.runs, route.shadow, route.fraction)
        unseen = f"{route.shadow} answers {route.fraction * 100:.4g} % of requests too, unseen." if route.shadow else ""
        put(self.sentence, routes.route_change(route, wanted) if moved else unseen)
        self.same.show(_set_command(wanted, self.moves) if moved else "")
        show(self.does, moved)


def request_texts(page: ViewPage, model: str) -> tuple[str, str]:
    """Return a sample request for a model: (curl command, OpenAI Python code)."""
    address, key = page.frame.address, page.frame.visitor.key is not None
    body: dict[str, Any] = {"model": model, "prompt": "A red apple"}
    if page.studio.service.engine.makes == "pictures":
        path, method, told = "images/generations", "images.generate", "data[0].b64_json"
    else:
        path, method, told = "chat/completions", "chat.completions.create", "choices[0].message.content"
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    head = ' -H "Authorization: Bearer $VENEER_API_KEY"' if key else ""
    given = shlex.quote(json.dumps(body, ensure_ascii=False))
    curl = f"curl {shlex.quote(f'{address}/v1/{path}')} -H 'Content-Type: application/json'{head} -d {given}"
    given_key = 'os.environ["VENEER_API_KEY"]' if key else '"none"'
    client = "\n".join(
        [
            *(["import os", ""] if key else []),
            "from openai import OpenAI",
            "",
            f"client = OpenAI(base_url={json.dumps(f'{address}/v1')}, api_key={given_key})",
            f"answer = client.{method}({', '.join(f'{name}={value!r}' for name, value in body.items())})",
            f"print(answer.{told})",
        ]
    )
    return curl, client


def _set_command(route: Route, moves: RouteMoves) -> str:
    targets = [f"{name}={weight}" if len(route.targets) > 1 else name for name, weight in route.targets]
    fraction = f"{route.fraction:g}" if route.shadow and route.fraction != 1 else None
    return command(
        "tenant",
        "route",
        "set",
        route.name,
        *targets,
        tenant=route.tenant,
        shadow=route.shadow,
        fraction=fraction,
        force=moves.force and moves.base in dict(route.targets),
    )


def _or_none(none: str, names: Sequence[str]) -> dict[str, str]:
    """Return options of a choice, with `none` as the label of an empty choice."""
    return {"": none} | {name: name for name in names}
