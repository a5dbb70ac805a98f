"""A new user with a mouse, from an empty library to a canary that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from tests.browser.conftest import new_window
from tests.studio.conftest import StudioServer
from veneer.serve.tenancy.store import Store


def test_an_empty_library_becomes_a_canary_release(
    chromium: Any, tiny_library: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, database, base = tmp_path / "here", tmp_path / "tenants.sqlite", tiny_library[0]
    folder.mkdir()
    rows = [{"prompt": f"Where is parcel {i}?", "completion": f"On shelf {i % 7}."} for i in range(24)]
    (folder / "parcels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--open", "--train", "--tenants", str(database))
    with (
        StudioServer(tmp_path, base, tmp_path / "library", *options, cwd=folder) as server,
        new_window(chromium, server.address) as window,
    ):
        page = window.open().page
        page.set_default_timeout(120_000)
        page.get_by_text("Train on parcels.jsonl").click()
        window.press("Start")
        window.heading("parcels")
        page.get_by_role("link", name="Open parcels@1").wait_for(
            timeout=600_000
        )  # waits until two processes have started and trained
        window.press("Use this step")
        window.confirm("Use this step")
        window.until("is step")
        page.get_by_role("link", name="Go live").click()
        page.get_by_text("parcels begins: 90% of users get tiny-base and 10% of users get parcels@").wait_for()
        window.press("Create route")
        page.get_by_role("region", name="Route parcels").wait_for()
        ((_, route),) = Store(str(database)).refresh().routes.items()
        (old, most), (new, few) = route.targets
        assert (old, most, few) == (base.name, 90, 10)
        assert new.startswith("parcels@")
        body = {"model": "parcels", "prompt": "Where is parcel 3?", "max_tokens": 2, "user": "anna"}
        assert httpx.post(f"{server.address}/v1/completions", json=body).status_code == 200
