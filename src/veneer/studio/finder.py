"""Search for views, adapters, runs and routes by name."""

from __future__ import annotations

import asyncio

from veneer.serve.tenancy.store import ALL
from veneer.studio.frame import ViewPage

_EACH = 6


async def finds(page: ViewPage, text: str) -> list[dict[str, str]]:
    """Return results with `title`, `what` (kind) and `to` (link), views first."""
    words = text.lower().split()[:8]
    out = [
        {"title": view.title, "what": f"view · g {view.key}", "to": page.link(view.path)}
        for view in page.studio.views
        if view.key and page.caller.can(view.needs) and _has(view.title, words)
    ]
    return out + await asyncio.to_thread(_kept, page, text, words) if words else out


def _kept(page: ViewPage, text: str, words: list[str]) -> list[dict[str, str]]:
    studio, caller = page.studio, page.caller
    sees = None if caller.can("operate") else caller.sees
    found = studio.library.browse(text[:200], sees=sees, limit=_EACH).versions
    out = [{"title": v.reference, "what": "adapter", "to": page.link("adapter", ref=v.reference)} for v in found]
    jobs = studio.jobs.jobs(caller.owner, limit=100)[0] if caller.can("train") else []
    named = [job for job in jobs if _has(f"{job.name} {job.id}", words)][:_EACH]
    out += [
        {"title": job.name or job.id, "what": f"run · {job.state}", "to": page.link("run", job=job.id)} for job in named
    ]
    if studio.tenants is not None and caller.can("operate"):
        routes = [each for each in studio.tenants.settings.routes.values() if _has(each.name, words)][:_EACH]
        out += [
            {
                "title": each.name,
                "what": "route" + ("" if each.tenant == ALL else f" of {each.tenant}"),
                "to": page.link("live", route=each.name),
            }
            for each in routes
        ]
    return out


def _has(name: str, words: list[str]) -> bool:
    return all(word in name.lower() for word in words)
