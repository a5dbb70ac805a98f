"""The Objectives view: how many answers of the last hour were fast enough and did not fail, by tenant."""

from __future__ import annotations

from collections import Counter
from typing import Any

from veneer.studio.elements import Fragment, box, line
from veneer.studio.page import ViewPage

_TENANTS = 200
"""Maximum tenants shown; those furthest from their objectives come first."""


async def objectives_view(page: ViewPage) -> None:
    page.title("Objectives", "Are answers fast enough, and do they succeed? The last hour of this server, by tenant.")
    metrics = page.studio.service.metrics
    aims, allowed = metrics.objectives, metrics.objectives.allowed()
    texts = {
        "first_token": f"First token within {aims.first_token:g} s",
        "between_tokens": f"At most {aims.between_tokens:g} s between tokens",
        "errors": "No error",
    }

    def visible() -> dict[str, Counter[str]]:
        owner = page.principal.owner  # None: the principal sees all tenants
        return {name: level for name, level in metrics.levels().items() if owner in (None, name)}

    def refill() -> None:
        levels = visible()
        rows = [(name or "no tenant", *_row(level, allowed)) for name, level in levels.items()]
        rows.sort(key=lambda row: (min(margin for _, margin in row[2]), row[0]))
        if len(levels) > 1:
            rows.insert(0, ("all tenants", *_row(sum(levels.values(), Counter()), allowed)))
        heads = [(texts[name], 1 - share) for name, share in allowed.items()]
        table.show(heads=heads, rows=rows[:_TENANTS], more=len(rows[_TENANTS:]))

    with box("div", "stack"):
        table = Fragment("objectives.html.j2")
        text = "The time between tokens is an answer's mean. An answer that fails counts only as an error. The operator"
        line(f"{text} sets the objectives in the server's configuration file.", "soft small")
    refill()
    page.on_change(visible, 2.0, refill)


def _row(level: Counter[str], allowed: dict[str, float]) -> tuple[int, list[tuple[float, Any]]]:
    """Return the answers, and for each objective (the share that kept it, its distance from the objective)."""
    missed = {name: level[name] / level["answers"] for name in allowed}
    return level["answers"], [(1 - missed[name], share - missed[name]) for name, share in allowed.items()]
