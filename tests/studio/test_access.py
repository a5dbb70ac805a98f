"""Who may see what: this machine alone, or whoever has a key, and of what a key may see nothing more."""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import veneer
from tests.studio.conftest import HOSTILE, Served
from veneer.errors import ConfigError
from veneer.serve.access import KeyAccess, OpenAccess
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.tenants import Tenants
from veneer.studio.access import check_reach
from veneer.studio.parts import box, link

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
        manage.add_tenant(tenants.store, name, adapters=[f"{name}/*"], who="test")
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


def test_a_page_that_others_can_reach_needs_a_key() -> None:
    asyncio.run(check_reach(OpenAccess(), "127.0.0.1"))
    asyncio.run(check_reach(KeyAccess(["a-key-of-the-test"]), "0.0.0.0"))
    with pytest.raises(ConfigError, match="it needs a key"):
        asyncio.run(check_reach(OpenAccess(), "0.0.0.0"))


# -- keys --------------------------------------------------------------------------------------------------------------


def test_who_has_no_key_gets_a_field_for_one_and_nothing_else(shared: tuple[Served, dict[str, str]]) -> None:
    served, keys = shared
    with httpx.Client(base_url=served.address, follow_redirects=True, timeout=30) as client:
        page = client.get("/studio/adapter?ref=acme/tone").text
        assert "Whose key?" in page
        assert "acme/tone@1" not in page
        assert client.get("/studio/api/v1/models").status_code == 401
        wrong = client.post("/studio/enter", data={"key": "veneer-wrong-key-0123456789"})
        assert "That key opens nothing here" in wrong.text
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
        assert "Whose key?" in client.get("/studio/").text


def test_a_tenant_sees_its_own_and_what_is_another_s_is_not_there(shared: tuple[Served, dict[str, str]]) -> None:
    served, keys = shared
    with entered(served, keys["acme"]) as client:
        page = client.get("/studio/").text
        assert "acme/tone" in page
        assert "globex/tone" not in page
        assert "support@" not in page
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
