"""The Doctor view: identify an adapter file, and convert it for other tools."""

from __future__ import annotations

import asyncio
from typing import Any

from veneer.errors import AdapterError, counted
from veneer.formats.topology import families
from veneer.serve.http.surfaces.adapters import keep_staged, staged_report
from veneer.serve.request import Refused
from veneer.serve.upload_stage import StagedAdapter
from veneer.studio.commands import command
from veneer.studio.frame import NothingHere, ViewPage
from veneer.studio.parts import (
    Command,
    Fragment,
    box,
    button,
    enable,
    form_field,
    heading,
    line,
    permit,
    progress,
    show,
)
from veneer.train.report.log import size

_FEW = 12


async def doctor_view(page: ViewPage) -> None:
    async def came(answer: dict[str, Any]) -> None:
        await page.go("doctor", file=str(answer.get("id", "")))

    def to(name: str) -> str:
        return page.api("/v1/adapter_inspections", filename=name)

    page.drops("Drop to inspect; the file is not saved", to, came)
    id = page.query.get("file")
    if not id:
        page.title("What is this file?", "Any adapter: what it is and why, and what other tools would do with it.")
        with box("div", "empty"):
            heading("Drop a file anywhere on this page", 2)
            line(
                "A .safetensors or .gguf of any tool, or a .zip of a PEFT folder. It stays for an hour, for you alone."
            )
            button("Choose a file", permit("read", page.pick), kind="filled", key="o")
        Command(command("adapter", "inspect", "FILE", elsewhere=True))
        return
    try:
        staged = page.studio.service.staging.get(page.caller.tenant, id)
    except Refused as error:
        raise NothingHere("This file is no longer available.", fix=error.fix) from None
    page.title(staged.name, f"{size(staged.size)} · here until it is kept, for an hour at most")
    with box("div", "row"):
        button("Another file", permit("read", page.pick), key="o")
    report = await asyncio.to_thread(staged_report, staged)
    _show(page, staged, report)


def _show(page: ViewPage, staged: StagedAdapter, report: dict[str, Any]) -> None:
    with box("div", "split"):
        with box("div"):
            Fragment("diagnosis.html.j2", facts=_facts(report), coverage=report["coverage"], few=_FEW, **_words(report))
            heading("In other tools")
            if _is_assumed(report):
                line("The file as it is now. It can be written for a tool once the alpha it was trained with is known:")
                Command(command("adapter", "convert", staged.name, alpha="N", to="peft", output="NEW"))
            else:
                line("The original file, and the same adapter in each tool's layout.", "soft small")
            for each in report["elsewhere"]:
                _tool(page, staged, report, each)
            if report["targets"]:
                heading("What it changes")
                Fragment("targets.html.j2", targets=report["targets"])
            Command(command("adapter", "inspect", staged.name, elsewhere=True))
        with box("aside", "stack"):
            _keep(page, staged, report)


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) lines of an inspection report."""
    card = report["card"]

    def several(counts: dict[str, int]) -> str:
        shown = [f"{value} ({n})" if len(counts) > 1 else value for value, n in list(counts.items())[:6]]
        return ", ".join(shown) + (", …" if len(counts) > 6 else "")

    dropped = f", dropout {report['dropout']:g}" if report["dropout"] else ""
    dtypes = ", ".join(report["dtypes"])
    facts = [
        ("format", report["format"]),
        ("because", "; ".join(report["reasons"][:4])),
        ("family", _family(report["family"])),
        ("base", report["base"] or "not said"),
        ("kind", ", ".join(report["variants"]) + dropped),
        ("holds", f"{counted(report['pairs'], 'pair')}, {report['parameters']:,} numbers in {dtypes}"),
        ("rank", several(report["ranks"])),
        ("alpha", several(report["alphas"])),
        ("scale", several(report["scales"])),
        ("trigger words", ", ".join(report["trigger_words"][:_FEW])),
        ("licence", str(card.get("licence", ""))),
        ("digest", report["digest"]),
        ("sha256", str(report["hashes"]["sha256"])),
    ]
    return [(name, value) for name, value in facts if value]


def _family(name: str) -> str:
    known = families().get(name)
    return known.label if known is not None else name


def _words(report: dict[str, Any]) -> dict[str, Any]:
    verdict = report["verdict"]
    own = {key: verdict[key] for key in ("use", "why", "fix")}
    return {**own, "assumed": _is_assumed(report), "notes": report["notes"][:_FEW]}


def _is_assumed(report: dict[str, Any]) -> bool:
    """Return whether only the adapter's scale is unknown."""
    coverage = report["coverage"]
    return bool(report["assumed_scale"]) and not (coverage["unused"] or coverage["unpaired"])


def _tool(page: ViewPage, staged: StagedAdapter, report: dict[str, Any], said: dict[str, Any]) -> None:
    with box("section", "panel"):
        Fragment("tool.html.j2", tool=said)
        if _is_assumed(report):
            return
        with box("div", "row") as place:
            _offer(page, staged, report, said, place)


def _offer(page: ViewPage, staged: StagedAdapter, report: dict[str, Any], said: dict[str, Any], place: Any) -> None:
    """Draw a button that converts the adapter for a tool and downloads the result.

    On failure, shows why."""
    to, tool, base = said["to"], said["tool"], _base(page, report)

    def told(wrong: str) -> None:
        show(bar, False)
        if wrong:
            place.clear()
            with place:
                line("\n".join(wrong.splitlines()[:_FEW]), "answer bad", role="alert")
        else:
            enable(does, True)
            page.say(f"It is written for {tool}, exactly")

    def write() -> None:
        if to in ("gguf", "tgi") and not base:
            own = command("adapter", "convert", staged.name, to=to, base="BASE", output="NEW")
            raise AdapterError(f"{to} depends on the base, and this server runs {page.studio.base}", fix=own)
        enable(does, False, "it is being written")
        show(bar, True)
        page.fetch(page.api(f"/v1/adapter_inspections/{staged.id}/file", to=to, base=base), told)

    does = button(f"Download for {tool}", permit("read", write))
    bar = progress(f"Writing it for {tool}")
    show(bar, False)


def _base(page: ViewPage, report: dict[str, Any]) -> str:
    """Return this server's base if the adapter belongs to it, else "".

    Compares fingerprints; without one, the base's name."""
    same = report["base_fingerprint"] == page.studio.service.catalog.fingerprint
    called = not report["base_fingerprint"] and report["base"].rstrip("/").rpartition("/")[2] == page.studio.base
    return page.studio.base if same or called else ""


def _keep(page: ViewPage, staged: StagedAdapter, report: dict[str, Any]) -> None:
    name = {"now": page.name_for(staged.name)}
    with box("section", "panel stack"):
        heading("Save", 2)
        if not report["verdict"]["use"]:
            line("This file cannot be used, so it cannot be saved.", "soft")
            return
        if not page.caller.can("write"):
            line("This key cannot change the library.", "soft")
            return

        def typed(text: str) -> None:
            name["now"] = text.strip()
            same.show(command("library", "add", staged.name, name["now"]))

        async def keep() -> None:
            studio, service = page.studio, page.studio.service
            added = await asyncio.to_thread(
                keep_staged, studio.library, service.tenancy, service.quotas, page.caller, staged, name["now"]
            )
            await page.go("adapter", ref=added.version.reference)
            page.say(f"{added.version.reference} is in the library")

        form_field("Name", name["now"], permit("read", typed), entered=permit("write", keep), most=200)
        button("Save to library", permit("write", keep), kind="filled")
        same = Command(command("library", "add", staged.name, name["now"]))
