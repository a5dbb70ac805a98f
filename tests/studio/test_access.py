"""Who may see what: this machine alone, or whoever has a key, and of what a key may see nothing more."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import httpx
import pytest
from starlette.responses import PlainTextResponse
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

import veneer
from tests.studio.conftest import HOSTILE, Served
from tests.studio.windows import Window, opened
from veneer.errors import VeneerError
from veneer.serve.access import OpenAccess
from veneer.serve.principal import Permission, Principal
from veneer.serve.request import Refused
from veneer.serve.settings import HttpSettings
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.tenants import Tenants
from veneer.studio.access import VISITORS, StudioMiddleware, Visitor
from veneer.studio.parts import box, heard, link, permit

_REBOUND = {"host": "evil.example:8000"}
_ELSEWHERE = {"origin": "https://evil.example"}


@pytest.fixture(scope="module")
def shared(
    tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, dict[str, str]]]:
    """A server with tenants, and the keys of two of them and of the operator."""
    folder = tmp_path_factory.mktemp("tenants")
    url = str(folder / "tenants.sqlite")
    tenants = Tenants(url, watch=False)
    keys = {"operator": "operator-of-the-test"}
    for name in ("acme", "globex"):
        manage.add_tenant(
            tenants.store, name, adapters=[f"{name}/*", *(["support"] if name == "acme" else [])], who="test"
        )
        keys[name] = manage.make_tenant_key(tenants.store, name, who="test")[1]
    tenants.close()
    with Served(folder, *tiny, "--tenants", url, "--admin-key", keys["operator"]) as served:
        yield served, keys


@contextmanager
def entered(served: Served, key: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.address, follow_redirects=True, timeout=30) as client:
        client.post("/studio/enter", data={"key": key})
        yield client


# -- this machine ------------------------------------------------------------------------------------------------------


def test_a_name_that_leads_here_from_elsewhere_opens_nothing(studio: Served) -> None:
    with httpx.Client(base_url=studio.address) as client:
        assert client.get("/studio/").status_code == 200
        for path in ("/studio/", "/studio/api/v1/models", "/studio/_nicegui_ws/socket.io/?EIO=4&transport=polling"):
            answer = client.get(path, headers=_REBOUND)
            assert (answer.status_code, "localhost" in answer.text) == (421, True), path


def test_a_page_of_another_site_writes_nothing(studio: Served) -> None:
    with httpx.Client(base_url=studio.address) as client:
        asked = {"model": "tiny-base", "prompt": "Hi", "max_tokens": 1}
        assert client.post("/studio/api/v1/completions", json=asked, headers=_ELSEWHERE).status_code == 403
        own = {"origin": studio.address}
        assert client.post("/studio/api/v1/completions", json=asked, headers=own).status_code == 200


# -- keys --------------------------------------------------------------------------------------------------------------


def test_who_has_no_key_gets_a_field_for_one_and_nothing_else(shared: tuple[Served, dict[str, str]]) -> None:
    served, keys = shared
    with httpx.Client(base_url=served.address, follow_redirects=True, timeout=30) as client:
        page = client.get("/studio/adapter?ref=acme/tone").text
        assert "Sign in" in page
        assert "acme/tone@1" not in page
        assert client.get("/studio/api/v1/models").status_code == 401
        wrong = client.post("/studio/enter", data={"key": "veneer-wrong-key-0123456789"})
        assert "Invalid key" in wrong.text
        first = client.post("/studio/enter", data={"key": keys["acme"]}, follow_redirects=False)
        cookie = first.headers["set-cookie"]
        for word in ("HttpOnly", "SameSite=strict", "Path=/studio"):
            assert word in cookie
        assert "acme/tone" in client.get("/studio/").text
        away = client.post(
            "/studio/enter", data={"key": keys["acme"], "then": "//evil.example"}, follow_redirects=False
        )
        assert away.headers["location"] == "/studio/"
        client.post("/studio/leave")
        assert "Sign in" in client.get("/studio/").text


def test_a_tenant_sees_its_own_and_what_is_another_s_is_not_there(shared: tuple[Served, dict[str, str]]) -> None:
    served, keys = shared
    with entered(served, keys["acme"]) as client:
        page = client.get("/studio/").text
        assert "acme/tone" in page
        assert "globex/tone" not in page
        assert client.get("/studio/adapter?ref=acme/tone").status_code == 200
        others = client.get("/studio/adapter?ref=globex/tone")
        nobody = client.get("/studio/adapter?ref=globex/nothing")
        assert others.status_code == nobody.status_code == 404
        assert words(others.text) == words(nobody.text)
        assert client.get("/studio/api/v1/models").json()["data"]
        assert client.get("/studio/live").status_code == 404
    with entered(served, keys["operator"]) as client:
        assert all(name in client.get("/studio/").text for name in ("acme/tone", "globex/tone", "support@2"))


def words(page: str) -> list[str]:
    """What stands on a page, without the numbers of this visit."""
    return sorted(re.findall(r"&quot;text&quot;:&quot;(.*?)&quot;", page.split("String.raw`")[1]))


def test_routes_are_the_operators_to_move(shared: tuple[Served, dict[str, str]]) -> None:
    served, keys = shared
    for whose, status in (("acme", 404), ("operator", 200)):
        with entered(served, keys[whose]) as client:
            assert client.get("/studio/live").status_code == status


def test_a_tenant_cannot_change_what_it_only_sees(shared: tuple[Served, dict[str, str]]) -> None:
    """Whatever a console sends for buttons that the page does not show."""
    served, keys = shared
    address = f"{served.address}/studio/adapter?ref=support@1"
    with opened(address, keys["acme"]) as window:
        for act, word in (("unalias", "prod"), ("untag", "shop"), ("use", "1"), ("go", "1")):
            window.act_unoffered(act, word=word, step=word)
        assert "outside your namespace" in window.until("outside your namespace")
    audit = {"authorization": f"Bearer {keys['operator']}"}
    with httpx.Client(base_url=served.address, headers=audit) as client:
        assert client.get("/v1/adapters/support@1").json()["aliases"] == ["prod"]
        changes = [row["what"] for row in client.get("/admin/audit").json()["lines"]]
        assert "adapter.change" not in changes


def test_a_change_on_the_page_is_in_the_audit_log(shared: tuple[Served, dict[str, str]]) -> None:
    served, keys = shared
    with opened(f"{served.address}/studio/adapter?ref=acme/tone@1", keys["acme"]) as window:
        window.enter("Another alias", "beta")
        window.until("has the alias beta")
        window.act_unoffered("unalias", word="beta")
        window.until("is no alias any more")
    with httpx.Client(base_url=served.address, headers={"authorization": f"Bearer {keys['operator']}"}) as client:
        rows = [row for row in client.get("/admin/audit").json()["lines"] if row["what"] == "adapter.change"]
        assert [(row["who"], row["subject"]) for row in rows] == [("acme", "acme/tone@1")] * 2


def test_a_socket_needs_an_open_page_of_its_key(shared: tuple[Served, dict[str, str]]) -> None:
    served, keys = shared
    window = Window(f"{served.address}/studio/", keys["acme"])
    for cookies in (
        {},
        {"cookie": "veneer_studio=wrong-key-0123456789"},
        {"cookie": f"veneer_studio={keys['globex']}"},
    ):
        with pytest.raises(InvalidStatus), connect(window.place, proxy=None, additional_headers=cookies):
            pass
    nowhere = window.place.replace(window.query["client_id"], "00000000-0000-0000-0000-000000000000")
    with pytest.raises(InvalidStatus), connect(nowhere, proxy=None, additional_headers=window.cookies):
        pass
    with ExitStack() as open_sockets:
        for _ in range(4):
            open_sockets.enter_context(connect(window.place, proxy=None, additional_headers=window.cookies))
        with pytest.raises(InvalidStatus), connect(window.place, proxy=None, additional_headers=window.cookies):
            pass


def test_the_pages_api_path_leads_to_no_page_and_no_socket(shared: tuple[Served, dict[str, str]]) -> None:
    served, keys = shared
    window = Window(f"{served.address}/studio/", keys["acme"])
    nested = window.place.replace("/studio/_nicegui_ws", "/studio/api/studio/_nicegui_ws")
    for cookies in ({}, window.cookies):
        with pytest.raises(InvalidStatus), connect(nested, proxy=None, additional_headers=cookies):
            pass
        for path in ("/studio/api/studio/", "/studio/api/studio/_nicegui_ws/socket.io/?EIO=4&transport=polling"):
            assert httpx.get(served.address + path, headers=cookies).status_code == 404
        polling = httpx.get(f"{served.address}/studio/_nicegui_ws/socket.io/?EIO=4&transport=polling", headers=cookies)
        assert polling.status_code == 403


def test_messages_of_a_page_write_nothing_into_the_log(shared: tuple[Served, dict[str, str]]) -> None:
    served, keys = shared
    before = served.log.stat().st_size
    with opened(f"{served.address}/studio/", keys["acme"]) as window:
        id = {"client_id": window.query["client_id"]}
        forged = {**id, "level": "error", "message": "2026-01-01 ERROR veneer: forged"}
        messages: list[list[Any]] = [["log", forged], ["event", {}], ["event", {**id, "id": 1, "listener_id": "x"}]]
        messages += [
            ["event", 5],
            ["handshake", id],
            ["ack", {**id, "next_message_id": "x"}],
            ["javascript_response", id],
        ]
        for each in messages:
            window.socket.send("42" + json.dumps(each))
        window.type("tone")
        window.until("acme/tone")
    assert served.log.read_text()[before:] == ""


def test_one_key_cannot_open_pages_without_bound() -> None:
    """Nor does it keep another from a page."""
    pages = []

    async def draws(scope: Any, receive: Any, send: Any) -> None:
        pages.append(Page())
        VISITORS[pages[-1]] = scope["veneer.visitor"]
        await PlainTextResponse("drawn")(scope, receive, send)

    class Page:
        pass

    class Two(OpenAccess):
        keyless = False

        async def caller(self, key: str | None, user: str | None = None) -> Principal:
            if key is None:
                raise Refused("no valid API key", status=401, code="unauthorized")
            return Principal("tenant", key)

    async def ask() -> dict[str, list[int]]:
        app = StudioMiddleware(draws, Two(), HttpSettings())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:

            async def get(key: str) -> int:
                head = {"cookie": f"veneer_studio={key}"} if key else {}
                return (await client.get("/studio/", headers=head)).status_code

            return {key: [await get(key) for _ in range(n)] for key, n in (("acme", 250), ("globex", 1), ("", 300))}

    statuses = asyncio.run(ask())
    assert statuses["acme"] == [200] * 200 + [429] * 50
    assert statuses["globex"] == [200]
    assert statuses[""] == [200] * 300  # the form to sign in
    assert len(pages) == 201


@pytest.fixture(scope="module")
def keyed(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, str, str]]:
    """A server that trains, without tenants: (it, a plain key, the admin key)."""
    folder, key, admin = tmp_path_factory.mktemp("keys"), "a-plain-key-of-the-test", "operator-of-the-test"
    (folder / "keys").write_text(f"{key}\n")
    with Served(folder, *tiny, "--train", "--api-keys", str(folder / "keys"), "--admin-key", admin) as served:
        yield served, key, admin


VIEWS = {
    "": "key tenant open operator",
    "compare": "key tenant open operator",
    "doctor": "key tenant open operator",
    "train": "tenant open operator",
    "live": "open operator",
}


def test_every_view_is_found_only_with_its_permission(
    studio: Served, shared: tuple[Served, dict[str, str]], keyed: tuple[Served, str, str]
) -> None:
    with_tenants, keys = shared
    with_keys, key, admin = keyed
    visitors = [
        ("key", with_keys, key),
        ("operator", with_keys, admin),
        ("tenant", with_tenants, keys["acme"]),
        ("tenant", with_tenants, keys["globex"]),
        ("operator", with_tenants, keys["operator"]),
        ("open", studio, ""),
    ]
    for kind, served, key in visitors:
        with entered(served, key) as client:
            for view, kinds in VIEWS.items():
                status = 200 if kind in kinds.split() else 404
                assert client.get(f"/studio/{view}").status_code == status, (kind, view)


def test_a_socket_of_another_sites_page_is_refused(studio: Served) -> None:
    window = Window(f"{studio.address}/studio/")
    for origin in ("https://evil.example", "null"):
        with pytest.raises(InvalidStatus), connect(window.place, proxy=None, origin=Origin(origin)):
            pass
    with connect(window.place, proxy=None, origin=Origin(studio.address)) as socket:
        assert str(socket.recv())[0] == "0"


def test_a_plain_key_changes_nothing(keyed: tuple[Served, str, str]) -> None:
    served, key, admin = keyed
    with entered(served, key) as client:
        for view, status in (
            ("", 200),
            ("doctor", 200),
            ("compare", 200),
            ("train", 404),
            ("steps", 404),
            ("live", 404),
        ):
            assert client.get(f"/studio/{view}").status_code == status, view
        rows = {"file": ("rows.jsonl", b"{}"), "purpose": (None, "fine-tune")}
        for answer in (
            client.post("/studio/api/v1/files", files=rows),
            client.post("/studio/api/v1/fine_tuning/jobs", json={"model": "tiny-base", "training_file": "file-x"}),
            client.patch("/studio/api/v1/adapters/support@1", json={"add_aliases": ["mine"]}),
            client.delete("/studio/api/v1/adapters/support@1"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert client.get("/studio/api/metrics").status_code == 200
    with opened(f"{served.address}/studio/adapter?ref=support@1", key) as window:
        window.act_unoffered("unalias", word="prod")
        window.until("may not change adapters")
    with entered(served, admin) as client:
        assert client.get("/studio/train").status_code == 200
        assert client.get("/studio/api/v1/adapters/support@1").json()["aliases"] == ["prod"]


@pytest.mark.parametrize("kind", ["key", "tenant", "open", "operator"])
def test_a_handler_runs_with_its_permission_alone(kind: Any) -> None:
    principal = Principal(kind, "acme" if kind == "tenant" else "")

    class As(OpenAccess):
        async def caller(self, key: str | None, user: str | None = None) -> Principal:
            return principal

    class Client:
        told: list[VeneerError]

        def handle_exception(self, error: VeneerError) -> None:
            self.told.append(error)

    async def send(handler: Any) -> list[VeneerError]:
        client = Client()
        client.told = []
        VISITORS[client] = Visitor(As(), None, principal)
        await heard(handler)(SimpleNamespace(client=client, args=None))
        return client.told

    for permission in get_args(Permission):
        ran: list[str] = []
        refused = asyncio.run(send(permit(permission, lambda: ran.append("ran"))))  # noqa: B023
        assert bool(ran) == principal.can(permission) != bool(refused), permission
    assert [error.status for error in asyncio.run(send(lambda: pytest.fail("it ran")))] == [403]  # type: ignore[attr-defined]


def test_the_api_reads_no_cookies(shared: tuple[Served, dict[str, str]]) -> None:
    served, keys = shared
    with entered(served, keys["acme"]) as client:
        cookies = {"cookie": f"veneer_studio={keys['acme']}"}
        assert httpx.get(f"{served.address}/v1/models", headers=cookies).status_code == 401
        assert client.get("/studio/api/v1/models", headers={"authorization": "Bearer no"}).status_code == 200
        assert client.get("/studio/api/metrics").status_code == 403


# -- what could slip in ------------------------------------------------------------------------------------------------


def test_names_that_somebody_made_to_do_harm_are_text(studio: Served) -> None:
    with httpx.Client(base_url=studio.address) as client:
        for path in ("/studio/?q=acme", "/studio/adapter?ref=acme/tone", f"/studio/?q={HOSTILE}", f"/studio/{HOSTILE}"):
            page = client.get(path)
            assert "onerror" in page.text or page.status_code == 404, path
            assert "<img src=x" not in page.text, path
            assert "\u202e" not in page.text, path
            assert page.text.count("</script>") == client.get("/studio/").text.count("</script>"), path
            policy = page.headers["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "frame-ancestors 'none'" in policy


def test_nothing_under_the_page_is_a_file_of_this_machine(studio: Served) -> None:
    with httpx.Client(base_url=studio.address) as client:
        for path in (
            "/studio/_nicegui/3.18.0/static/../../../etc/passwd",
            "/studio/_nicegui/auto/static/x",
            "/studio/..%2f..%2fetc/passwd",
        ):
            assert "root:" not in client.get(path).text


SOURCES = sorted((Path(veneer.__file__).parent / "studio").glob("*.py"))
_FRAME = {"parts.py", "moving.py", "frame.py", "build.py", "watch.py", "still.py"}
_PARTS_ALONE = {"props", "style", "html", "markdown", "add_slot", "tooltip", "run_method", "_text", "_props"}
_NEVER = {
    "run_javascript",
    "download",
    "image",
    "video",
    "interactive_image",
    "navigate",
    "add_css",
    "markdown",
    "upload",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_views_give_no_markup_and_no_code(path: Path) -> None:
    """Whatever makes markup, attributes or code of texts is in parts.py, and some of it nowhere; a Fragment's template
    never says that a text is safe."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            of_ui = isinstance(node.value, ast.Name) and node.value.id == "ui"
            where = f"{path}:{node.lineno}: {node.attr}"
            assert node.attr not in (_NEVER if of_ui else {"run_javascript"}), where
            if path.name not in _FRAME:
                assert not of_ui, f"{where} in a view"
                assert node.attr not in _PARTS_ALONE, f"{where} is for parts.py"
    for template in (path.parent / "templates").glob("*.j2"):
        assert not re.search(r"\|\s*safe|autoescape|Markup|\son\w+=", template.read_text(encoding="utf-8")), template


def test_parts_take_no_code_for_an_attribute_and_link_nowhere_else() -> None:
    with pytest.raises(ValueError, match="this server alone"):
        link("x", "javascript:alert(1)")
    with pytest.raises(ValueError, match="this server alone"):
        link("x", "//evil.example/")
    assert box.__doc__
