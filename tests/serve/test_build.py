"""A server is built from the parts that its settings need; settings without effect are refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.serve.http.toy import ToyCatalog
from tests.tiny_base import tiny_base_dir
from tests.tiny_image_base import tiny_image_base
from veneer.errors import ConfigError
from veneer.serve.build import Extend, Extension, build, operator_routes, tenancy_of
from veneer.serve.checks import check_settings, open_stores
from veneer.serve.settings import EngineSettings, FleetSettings, HttpSettings, LedgerSettings, ServeSettings
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store

FLEET = FleetSettings(upstream="http://127.0.0.1:1")


def load(settings: ServeSettings) -> None:
    """Build a server, load its base, and close the server."""

    async def live() -> None:
        built = build(settings, print)
        try:
            await built.load()
        finally:
            await built.stop()

    asyncio.run(live())


def test_a_server_with_tenants_asks_for_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    said: list[str] = []

    def kind(**settings: Any) -> str:
        opened = open_stores(chosen := ServeSettings("toy", **settings))
        tenancy = tenancy_of(chosen, said.append, opened.store)
        tenancy.close()
        opened.close()
        return type(tenancy).__name__ + ("+admin" if operator_routes(chosen, tenancy, ToyCatalog()) else "")

    assert kind() == "OpenAccess"
    assert not said
    assert kind(host="0.0.0.0") == "OpenAccess"
    assert "any client that reaches 0.0.0.0:8000" in said.pop()
    where = str(tmp_path / "tenants.sqlite")
    (store := Store(where)).close()
    assert kind() == "OpenTenants", "an empty database does not close a local server"
    assert said.pop() == f"this machine needs no key; routes and ledger: {where}"
    assert kind(host="0.0.0.0") == kind(tenants=where) == "Tenants"
    assert "no tenants yet" in said.pop()
    assert kind(admin_key="an-admin-key-of-some-length") == "Tenants+admin"
    assert kind(keys=("sk-0123456789abcdef",)) == "KeyAccess"
    manage.add_tenant(store, "acme", actor="test")
    store.close()
    said.clear()
    assert kind() == "Tenants"
    assert f"{where}, so requests need a key, unless --open" in said.pop()
    assert kind(open=True) == kind(open=True, tenants=where) == "OpenTenants"
    assert kind(open=True, admin_key="an-admin-key-of-some-length") == "OpenTenants+admin"
    assert kind(open=True, host="0.0.0.0") == "OpenAccess"


def test_extensions_stop_in_reverse_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    heard: list[str] = []

    def of(name: str) -> Extend:
        async def start() -> None:
            heard.append(f"start {name}")

        async def stop() -> None:
            heard.append(f"stop {name}")

        extension = Extension([], {name: 1}, [name], start, stop, lambda app: heard.append(f"mount {name}"))
        return lambda service, library: extension

    async def live() -> None:
        built = build(ServeSettings(str(tiny_base_dir(tmp_path))), print, extends=[of("a"), of("b")])
        await built.start()
        await built.stop()

    asyncio.run(live())
    assert heard == ["mount a", "mount b", "start a", "start b", "stop b", "stop a"]


@pytest.mark.parametrize(
    ("option", "more"),
    [
        ("--batch-invariant", {"engine": EngineSettings(batch_invariant=True)}),
        ("--cache-memory", {"engine": EngineSettings(cache_bytes=1 << 20)}),
        ("--adapter-memory", {"engine": EngineSettings(adapter_bytes=1 << 20)}),
        ("--dtype", {"dtype": "float32"}),
        ("--device", {"device": "cpu"}),
        ("--quantize", {"quantize": "nf4"}),
    ],
)
def test_computing_options_are_refused_with_upstreams(option: str, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{option} applies to .* the upstream server runs the model") as caught:
        load(ServeSettings("anything", fleet=FLEET, **more))
    assert caught.value.where == option


@pytest.mark.parametrize(
    ("option", "more"),
    [
        ("--quantize", {"quantize": "nf4"}),
        ("--cache-memory", {"engine": EngineSettings(cache_bytes=1 << 20)}),
        ("max_tokens", {"http": HttpSettings(max_tokens=100)}),
        ("tenant_mixes", {"fleet": FleetSettings(mixes=3)}),
    ],
)
def test_text_options_are_refused_with_image_bases(option, more, tmp_path_factory):
    base = str(tiny_image_base(tmp_path_factory.getbasetemp(), "flux1"))
    with pytest.raises(ConfigError, match=f"^{option} applies to"):
        load(ServeSettings(base, **more))


@pytest.mark.parametrize("more", [{"mixes": 3}, {"mix_bytes": 1 << 20}])
def test_upstream_options_are_refused_without_upstreams(more: dict[str, Any], tmp_path: Path) -> None:
    base = str(tiny_base_dir(tmp_path))
    with pytest.raises(ConfigError, match="applies to mixes in vLLM, but this server's own engine runs the model"):
        load(ServeSettings(base, fleet=replace(FleetSettings(), **more)))


@pytest.mark.parametrize(
    ("option", "more"), [("days", {"days": 3.0}), ("room", {"room": 1 << 20}), ("folder", {"folder": Path("x")}),
                         ("sync", {"synced": True})],
)  # fmt: skip
def test_ledger_options_are_refused_without_tenants(option, more, tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    settings = ServeSettings(str(tiny_base_dir(tmp_path)), ledger=LedgerSettings(**more))
    with pytest.raises(ConfigError, match=f"ledger_{option} applies to the ledger of tenants"):
        check_settings(settings)
    check_settings(replace(settings, tenants=str(tmp_path / "tenants.sqlite"))).close()
