"""Tokens of an OpenID Connect issuer. The issuer is oidc-provider-mock, or one that the tests control."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from joserfc import jwk, jwt

from tests.test_readme import ROOT, blocks
from veneer.errors import ConfigError
from veneer.serve.config import server_config
from veneer.serve.principal import Principal
from veneer.serve.request import Refused
from veneer.serve.settings import OidcSettings
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.oidc import OidcUsers
from veneer.serve.tenancy.tenants import OpenTenants, Tenants


class Issuer:
    """An issuer with keys of our own. `asked`: requests for the keys; `broken`: whether it fails; `answering`: whether
    it answers now."""

    def __init__(self) -> None:
        self.keys = [jwk.generate_key("RSA", 2048, {"kid": "one", "use": "sig"})]
        self.asked, self.broken, self.url, self.body = 0, False, "", b""
        self.answering = threading.Event()
        self.answering.set()

    def token(self, key: Any = None, alg: str = "RS256", head: Any = None, **claims: Any) -> str:
        key = key or self.keys[0]
        usual = {"iss": self.url, "aud": "veneer", "sub": "ana", "exp": time.time() + 60, "tenant": "acme"}
        all_claims = {k: v for k, v in (usual | {"roles": ["caller"]} | claims).items() if v is not None}
        return jwt.encode({"alg": alg, "kid": key.kid} | (head or {}), all_claims, key, algorithms=[alg])

    def answer(self, path: str) -> bytes:
        if path.endswith("/openid-configuration"):
            return json.dumps({"issuer": self.url, "jwks_uri": f"{self.url}/keys"}).encode()
        self.asked += 1
        return self.body or json.dumps({"keys": [key.as_dict(private=False) for key in self.keys]}).encode()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    here = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = here.answer(self.path)
            here.answering.wait(30)
            self.send_response(500 if here.broken else 200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield here
    server.shutdown()
    thread.join()
    server.server_close()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def opened(folder: Path, issuer: str, kind: type[Tenants] = Tenants, **more: Any) -> Iterator[Tenants]:
    tenants = kind(str(folder / "t.sqlite"), oidc=OidcSettings(issuer, "veneer", **more), watch=False)
    manage.add_tenant(tenants.store, "acme", adapters=["acme/*"], weight=2.0, actor="me")
    yield tenants
    tenants.close()


def who(tenants: Tenants, token: str) -> Principal:
    return asyncio.run(tenants.authenticate(token))


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def refusal(act: Callable[[], Any]) -> Refused:
    with pytest.raises(Refused) as error:
        act()
    return error.value


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the provider uses authlib.jose
def test_a_token_of_a_real_provider_gives_its_tenant_and_roles(quick: Path) -> None:
    """The provider issues the token through the authorization code flow, as to an application."""
    import httpx
    from oidc_provider_mock import User, run_server_in_thread

    user = User(sub="ana@acme.example", claims={"tenant": "acme", "groups": ["staff", "ml-team"]})
    with run_server_in_thread(user_claims=[user]) as server, httpx.Client() as browser:
        url = f"http://localhost:{server.server_port}"
        asked = {"client_id": "veneer", "redirect_uri": "http://app/", "response_type": "code", "scope": "openid"}
        back = browser.post(f"{url}/oauth2/authorize", params=asked, data={"sub": user.sub})
        code = httpx.URL(back.headers["location"]).params["code"]
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": "http://app/"}
        token = browser.post(f"{url}/oauth2/token", data=form, auth=("veneer", "secret")).json()["id_token"]
        roles = {"role_claim": "groups", "roles": {"ml-team": "trainer"}}
        with opened(quick, url, **roles) as tenants:
            ana = who(tenants, token)
            assert (ana.kind, ana.tenant, ana.roles, ana.weight) == ("tenant", "acme", ("trainer",), 2.0)
            assert ana.actor == "acme/oidc:ana@acme.example"
            assert (ana.can("train"), ana.can("keys"), ana.sees("acme/x"), ana.sees("b/x")) == (
                True,
                False,
                True,
                False,
            )
        with opened(quick / "other", url, tenant_claim="sub", **roles) as tenants:
            assert refusal(lambda: who(tenants, token)).status == 403


def test_only_tokens_of_the_issuer_for_this_audience_are_valid(quick: Path, issuer: Issuer) -> None:
    public = issuer.keys[0].as_pem(private=False)
    stranger = jwk.generate_key("RSA", 2048, {"kid": "one"})
    head, body, signature = issuer.token().split(".")
    symmetric = _base64(b'{"alg": "HS256", "kid": "one"}') + f".{body}"
    by_public_key = _base64(hmac.digest(public, symmetric.encode(), "sha256"))
    wrong = {
        "signature": f"{head}.{body}.{signature[:-8]}AAAAAAAA",
        "key": issuer.token(stranger),
        "public key as secret": f"{symmetric}.{by_public_key}",
        "none": f"eyJhbGciOiJub25lIiwia2lkIjoib25lIn0.{body}.",
        "expired": issuer.token(exp=time.time() - 60),
        "no expiry": issuer.token(exp=None),
        "not yet": issuer.token(nbf=time.time() + 3600),
        "issuer": issuer.token(iss="https://elsewhere.example"),
        "audience": issuer.token(aud="another"),
        "no audience": issuer.token(aud=None),
        "no subject": issuer.token(sub=None),
        "nested": f"eyJ{'W1tb' * 1500}.{body}.{signature}",
        "not JSON": "eyJ.eyJ.x",
    }
    with opened(quick, issuer.url) as tenants:
        assert who(tenants, issuer.token()).can("infer")
        assert who(tenants, issuer.token(aud=["other", "veneer"])).can("infer")
        found = {name: refusal(lambda token=token: who(tenants, token)) for name, token in wrong.items()}
        assert {name: e.status for name, e in found.items()} == dict.fromkeys(wrong, 401)
        for claims in (
            {"tenant": None},
            {"tenant": "globex"},
            {"roles": None},
            {"roles": ["operator"]},
            {"sub": "a\nb"},
        ):
            assert refusal(lambda claims=claims: who(tenants, issuer.token(**claims))).status == 403
        manage.change_settings(tenants.store, "acme", {"enabled": False}, actor="me")
        assert refusal(lambda: who(tenants, issuer.token())).status == 403
    assert issuer.asked == 1


def test_roles_can_be_nested_and_add_up(quick: Path, issuer: Issuer) -> None:
    with opened(quick, issuer.url, role_claim="realm_access.roles") as tenants:
        ana = who(tenants, issuer.token(realm_access={"roles": ["auditor", "caller", "x"]}))
        assert [ana.can(p) for p in ("infer", "audit", "train", "keys")] == [True, True, False, False]


def test_keys_are_cached_and_rotate(issuer: Issuer) -> None:
    clock = Clock()
    users = OidcUsers(OidcSettings(issuer.url, "veneer"), clock)

    async def work() -> None:
        await asyncio.gather(*(users.user(issuer.token()) for _ in range(20)))
        assert issuer.asked == 1
        clock.now += 60
        issuer.keys.insert(0, jwk.generate_key("EC", "P-256", {"kid": "two"}))
        assert (await users.user(issuer.token(alg="ES256"))).subject == "ana"
        assert issuer.asked == 2
        del issuer.keys[1]
        clock.now += 3601
        await users.user(issuer.token(alg="ES256"))
        assert issuer.asked == 3

    old = issuer.token()
    asyncio.run(work())
    assert refusal(lambda: asyncio.run(users.user(old))).status == 401  # the issuer has withdrawn this key


def test_invented_key_ids_and_huge_tokens_do_not_reach_the_issuer(issuer: Issuer) -> None:
    clock = Clock()
    users = OidcUsers(OidcSettings(issuer.url, "veneer"), clock)
    asyncio.run(users.user(issuer.token()))
    stranger = jwk.generate_key("EC", "P-256")
    for n in range(50):
        token = issuer.token(stranger, "ES256", {"kid": f"invented-{n}"})
        assert refusal(lambda token=token: asyncio.run(users.user(token))).status == 401
    huge = issuer.token(padding="x" * 9000)
    assert refusal(lambda: asyncio.run(users.user(huge))).status == 401
    assert issuer.asked == 1
    clock.now += 10
    for n in range(50):
        token = issuer.token(stranger, "ES256", {"kid": f"invented-{n}"})
        assert refusal(lambda token=token: asyncio.run(users.user(token))).status == 401
    assert issuer.asked == 2


def test_an_outage_of_the_issuer_is_503_and_keeps_known_keys(issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    clock, other = Clock(), jwk.generate_key("EC", "P-256", {"kid": "other"})
    users = OidcUsers(OidcSettings(issuer.url, "veneer"), clock)
    issuer.broken = True
    error = refusal(lambda: asyncio.run(users.user(issuer.token())))
    assert (error.status, bool(error.retry_after)) == (503, True)
    for body in (b"x" * (1 << 20), b"[]", b'{"keys": 3}', b'{"keys": [3]}', b"\xff"):
        issuer.broken, issuer.body, clock.now = False, body, clock.now + 10
        assert refusal(lambda: asyncio.run(users.user(issuer.token()))).status == 503
    issuer.body, clock.now = b"", clock.now + 10
    asyncio.run(users.user(issuer.token()))
    issuer.broken, clock.now = True, clock.now + 7200
    asyncio.run(users.user(issuer.token()))
    assert refusal(lambda: asyncio.run(users.user(issuer.token(other, "ES256")))).status == 503
    clock.now += 86400
    assert refusal(lambda: asyncio.run(users.user(issuer.token()))).status == 503
    assert "cannot be fetched" in caplog.text


def test_users_with_a_known_key_do_not_wait_in_turn_for_a_slow_issuer(issuer: Issuer) -> None:
    clock = Clock()
    users = OidcUsers(OidcSettings(issuer.url, "veneer"), clock)
    asyncio.run(users.user(issuer.token()))
    clock.now += 7200
    issuer.answering.clear()

    async def work() -> None:
        tasks = [asyncio.create_task(users.user(issuer.token())) for _ in range(6)]
        while sum(task.done() for task in tasks) < 5:
            await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
        issuer.answering.set()  # only now does the issuer answer the request that fetches the keys
        assert {user.subject for user in await asyncio.gather(*tasks)} == {"ana"}

    asyncio.run(asyncio.wait_for(work(), 30))


def test_an_open_server_checks_tokens_too(quick: Path, issuer: Issuer) -> None:
    with opened(quick, issuer.url, OpenTenants) as tenants:
        assert who(tenants, issuer.token()).kind == "tenant"
        assert who(tenants, "sk-dummy").kind == "open"
        assert refusal(lambda: who(tenants, issuer.token(aud="another"))).status == 401


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"issuer": "http://id.example.com", "audience": "x"}, "https"),
        ({"issuer": "https://id.example.com"}, "oidc.audience"),
        ({"issuer": "https://id.example.com", "audience": "x", "role": "y"}, "oidc.role"),
        ({"issuer": "https://id.example.com", "audience": "x", "roles": {"staff": "operator"}}, "oidc.roles.staff"),
    ],
)
def test_incomplete_and_unsafe_settings_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        OidcUsers(server_config({"oidc": keys}, Path("server.yaml")).oidc or OidcSettings("", ""))
    good = {"issuer": "https://id.example.com/r/a", "audience": "x", "roles": {"staff": "caller"}}
    settings = server_config({"oidc": good}, Path("server.yaml")).oidc
    assert settings == OidcSettings("https://id.example.com/r/a", "x", roles={"staff": "caller"})
    assert server_config({}, Path("server.yaml")).oidc is None


def test_the_pages_example_is_a_valid_configuration() -> None:
    (example,) = blocks((ROOT / "docs" / "how-to" / "tenants.md").read_text(encoding="utf-8"), "yaml")
    settings = server_config(yaml.safe_load(example), Path("server.yaml")).oidc
    assert settings is not None
    assert OidcUsers(settings).settings.roles == {"ml-team": "trainer"}
