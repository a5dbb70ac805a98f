"""Cross-site requests sent by a browser."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyText, responses, toy_app
from veneer.serve.access import KeyAccess, OpenAccess, Tenancy
from veneer.serve.settings import HttpSettings

KEY = "a-key-of-the-test-0123"
ASKED = {"prompt": "Hi", "max_tokens": 1}
EVIL = "https://evil.example"


def statuses(
    requests: list[dict[str, Any]], tenancy: Tenancy | None = None, settings: HttpSettings | None = None
) -> list[int]:
    """Return the status of each request; requests are given as httpx arguments."""
    app = toy_app(ToyEngine(ToyText()), ToyCatalog(), tenancy, settings)
    return [each.status_code for each in responses(app, requests, "http://localhost:8000")]


def asked(**headers: str) -> dict[str, Any]:
    return {"method": "POST", "url": "/v1/completions", "json": ASKED, "headers": headers}


OWN_HOSTS = ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST", "desk.example:8000"]
OTHER_HOSTS = ["evil.example", "evil.example:8000", "localhost.evil.example", "localhost@evil.example", "10.0.0.7"]
OTHER_HOSTS += ["evil.example/health?", "["]


@pytest.mark.parametrize("host", OWN_HOSTS + OTHER_HOSTS)
def test_a_server_without_keys_accepts_only_its_own_hosts(host: str) -> None:
    settings = HttpSettings(allowed_hosts=("desk.example",))
    exempt = [{"method": "GET", "url": path, "headers": {"host": host}} for path in ("/health", "/ready", "/metrics")]
    status = 200 if host in OWN_HOSTS else 421
    assert statuses([asked(host=host), *exempt], settings=settings) == [status, 200, 200, 200]


def test_a_server_with_keys_accepts_any_host() -> None:
    assert statuses([asked(host="10.0.0.7", authorization=f"Bearer {KEY}")], KeyAccess([KEY])) == [200]


@pytest.mark.parametrize("tenancy", [OpenAccess(), KeyAccess([KEY])], ids=["open", "keys"])
def test_changes_need_the_servers_own_origin(tenancy: Tenancy) -> None:
    key = {"authorization": f"Bearer {KEY}"}
    read: dict[str, Any] = {"method": "GET", "url": "/v1/models"}
    origins = ["http://localhost:8000", "https://app.example", EVIL, "null", "http://localhost:3000", "http://["]
    requests = [
        asked(**key),
        *(asked(origin=origin, **key) for origin in origins),
        read | {"headers": {"origin": EVIL, **key}},
        read | {"headers": {"origin": EVIL, "cookie": "a=b", **key}},
        read | {"headers": {"origin": "https://app.example", "cookie": "a=b", **key}},
    ]
    settings = HttpSettings(allowed_origins=("https://app.example",))
    assert statuses(requests, tenancy, settings) == [200, 200, 200, 403, 403, 403, 403, 200, 403, 200]


def test_wildcard_origin_requires_keys_and_refuses_cookies() -> None:
    settings, key = HttpSettings(allowed_origins=("*",)), {"authorization": f"Bearer {KEY}"}
    requests = [asked(origin=EVIL, **key), asked(origin=EVIL, cookie="a=b", **key)]
    assert statuses(requests, KeyAccess([KEY]), settings) == [200, 403]


@pytest.mark.parametrize("kind", [None, "text/plain", "text/plain; charset=utf-8", "application/x-www-form-urlencoded"])
def test_a_body_with_a_forms_content_type_is_refused(kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    body = b'{"prompt": "Hi", "max_tokens": 1}'
    paths = ("/v1/completions", "/v1/load_lora_adapter", "/nowhere")
    assert statuses([{"method": "POST", "url": at, "content": body, "headers": headers} for at in paths]) == [415] * 3


def test_only_a_front_door_and_the_operator_name_the_tenant_that_is_scheduled() -> None:
    """Otherwise a client could have a share of the engine under each name that it makes up."""
    door, admin = "door-0123456789abcdef", "admin-0123456789abcdef"
    named = {"x-llm-d-inference-fairness-id": "acme", "x-veneer-weight": "2.5"}

    def scheduled(tenancy: Tenancy, *headers: dict[str, str]) -> list[tuple[str, float]]:
        engine = ToyEngine(ToyText())
        answers = responses(toy_app(engine, ToyCatalog(), tenancy), [asked(**each) for each in headers])
        assert [each.status_code for each in answers] == [200] * len(headers)
        return [(each.tenant, each.weight) for each in engine.seen]

    keys = KeyAccess([KEY, door], admin, door)
    known = [{"authorization": f"Bearer {key}"} for key in (KEY, door, admin)]
    key, *honored = scheduled(keys, *(named | each for each in known))
    assert key == ("", 1.0)
    assert honored == [("~acme", 2.5)] * 2
    assert scheduled(keys, known[1], {"x-veneer-weight": "9"} | known[1]) == [("", 1.0)] * 2
    assert scheduled(OpenAccess(), named) == [("", 1.0)]
    wrong = [asked(**named | known[1] | {"x-veneer-weight": each}) for each in ("0", "-1", "nan", "1e9", "inf", "a")]
    assert statuses(wrong, keys) == [400] * 6
    assert statuses([asked(**named | known[0] | {"x-veneer-weight": "a"})], keys) == [200]
