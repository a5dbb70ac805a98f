"""The Live view: routes and versions, shadows, tenants' usage, loaded adapters.

The view describes each change of a route before applying it. One click rolls a change back."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from veneer.errors import ConfigError
from veneer.jobs.store import money
from veneer.library.database import reading
from veneer.library.names import parse_reference
from veneer.serve.access import TRIALS
from veneer.serve.request import Refused
from veneer.serve.tenancy import routes
from veneer.serve.tenancy.entry import day_of
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import ALL, EACH, Limit, TenantSettings
from veneer.serve.tenancy.tenants import Tenants
from veneer.studio.elements import Command, Fragment, box, command, details, heading, line
from veneer.studio.page import ViewPage
from veneer.studio.routes import RouteForm

_REVISIONS = 8
"""Maximum number of revisions shown for a route."""
_USAGE_DAYS = 7


async def live_view(page: ViewPage) -> None:
    page.title("Live", "Routes: the versions in use, their shares of users, and their costs.")
    tenancy = page.studio.service.tenancy
    if not isinstance(tenancy, Tenants):
        with box("div", "empty"):
            line("This server has no routes: it was started with --api-keys, or without a tenants' database.")
            Command(command("serve", studio=True, open=True, tenants="tenants.sqlite", base=page.base_argument))
        return
    await page.studio.service.catalog.fresh()  # the catalog may not contain the adapter in the link yet
    await asyncio.to_thread(tenancy.store.refresh)
    view = _LiveView(page, tenancy)
    await view.refill()
    proposed = view.proposed()
    if proposed:
        view.propose(proposed)
    page.on_change(view.mark, 1.0, view.refill)


class _LiveView:
    def __init__(self, page: ViewPage, tenancy: Tenants) -> None:
        self.page, self.store = page, tenancy.store
        self.forms: dict[tuple[str, str], RouteForm] = {}
        self.revision = -1
        self.content = box("div", "stack")
        opened = bool(page.query.get("ref")) or not self.store.settings.routes
        with details("New route", open=opened):
            text = "A route is a name that clients request as their model. You can change its versions without"
            text += " changing clients. Start with a few users, then promote the version or roll back."
            line(text, "soft small")
            self.new = RouteForm(page, self.store, self.refresh)
        heading("Shadows")
        self.shadows = Fragment("shadows.html.j2")
        heading(f"Usage and cost of the last {_USAGE_DAYS} days")
        self.usage = Fragment("used.html.j2")
        Command(command("tenant", "usage", by="tenant,adapter"))
        heading("Adapters in memory")
        self.memory = Fragment("residents.html.j2")

    def names(self) -> list[str]:
        """Return the possible targets of a route.

        These are the base, loaded adapters, this base's newest versions, and the version in the link."""
        catalog, linked = self.page.studio.service.catalog, self.page.query.get("ref")
        cards = [card for card in catalog.models(self.page.principal) if card.parent is None or card.digest]
        names = list(dict.fromkeys(card.root if card.digest else card.id for card in cards))[:300]
        with suppress(Refused):
            if linked not in names and catalog.resolve(linked, self.page.principal).adapters == (linked,):
                names.append(linked)
        return names

    def proposed(self) -> str:
        """Return the adapter in the link; "" if it is invalid or already a target of a route."""
        linked = self.page.query.get("ref")
        targets = {name for route in self.store.settings.routes.values() for name, _ in route.targets}
        return "" if linked in targets or linked not in self.names() else linked

    def propose(self, adapter: str) -> None:
        """Add an adapter as a canary to the form of the route with the adapter's name.

        If there is no such route, use the form for a new route."""
        name = parse_reference(adapter, cased=True).name
        form = self.forms.get((ALL, name), self.new)
        if form is self.new:
            form.name.set_value(name)
        form.add(adapter)

    async def refresh(self) -> None:
        """Reload the routes at once, after a change on this page."""
        await asyncio.to_thread(self.store.refresh)
        await self.refill()

    def mark(self) -> object:
        with reading(self.store.engine) as c:
            log = routes.shadow_log(c, limit=1)
        stats = self.page.studio.service.engine.stats()
        return self.store.refresh().revision, log[0]["id"] if log else 0, stats.adapters, int(time.time() / 5)

    async def refill(self) -> None:
        settings, catalog = self.store.settings, self.page.studio.service.catalog
        if settings.revision != self.revision:
            self.revision = settings.revision
            await self._fill_routes(settings)
        summary, used, loaded = await asyncio.to_thread(self._read)
        links = [self.page.link("compare", c=[each["target"], each["shadow"]]) for each in summary]
        self.shadows.show(rows=list(zip(summary, links, strict=True)))
        active = {row["tenant"] for row in used}
        rows = [row | {"tenant": _tenant_text(row["tenant"]), "cost": money(row["cost"])} for row in used]
        limits = [
            (_tenant_text(tenant), adapter or "all adapters", _limit_text(limit))
            for (tenant, adapter), limit in sorted(settings.limits.items())
        ]
        self.usage.show(rows=rows, limits=limits, idle=[name for name in settings.tenants if name not in active])
        limit, size = getattr(catalog.residents, "limit", 0), sum(each.bytes for _, each in loaded)
        self.memory.show(rows=loaded, bytes=size, limit=limit)

    def _read(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Any]:
        """Return the shadows' summary, the usage and the loaded adapters. Blocking."""
        since = day_of(time.time() - (_USAGE_DAYS - 1) * 86400)
        with reading(self.store.engine) as c:
            summary, used = routes.shadow_summary(c), usage(c, by=("tenant", "adapter"), since=since)
        return summary, used, self.page.studio.service.catalog.in_memory()

    async def _fill_routes(self, settings: TenantSettings) -> None:
        """Update the forms of the routes that have changed.

        All other forms stay as they are, so that a redraw does not disturb the user."""
        now, forms = settings.routes, self.forms
        changed = [key for key, route in now.items() if key not in forms or forms[key].route != route]

        def read() -> dict[tuple[str, str], list[dict[str, Any]]]:
            histories = {}
            with reading(self.store.engine) as c:
                for tenant, name in changed:
                    with suppress(ConfigError):  # removed meanwhile
                        histories[tenant, name] = routes.route_history(c, name, tenant=tenant, limit=_REVISIONS)
            return histories

        histories = await asyncio.to_thread(read)
        if self.revision != settings.revision:
            return  # a newer refill has started
        for key in forms.keys() - now.keys():
            forms.pop(key).panel.delete()
        for key, history in sorted(histories.items()):
            if key not in forms:
                with self.content:
                    forms[key] = RouteForm(self.page, self.store, self.refresh, now[key])
            forms[key].fill(now[key], history)
        for form in (*forms.values(), self.new):
            form.set_choices(self.names())


def _tenant_text(tenant: str) -> str:
    return {ALL: "everyone", EACH: "each tenant", TRIALS: "Studio requests"}.get(tenant, tenant)


def _limit_text(limit: Limit) -> str:
    values = {name.replace("_per_", " per "): value for name, value in asdict(limit).items() if value is not None}
    return ", ".join(f"{value:,} {'concurrent' if name == 'concurrency' else name}" for name, value in values.items())
