"""Every view as somebody sees it who does not see it well: axe; nothing is cut off or wider than the window."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.conftest import LONG, Window
from tests.studio.conftest import Served

axe = pytest.importorskip("axe_playwright_python.base")
VIEWS = ["", "doctor", "?q=nothing-has-this", "adapter?ref=support@1", f"adapter?ref={LONG}"]
VIEWS += ["compare", "compare?c=support@1", "live", "train", "train?q=teach%20tiny-base%20rnak%203"]
"""Others add theirs."""


@pytest.mark.parametrize("path", VIEWS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_window(
    chromium: Any, served: Served, path: str, scheme: str, width: int
) -> None:
    context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    try:
        window = Window(context.new_page(), served.address)
        window.at(path)
        window.page.evaluate(axe.AXE_SCRIPT)
        found = window.page.evaluate("axe.run()")["violations"]
        bad = [f"{v['id']}: {v['help']}: {[n['html'][:200] for n in v['nodes'][:3]]}" for v in found
               if v["impact"] in ("serious", "critical")]  # fmt: skip
        assert not bad, "\n".join(bad)
        wide = window.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{wide} pixels are cut off"
        assert not window.wrong, window.wrong
    finally:
        context.close()
