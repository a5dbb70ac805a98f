"""The view of one adapter: answers, metadata, relatives and actions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from veneer.errors import AdapterError, ConfigError
from veneer.formats.card import opening
from veneer.jobs.checkpoints import job_of_tag
from veneer.library.describe_files import card_prompt, gain_of
from veneer.library.names import parse_reference
from veneer.library.queries import AdapterFamily, Version
from veneer.serve.http.surfaces.adapters import AdapterChange, change_adapter, remove_adapter
from veneer.studio.commands import command, command_base
from veneer.studio.frame import NothingHere, ViewPage
from veneer.studio.library import LibraryCard, card_of, routes_of
from veneer.studio.parts import Command, Field, Fragment, box, button, confirm, form_field, heading, line, link, permit
from veneer.studio.talk import start_answers
from veneer.studio.watch import on_change
from veneer.train.report.log import size

_TARGETS = {
    "text": ("peft", "vllm", "tgi", "gguf"),
    "image": ("kohya", "comfyui", "diffusers", "peft"),
}
"""Kind of adapter -> layouts to convert to."""


@dataclass(frozen=True)
class _Seen:
    """The data of a version on its page.

    The content never changes; names, checks, children and routes can."""

    version: Version
    family: AdapterFamily
    checks: list[dict[str, Any]]
    routes: dict[str, list[str]]


async def adapter_view(page: ViewPage) -> None:
    seen = await asyncio.to_thread(_read, page, page.query.get("ref"))
    version = seen.version
    own = page.caller.can_change(version.name)
    card = card_of(page, version, seen.routes)

    page.title(version.reference)
    line(_summary(card.base, version), "lede")
    with box("div", "row"):
        link("Compare with the base", page.link("compare", c=version.reference), "button filled", key="c")
        link("To the library", page.link(""), "button quiet")
        for job in dict.fromkeys(job_of_tag(tag) for tag in version.tags if job_of_tag(tag)):
            link("Training run", page.link("run", job=job), "button quiet")

    with box("div", "split"):
        with box("div"):
            _content(page, version, card)
            if card.sample is None:
                _ask_both(page, version)
            heading("Use it")
            Command(_use(page, version))
            if page.studio.service.catalog.fingerprint == version.fingerprint:
                line(f"Here, requests that name {version.reference} as their model get it.", "soft small")
            heading("Family")
            family = Fragment("family.html.j2", **_relatives(page, seen))
            if own:
                _download(page, version)
                with box("details", "made"):
                    line("Training details", tag="summary")
                    Fragment("facts.html.j2", facts=_facts(version))
        with box("aside", "stack"):
            names = _names(page, seen, own, lambda: refill())
            _words(version)
            checks = _health(page, seen, own, lambda: refill())
            live = Fragment("adapter_live.html.j2", routes=card.routes)
    if own:
        _remove(page, version)

    async def refill() -> None:
        try:
            seen = await asyncio.to_thread(_read, page, version.reference)
        except NothingHere:
            if page.frame.page is page:  # removing the version here opens another view
                await page.again()
            return
        names.show(own=own, **_named(seen.version))
        checks.show(checks=seen.checks, health=seen.version.health)
        family.show(**_relatives(page, seen))
        live.show(routes=card_of(page, seen.version, seen.routes).routes)

    def now() -> Any:
        try:
            found = page.studio.library.find(version.reference)
        except AdapterError:
            return None
        return found.aliases, found.tags, found.health, routes_of(page)

    on_change(now, 1.0, refill)
    page.when_loaded(page.again)


def _read(page: ViewPage, reference: str) -> _Seen:
    """Read a version. Raises NothingHere if it does not exist or is not visible."""
    library = page.studio.library
    try:
        parse_reference(reference)
        version = library.find(reference)
    except (AdapterError, ConfigError) as error:
        raise NothingHere("There is no such adapter.", fix=error.fix) from None
    if not page.caller.can_see(reference, version.reference):
        raise NothingHere("There is no such adapter.")
    found = version.reference
    return _Seen(version, library.family(found), library.checks(found), routes_of(page))


def _summary(base: str, version: Version) -> str:
    told = [base, version.kind, f"rank {version.rank}" if version.rank else "", size(version.size)]
    told += [version.format, f"licence {version.licence}" if version.licence else "", f"added {version.added[:10]}"]
    return " · ".join(filter(None, told))


def _content(page: ViewPage, version: Version, card: LibraryCard) -> None:
    gain, sample = gain_of(version.card), card.sample
    if gain is not None:
        with box("div", "row level"):
            if card.gain:
                line(card.gain, "number", "span")
            line(f"held-out loss, {gain.before:.3g} with the base alone, {gain.after:.3g} with it", "soft")
    if card.picture:
        box("img", "preview", src=card.picture, alt=f"A picture that came with {version.reference}")
    if sample is not None:
        _asked(version)
        with box("div", "pair"):
            for who, words in ((page.studio.base, sample["base"]), (version.reference, sample["adapter"])):
                with box("section", "panel"):
                    heading(who, 3)
                    line(words, "answer")


def _asked(version: Version) -> None:
    """Show the card's prompt, with the row's system message."""
    heading("Prompt")
    for message in card_prompt(version.card):
        with box("section", "panel"):
            role = message["role"]
            heading("System prompt" if role in ("system", "developer") else role, 3)
            line(message["content"], "answer")


def _ask_both(page: ViewPage, version: Version) -> None:
    """Offer to send the card's prompt to base and adapter.

    Only if the card has no answers and this server can answer."""
    studio, messages = page.studio, card_prompt(version.card)
    if not messages or studio.service.engine.makes != "texts":
        return
    if studio.service.catalog.fingerprint != version.fingerprint:
        return
    _asked(version)

    def ask() -> None:
        start_answers(page, answers, messages, version.reference)

    button("Ask both", permit("infer", ask))
    answers = Fragment("answers_two.html.j2", columns=[])


def _use(page: ViewPage, version: Version) -> str:
    stated = version.base if page.caller.can("operate") else version.base.rstrip("/").rpartition("/")[2]
    own = page.studio.service.catalog.fingerprint == version.fingerprint
    base = command_base(page) if own else stated or "BASE"
    if version.kind == "image":
        return command("image", "--base", base, "--adapter", version.reference, "a drawing of a fox")
    system, text = opening(card_prompt(version.card))
    return command("generate", text or "…", base=base, adapter=version.reference, system=system)


def _relatives(page: ViewPage, seen: _Seen) -> dict[str, Any]:
    """Return the values of family.html.j2."""
    family = seen.family

    def those(all: list[Version]) -> list[Version]:
        return [each for each in all if page.caller.can_see(each.reference)]

    unknown = family.unknown if page.caller.can("operate") else []
    shown = {
        "parents": those(family.parents),
        "unknown": unknown,
        "children": those(family.children),
        "versions": those(family.versions),
    }
    return {"family": shown, "own": seen.version.reference, "link": page.link}


def _named(version: Version) -> dict[str, Any]:
    return {"aliases": version.aliases, "tags": [tag for tag in version.tags if not job_of_tag(tag)]}


def _names(page: ViewPage, seen: _Seen, own: bool, refill: Callable[[], Awaitable[None]]) -> Fragment:
    version = seen.version

    async def change(said: str, **wanted: list[str]) -> None:
        studio = page.studio
        await asyncio.to_thread(
            change_adapter,
            studio.library,
            studio.service.tenancy,
            page.caller,
            version.reference,
            AdapterChange(**wanted),
        )
        await refill()
        page.say(said)

    with box("section", "panel stack"):
        heading("Names", 2)
        names = Fragment(
            "names.html.j2",
            own=own,
            **_named(version),
            acts={
                "unalias": permit(
                    "write", lambda data: change(f"{data['word']} is no alias any more", remove_aliases=[data["word"]])
                ),
                "untag": permit(
                    "write", lambda data: change(f"The tag {data['word']} is off", remove_tags=[data["word"]])
                ),
            },
        )
        if not own:
            return names
        new, fields = {"alias": "", "tag": ""}, dict[str, Field]()
        for what, hint in (("alias", "prod"), ("tag", "support")):

            def typed(text: str, what: str = what) -> None:
                new[what] = text.strip()
                same.show(command("library", what, version.reference, new[what]) if new[what] else "")

            async def entered(text: str, what: str = what) -> None:
                word = text.strip()
                wanted = {"add_aliases" if what == "alias" else "add_tags": [word]}
                await change(f"{version.reference} has the {what} {word}", **wanted)
                fields[what].put("")
                same.show("")

            fields[what] = form_field(
                f"Another {what}", "", permit("write", typed), hint=hint, entered=permit("write", entered), most=100
            )
        same = Command()
    return names


def _words(version: Version) -> None:
    if version.trigger_words:
        with box("section", "panel"):
            heading("Trigger words", 2)
            line("Include one of these words to activate the adapter. Click to copy.", "soft small")
            Fragment("words.html.j2", words=version.trigger_words)


def _health(page: ViewPage, seen: _Seen, own: bool, refill: Callable[[], Awaitable[None]]) -> Fragment:
    from veneer.adapters.inspect import verify_kept

    version = seen.version

    async def look() -> None:
        await asyncio.to_thread(verify_kept, page.studio.library, version.reference)
        await refill()
        page.say(f"{version.reference} was checked")

    with box("section", "panel stack"):
        heading("Health", 2)
        checks = Fragment("checks.html.j2", checks=seen.checks, health=version.health)
        if own:
            button("Check it now", permit("write", look))
            Command(command("library", "verify", version.reference))
    return checks


def _download(page: ViewPage, version: Version) -> None:
    heading("Download")
    with box("div", "row"):
        at = f"/v1/adapter_files/{version.reference}"
        link("Original file", page.api(at), "button quiet", download=True)
        base = page.studio.base if page.studio.service.catalog.fingerprint == version.fingerprint else version.base
        for to in _TARGETS.get(version.kind, ()):
            link(f"for {to}", page.api(at, to=to, base=base), "button quiet", download=True)


def _facts(version: Version) -> list[tuple[str, str]]:
    """Return (name, value) lines of the card that the page does not show elsewhere."""
    out: list[tuple[str, str]] = [("digest", version.digest), ("base fingerprint", version.fingerprint)]
    out += [("source", version.source), ("created", version.created)]
    for key in ("recipe", "metrics", "data"):
        said = version.card.get(key)
        if isinstance(said, dict):
            out += [(f"{key} · {name}".replace("_", " "), str(value)[:500]) for name, value in said.items()]
    return [(name, value) for name, value in out if value][:80]


def _remove(page: ViewPage, version: Version) -> None:
    async def remove() -> None:
        studio = page.studio
        await asyncio.to_thread(
            remove_adapter, studio.library, studio.service.tenancy, page.caller, version.reference, with_aliases=True
        )
        await page.go("")
        page.say(f"{version.reference} is out of the library")

    async def asked() -> None:
        aliases = (await asyncio.to_thread(page.studio.library.find, version.reference)).aliases
        pointed = f" Its aliases {', '.join(aliases)} go with it." if aliases else ""
        confirm(
            f"Remove {version.reference}?",
            f"Its name goes now.{pointed} Its files go with the next clean-up, unless another name has them.",
            permit("write", remove),
            button_text="Remove",
            danger=True,
            command=command("library", "remove", version.reference, with_aliases=bool(aliases)),
        )

    with box("div", "apart"):
        button("Remove…", permit("write", asked), kind="danger")
