"""The Library: a card for each adapter, found as one types; and the page of one adapter."""

from __future__ import annotations

import asyncio

from veneer.errors import counted
from veneer.studio.commands import command
from veneer.studio.frame import NothingHere, ViewPage
from veneer.studio.parts import Command, Fragment, button, confirm, form_field, line, put
from veneer.studio.watch import on_change

_SOME = 60
"""Cards at a time."""


async def library_view(page: ViewPage) -> None:
    page.title("Library", f"Every adapter that is kept here, for {page.studio.base} and others.")
    text = page.query.get("q")
    form_field(
        "Find",
        text,
        lambda now: narrowed(now),
        kind="search",
        hint="Name, base, tag, trigger word",
        key="/",
        look="find",
    )
    count = line("", "soft", role="status")
    cards = Fragment("cards.html.j2", versions=[], link=page.link)
    same = Command()

    async def fill() -> None:
        found = await asyncio.to_thread(page.studio.library.search, page.query.get("q"), limit=_SOME)
        found = [each for each in found if page.caller.sees(each.name)]
        cards.show(versions=found, link=page.link)
        put(count, counted(len(found), "adapter"))
        same.show(command("library", "search", page.query.get("q")))

    async def narrowed(now: str) -> None:
        page.keep(q=now)
        await fill()

    await fill()
    on_change(page.studio.library_mark, 1.0, fill)


async def adapter_view(page: ViewPage) -> None:
    reference = page.query.get("ref")
    if not reference or not page.caller.sees(reference.partition("@")[0]):
        raise NothingHere("There is nothing here.")
    version = await asyncio.to_thread(page.studio.library.find, reference)
    page.title(version.reference)
    line(f"{version.base} · {version.kind}", "soft")
    Command(command("library", "show", version.reference))

    async def remove() -> None:
        await asyncio.to_thread(page.studio.library.remove, version.reference, with_aliases=True)
        await page.go("")
        page.say(f"{version.reference} is not in the library any more")

    def asked() -> None:
        confirm(
            f"Remove {version.reference}?",
            "Its name goes now. Its files go with the next clean-up, unless another name has them too.",
            remove,
            button_text="Remove",
            command=command("library", "remove", version.reference, with_aliases=True),
            danger=True,
        )

    if page.caller.admin:
        button("Remove…", asked, kind="danger")
