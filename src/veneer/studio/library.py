"""The Library view: one card per adapter, with live search and filters."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import counted
from veneer.jobs.checkpoints import STEPS_TAG, job_of_tag
from veneer.library.describe_files import card_picture, card_sample, gain_of
from veneer.library.queries import SearchPage, Version
from veneer.serve.http.surfaces.adapters import facet_of_bases
from veneer.serve.tenancy.store import ALL
from veneer.studio import elements
from veneer.studio.page import ViewPage
from veneer.studio.train import suggestions

_BATCH, _MAX_CARDS, _MAX_MARKED = 60, 600, 8
"""Cards per batch, maximum cards on a page, and maximum adapters marked for comparison."""
_ORDERS = {
    "added": "newest first",
    "name": "by name",
    "gain": "largest loss reduction first",
    "rank": "highest rank first",
    "size": "largest first",
}
_FILTERS = {"base": "Base", "kind": "Kind", "rank": "Rank", "tag": "Tag", "health": "Health"}
_HEALTH = {"sound": "sound", "faulty": "faulty", "unknown": "not checked yet"}


@dataclass(frozen=True)
class LibraryCard:
    """The contents of a version's card."""

    version: Version
    base: str
    gain: str
    sample: Mapping[str, str] | None
    picture: str
    health: str
    routes: list[str] = field(default_factory=list)


def card_of(page: ViewPage, version: Version, routes: Mapping[str, list[str]]) -> LibraryCard:
    gain = gain_of(version.card)
    share = None if gain is None else gain.share
    names = [version.reference, version.name, *(f"{version.name}@{alias}" for alias in version.aliases)]
    return LibraryCard(
        version,
        _short_base(version.base) or "base not stated",
        "" if share is None else f"{'−' if share < 0 else '+'}{_percent(abs(share))}",
        card_sample(version.card),
        page.api(f"/v1/adapter_previews/{version.reference}") if card_picture(version.card) else "",
        _HEALTH[version.health],
        [each for name in dict.fromkeys(names) for each in routes.get(name, [])],
    )


def routes_of(page: ViewPage) -> dict[str, list[str]]:
    """Return adapter name -> its visible routes, such as "live 90%", "live (shadow)"."""
    routes: dict[str, list[str]] = {}
    tenants = page.studio.tenants
    for route in tenants.settings.routes.values() if tenants is not None else ():
        if page.principal.can("operate") or route.tenant in (ALL, page.principal.tenant):
            total = sum(weight for _, weight in route.targets)
            for target, weight in route.targets:
                routes.setdefault(target, []).append(f"{route.name} {_percent(weight / total)}")
            if route.shadow:
                routes.setdefault(route.shadow, []).append(f"{route.name} (shadow)")
    return routes


def _short_base(base: str) -> str:
    return base.rstrip("/").rpartition("/")[2]


def _percent(share: float) -> str:
    return f"{share:.0%}"


class _Search:
    """A search read from the link: `text`, `order`, and the value of each filter."""

    def __init__(self, page: ViewPage) -> None:
        query = page.query
        self.text, self.order = query.get("q")[:200], query.get("order")
        if self.order not in _ORDERS:
            self.order = "added"
        self.filters = {name: query.get(name) for name in _FILTERS}
        if not re.fullmatch("[0-9]{1,9}", self.filters["rank"]):
            self.filters["rank"] = ""
        if self.filters["health"] not in _HEALTH:
            self.filters["health"] = ""
        self.without = "" if self.filters["tag"] else STEPS_TAG
        """Prefix of the tags to leave out: the Run view, not this view, lists the checkpoints of runs."""
        self.narrowed = bool(self.text or any(self.filters.values()))

    def run(self, page: ViewPage, limit: int) -> SearchPage:
        arguments: dict[str, Any] = {name: value for name, value in self.filters.items() if value and name != "tag"}
        if "rank" in arguments:
            arguments["rank"] = int(arguments["rank"])
        tags = [self.filters["tag"]] if self.filters["tag"] else []
        visible = None if page.principal.can("operate") else page.principal.can_see
        arguments |= {"tags": tags, "order": self.order, "without": self.without, "can_access": visible}
        return page.studio.library.browse(self.text, **arguments, limit=limit)

    def command(self) -> str:
        sort = "" if self.order == "name" else self.order
        if self.narrowed:
            return elements.command("library", "search", self.text, **self.filters, without=self.without, sort=sort)
        return elements.command("library", "list", without=self.without, sort=sort)


async def library_view(page: ViewPage) -> None:
    limit = _BATCH
    with elements.box("div", "row spread"):
        page.title("Library")
        with elements.box("div", "row"):
            elements.button("Add a file…", elements.permit("read", page.pick_file), key="a")
            train_link = elements.link("Train an adapter", page.link("train"), "button filled")
    search = _Search(page)
    find = elements.form_field(
        "Search",
        search.text,
        elements.permit("read", lambda text: narrow(q=text)),
        kind="search",
        key="/",
        classes="find",
        hidden_label=True,
        hint="Name, base, tag, trigger word, license …",
        delay=0.08,
    )

    def choice(name: str, label: str, value: str, options: Mapping[str, str], classes: str = "") -> elements.Field:
        handler = elements.permit("read", lambda chosen: narrow(**{name: chosen}))
        return elements.form_field(label, value, handler, kind="choice", options=options, classes=classes)

    with elements.box("div", "picks", role="group", aria_label="Filters and order") as choices:
        filters = {name: choice(name, label, search.filters[name], {"": "any"}) for name, label in _FILTERS.items()}
        choice("order", "Order", search.order, _ORDERS, "last")
    count = elements.line("", "soft small count", role="status")
    empty = elements.box("div", "empty")
    cards = elements.Fragment(
        "cards.html.j2", actions={"mark": elements.permit("read", lambda data: toggle(data["ref"]))}
    )
    rest = elements.line("", "soft")
    more = elements.button("Show more", elements.permit("read", lambda: show_more()), data_more="")
    with elements.box("div", "bar") as bar:
        marked_count = elements.line("", "", "span")
        compare = elements.permit("infer", lambda: page.go("compare", c=page.query.all("m")))
        elements.button("Compare", compare, kind="filled", key="c")
        elements.button("Clear", elements.permit("read", lambda: mark([])), kind="word")
    same = elements.Command()
    shown_reason = ""

    async def refill() -> None:
        nonlocal shown_reason
        query, search = page.query, _Search(page)

        def read() -> tuple[SearchPage, list[LibraryCard]]:
            result = search.run(page, limit)
            routes = routes_of(page)
            return result, [card_of(page, each, routes) for each in result.versions]

        result, visible_cards = await asyncio.to_thread(read)
        if page.query is not query:
            return  # a newer search has started
        marked, shown_count, busy = page.query.all("m"), len(visible_cards), bool(visible_cards) or search.narrowed
        cards.show(cards=visible_cards, marked=marked, link=page.link)
        elements.set_text(
            count, f"{counted(result.total, 'adapter')}{' found' if search.narrowed else ''}" if shown_count else ""
        )
        elements.set_text(rest, f"Showing {_MAX_CARDS} of {result.total:,}. Narrow the search to see others.")
        elements.set_text(marked_count, f"{len(marked)} selected")
        _set_filter_options(page, filters, search, result)
        reason = "" if visible_cards else "no match" if search.narrowed else "no adapter"
        if reason and reason != shown_reason:
            _draw_empty(page, empty, search.narrowed)
        shown_reason = reason
        for element, visible in (
            (rest, shown_count >= _MAX_CARDS and result.total > shown_count),
            (more, shown_count < min(result.total, _MAX_CARDS)),
            (empty, not visible_cards),
            (find, busy),  # if the library is empty, the view shows only the ways to add an adapter
            (choices, busy),
            (train_link, busy and page.principal.can("train")),
            (bar, bool(marked)),
        ):
            elements.set_visible(element, visible)
        same.show(text=search.command())

    async def show_more() -> None:
        nonlocal limit
        limit = min(limit + _BATCH, _MAX_CARDS)
        await refill()

    async def narrow(**changes: str) -> None:
        nonlocal limit
        limit = _BATCH
        page.set_query(**changes)
        await refill()

    async def mark(references: list[str]) -> None:
        page.set_query(m=references[:_MAX_MARKED])
        await refill()

    async def toggle(reference: str) -> None:
        marked = page.query.all("m")
        rest = [each for each in marked if each != reference]
        await mark(rest if reference in marked else [*rest, reference])

    await refill()
    page.on_change(page.studio.library_mark, 1.0, refill)


def _set_filter_options(
    page: ViewPage, filters: Mapping[str, elements.Field], search: _Search, result: SearchPage
) -> None:
    """Offer each filter's values with counts; hide a filter that has only one value."""
    for name, choice in filters.items():
        counts = result.facets[name]
        if name == "base":
            counts = facet_of_bases(counts, page.principal)
        values = [value for value in list(counts)[:100] if value and not job_of_tag(value)]
        options = {"": "any"} | {value: f"{_value_text(name, value)} ({counts[value]:,})" for value in values}
        if (selected := search.filters[name]) and selected not in options:
            options[selected] = f"{_value_text(name, selected)} (0)"
        choice.set_options(options)
        elements.set_visible(choice, bool(selected) or len(values) > 1)


def _value_text(name: str, value: str) -> str:
    if name == "base":
        return _short_base(value)
    if name == "rank":
        return "mixed" if value == "0" else value
    return _HEALTH.get(value, value) if name == "health" else value


def _draw_empty(page: ViewPage, empty: Any, narrowed: bool) -> None:
    empty.clear()
    with empty:
        if narrowed:
            elements.heading("No matches")
            elements.line("No adapter matches the search and all filters.")
            elements.link("Show all", page.link(""), "button quiet")
            return
        elements.heading("No adapters yet")
        base = page.studio.base
        elements.line(f"An adapter is a few megabytes that teach {base} your task; {base} itself does not change.")
        elements.line("Train one, or drop an adapter file anywhere on this page.")
        offers = suggestions(page.studio) if page.principal.can("operate") else []
        for name, settings in offers[:1]:
            elements.link(f"Train on {name}", page.link("train", s=settings), "button filled")
