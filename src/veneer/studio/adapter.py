"""The view of one adapter: sample answers, metadata, relatives and actions."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

from veneer.errors import AdapterError, ConfigError
from veneer.formats.card import opening
from veneer.jobs.checkpoints import job_of_tag
from veneer.library.describe_files import card_prompt, gain_of
from veneer.library.names import parse_reference
from veneer.library.queries import AdapterFamily, Version
from veneer.serve.http.surfaces.adapters import AdapterChange, change_adapter, remove_adapter
from veneer.studio import elements
from veneer.studio.library import LibraryCard, card_of, routes_of
from veneer.studio.page import NotFound, ViewPage
from veneer.train.report.log import size

TARGETS = {"text": ("peft", "vllm", "gguf"), "image": ("kohya", "comfyui", "diffusers", "peft")}
"""Kind of adapter -> the layouts that its page offers for download."""


@dataclass(frozen=True)
class _AdapterData:
    """What a version's page shows.

    A version's content never changes; its names, checks, children and routes can."""

    version: Version
    family: AdapterFamily
    checks: list[dict[str, Any]]
    routes: dict[str, list[str]]


def _read(page: ViewPage, reference: str) -> _AdapterData:
    """Read a version's data. Raises NotFound if the version does not exist or is not visible."""
    library = page.studio.library
    try:
        parse_reference(reference)
        version = library.find(reference)
    except (AdapterError, ConfigError) as error:
        raise NotFound("There is no such adapter.", fix=error.fix) from None
    if not page.principal.can_see(reference, version.reference):
        raise NotFound("There is no such adapter.")
    name = version.reference
    return _AdapterData(version, library.family(name), library.checks(name), routes_of(page))


async def adapter_view(page: ViewPage) -> None:
    data = await asyncio.to_thread(_read, page, page.query.get("ref"))
    version, studio = data.version, page.studio
    reference, editable = version.reference, page.principal.can_change(version.name)
    same_base = studio.service.catalog.fingerprint == version.fingerprint
    card = card_of(page, version, data.routes)

    page.title(reference)
    elements.line(_summary(card.base, version), "lede")
    with elements.box("div", "row"):
        elements.link("Compare with the base", page.link("compare", c=reference), "button filled", key="c")
        if same_base and page.principal.can("operate") and studio.tenants is not None:
            elements.link("Go live", page.link("live", ref=reference), "button quiet")
        for job in dict.fromkeys(job_of_tag(tag) for tag in version.tags if job_of_tag(tag)):
            elements.link("Training run", page.link("run", job=job), "button quiet")
        elements.link("Back to library", page.link(""), "button quiet")
    with elements.box("div", "split"):
        with elements.box("div"):
            _draw_content(page, version, card)
            elements.heading("Use")
            elements.Command(_use_command(page, version, same_base))
            if same_base:
                elements.line(f"On this server, set `model` to {reference} in requests.", "soft small")
            elements.heading("Lineage")
            family = elements.Fragment("family.html.j2")
            if editable:
                _draw_downloads(page, version, studio.base if same_base else version.base)
                with elements.details("Training details"):
                    elements.Fragment("facts.html.j2", facts=_facts(version))
        with elements.box("aside", "stack"):
            with elements.panel("Names"):
                unalias = elements.permit(
                    "write", lambda data: change("Removed the alias", data["word"], "remove_aliases")
                )
                untag = elements.permit("write", lambda data: change("Removed the tag", data["word"], "remove_tags"))
                names = elements.Fragment("names.html.j2", actions={"unalias": unalias, "untag": untag})
                if editable:
                    _draw_name_fields(reference, lambda *words: change(*words))
            if version.trigger_words:
                with elements.panel("Trigger words"):
                    elements.line("Include one of these words to activate the adapter. Click to copy.", "soft small")
                    elements.Fragment("words.html.j2", words=version.trigger_words)
            with elements.panel("Health"):
                checks = elements.Fragment("checks.html.j2")
                if editable:
                    elements.button("Check now", elements.permit("write", lambda: check()))
                    elements.Command(elements.command("library", "verify", reference))
            live = elements.Fragment("adapter_live.html.j2")
    if editable:
        with elements.box("div", "apart"):
            elements.button("Remove…", elements.permit("write", lambda: _ask_to_remove(page, reference)), kind="danger")

    def show(data: _AdapterData) -> None:
        version = data.version
        tags = [tag for tag in version.tags if not job_of_tag(tag)]
        names.show(editable=editable, aliases=version.aliases, tags=tags)
        checks.show(checks=data.checks, health=version.health)
        family.show(**_family_values(page, data))
        live.show(routes=card_of(page, version, data.routes).routes)

    async def refill() -> None:
        try:
            show(await asyncio.to_thread(_read, page, reference))
        except NotFound:
            if (
                page.frame.page is page
            ):  # false after the user removed the version, because the removal opens another view
                await page.reload()

    async def change(text: str, word: str, field: str) -> None:
        changes = AdapterChange(**{field: [word]})
        tenancy = studio.service.tenancy
        await asyncio.to_thread(change_adapter, studio.library, tenancy, page.principal, reference, changes)
        await refill()
        page.notify(f"{text} {word}")

    async def check() -> None:
        from veneer.adapters.inspect import verify_stored

        await asyncio.to_thread(verify_stored, studio.library, reference)
        await refill()
        page.notify(f"Checked {reference}")

    def mark() -> Any:
        try:
            now = studio.library.find(reference)
        except AdapterError:
            return None
        return now.aliases, now.tags, now.health, routes_of(page)

    show(data)
    page.on_change(mark, 1.0, refill)
    page.when_loaded(page.reload)


def _summary(base: str, version: Version) -> str:
    parts = [base, version.kind, f"rank {version.rank}" if version.rank else "", size(version.size)]
    parts += [version.format, f"license {version.licence}" if version.licence else "", f"added {version.added[:10]}"]
    return " · ".join(filter(None, parts))


def _draw_content(page: ViewPage, version: Version, card: LibraryCard) -> None:
    gain = gain_of(version.card)
    if gain is not None:
        with elements.box("div", "row level"):
            if card.gain:
                elements.line(card.gain, "number", "span")
            elements.line(f"held-out loss: {gain.before:.3g} (base), {gain.after:.3g} (with adapter)", "soft")
    if card.picture:
        elements.box("img", "preview", src=card.picture, alt=f"Sample image of {version.reference}")
    if card.sample is not None:
        elements.heading("Sample")
        for message in card_prompt(version.card):
            role = message["role"]
            _draw_text("System prompt" if role in ("system", "developer") else role, message["content"])
        with elements.box("div", "pair"):
            _draw_text(page.studio.base, card.sample["base"])
            _draw_text(version.reference, card.sample["adapter"])


def _draw_text(title: str, text: str) -> None:
    with elements.box("section", "panel"):
        elements.heading(title, 3)
        elements.line(text, "answer")


def _use_command(page: ViewPage, version: Version, same_base: bool) -> str:
    named = version.base if page.principal.can("operate") else version.base.rstrip("/").rpartition("/")[2]
    base = page.base_argument if same_base else named or "BASE"
    if version.kind == "image":
        return elements.command("image", "--base", base, "--adapter", version.reference, "a drawing of a fox")
    system, text = opening(card_prompt(version.card))
    return elements.command("generate", text or "…", base=base, adapter=version.reference, system=system)


def _family_values(page: ViewPage, data: _AdapterData) -> dict[str, Any]:
    """Return the values of family.html.j2, limited to visible versions."""

    def visible(versions: list[Version]) -> list[Version]:
        return [each for each in versions if page.principal.can_see(each.reference)]

    family = {
        "parents": visible(data.family.parents),
        "unknown": data.family.unknown if page.principal.can("operate") else [],
        "children": visible(data.family.children),
        "versions": visible(data.family.versions),
    }
    return {"family": family, "reference": data.version.reference, "link": page.link}


def _draw_name_fields(reference: str, change: Any) -> None:
    """Draw a field that adds an alias and a field that adds a tag.

    change: the function that adds the alias or tag."""
    fields: dict[str, elements.Field] = {}

    def typed(kind: str, text: str) -> None:
        same.show(text=elements.command("library", kind, reference, text.strip()) if text.strip() else "")

    async def add(kind: str, field: str, text: str) -> None:
        await change(f"Added the {kind}", text.strip(), field)
        fields[kind].set_value("")
        same.show(text="")

    for kind, field, hint in (("alias", "add_aliases", "prod"), ("tag", "add_tags", "support")):
        typing, adding = partial(typed, kind), elements.permit("write", partial(add, kind, field))
        fields[kind] = elements.form_field(
            f"New {kind}", "", elements.permit("write", typing), hint=hint, on_enter=adding, max_length=100
        )
    same = elements.Command()


def _draw_downloads(page: ViewPage, version: Version, base: str) -> None:
    elements.heading("Download")
    with elements.box("div", "row"):
        path = f"/v1/adapter_files/{version.reference}"
        elements.link("Original file", page.api(path), "button quiet", download=True)
        for to in TARGETS.get(version.kind, ()):
            elements.link(f"for {to}", page.api(path, to=to, base=base), "button quiet", download=True)


def _facts(version: Version) -> list[tuple[str, str]]:
    """Return (name, value) lines with the version's metadata that the page does not show elsewhere."""
    facts: list[tuple[str, str]] = [("digest", version.digest), ("base fingerprint", version.fingerprint)]
    facts += [("source", version.source), ("created", version.created)]
    for key in ("recipe", "metrics", "data"):
        values = version.card.get(key)
        if isinstance(values, dict):
            facts += [(f"{key} · {name}".replace("_", " "), str(value)[:500]) for name, value in values.items()]
    return [(name, value) for name, value in facts if value][:80]


async def _ask_to_remove(page: ViewPage, reference: str) -> None:
    library = page.studio.library
    aliases = (await asyncio.to_thread(library.find, reference)).aliases

    async def remove() -> None:
        tenancy = page.studio.service.tenancy
        await asyncio.to_thread(remove_adapter, library, tenancy, page.principal, reference, with_aliases=True)
        await page.go("")
        page.notify(f"Removed {reference}")

    pointing = f" and its aliases {', '.join(aliases)}" if aliases else ""
    sentence = (
        f"Removes the name{pointing}. The next `veneer library gc` deletes the files, unless another name uses them."
    )
    same = elements.command("library", "remove", reference, with_aliases=bool(aliases))
    title, handler = f"Remove {reference}?", elements.permit("write", remove)
    elements.confirm(title, sentence, handler, button_text="Remove", danger=True, command=same)
