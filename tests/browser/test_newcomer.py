"""A newcomer, with the mouse alone and nothing but the page: from an empty library to a canary that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from tests.browser.conftest import Window
from tests.studio.conftest import Served
from veneer.serve.tenancy.store import Store


def test_from_nothing_to_a_canary(chromium: Any, kept: tuple[Path, Path], tmp_path: Path) -> None:
    here, database = tmp_path / "here", tmp_path / "tenants.sqlite"
    here.mkdir()
    rows = [{"prompt": f"Where is parcel {i}?", "completion": f"On shelf {i % 7}."} for i in range(24)]
    (here / "parcels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    served = Served(tmp_path, kept[0], tmp_path / "library", "--open", "--train", "--tenants", str(database), cwd=here)
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    try:
        served.wait()
        window = Window(context.new_page(), served.address)
        page = window.at().page
        page.set_default_timeout(120_000)
        page.get_by_text("Train on parcels.jsonl").click()
        page.get_by_role("button", name="Start", exact=True).click()
        window.heading("parcels")
        page.get_by_role("link", name="Choose a step").click(timeout=600_000)  # two processes begin, and train
        page.get_by_role("button", name="Use this step").first.click()
        page.locator("dialog[open]").get_by_role("button", name="Use this step").click()
        page.get_by_text("parcels@prod", exact=True).wait_for()
        page.get_by_role("link", name="Go live").first.click()
        page.get_by_text("parcels begins: 90 % of users get tiny-base and 10 % of users get parcels@").wait_for()
        page.get_by_role("button", name="Create route").click()
        page.get_by_role("region", name="The route parcels").wait_for()
        ((_, route),) = Store(str(database)).look().routes.items()
        (old, most), (new, few) = route.targets
        assert (old, most, few) == (kept[0].name, 90, 10)
        assert new.startswith("parcels@")
        asked = {"model": "parcels", "prompt": "Where is parcel 3?", "max_tokens": 2, "user": "anna"}
        assert httpx.post(f"{served.address}/v1/completions", json=asked).status_code == 200
        assert not window.wrong, window.wrong
    finally:
        context.close()
        served.end()
