"""The forms of the Live view: one per route, and one for a new route.

A form has a weight for each target, a shadow, a description of the planned change, the revision history and
a rollback button. A form can add a version as a canary."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from veneer.errors import ConfigError
from veneer.library.database import reading
from veneer.models.builtin import BUILTIN
from veneer.serve.tenancy import routes
from veneer.serve.tenancy.store import ALL, Route, Store
from veneer.studio import elements
from veneer.studio.page import ViewPage

ACTOR = "studio"
"""The audit log's actor for changes made in the Studio."""
_CANARY = 0.1
"""Share of users who get a version that has just been added."""
_operate = partial(elements.permit, "operate")


class RouteForm:
    """The form of an existing or a new route.

    refresh: reloads the page's data after a change."""

    def __init__(
        self, page: ViewPage, store: Store, refresh: Callable[[], Awaitable[None]], route: Route | None = None
    ) -> None:
        self.page, self.store, self.refresh, self.route = page, store, refresh, route
        self.weights: dict[str, int] = {}
        label = f"Route {route.name}" if route else "New route"
        with elements.box("section", "panel stack route", aria_label=label) as self.panel:
            if route is None:
                self.name = elements.form_field("Name", "", _operate(self.describe), hint="support", max_length=120)
            else:
                self._draw_head(route)
            self.targets = elements.box("div", "row foot")
            with elements.box("div", "row foot"):
                self.other = elements.form_field("Add a target", "", _operate(self.add), kind="choice")
                self.shadow = elements.form_field("Shadow", "", _operate(self.describe), kind="choice")
                self.percent = elements.form_field(
                    "Share of requests, in %", 100, _operate(self.describe), kind="number", low=0, high=100, step=1
                )
            self.sentence = elements.line("", "sentence", role="status")
            self.same = elements.Command()
            with elements.box("div", "row") as self.buttons:
                self.apply = elements.button(
                    "Apply" if route else "Create route", _operate(self.set_route), kind="filled"
                )
                if route:
                    elements.button("Cancel", _operate(self.reset), kind="word")
            if route:
                with elements.details("Example request"):
                    elements.Fragment("request.html.j2", text=curl_command(page, route.name))
                with elements.details("History") as self.history_box:
                    self.history = elements.Fragment("route_moves.html.j2")
                    elements.Command(elements.command("tenant", "route", "history", route.name, tenant=route.tenant))
            else:
                self.reset()

    def _draw_head(self, route: Route) -> None:
        with elements.box("div", "row"):
            elements.heading(route.name)
            if route.tenant:
                elements.line(f"tenant {route.tenant}", "chip", "span")
            with elements.box("div", "row far"):
                elements.link("Try in Compare", self.page.link("compare", c=route.name), "button word")
                self.back = elements.button("Roll back", _operate(self.confirm_rollback), kind="word", key="r")
                elements.button(
                    "Remove", _operate(self.confirm_removal), kind="word", aria_label=f"Remove {route.name}"
                )

    # -- the fields

    def fill(self, route: Route, history: Sequence[dict[str, Any]]) -> None:
        """Show the current route and its revisions (newest first)."""
        self.route = route
        for each in (self.back, self.history_box):
            elements.set_visible(each, len(history) > 1)
        self.history.show(moves=history)
        self.reset()

    def set_choices(self, names: Sequence[str]) -> None:
        """Set the targets and shadows that the form offers."""
        shadow = self.route.shadow if self.route else None
        shadows = [name for name in names if name != self.page.studio.base]
        if shadow and shadow not in shadows:
            shadows.append(shadow)
        self.other.set_options({"": "choose a version"} | {name: name for name in names})
        self.shadow.set_options({"": "none"} | {name: name for name in shadows})

    def reset(self) -> None:
        """Discard changes: set the fields to the current route."""
        route = self.route
        self.weights = dict(route.targets) if route else {self.page.studio.base: 100}
        self.shadow.set_value((route.shadow if route else None) or "")
        self.percent.set_value(route.fraction * 100 if route else 100)
        self._draw_targets()

    def add(self, name: str) -> None:
        """Add a target as a canary, with the share `_CANARY`."""
        if name and name not in self.weights:
            total = sum(self.weights.values()) or 1
            self.weights = {each: round(100 * (1 - _CANARY) * w / total) for each, w in self.weights.items()}
            self.weights[name] = round(100 * _CANARY)
            self._draw_targets()
        self.other.set_value("")

    def _promote(self, name: str) -> None:
        self.weights = {each: 100 if each == name else 0 for each in self.weights}
        self._draw_targets()

    def _draw_targets(self) -> None:
        def weigh(name: str, weight: float | None) -> None:
            self.weights[name] = int(weight or 0)
            self.describe()

        self.targets.clear()
        with self.targets:
            for name, weight in self.weights.items():
                with elements.box("div", "target"):
                    handler = _operate(partial(weigh, name))
                    elements.form_field(
                        f"Weight of {name}", weight, handler, kind="number", low=0, high=1_000_000, step=1
                    )
                    if len(self.weights) > 1:
                        promote = _operate(partial(self._promote, name))
                        elements.button("Promote", promote, kind="word", aria_label=f"Promote {name}")
        self.describe()

    # -- applying the change

    def _planned(self) -> Route:
        route, shadow = self.route, str(self.shadow.value or "") or None
        percent = min(100.0, max(0.0, float(self.percent.value or 0)))
        name, tenant = (route.name, route.tenant) if route else (str(self.name.value or "").strip(), ALL)
        fraction = percent / 100 if shadow else 1.0
        targets = list(self.weights.items())
        return routes.planned_route(route, name, targets, tenant=tenant, shadow=shadow, fraction=fraction)

    def describe(self) -> None:
        """Describe the change that the current fields would make."""
        route, planned, changed = self.route, None, True
        try:
            planned = self._planned()
            text = routes.route_change(route, planned)
            if route and _content(planned) == _content(route):
                changed, text = False, routes.shadow_text(route)
        except ConfigError as error:
            text = error.what if route or self.name.value else "The route needs a name."
        elements.set_text(self.sentence, text)
        self.same.show(text=self._set_command(planned) if planned and changed else "")
        elements.enable(self.apply, planned is not None, text)
        elements.set_visible(self.buttons, changed)

    def _set_command(self, route: Route) -> str:
        names, base = dict(route.targets), self.page.studio.base
        targets = [f"{name}={weight}" if len(names) > 1 else name for name, weight in route.targets]
        fraction = f"{route.fraction:g}" if route.shadow and route.fraction != 1 else None
        exists = base in BUILTIN or self.page.studio.library.knows_base(base)
        options = {"tenant": route.tenant, "shadow": route.shadow, "fraction": fraction}
        return elements.command(
            "tenant", "route", "set", route.name, *targets, **options, force=base in names and not exists
        )

    async def set_route(self) -> None:
        """Apply the change.

        Raises ConfigError, and RouteMoved if the route has changed since this form read it."""
        planned, check = self._planned(), self.page.studio.service.catalog.check
        if self.route is None and (ALL, planned.name) in self.store.settings.routes:
            raise ConfigError(f"the route {planned.name} already exists", fix="change its weights above")
        options: dict[str, Any] = {"tenant": planned.tenant, "shadow": planned.shadow, "fraction": planned.fraction}

        def apply() -> None:
            move = self.route.move if self.route else 0
            if self.route is None:
                with (
                    suppress(ConfigError),
                    reading(self.store.engine) as c,
                ):  # revision numbers continue after those of a removed route with the same name
                    move = routes.route_history(c, planned.name, limit=1)[0]["move"]
            options.update(actor=ACTOR, check=check, from_move=move)
            routes.set_route(self.store, planned.name, planned.targets, **options)

        await asyncio.to_thread(apply)
        self.page.set_query(ref=None)
        if self.route is None:
            self.name.set_value("")
            self.reset()
        await self.refresh()
        self.page.notify(f"{planned.name} is live" if self.route is None else f"{planned.name} changed")

    async def confirm_rollback(self) -> None:
        route, check = self.route, self.page.studio.service.catalog.check
        assert route is not None
        options: dict[str, Any] = {"tenant": route.tenant, "actor": ACTOR}

        def read() -> tuple[Route, Route]:
            with reading(self.store.engine) as c:
                return routes.earlier_route(c, route.name, tenant=route.tenant)

        now, previous = await asyncio.to_thread(read)

        async def do() -> None:
            await asyncio.to_thread(
                routes.rollback_route, self.store, route.name, check=check, moves=[now.move], **options
            )
            await self.refresh()
            self.page.notify(f"{route.name} rolled back")

        same = elements.command("tenant", "route", "rollback", route.name, tenant=route.tenant)
        sentence = routes.route_change(now, previous)
        elements.confirm(f"Roll {route.name} back", sentence, _operate(do), button_text="Roll back", command=same)

    def confirm_removal(self) -> None:
        route = self.route
        assert route is not None

        async def do() -> None:
            await asyncio.to_thread(routes.remove_route, self.store, route.name, tenant=route.tenant, actor=ACTOR)
            await self.refresh()

        change = routes.route_change(route, replace(route, targets=(), runs=(), shadow=None))
        same = elements.command("tenant", "route", "remove", route.name, tenant=route.tenant)
        sentence = f"{change} A rollback restores the route."
        title = f"Remove {route.name}"
        elements.confirm(title, sentence, _operate(do), button_text="Remove", command=same, danger=True)


def _content(route: Route) -> object:
    return route.targets, route.shadow, route.fraction


def curl_command(page: ViewPage, model: str) -> str:
    """Return an example request to a model as a curl command."""
    path, body = "chat/completions", {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    if page.studio.makes_images:
        path, body = "images/generations", {"model": model, "prompt": "A red apple"}
    key = ' -H "Authorization: Bearer $VENEER_API_KEY"' if page.frame.visitor.key is not None else ""
    url, data = f"{page.frame.address}/v1/{path}", json.dumps(body, ensure_ascii=False)
    return f"curl {shlex.quote(url)} -H 'Content-Type: application/json'{key} -d {shlex.quote(data)}"
