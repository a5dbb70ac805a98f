"""Access to the Studio: without a key only from this machine; with a key, only what the key permits."""

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
from tests.serve.http.toy import responses
from tests.studio.conftest import HOSTILE, OPERATOR, StudioServer, tenant_keys
from tests.studio.page_socket import PageSocket, open_page
from veneer.errors import VeneerError
from veneer.serve.access import OpenAccess
from veneer.serve.principal import Permission, Principal
from veneer.serve.request import Refused
from veneer.serve.settings import HttpSettings
from veneer.studio.access import VISITORS, StudioMiddleware, Visitor
from veneer.studio.elements import event_handler, link, permit

Shared = tuple[StudioServer, dict[str, str]]
_POLLING = "_nicegui_ws/socket.io/?EIO=4&transport=polling"


@pytest.fixture(scope="module")
def shared(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Yield a server with tenants, and the keys of two tenants and the operator."""
    folder = tmp_path_factory.mktemp("tenants")
    keys = tenant_keys(folder / "tenants.sqlite", acme=["support"])
    options = ("--tenants", str(folder / "tenants.sqlite"), "--admin-key", OPERATOR)
    with StudioServer(folder, *tiny, *options) as server:
        yield server, keys


@pytest.fixture(scope="module")
def keyed(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Yield a server that trains but has no tenants, and the server's keys."""
    folder, key = tmp_path_factory.mktemp("keys"), "a-plain-key-of-the-test"
    (folder / "keys").write_text(f"{key}\n")
    options = ("--train", "--api-keys", str(folder / "keys"), "--admin-key", OPERATOR)
    with StudioServer(folder, *tiny, *options) as server:
        yield server, {"key": key, "operator": OPERATOR}


@contextmanager
def signed_in(server: StudioServer, key: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, follow_redirects=True, timeout=30) as client:
        client.post("/studio/enter", data={"key": key})
        yield client


def assert_refused(url: str, **options: Any) -> None:
    with pytest.raises(InvalidStatus), connect(url, proxy=None, **options):
        pass


# -- without keys ------------------------------------------------------------------------------------------------------


def test_request_for_another_host_is_refused(studio: StudioServer) -> None:
    with httpx.Client(base_url=studio.address) as client:
        assert client.get("/studio/").status_code == 200
        for path in ("/studio/", "/studio/api/v1/models", f"/studio/{_POLLING}"):
            answer = client.get(path, headers={"host": "evil.example:8000"})
            assert (answer.status_code, "localhost" in answer.text) == (421, True), path


def test_another_site_cannot_write(studio: StudioServer) -> None:
    body = {"model": "tiny-base", "prompt": "Hi", "max_tokens": 1}
    for origin, status in (("https://evil.example", 403), (studio.address, 200)):
        url = f"{studio.address}/studio/api/v1/completions"
        assert httpx.post(url, json=body, headers={"origin": origin}, timeout=60).status_code == status


def test_another_site_cannot_open_a_socket(studio: StudioServer) -> None:
    page = PageSocket(f"{studio.address}/studio/")
    for origin in ("https://evil.example", "null"):
        assert_refused(page.socket_url, origin=Origin(origin))
    with connect(page.socket_url, proxy=None, origin=Origin(studio.address)) as socket:
        assert str(socket.recv())[0] == "0"


# -- keys --------------------------------------------------------------------------------------------------------------


def test_without_a_key_only_the_sign_in_form_is_served(shared: Shared) -> None:
    server, keys = shared
    with httpx.Client(base_url=server.address, follow_redirects=True, timeout=30) as client:
        page = client.get("/studio/adapter?ref=acme/tone").text
        assert "Sign in" in page
        assert "acme/tone@1" not in page
        assert client.get("/studio/api/v1/models").status_code == 401
        wrong = client.post("/studio/enter", data={"key": "veneer-wrong-key-0123456789"})
        assert "Invalid key" in wrong.text
        first = client.post("/studio/enter", data={"key": keys["acme"]}, follow_redirects=False)
        for word in ("HttpOnly", "SameSite=strict", "Path=/studio"):
            assert word in first.headers["set-cookie"]
        assert "acme/tone" in client.get("/studio/").text
        form = {"key": keys["acme"], "then": "//evil.example"}
        away = client.post("/studio/enter", data=form, follow_redirects=False)
        assert away.headers["location"] == "/studio/"
        client.post("/studio/leave")
        assert "Sign in" in client.get("/studio/").text


def test_tenant_cannot_tell_hidden_adapters_from_missing_ones(shared: Shared) -> None:
    server, keys = shared
    with signed_in(server, keys["acme"]) as client:
        page = client.get("/studio/").text
        assert "acme/tone" in page
        assert "globex/tone" not in page
        assert client.get("/studio/adapter?ref=acme/tone").status_code == 200
        hidden = client.get("/studio/adapter?ref=globex/tone")
        missing = client.get("/studio/adapter?ref=globex/nothing")
        assert hidden.status_code == missing.status_code == 404
        assert texts(hidden.text) == texts(missing.text)
        assert client.get("/studio/api/v1/models").json()["data"]
    with signed_in(server, keys["operator"]) as client:
        assert all(name in client.get("/studio/").text for name in ("acme/tone", "globex/tone", "support@2"))


def texts(page: str) -> list[str]:
    """Return a page's texts, sorted. Ids that differ per visit are left out."""
    return sorted(re.findall(r"&quot;text&quot;:&quot;(.*?)&quot;", page.split("String.raw`")[1]))


VIEWS = {
    "": "key tenant open operator",
    "compare": "key tenant open operator",
    "doctor": "key tenant open operator",
    "objectives": "key tenant open operator",
    "train": "tenant open operator",
    "live": "open operator",
}


def test_every_view_needs_its_permission(studio: StudioServer, shared: Shared, keyed: Shared) -> None:
    visitors = [("open", studio, "")]
    visitors += [(kind, keyed[0], key) for kind, key in keyed[1].items()]
    visitors += [("operator" if name == "operator" else "tenant", shared[0], key) for name, key in shared[1].items()]
    assert len(visitors) == 6
    for kind, server, key in visitors:
        with signed_in(server, key) as client:
            for view, kinds in VIEWS.items():
                status = 200 if kind in kinds.split() else 404
                assert client.get(f"/studio/{view}").status_code == status, (kind, view)


@pytest.mark.parametrize("kind", ["key", "tenant", "open", "operator"])
def test_handler_needs_its_permission(kind: Any) -> None:
    principal = Principal(kind, "acme" if kind == "tenant" else "")

    class Access(OpenAccess):
        async def authenticate(self, key: str | None, user: str | None = None) -> Principal:
            return principal

    class Client:
        def handle_exception(self, error: VeneerError) -> None:
            errors.append(error)

    async def send(handler: Any) -> None:
        client = Client()
        VISITORS[client] = Visitor(Access(), None, principal)
        await event_handler(handler)(SimpleNamespace(client=client, args=None))

    for permission in get_args(Permission):
        ran, errors = list[str](), list[Any]()
        asyncio.run(send(permit(permission, lambda: ran.append("ran"))))  # noqa: B023
        assert bool(ran) == principal.can(permission) != bool(errors), permission
    errors = []
    asyncio.run(send(lambda: pytest.fail("a handler without a permission ran")))
    assert [error.status for error in errors] == [403]


def test_a_tenant_cannot_change_the_adapters_of_other_tenants(shared: Shared) -> None:
    server, keys = shared
    with open_page(f"{server.address}/studio/adapter?ref=support@1", keys["acme"]) as page:
        for act, word in (("unalias", "prod"), ("untag", "shop")):
            page.act_unoffered(act, word=word)
        page.until("outside your namespace")
    with httpx.Client(base_url=server.address, headers={"authorization": f"Bearer {OPERATOR}"}) as client:
        assert client.get("/v1/adapters/support@1").json()["aliases"] == ["prod"]
        assert "adapter.change" not in [row["what"] for row in client.get("/admin/audit").json()["lines"]]


def test_plain_key_changes_nothing(keyed: Shared) -> None:
    server, keys = keyed
    with signed_in(server, keys["key"]) as client:
        rows = {"file": ("rows.jsonl", b"{}"), "purpose": (None, "fine-tune")}
        for answer in (
            client.post("/studio/api/v1/files", files=rows),
            client.post("/studio/api/v1/fine_tuning/jobs", json={"model": "tiny-base", "training_file": "file-x"}),
            client.patch("/studio/api/v1/adapters/support@1", json={"add_aliases": ["mine"]}),
            client.delete("/studio/api/v1/adapters/support@1"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert client.get("/studio/api/metrics").status_code == 200
    with open_page(f"{server.address}/studio/adapter?ref=support@1", keys["key"]) as page:
        page.act_unoffered("unalias", word="prod")
        page.until("not allowed to change adapters")
    with signed_in(server, keys["operator"]) as client:
        assert client.get("/studio/api/v1/adapters/support@1").json()["aliases"] == ["prod"]


def test_change_on_the_page_is_audited(shared: Shared) -> None:
    server, keys = shared
    with open_page(f"{server.address}/studio/adapter?ref=acme/tone@1", keys["acme"]) as page:
        page.enter("New alias", "beta")
        page.until("Added the alias beta")
        page.act_unoffered("unalias", word="beta")
        page.until("Removed the alias beta")
    audit = httpx.get(f"{server.address}/admin/audit", headers={"authorization": f"Bearer {OPERATOR}"})
    rows = [row for row in audit.json()["lines"] if row["what"] == "adapter.change"]
    who = f"acme/key:{keys['acme'][4:14]}"
    assert [(row["who"], row["subject"]) for row in rows] == [(who, "acme/tone@1")] * 2


def test_socket_needs_an_open_page_of_its_key(shared: Shared) -> None:
    server, keys = shared
    page = PageSocket(f"{server.address}/studio/", keys["acme"])
    for key in (None, "wrong-key-0123456789", keys["globex"]):
        assert_refused(page.socket_url, additional_headers={"cookie": f"veneer_studio={key}"} if key else {})
    unknown = page.socket_url.replace(page.query["client_id"], "00000000-0000-0000-0000-000000000000")
    assert_refused(unknown, additional_headers=page.cookies)
    with ExitStack() as sockets:
        for _ in range(4):
            sockets.enter_context(connect(page.socket_url, proxy=None, additional_headers=page.cookies))
        assert_refused(page.socket_url, additional_headers=page.cookies)


def test_api_paths_return_no_page_and_no_socket(shared: Shared) -> None:
    server, keys = shared
    page = PageSocket(f"{server.address}/studio/", keys["acme"])
    nested = page.socket_url.replace("/studio/_nicegui_ws", "/studio/api/studio/_nicegui_ws")
    for cookies in ({}, page.cookies):
        assert_refused(nested, additional_headers=cookies)
        paths = {"api/studio/": 404, f"api/studio/{_POLLING}": 404, _POLLING: 403}
        for path, status in paths.items():
            assert httpx.get(f"{server.address}/studio/{path}", headers=cookies).status_code == status, path


def test_page_messages_write_nothing_to_the_log(shared: Shared) -> None:
    server, keys = shared
    log_size = server.log.stat().st_size
    with open_page(f"{server.address}/studio/", keys["acme"]) as page:
        id = {"client_id": page.query["client_id"]}
        messages: list[list[Any]] = [["event", {}], ["event", 5], ["event", {**id, "id": 1, "listener_id": "x"}]]
        messages += [["log", {**id, "level": "error", "message": "2026-01-01 ERROR veneer: forged"}]]
        messages += [["handshake", id], ["ack", {**id, "next_message_id": "x"}], ["javascript_response", id]]
        for each in messages:
            page.socket.send("42" + json.dumps(each))
        page.type("tone")
        page.until("acme/tone")
    assert server.log.read_text()[log_size:] == ""


def test_pages_per_key_are_limited() -> None:
    """Reaching the limit of one key does not affect another key."""
    pages = []

    class Page:
        pass

    async def draw(scope: Any, receive: Any, send: Any) -> None:
        pages.append(Page())
        VISITORS[pages[-1]] = scope["veneer.visitor"]
        await PlainTextResponse("drawn")(scope, receive, send)

    class Access(OpenAccess):
        keyless = False

        async def authenticate(self, key: str | None, user: str | None = None) -> Principal:
            if key is None:
                raise Refused("no valid API key", status=401, code="unauthorized")
            return Principal("tenant", key)

    def statuses(key: str, count: int) -> list[int]:
        request = {"method": "GET", "url": "/studio/", "headers": {"cookie": f"veneer_studio={key}"} if key else {}}
        return [answer.status_code for answer in responses(app, [request] * count, "http://x")]

    app = StudioMiddleware(draw, Access(), HttpSettings())
    assert statuses("acme", 250) == [200] * 200 + [429] * 50
    assert statuses("globex", 1) == [200]
    assert statuses("", 300) == [200] * 300  # without a key, the sign-in form is returned, which has no limit
    assert len(pages) == 201


def test_api_reads_no_cookies(shared: Shared) -> None:
    server, keys = shared
    cookies = {"cookie": f"veneer_studio={keys['acme']}"}
    assert httpx.get(f"{server.address}/v1/models", headers=cookies).status_code == 401
    with signed_in(server, keys["acme"]) as client:
        assert client.get("/studio/api/v1/models", headers={"authorization": "Bearer no"}).status_code == 200
        assert client.get("/studio/api/metrics").status_code == 403


# -- injection ---------------------------------------------------------------------------------------------------------


def test_hostile_names_are_text(studio: StudioServer) -> None:
    with httpx.Client(base_url=studio.address) as client:
        for path in ("/studio/?q=acme", "/studio/adapter?ref=acme/tone", f"/studio/?q={HOSTILE}", f"/studio/{HOSTILE}"):
            page = client.get(path)
            assert "onerror" in page.text or page.status_code == 404, path
            assert "<img src=x" not in page.text, path
            assert "\u202e" not in page.text, path
            assert page.text.count("</script>") == client.get("/studio/").text.count("</script>"), path
            for directive in ("default-src 'self'", "frame-ancestors 'none'"):
                assert directive in page.headers["content-security-policy"]


def test_paths_below_the_page_read_no_local_files(studio: StudioServer) -> None:
    for path in ("_nicegui/3.18.0/static/../../../etc/passwd", "_nicegui/auto/static/x", "..%2f..%2fetc/passwd"):
        assert "root:" not in httpx.get(f"{studio.address}/studio/{path}").text


SOURCES = sorted((Path(veneer.__file__).parent / "studio").glob("*.py"))
_USE_NICEGUI = {"elements.py", "components.py", "page.py", "build.py"}
_ELEMENTS_ONLY = {"props", "style", "html", "markdown", "add_slot", "tooltip", "run_method", "_text", "_props"}
_FORBIDDEN = {"run_javascript", "download", "image", "video", "interactive_image", "navigate", "add_css", "markdown"}
_FORBIDDEN |= {"upload"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_views_create_no_markup_and_no_code(path: Path) -> None:
    """Only elements.py turns text into markup or attributes, and no template marks text as safe."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            of_ui = isinstance(node.value, ast.Name) and node.value.id == "ui"
            where = f"{path}:{node.lineno}: {node.attr}"
            assert node.attr not in (_FORBIDDEN if of_ui else {"run_javascript"}), where
            if path.name not in _USE_NICEGUI:
                assert not of_ui, f"{where} in a view"
                assert node.attr not in _ELEMENTS_ONLY, f"{where} is for elements.py"
    for template in (path.parent / "templates").glob("*.j2"):
        assert not re.search(r"\|\s*safe|autoescape|Markup|\son\w+=", template.read_text(encoding="utf-8")), template


def test_links_lead_to_this_server_only() -> None:
    for to in ("javascript:alert(1)", "//evil.example/"):
        with pytest.raises(ValueError, match="of this server"):
            link("x", to)
