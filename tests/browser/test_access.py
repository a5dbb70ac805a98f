"""A tenant's browser shows the tenant's own objects; other tenants' objects look like missing objects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser.conftest import Window, new_window
from tests.serve.http.toy import wait_for
from tests.serve.saved_adapters import saved
from tests.studio.conftest import OPERATOR, StudioServer, tenant_keys
from tests.studio.recorded_jobs import parcel_rows, recorded_job
from tests.tiny_base import tiny_base_dir
from veneer.jobs.store import JobStore
from veneer.library.library import open_library
from veneer.models.text.base import load_text
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store


@dataclass
class Shared:
    """A server with two tenants. `key`: acme's API key. `job`, `file`: a job and a file of globex."""

    server: StudioServer
    key: str
    job: str
    file: str


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("tenants")
    base_dir, database = tiny_base_dir(folder), folder / "tenants.sqlite"
    base, keys = load_text(str(base_dir)), tenant_keys(database)
    with open_library(folder / "library") as library:
        for seed, name in enumerate(["acme/tone", "globex/tone", "support"]):
            saved(base, folder / str(seed), seed)
            library.add(folder / str(seed), name)
        jobs, rows = JobStore(library), parcel_rows(folder)
        for tenant in ("acme", "globex"):
            job = recorded_job(jobs, base_dir, rows, folder, tenant=tenant, published=f"{tenant}/tone@1")
    options = ("--tenants", str(database), "--admin-key", OPERATOR)
    with StudioServer(folder, base_dir, folder / "library", *options) as server:
        staged = httpx.post(
            f"{server.address}/v1/adapter_inspections?filename=x.safetensors",
            content=(Path(folder) / "1" / "adapter_model.safetensors").read_bytes(),
            headers={"authorization": f"Bearer {keys['globex']}", "content-type": "application/octet-stream"},
            timeout=60,
        )
        yield Shared(server, keys["acme"], job.id, str(staged.raise_for_status().json()["id"]))


def sign_in(window: Window, key: str, path: str) -> None:
    """Sign in with the keyboard only, and open `path`."""
    window.page.goto(f"{window.address}/studio/{path}")
    window.until("Sign in")
    window.page.keyboard.type(key)  # the key field has the focus
    window.keys("Enter")
    window.page.wait_for_function("window.did_handshake === true && document.querySelector('.view h1')")


def test_links_of_another_tenant_look_like_missing_ones(chromium: Any, shared: Shared) -> None:
    job, file, missing = shared.job, shared.file, "ftjob-" + "x" * 24
    links = {
        "adapter?ref=globex/tone": "adapter?ref=globex/none",
        "adapter?ref=support@1": "adapter?ref=none@1",
        "compare?c=globex/tone%401": "compare?c=globex/none%401",
        "compare?c=acme/tone%401%2Bsupport%401": "compare?c=acme/tone%401%2Bnone%401",
        f"compare?job={job}": f"compare?job={missing}",
        f"run?job={job}": f"run?job={missing}",
        f"doctor?file={file}": "doctor?file=none",
        "live": "none",
    }
    with new_window(chromium, shared.server.address) as window:
        sign_in(window, shared.key, "adapter?ref=acme/tone")
        window.heading("acme/tone@1")
        for path, other in links.items():
            window.open(other, status="404").heading("Not found")
            text = window.page.locator("body").inner_text()
            window.open(path, status="404").heading("Not found")
            assert window.page.locator("body").inner_text() == text, path
        for path in (f"/v1/jobs/{job}/samples/2", f"/v1/adapter_inspections/{file}", "/v1/models/globex/tone@1"):
            status = window.page.evaluate("path => fetch('/studio/api' + path).then((answer) => answer.status)", path)
            assert status == 404, path
        window.ignore("404")


def test_views_show_own_objects_until_the_key_is_revoked(chromium: Any, shared: Shared) -> None:
    with new_window(chromium, shared.server.address) as window:
        sign_in(window, shared.key, "")
        page = window.page
        page.locator(".cards .card", has_text="acme/tone").wait_for()
        assert page.locator(".cards .card").count() == 1
        window.open("compare")
        page.get_by_role("button", name="acme/tone@1").wait_for()
        assert page.locator(".another .chip").count() == 1
        window.open("train")
        page.get_by_role("link", name="acme/lesson").click()
        window.heading("acme/lesson")
        for text in ("globex", "support"):
            assert page.get_by_text(text).count() == 0
        window.open("")
        store = Store(str(shared.server.home / "tenants.sqlite"))
        (key,) = manage.list_keys(store, "acme")
        manage.revoke_key(store, key.id, actor="test")
        store.close()
        headers = {"authorization": f"Bearer {shared.key}"}
        wait_for(lambda: httpx.get(f"{shared.server.address}/v1/models", headers=headers).status_code == 401)
        page.get_by_label("Search", exact=True).fill("tone")
        window.until("Sign in")
