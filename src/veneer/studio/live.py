"""The Live view: routes and versions, shadows, tenants' usage, loaded adapters.

The view describes each change of a route before it is made, and can roll it back with one click."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from veneer.errors import ConfigError
from veneer.jobs.store import money
from veneer.library.database import reading
from veneer.serve.access import TRIALS, shadow_id
from veneer.serve.tenancy import routes
from veneer.serve.tenancy.feedback import AnswerFeedback, kept_answers
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.manage import change_settings
from veneer.serve.tenancy.store import ALL, EACH, Limit, TenantSettings
from veneer.serve.tenancy.tenants import Tenants
from veneer.studio.commands import command, command_base
from veneer.studio.frame import ViewPage
from veneer.studio.parts import Command, Fragment, box, button, confirm, heading, line, permit, show
from veneer.studio.route import WHO, NewRoute, RouteMoves, RoutePanel
from veneer.studio.watch import on_change

_PAIRS = 6
"""Maximum number of shadow comparisons shown."""
_MOVES = 8
"""Maximum number of a route's revisions shown, newest first."""


async def live_view(page: ViewPage) -> None:
    page.title("Live", "Which versions answer, for how many users, and what that costs.")
    tenancy = page.studio.service.tenancy
    if not isinstance(tenancy, Tenants):
        with box("div", "empty"):
            line("This server keeps no routes: it was started with keys of its own, or without a tenants' database.")
            Command(command("serve", studio=True, open=True, tenants="tenants.sqlite", base=command_base(page)))
        return
    await page.studio.service.catalog.fresh()  # the link's adapter can be new in the library
    await asyncio.to_thread(tenancy.store.look)
    view = _Live(page, tenancy)
    view.draw()
    await view.refill()
    on_change(view.seen, 1.0, view.refill)


class _Live:
    def __init__(self, page: ViewPage, tenancy: Tenants) -> None:
        self.page, self.tenancy, self.store = page, tenancy, tenancy.store
        self.moves = RouteMoves(page, tenancy.store, self._again)
        self.panels: dict[tuple[str, str], RoutePanel] = {}
        self.revision = -1

    def draw(self) -> None:
        offered = self.moves.offered()
        self.place = box("div", "stack")
        self.new = NewRoute(self.moves, offered, opened=bool(offered) or not self.store.settings.routes)
        heading("Shadows", 2)
        self.shadows = Fragment(
            "shadows.html.j2", acts={"better": permit("operate", self.better)}, pairs=[], summary=[], kept=False
        )
        self.keep = button("Keep answers for 7 days, to see both", permit("operate", self._keep_answers), kind="quiet")
        heading("Use and cost", 2)
        self.used = Fragment("used.html.j2", rows=[], limits=[], quiet=[])
        Command(command("tenant", "usage", by="tenant,adapter"))
        heading("In memory", 2)
        self.resident = Fragment("residents.html.j2", rows=[], bytes=0, limit=0)

    # -- what is looked at again and again

    def seen(self) -> object:
        """Return a value that differs after a change of the shown data. Runs in a thread."""
        with reading(self.store.engine) as c:
            log = routes.shadow_log(c, limit=1)
        stats = self.page.studio.service.engine.stats()
        return self.store.look().revision, log[0]["id"] if log else 0, stats.adapters, int(time.time() / 5)

    async def refill(self) -> None:
        settings = self.store.settings
        if settings.revision != self.revision:
            self.revision = settings.revision
            await self._fill_routes(settings)
        await self._fill_shadows(settings)
        await self._fill_used(settings)
        catalog = self.page.studio.service.catalog
        found = await asyncio.to_thread(catalog.in_memory)
        limit = getattr(catalog.residents, "limit", 0)
        self.resident.show(rows=found, bytes=sum(each.bytes for _, each in found), limit=limit)

    async def _fill_routes(self, settings: TenantSettings) -> None:
        """Update the routes' panels; a panel stays while its route exists, for clicks."""
        now, panels = settings.routes, self.panels
        moved = [key for key, route in now.items() if key not in panels or panels[key].route != route]

        def read() -> dict[tuple[str, str], list[dict[str, Any]]]:
            found = {}
            with reading(self.store.engine) as c:
                for tenant, name in moved:
                    with suppress(ConfigError):  # removed meanwhile
                        found[tenant, name] = routes.route_history(c, name, tenant=tenant, limit=_MOVES)
            return found

        before = await asyncio.to_thread(read)
        if self.revision != settings.revision:
            return  # a newer refill was faster
        offered, names = self.moves.offered(), self.moves.names()
        for key in panels.keys() - now.keys():
            panels.pop(key).end()
        with self.place:
            for place, (key, route) in enumerate(sorted(now.items())):
                if key not in panels and key in before:
                    panels[key] = RoutePanel(self.moves, route, place)
                if key in before:
                    panels[key].fill(route, before[key])
                if key in panels:
                    panels[key].offer(names, offered)
        self.new.offer(names)

    async def _again(self) -> None:
        """Show a change made on this page at once."""
        await asyncio.to_thread(self.store.look)
        await self.refill()

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
        self.shadows.show(pairs=pairs, summary=list(zip(summary, compare, strict=True)), kept=kept)
        show(self.keep, bool(summary) and ALL not in settings.feedback)

    async def _fill_used(self, settings: TenantSettings) -> None:
        def read() -> list[dict[str, Any]]:
            with reading(self.store.engine) as c:
                return usage(c, by=("tenant", "adapter"))

        rows = await asyncio.to_thread(read)
        asked = {row["tenant"] for row in rows}
        limits = [
            (_whose(tenant), adapter or "all adapters", _limits(limit))
            for (tenant, adapter), limit in sorted(settings.limits.items())
        ]
        shown = [row | {"tenant": _whose(row["tenant"]), "cost": money(row["cost"])} for row in rows]
        quiet = [name for name in settings.tenants if name not in asked]
        self.used.show(rows=shown, limits=limits, quiet=quiet)

    def _keep_answers(self) -> None:
        async def do() -> None:
            await asyncio.to_thread(change_settings, self.store, ALL, {"feedback_days": 7.0}, who=WHO)
            await self._again()

        what = "From now on, what is asked without a tenant's key and what is answered is kept for 7 days."
        why = "Then a shadow's answer can be read beside the one that was sent, and one be chosen over the other."
        same = command("tenant", "set", "all", "feedback_days=7")
        confirm("Keep answers", f"{what} {why}", permit("operate", do), button_text="Keep them", command=same)

    async def better(self, data: dict[str, str]) -> None:
        """Record a preference row: this answer of a pair is better."""
        given = AnswerFeedback(data["id"], 0, rejected=((data["other"], 0),), said=frozenset({"rejected"}))
        await asyncio.to_thread(self.tenancy.answers.give, data["tenant"], given)
        self.page.say("Kept as a row of preferences")


def _whose(tenant: str) -> str:
    return {ALL: "everyone", EACH: "each tenant", TRIALS: "trials in the Studio"}.get(tenant, tenant)


def _limits(limit: Limit) -> str:
    """Return limits in words."""
    given = [(name, value) for name, value in asdict(limit).items() if value is not None]
    return ", ".join(f"{v:,} {'at once' if n == 'concurrency' else n.replace('_per_', ' a ')}" for n, v in given)


def _pair(row: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
    """Return a comparison, with both answers if they are stored."""
    sent, unseen = texts.get(row["request"]), texts.get(shadow_id(row["request"]))
    said = [each.choices[0].get("content", "") if each else "" for each in (sent, unseen)]
    questions = [str(m.get("content", "")) for m in sent.messages if m.get("role") == "user"] if sent else []
    return row | {
        "asked": questions[-1] if questions else "",
        "sent": said[0],
        "unseen": said[1],
        "both": sent is not None and unseen is not None,
        "first": row["first_difference"] or 0,
        "other": shadow_id(row["request"]),
    }
