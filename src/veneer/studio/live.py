"""Live: which versions answer under which names, for how many users; shadows beside what was sent; what tenants use,
and what is in memory. What a move does is said before it is made, and the way back is one click."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from veneer.errors import ConfigError
from veneer.jobs.store import money
from veneer.library.database import reading
from veneer.serve.access import shadow_id
from veneer.serve.tenancy import routes
from veneer.serve.tenancy.feedback import AnswerFeedback, kept_answers
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.manage import set_feedback
from veneer.serve.tenancy.store import ALL, EACH, FeedbackTerms, Limit, Route, TenantSettings
from veneer.serve.tenancy.tenants import Tenants
from veneer.studio.commands import command
from veneer.studio.frame import ViewPage
from veneer.studio.moving import WeightBar
from veneer.studio.parts import Command, Fragment, box, button, confirm, form_field, heading, line, put, show
from veneer.studio.watch import on_change

_WHO = "studio"
_PAIRS = 6
"""Comparisons with shadows that are shown."""


async def live_view(page: ViewPage) -> None:
    page.title("Live", "Which versions answer, for how many users, and what that costs.")
    tenancy = page.studio.service.tenancy
    if not isinstance(tenancy, Tenants):
        with box("div", "empty"):
            line("This server keeps no routes: it was started with keys of its own, or without a tenants' database.")
            Command(command("serve", studio=True, open=True, tenants="tenants.sqlite", base=page.studio.base))
        return
    view = _Live(page, tenancy)
    view.draw()
    await view.refill()
    on_change(view.seen, 1.0, view.refill)


class _Live:
    def __init__(self, page: ViewPage, tenancy: Tenants) -> None:
        self.page, self.tenancy, self.store = page, tenancy, tenancy.store
        self.revision = -1

    def draw(self) -> None:
        self.place = box("div", "stack")
        self._begin()
        heading("Shadows", 2)
        self.shadows = Fragment(
            "shadows.html.j2", acts={"better": self.better}, pairs=[], summary=[], kept=False, compare=""
        )
        self.keep = button("Keep answers for 7 days, to see both", self._keep_answers, kind="quiet")
        heading("Use and cost", 2)
        self.used = Fragment("used.html.j2", rows=[], limits=[], quiet=[])
        Command(command("tenant", "usage", by="tenant,adapter"))
        heading("In memory", 2)
        self.resident = Fragment("residents.html.j2", rows=[], bytes=0, limit=0)

    def _begin(self) -> None:
        """A route that there is not yet."""
        with box("details", "how"):
            line("A new route", tag="summary")
            line("A route is a name that clients ask for. Where it leads can move without them.", "soft small")
            with box("div", "row foot"):
                self.name = form_field("Name", "", self._asked_for, hint="support", most=120)
                self.first = form_field("Leads to", "", self._asked_for, kind="choice", options=self._names())
                button("Begin it", self._set_first, kind="quiet")
            self.begins = Command("")

    def _names(self) -> list[str]:
        """What a route can lead to: the base, what is loaded, and the library's versions of this base."""
        catalog = self.page.studio.service.catalog
        cards = [card for card in catalog.models(self.page.caller) if card.parent is None or card.digest]
        return list(dict.fromkeys(card.root if card.digest else card.id for card in cards))[:300]

    def _asked_for(self, _: Any) -> None:
        name, first = str(self.name.value or ""), str(self.first.value or self._names()[0])
        self.begins.show(command("tenant", "route", "set", name or "NAME", first))

    async def _set_first(self) -> None:
        name, first = str(self.name.value or "").strip(), str(self.first.value or self._names()[0])
        if (ALL, name) in self.store.settings.routes:
            raise ConfigError(f"there is a route {name} already", fix="move its shares below")
        await self._move(routes.planned_route(None, name, [(first, 1)]), 0)
        self.name.put("")

    # -- what is looked at again and again

    def seen(self) -> object:
        """Another one where something that is shown may have changed. In a thread."""
        with reading(self.store.engine) as c:
            log = routes.shadow_log(c, limit=1)
        stats = self.page.studio.service.engine.stats()
        return self.store.look().revision, log[0]["id"] if log else 0, stats.adapters, int(time.time() / 5)

    async def refill(self) -> None:
        settings = self.store.look() if self.revision < 0 else self.store.settings
        if settings.revision != self.revision:
            self.revision = settings.revision
            self.first.offer(self._names())
            self._draw_routes(settings)
        await self._fill_shadows(settings)
        await self._fill_used(settings)
        catalog = self.page.studio.service.catalog
        found = await asyncio.to_thread(catalog.in_memory)
        limit = getattr(catalog.residents, "limit", 0)
        self.resident.show(rows=found, bytes=sum(each.bytes for _, each in found), limit=limit)

    def _draw_routes(self, settings: TenantSettings) -> None:
        self.place.clear()
        with self.place:
            if not settings.routes:
                with box("div", "empty"):
                    line("No route yet. A route is a name that clients ask for; it leads to versions by weight.")
            for route in sorted(settings.routes.values(), key=lambda each: (each.tenant, each.name)):
                _RoutePanel(self, route)

    async def _fill_shadows(self, settings: TenantSettings) -> None:
        def read() -> tuple[list[Any], list[Any]]:
            with reading(self.store.engine) as c:
                log, summary = routes.shadow_log(c, limit=_PAIRS), routes.shadow_summary(c)
                texts: dict[str, Any] = {}
                for tenant in {row["tenant"] for row in log}:
                    ids = [each for row in log for each in (row["request"], shadow_id(row["request"]))]
                    texts |= kept_answers(c, tenant, ids, self.tenancy.answers.wall())
            return [_pair(row, texts) for row in log], summary

        pairs, summary = await asyncio.to_thread(read)
        kept = bool(settings.feedback)
        compare = [self.page.link("compare", c=[s["target"], s["shadow"]]) for s in summary]
        self.shadows.show(pairs=pairs, summary=list(zip(summary, compare, strict=True)), kept=kept, compare="")
        show(self.keep, bool(summary) and ALL not in settings.feedback)

    async def _fill_used(self, settings: TenantSettings) -> None:
        def read() -> list[dict[str, Any]]:
            with reading(self.store.engine) as c:
                return usage(c, by=("tenant", "adapter"))

        rows = await asyncio.to_thread(read)
        names = {(row["tenant"], row["adapter"]) for row in rows}
        limits = [
            (_whose(tenant), adapter or "all adapters", _limits(limit))
            for (tenant, adapter), limit in sorted(settings.limits.items())
        ]
        shown = [row | {"tenant": _whose(row["tenant"]), "cost": money(row["cost"])} for row in rows]
        quiet = [name for name in settings.tenants if name not in {tenant for tenant, _ in names}]
        self.used.show(rows=shown, limits=limits, quiet=quiet)

    def _keep_answers(self) -> None:
        async def do() -> None:
            await asyncio.to_thread(set_feedback, self.store, ALL, FeedbackTerms(7.0), who=_WHO)
            await self._again()

        what = "From now on, what is asked without a tenant's key and what is answered is kept for 7 days."
        why = "Then a shadow's answer can be read beside the one that was sent, and one be chosen over the other."
        same = command("tenant", "feedback", "keep", days=7)
        confirm("Keep answers", f"{what} {why}", do, button_text="Keep them", command=same)

    async def better(self, data: dict[str, str]) -> None:
        """Of a pair, this one is better: a row of preferences."""
        given = AnswerFeedback(data["id"], 0, rejected=((data["other"], 0),), said=frozenset({"rejected"}))
        await asyncio.to_thread(self.tenancy.answers.give, data["tenant"], given)
        self.page.say("Kept as a row of preferences")

    # -- moves

    async def _move(self, wanted: Route, from_move: int) -> None:
        await asyncio.to_thread(
            routes.set_route, self.store, wanted.name, wanted.targets, tenant=wanted.tenant, shadow=wanted.shadow,
            fraction=wanted.fraction, who=_WHO, check=self.page.studio.service.catalog.check, from_move=from_move,
        )  # fmt: skip
        await self._again()

    async def moved(self, now: Route, wanted: Route) -> None:
        """Make a move that was said, unless somebody else made one meanwhile."""
        await self._move(wanted, now.move)
        self.page.say(f"{wanted.name} moved")

    async def _again(self) -> None:
        await asyncio.to_thread(self.store.look)
        await self.refill()

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
                who=_WHO,
                check=check,
                moves=[now.move],
            )
            await self._again()
            self.page.say(f"{route.name} is as it was before")

        same = command("tenant", "route", "rollback", route.name, tenant=route.tenant)
        confirm(f"Roll {route.name} back", routes.route_change(now, before), do, button_text="Roll back", command=same)

    def ended(self, route: Route) -> None:
        gone = replace(route, targets=(), runs=(), shadow=None)

        async def do() -> None:
            await asyncio.to_thread(routes.remove_route, self.store, route.name, tenant=route.tenant, who=_WHO)
            await self._again()

        sentence = f"{routes.route_change(route, gone)} A rollback brings it back."
        same = command("tenant", "route", "remove", route.name, tenant=route.tenant)
        confirm(f"Remove {route.name}", sentence, do, button_text="Remove it", command=same, danger=True)


class _RoutePanel:
    """One route: its shares as a bar, what a move would do, and the way back."""

    def __init__(self, live: _Live, route: Route) -> None:
        self.live, self.route, self.wanted = live, route, route
        total = sum(weight for _, weight in route.targets)
        self.shares = [(name, weight * 100 / total) for name, weight in route.targets]
        with box("section", "panel route", aria_label=f"The route {route.name}"):
            with box("div", "row"):
                heading(route.name, 2)
                if route.tenant:
                    line(f"of {route.tenant}", "chip", "span")
                with box("div", "row far"):
                    button("Roll back", lambda: live.back(route), kind="word", key="r")
                    button("Remove", lambda: live.ended(route), kind="word", aria_label=f"Remove {route.name}")
            self.bar = WeightBar(self.shares, self._dragged)
            with box("div", "row"):
                for name, share in self.shares if len(self.shares) > 1 else ():
                    if share < 100:
                        button(f"Promote {name}", self._promote(name), kind="quiet")
            self._more()
            self.sentence = line("", "sentence", role="status")
            self.same = Command("")
            self.does = box("div", "row")
            with self.does:
                button("Move", lambda: live.moved(self.route, self.wanted), kind="filled")
                button("Leave it", self._left, kind="word")
            self._say()

    def _more(self) -> None:
        """Another version, and who answers unseen."""
        route, names = self.route, self.live._names()
        others = [name for name in names if name not in dict(self.route.targets)]
        with box("details", "how"):
            line("Another version, or a shadow", tag="summary")
            with box("div", "row foot"):
                self.other = form_field(
                    "Another version", "", self._added, kind="choice", options={"": "none", **_same(others)}
                )
                unseen = {"": "nobody", **_same([name for name in names if name != self.live.page.studio.base])}
                self.shadow = form_field(
                    "Answers too, unseen", route.shadow or "", self._unseen, kind="choice", options=unseen,
                )  # fmt: skip
                self.fraction = form_field(
                    "Of the requests, in %", route.fraction * 100, self._unseen, kind="number", low=0, high=100, step=1
                )

    def _dragged(self, shares: Sequence[float]) -> None:
        self.shares = [(name, float(share)) for (name, _), share in zip(self.shares, shares, strict=True)]
        self._say()

    def _added(self, name: str) -> None:
        """A further version begins with a tenth of the users."""
        if not name or name in dict(self.shares):
            return
        self.shares = [*((each, share * 0.9) for each, share in self.shares), (name, 10.0)]
        self.bar.put(self.shares)
        self._say()

    def _unseen(self, _: Any) -> None:
        self._say()

    def _promote(self, name: str) -> Callable[[], None]:
        def ask() -> None:
            wanted = routes.planned_route(self.route, self.route.name, [(name, 100)], tenant=self.route.tenant)
            confirm(
                f"Promote {name}", routes.route_change(self.route, wanted), lambda: self.live.moved(self.route, wanted),
                button_text="Promote it", command=_set_command(wanted),
            )  # fmt: skip

        return ask

    def _left(self) -> None:
        self.live.revision = -1
        self.live.page.task(self.live.refill())

    def _say(self) -> None:
        """What the shares as they stand now would do."""
        route = self.route
        weights = [(name, round(share * 100)) for name, share in self.shares]
        if all(weight % 100 == 0 for _, weight in weights):
            weights = [(name, weight // 100) for name, weight in weights]
        fraction = min(100.0, max(0.0, float(self.fraction.value or 0))) / 100
        shadow = str(self.shadow.value or "") or None
        self.wanted = routes.planned_route(
            route, route.name, weights, tenant=route.tenant, shadow=shadow,
            fraction=fraction if shadow else 1.0,
        )  # fmt: skip
        same = (self.wanted.runs, self.wanted.shadow, self.wanted.fraction) == (
            route.runs,
            route.shadow,
            route.fraction,
        )
        unseen = f"{route.shadow} answers {route.fraction * 100:.4g} % of requests too, unseen." if route.shadow else ""
        put(self.sentence, unseen if same else routes.route_change(route, self.wanted))
        self.same.show("" if same else _set_command(self.wanted))
        show(self.does, not same)


def _set_command(route: Route) -> str:
    targets = [f"{name}={weight}" if len(route.targets) > 1 else name for name, weight in route.targets]
    fraction = f"{route.fraction:g}" if route.shadow and route.fraction != 1 else None
    return command(
        "tenant", "route", "set", route.name, *targets, tenant=route.tenant, shadow=route.shadow, fraction=fraction
    )


def _same(names: Sequence[str]) -> dict[str, str]:
    return {name: name for name in names}


def _whose(tenant: str) -> str:
    return {ALL: "whoever asks", EACH: "each tenant"}.get(tenant, tenant)


def _limits(limit: Limit) -> str:
    """As people say them."""
    given = [(name, value) for name, value in asdict(limit).items() if value is not None]
    return ", ".join(f"{v:,} {'at once' if n == 'concurrency' else n.replace('_per_', ' a ')}" for n, v in given)


def _pair(row: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
    """A comparison, with both answers where they are kept."""
    sent, unseen = texts.get(row["request"]), texts.get(shadow_id(row["request"]))
    said = [each.choices[0].get("content", "") if each else "" for each in (sent, unseen)]
    asked = (
        next((str(m.get("content", "")) for m in reversed(sent.messages) if m.get("role") == "user"), "")
        if sent
        else ""
    )
    first = row["first_difference"] or 0
    both = sent is not None and unseen is not None
    return row | {
        "asked": asked,
        "sent": said[0],
        "unseen": said[1],
        "both": both,
        "first": first,
        "other": shadow_id(row["request"]),
    }
