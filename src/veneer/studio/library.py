"""The Library view: a card per adapter, with live search and filters."""

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
from veneer.studio.commands import command
from veneer.studio.frame import ViewPage
from veneer.studio.parts import Command, Fragment, box, button, form_field, heading, line, link, permit, put, show
from veneer.studio.train import beginnings
from veneer.studio.watch import on_change

_SOME, _MOST = 60, 600
"""Cards per batch, and maximum cards on a page."""
_ORDERS = {
    "added": "newest first", "name": "by name", "gain": "most gained first", "rank": "highest rank first",
    "size": "largest first",
}  # fmt: skip
_PICKS = {"base": "Base", "kind": "Kind", "rank": "Rank", "tag": "Tag", "health": "Health"}
_HEALTH = {"sound": "sound", "faulty": "faulty", "unknown": "not checked yet"}


@dataclass(frozen=True)
class LibraryCard:
    """The data of a version's card."""

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
    words = "" if share is None else f"{'−' if share < 0 else '+'}{abs(share):.0%}".replace("%", " %")
    names = [version.reference, version.name, *(f"{version.name}@{alias}" for alias in version.aliases)]
    return LibraryCard(
        version,
        version.base.rstrip("/").rpartition("/")[2] or "base not named",
        words,
        card_sample(version.card),
        page.api(f"/v1/adapter_previews/{version.reference}") if card_picture(version.card) else "",
        _HEALTH[version.health],
        [each for name in dict.fromkeys(names) for each in routes.get(name, [])],
    )


def routes_of(page: ViewPage) -> dict[str, list[str]]:
    """Return adapter name -> its visible routes: "live 90 %", "live, as a shadow"."""
    found: dict[str, list[str]] = {}
    tenants = page.studio.tenants
    for route in tenants.settings.routes.values() if tenants is not None else ():
        if page.caller.can("operate") or route.tenant in (ALL, page.caller.tenant):
            every = sum(weight for _, weight in route.targets)
            for target, weight in route.targets:
                if weight:
                    found.setdefault(target, []).append(f"{route.name} {weight / every:.0%}".replace("%", " %"))
            if route.shadow:
                found.setdefault(route.shadow, []).append(f"{route.name}, as a shadow")
    return found


@dataclass(frozen=True)
class _Asked:
    """The search of a link."""

    text: str
    order: str
    picks: dict[str, str]

    def search(self) -> dict[str, Any]:
        """Return the arguments of `queries.browse`."""
        given: dict[str, Any] = {k: v for k, v in self.picks.items() if v and k != "tag"}
        if "rank" in given:
            given["rank"] = int(given["rank"])
        tags = [self.picks["tag"]] if self.picks["tag"] else []
        return given | {"tags": tags, "order": self.order, "without": self.without}

    @property
    def without(self) -> str:
        """Return the tag prefix to exclude: steps of runs, which have their own view."""
        return "" if self.picks["tag"] else STEPS_TAG

    def command(self) -> str:
        sort = "" if self.order == "name" else self.order
        if self.text or any(self.picks.values()):
            return command("library", "search", self.text, **self.picks, without=self.without, sort=sort)
        return command("library", "list", without=self.without, sort=sort)


def _asked(page: ViewPage) -> _Asked:
    order = page.query.get("order", "added")
    picks = {name: page.query.get(name) for name in _PICKS}
    if not re.fullmatch("[0-9]{1,9}", picks["rank"]):
        picks["rank"] = ""
    picks["health"] = picks["health"] if picks["health"] in _HEALTH else ""
    return _Asked(page.query.get("q")[:200], order if order in _ORDERS else "added", picks)


async def library_view(page: ViewPage) -> None:
    studio, library = page.studio, page.studio.library
    with box("div", "row spread"):
        page.title("Library")
        with box("div", "row"):
            button("Add a file…", permit("read", page.pick), key="a")
            teach = link("Train an adapter", page.link("train"), "button filled")
    asked = _asked(page)
    find = form_field(
        "Find",
        asked.text,
        permit("read", lambda text: narrowed(q=text)),
        kind="search",
        key="/",
        look="find",
        hidden_label=True,
        hint="Find by name, base, tag, trigger word, licence …",
        wait=0.08,
    )
    with box("div", "picks", role="group", aria_label="Narrow and order") as order:
        picks = {
            name: form_field(
                label,
                asked.picks[name],
                permit("read", lambda value, name=name: narrowed(**{name: value})),
                kind="choice",
                options={"": "any"},
            )
            for name, label in _PICKS.items()
        }
        form_field(
            "Order",
            asked.order,
            permit("read", lambda value: narrowed(order=value)),
            kind="choice",
            options=_ORDERS,
            look="last",
        )
    count = line("", "soft small count", role="status")
    empty = box("div", "empty")
    pages = box("div", "stack")
    cut = line("", "soft")
    more = button("Show more", permit("read", lambda: further()), kind="quiet", look="more", data_more="")
    marked = _Marked(page)
    same = Command()
    leaves: list[Fragment] = []
    shown = turn = 0
    told_empty = ""

    async def fetch(offset: int, some: int) -> tuple[SearchPage, list[LibraryCard]]:
        asked, sees = _asked(page), None if page.caller.can("operate") else page.caller.sees

        def look() -> tuple[SearchPage, list[LibraryCard]]:
            found = library.browse(asked.text, **asked.search(), sees=sees, limit=some, offset=offset)
            routes = routes_of(page)
            return found, [card_of(page, each, routes) for each in found.versions]

        return await asyncio.to_thread(look)

    async def fill() -> None:
        """Draw the cards from the first; a newer call supersedes an older one."""
        nonlocal shown, turn, told_empty
        turn = own = turn + 1
        asked = _asked(page)
        found, cards = await fetch(0, max(_SOME, shown if shown <= _MOST else _SOME))
        if own != turn:
            return
        shown = len(cards)
        for leaf in leaves[-(-shown // _SOME) :]:
            leaf.delete()
        del leaves[-(-shown // _SOME) :]
        for k in range(0, shown, _SOME):
            leafed(k // _SOME, cards[k : k + _SOME])
        narrow = asked.text or any(asked.picks.values())
        put(count, f"{counted(found.total, 'adapter')}{' that fit' if narrow else ''}" if found.total else "")
        _offer(page, picks, asked, found)
        ended(found.total)
        show(pages, bool(cards))
        show(empty, not cards)
        why = "" if cards else "nothing fits" if narrow else "nothing"
        if why and why != told_empty:
            _say_empty(page, empty, bool(narrow))
        told_empty = why or told_empty
        for each in (find, order):  # an empty library shows only how to add an adapter
            show(each, bool(cards) or bool(narrow))
        show(teach, page.caller.can("train") and (bool(cards) or bool(narrow)))
        show(more, shown < min(found.total, _MOST))
        same.show(asked.command())

    async def further() -> None:
        nonlocal shown
        found, cards = await fetch(shown, _SOME)
        if cards:
            leafed(shown // _SOME, cards)
        shown += len(cards)
        ended(found.total)
        show(more, bool(cards) and shown < min(found.total, _MOST))

    def leafed(k: int, cards: list[LibraryCard]) -> None:
        """Draw or update the k-th batch of cards; unchanged cards keep their elements."""
        given: dict[str, Any] = {"cards": cards, "marked": marked.all, "link": page.link}
        if k < len(leaves):
            leaves[k].show(**given)
        else:
            with pages:
                leaves.append(Fragment("cards.html.j2", acts=marked.acts, **given))

    def ended(total: int) -> None:
        whole = shown < _MOST or shown >= total
        put(cut, "" if whole else f"{_MOST} of {total:,} are shown: say more of what you look for.")
        show(cut, not whole)

    async def narrowed(**changes: str) -> None:
        nonlocal shown
        shown = 0
        page.keep(**{name: None if value == "added" and name == "order" else value for name, value in changes.items()})
        await fill()

    marked.redraw = fill
    await fill()
    on_change(studio.library_mark, 1.0, fill)


def _offer(page: ViewPage, picks: Mapping[str, Any], asked: _Asked, found: SearchPage) -> None:
    """Offer each filter's values with counts; hide a filter without values."""
    for name, choice in picks.items():
        there = found.facets[name]
        if name == "base":
            there = facet_of_bases(there, page.caller)
        told = {value: _told(name, value) for value in list(there)[:100] if value and not job_of_tag(value)}
        chosen = asked.picks[name]
        options = {"": "any"} | {value: f"{words} ({there[value]:,})" for value, words in told.items()}
        if chosen and chosen not in options:
            options[chosen] = f"{_told(name, chosen)} (0)"
        choice.offer(options)
        show(choice, bool(chosen) or len(told) > 1)


def _told(name: str, value: str) -> str:
    if name == "base":
        return value.rstrip("/").rpartition("/")[2]
    if name == "rank":
        return "several" if value == "0" else value
    return _HEALTH.get(value, value) if name == "health" else value


def _say_empty(page: ViewPage, place: Any, narrow: bool) -> None:
    place.clear()
    with place:
        if narrow:
            heading("No matches", 2)
            line("No adapter matches all filters.")
            link("Show all", page.link(""), "button quiet")
            return
        heading("No adapters yet", 2)
        base = page.studio.base
        line(
            f"An adapter is a thin layer on {base}, a few megabytes, that makes it do your thing; {base} itself stays "
            "as it is. Train one, or drop an adapter file anywhere on this page."
        )
        offers = beginnings(page.studio) if page.caller.can("operate") else []
        for what, settings in offers[:1]:
            link(f"Train on {what}", page.link("train", s=settings), "button filled")


class _Marked:
    """Adapters marked for comparison, in the link and in a bar at the bottom."""

    def __init__(self, page: ViewPage) -> None:
        self.page = page
        self.acts = {"mark": permit("read", self.toggle)}
        self.redraw: Any = None
        with box("div", "bar") as self.bar:
            self.words = line("", "", "span")
            button("Compare", permit("infer", self.compare), kind="filled", key="c")
            button("Clear", permit("read", self.clear), kind="word")
        self._told()

    @property
    def all(self) -> list[str]:
        return self.page.query.all("m")

    def _told(self) -> None:
        show(self.bar, bool(self.all))
        put(self.words, f"{len(self.all)} marked")

    async def toggle(self, data: dict[str, str]) -> None:
        ref = data["ref"]
        self.page.keep(m=[each for each in self.all if each != ref] + ([] if ref in self.all else [ref])[:8])
        self._told()
        await self.redraw()

    async def clear(self) -> None:
        self.page.keep(m=None)
        self._told()
        await self.redraw()

    async def compare(self) -> None:
        if self.all:
            await self.page.go("compare", c=self.all)
