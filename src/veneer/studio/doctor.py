"""The Doctor view: identify an adapter file, and convert it for other tools."""

from __future__ import annotations

import asyncio
from typing import Any

from veneer.errors import counted
from veneer.formats.topology import families
from veneer.library.upload_stage import StagedAdapter
from veneer.serve.http.surfaces.adapters import add_staged, staged_report
from veneer.studio import elements
from veneer.studio.adapter import TARGETS
from veneer.studio.page import NotFound, ViewPage
from veneer.train.report.log import size

_FEW = 12
_Report = dict[str, Any]


async def doctor_view(page: ViewPage) -> None:
    async def uploaded(answer: dict[str, Any]) -> None:
        await page.go("doctor", file=str(answer.get("id", "")))

    def upload_url(name: str) -> str:
        return page.api("/v1/adapter_inspections", filename=name)

    page.on_drop("Drop to inspect; the file is not saved", upload_url, uploaded)
    id = page.query.get("file")
    if not id:
        page.title("Inspect a file", "Identify any adapter file, and convert it for other tools.")
        with elements.box("div", "empty"):
            elements.heading("Drop a file anywhere on this page")
            elements.line(
                "A .safetensors or .gguf file from any tool, or a .zip of a PEFT folder; deleted after an hour."
            )
            elements.button("Choose a file", elements.permit("read", page.pick_file), kind="filled", key="o")
        elements.Command(elements.command("adapter", "inspect", "FILE"))
        return
    if (staged := page.studio.service.staging.get(page.principal.tenant, id)) is None:
        raise NotFound("This file is no longer available.", fix="upload it again; uploads expire after an hour")
    page.title(staged.name, f"{size(staged.size)} · deleted after an hour unless you save it")
    with elements.box("div", "row"):
        elements.button("Another file", elements.permit("read", page.pick_file), key="o")
    report = await asyncio.to_thread(staged_report, staged)
    coverage, verdict = report["coverage"], report["verdict"]
    assumed = bool(report["assumed_scale"]) and not (coverage["unused"] or coverage["unpaired"])
    """Whether everything about the adapter is known except its scale."""
    with elements.box("div", "split"):
        with elements.box("div"):
            elements.Fragment(
                "diagnosis.html.j2",
                facts=_facts(report),
                coverage=coverage,
                few=_FEW,
                assumed=assumed,
                notes=report["notes"][:_FEW],
                **{key: verdict[key] for key in ("use", "why", "fix")},
            )
            elements.heading("Other tools")
            if assumed:
                elements.line("To convert the file, give the alpha used in training:")
                convert = elements.command("adapter", "convert", staged.name, alpha="N", to="peft", output="NEW")
                elements.Command(convert)
            elif verdict["use"]:
                _draw_downloads(page, staged, report)
            if report["targets"]:
                elements.heading("Target modules")
                elements.Fragment("targets.html.j2", targets=report["targets"])
            elements.Command(elements.command("adapter", "inspect", staged.name))
        with elements.box("aside", "stack"), elements.panel("Save"):
            if not verdict["use"]:
                elements.line("This file cannot be used, so it cannot be saved.", "soft")
            elif not page.principal.can("write"):
                elements.line("Your key cannot change the library.", "soft")
            else:
                _draw_save(page, staged)


def _facts(report: _Report) -> list[tuple[str, str]]:
    """Return (name, value) lines for an inspection report."""
    family = families().get(report["family"])

    def several(counts: dict[str, int]) -> str:
        parts = [f"{value} ({n})" if len(counts) > 1 else value for value, n in list(counts.items())[:6]]
        return ", ".join(parts) + (", …" if len(counts) > 6 else "")

    dropout = f", dropout {report['dropout']:g}" if report["dropout"] else ""
    dtypes = ", ".join(report["dtypes"])
    facts = [
        ("format", report["format"]),
        ("evidence", "; ".join(report["reasons"][:4])),
        ("family", family.label if family is not None else report["family"]),
        ("base", report["base"] or "not stated"),
        ("kind", ", ".join(report["variants"]) + dropout),
        ("size", f"{counted(report['pairs'], 'pair')}, {report['parameters']:,} parameters in {dtypes}"),
        ("rank", several(report["ranks"])),
        ("alpha", several(report["alphas"])),
        ("scale", several(report["scales"])),
        ("trigger words", ", ".join(report["trigger_words"][:_FEW])),
        ("license", str(report["card"].get("licence", ""))),
        ("digest", report["digest"]),
        ("sha256", str(report["hashes"]["sha256"])),
    ]
    return [(name, value) for name, value in facts if value]


def _draw_downloads(page: ViewPage, staged: StagedAdapter, report: _Report) -> None:
    """Draw a download link for each layout to which this server can convert the adapter."""
    base, kind = _server_base(page, report), "image" if any(report["components"]) or report["family"] else "text"
    with elements.box("div", "row"):
        for to in TARGETS[kind]:
            if base or to != "gguf":  # conversion to GGUF needs the adapter's base, which must be this server's base
                url = page.api(f"/v1/adapter_inspections/{staged.id}/file", to=to, base=base)
                elements.link(f"for {to}", url, "button quiet", download=True)


def _server_base(page: ViewPage, report: _Report) -> str:
    """Return this server's base if the adapter is for it, else "".

    Compares the fingerprints, or the names if the adapter has no fingerprint."""
    base, fingerprint = page.studio.base, report["base_fingerprint"]
    if fingerprint:
        return base if fingerprint == page.studio.service.catalog.fingerprint else ""
    return base if report["base"].rstrip("/").rpartition("/")[2] == base else ""


def _draw_save(page: ViewPage, staged: StagedAdapter) -> None:
    studio, service, name = page.studio, page.studio.service, page.name_for(staged.name)

    def typed(text: str) -> None:
        same.show(text=elements.command("library", "add", staged.name, text.strip()))

    async def save() -> None:
        name = str(field.value).strip()
        added = await asyncio.to_thread(
            add_staged, studio.library, service.tenancy, service.quotas, page.principal, staged, name
        )
        await page.go("adapter", ref=added.version.reference)
        page.notify(f"Saved {added.version.reference}")

    field = elements.form_field(
        "Name", name, elements.permit("read", typed), on_enter=elements.permit("write", save), max_length=200
    )
    elements.button("Save to library", elements.permit("write", save), kind="filled")
    same = elements.Command(elements.command("library", "add", staged.name, name))
