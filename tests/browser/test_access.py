"""A tenant's browser: its own key, its own things, and of what is another's the same words as of what is nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser.conftest import Window, seen_in
from tests.serve.http.toy import wait_for
from tests.serve.saved_adapters import saved
from tests.studio.conftest import Served
from tests.studio.lessons import parcel_rows, told_lesson
from tests.tiny_base import tiny_base_dir
from veneer.jobs.store import JobStore
from veneer.library.library import open_library
from veneer.models.text.base import load_text
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.tenants import Tenants


@dataclass
class Shared:
    """A server of two tenants. `key`: acme's. `job`, `file`: globex's."""

    served: Served
    tenants: Tenants
    key: str
    job: str
    file: str


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("tenants")
    base_dir, url = tiny_base_dir(folder), str(folder / "tenants.sqlite")
    base, tenants, keys = load_text(str(base_dir)), Tenants(url, watch=False), dict[str, str]()
    for name in ("acme", "globex"):
        manage.add_tenant(tenants.store, name, adapters=[f"{name}/*"], who="test")
        keys[name] = manage.make_tenant_key(tenants.store, name, who="test")[1]
    with open_library(folder / "library") as library:
        for seed, name in enumerate(["acme/tone", "globex/tone", "support"]):
            saved(base, folder / str(seed), seed)
            library.add(folder / str(seed), name)
        jobs, rows = JobStore(library), parcel_rows(folder)
        told_lesson(jobs, base_dir, rows, folder, tenant="acme", of="acme/tone@1")
        theirs = told_lesson(jobs, base_dir, rows, folder, tenant="globex", of="globex/tone@1")
    with Served(
        folder, base_dir, folder / "library", "--tenants", url, "--admin-key", "operator-of-the-test"
    ) as served:
        staged = httpx.post(
            f"{served.address}/v1/adapter_inspections",
            params={"filename": "x.safetensors"},
            content=(Path(folder) / "1" / "adapter_model.safetensors").read_bytes(),
            headers={"authorization": f"Bearer {keys['globex']}", "content-type": "application/octet-stream"},
            timeout=60,
        )
        yield Shared(served, tenants, keys["acme"], theirs.id, str(staged.raise_for_status().json()["id"]))
        tenants.close()


def entered(window: Window, key: str, path: str) -> None:
    """By keys alone, to where the link led."""
    window.page.goto(f"{window.address}/studio/{path}")
    window.until("Sign in")
    window.page.keyboard.type(key)  # the field has the focus
    window.page.keyboard.press("Enter")
    window.page.wait_for_function("window.did_handshake === true && document.querySelector('.view h1')")


def test_another_s_links_lead_where_those_to_nothing_do(chromium: Any, shared: Shared) -> None:
    job, file, no = shared.job, shared.file, "ftjob-" + "x" * 24
    theirs = {
        "adapter?ref=globex/tone": "adapter?ref=globex/none",
        "adapter?ref=support@1": "adapter?ref=none@1",
        "compare?c=globex/tone%401": "compare?c=globex/none%401",
        "compare?c=acme/tone%401%2Bsupport%401": "compare?c=acme/tone%401%2Bnone%401",
        f"run?job={job}": f"run?job={no}",
        f"steps?job={job}": f"steps?job={no}",
        f"doctor?file={file}": "doctor?file=none",
        "live": "none",
    }
    with seen_in(chromium, shared.served.address) as window:
        entered(window, shared.key, "adapter?ref=acme/tone")
        window.heading("acme/tone@1")
        for path, nowhere in theirs.items():
            window.at(nowhere, there=False).heading("Not found")
            said = window.page.locator("body").inner_text()
            window.at(path, there=False).heading("Not found")
            assert window.page.locator("body").inner_text() == said, path
        for path in (f"/v1/jobs/{job}/samples/2", f"/v1/adapter_inspections/{file}", "/v1/models/globex/tone@1"):
            status = window.page.evaluate("path => fetch('/studio/api' + path).then((answer) => answer.status)", path)
            assert status == 404, path
        window.wrong[:] = [line for line in window.wrong if "404" not in line]


def test_every_view_has_its_own_things_and_a_key_that_is_revoked_opens_nothing(chromium: Any, shared: Shared) -> None:
    with seen_in(chromium, shared.served.address) as window:
        entered(window, shared.key, "")
        page = window.page
        page.locator(".cards .card", has_text="acme/tone").wait_for()
        assert page.locator(".cards .card").count() == 1
        window.at("compare")
        page.get_by_role("button", name="acme/tone@1").wait_for()
        assert page.locator(".another .chip").count() == 1
        window.at("train")
        page.get_by_role("link", name="acme/lesson").click()
        window.heading("acme/lesson")
        page.get_by_role("link", name="Steps", exact=True).click()
        window.heading("Steps of acme/lesson")
        for text in ("globex", "support"):
            assert page.get_by_text(text).count() == 0
        window.at("")
        (key,) = (each for each in manage.list_keys(shared.tenants.store, "acme"))
        manage.revoke_key(shared.tenants.store, key.id, who="test")
        head = {"authorization": f"Bearer {shared.key}"}
        wait_for(lambda: httpx.get(f"{shared.served.address}/v1/models", headers=head).status_code == 401)
        page.get_by_label("Find", exact=True).fill("tone")
        window.until("Sign in")
