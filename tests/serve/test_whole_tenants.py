"""Servers with tenants and the real engine: tenants learn nothing about each other, behind one server or two."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.library.conftest import _s3_server, postgres, s3  # noqa: F401
from tests.serve.tenancy.conftest import new_tenant
from tests.serve.whole import Shop, Whole, prompt, served
from veneer.library.library import open_library
from veneer.serve.settings import LedgerSettings
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store


@dataclass
class Doors:
    """One server or two. A request goes to each of them, in a random order, and must have the same answer."""

    servers: Sequence[Whole]
    store: Store
    pick: random.Random = field(default_factory=lambda: random.Random(1))

    def send(self, method: str, path: str, key: str, **more: Any) -> httpx.Response:
        """Send a request to a random server."""
        headers = {"Authorization": f"Bearer {key}"} | more.pop("headers", {})
        url = f"{self.pick.choice(self.servers).url}{path}"
        return httpx.request(method, url, headers=headers, timeout=60, **more)

    def asked(self, key: str, model: str, ids: list[int], **more: Any) -> tuple[int, int]:
        """Request a short completion of every server. Return (status, number of cached prompt tokens)."""
        body = {"model": model, "prompt": ids, "max_tokens": 2, **more}
        found = set()
        for each in self.pick.sample(list(self.servers), len(self.servers)):
            alone = replace(self, servers=[each])
            answer = alone.send("POST", "/v1/completions", key, json=body)
            found.add((answer.status_code, answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]))
        (same,) = found
        return same


@dataclass
class SharedShop(Shop):
    """The shop's base and adapters, with a library elsewhere."""

    location: str = ""

    @cached_property
    def library(self) -> Any:
        return open_library(self.location)


@pytest.fixture(params=["one server", "two servers"])
def doors(request: pytest.FixtureRequest, shop: Shop, tmp_path: Path) -> Iterator[Doors]:
    """Yield a server on SQLite and a folder, or two servers on one PostgreSQL and one S3."""
    place, number = str(tmp_path / "tenants.sqlite"), 1
    with ExitStack() as stack:
        if request.param == "two servers":
            number, new_schema = 2, request.getfixturevalue("postgres")
            place = new_schema()
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setenv("VENEER_LIBRARY_INDEX", new_schema())
            shop = SharedShop(shop.folder, location=f"{request.getfixturevalue('s3')}/library")
            for kind in ("plain", "rs"):
                shop.library.add(shop.adapters / kind, kind)
            stack.callback(shop.library.close)
        store = Store(place)
        stack.callback(store.close)
        ledgers = [LedgerSettings(folder=tmp_path / f"journals-{n}", room=1 << 20) for n in range(number)]
        servers = [stack.enter_context(served(shop, tenants=place, ledger=each)) for each in ledgers]
        yield Doors(servers, store)


def test_cache_hits_reveal_nothing_between_tenants(doors: Doors) -> None:
    """The operator can let tenants share cached prefixes per adapter. `cache_salt` also separates requests of the
    same tenant."""
    store, asked = doors.store, doors.asked
    keys = {name: new_tenant(store, name, ["*"]) for name in ("acme", "globex")}
    ids, most = prompt(97), 96
    for model in ("tiny", "plain", "rs"):
        assert asked(keys["acme"], model, ids) == (200, 0)
        assert asked(keys["globex"], model, ids) == (200, 0), "B repeats A's prompt"
        assert asked(keys["acme"], model, ids) == (200, most), "and A its own"
        assert asked(keys["acme"], model, ids, cache_salt="x") == (200, 0)
        assert asked(keys["acme"], model, ids, cache_salt="x") == (200, most)
        assert asked(keys["globex"], model, ids, cache_salt="x") == (200, 0)

    manage.change_settings(store, "", {"shared_cache": ["plain", "tiny"]}, actor="me")
    for model in ("plain", "tiny", "plain@1"):
        asked(keys["acme"], model, ids)
        assert asked(keys["globex"], model, ids) == (200, most)
        assert asked(keys["globex"], model, ids, cache_salt=f"y {model}") == (200, 0)
    both = {"mix": ["plain", "rs"]}
    assert asked(keys["acme"], "", ids, **both) == (200, 0)
    assert asked(keys["globex"], "", ids, **both) == (200, 0), "not all of the mix is shared"
    manage.change_settings(store, "", {"shared_cache": ["tiny"]}, actor="me")
    assert asked(keys["globex"], "plain", ids) == (200, most), "its own, from before"
    assert asked(keys["acme"], "plain", prompt(100, 2)) == (200, 0)
    assert asked(keys["globex"], "plain", prompt(100, 2)) == (200, 0)


def test_any_server_serves_and_downloads_an_adapter_that_another_received(doors: Doors, shop: Shop) -> None:
    """Downloads need an API key instead of a signed URL, so each server answers them."""
    acme, globex = (new_tenant(doors.store, name, [f"{name}/*"]) for name in ("acme", "globex"))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for each in sorted((shop.adapters / "rs").iterdir()):
            file.write(each, each.name)
    data = archive.getvalue()
    first, last = doors.servers[0], doors.servers[-1]
    there, elsewhere = (replace(doors, servers=[each]) for each in (first, last))
    head = {"content-type": "application/octet-stream"}
    made = there.send("POST", "/v1/adapters?name=acme/mine&filename=x.zip", acme, content=data, headers=head)
    assert made.status_code in (200, 201), made.text
    body = {"model": "acme/mine", "prompt": prompt(9), "max_tokens": 2}
    assert elsewhere.send("POST", "/v1/completions", acme, json=body).status_code == 200
    path = "/v1/adapter_files/acme/mine@1"
    assert elsewhere.send("GET", path, acme).content == there.send("GET", path, acme).content != b""
    assert elsewhere.send("GET", path, globex).status_code == 404
    assert elsewhere.send("GET", path, "vnr-0").status_code == 401
    assert elsewhere.send("DELETE", "/v1/adapters/acme/mine@1", acme).status_code == 200
    assert there.send("POST", "/v1/completions", acme, json=body).status_code == 404
