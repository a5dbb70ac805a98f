"""`veneer tenant …` as a user types it, and the page of the docs as it stands: its commands and its HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.run import run
from tests.library.conftest import quick  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "how-to" / "tenants.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _home(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("VENEER_HOME", str(quick))


def result(capsys: Any, *arguments: str) -> Any:
    ran = run(capsys, "tenant", *arguments, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_every_subcommand_gives_json(capsys: Any) -> None:
    assert result(capsys, "add", "acme", "--see", "acme/*", "--weight", "2")["weight"] == 2.0
    assert [t["name"] for t in result(capsys, "list")["tenants"]] == ["acme"]
    assert result(capsys, "change", "acme", "--disable")["enabled"] is False
    assert result(capsys, "see", "acme", "support")["adapters"] == ["acme/*", "support"]
    assert result(capsys, "see", "acme", "support", "--remove")["adapters"] == ["acme/*"]
    assert result(capsys, "share", "base")["adapters"] == ["base"]
    key = result(capsys, "key", "add", "acme", "--expires", "2099-01-31")
    assert key["key"].startswith(f"vnr-{key['id']}-")
    assert result(capsys, "key", "rotate", key["id"], "--grace", "1h")["expires"] > key["created"]
    assert result(capsys, "key", "revoke", key["id"])["revoked"]
    assert sorted(k["state"] for k in result(capsys, "key", "list")["keys"]) == ["active", "revoked"]
    assert result(capsys, "limit", "acme", "--concurrency", "3")["limits"][0]["concurrency"] == 3
    assert result(capsys, "limit", "acme", "--concurrency", "0")["limits"] == []
    price = result(capsys, "price", "all", "--prompt", "0.15", "--completion", "0.6")["prices"][0]
    assert (price["prompt"], price["cached"], price["completion"]) == (150_000, 150_000, 600_000)
    assert result(capsys, "price", "all", "--remove")["prices"] == []
    assert result(capsys, "alias", "set", "support", "a=3", "b=1")["targets"] == {"a": 3, "b": 1}
    assert result(capsys, "alias", "set", "support", "c", "--shadow", "a")["targets"] == {"c": 1}
    assert result(capsys, "alias", "rollback", "support")["targets"] == {"a": 3, "b": 1}
    assert len(result(capsys, "alias", "history", "support")["moves"]) == 2
    assert len(result(capsys, "alias", "list")["aliases"]) == 1
    assert result(capsys, "alias", "shadows")["comparisons"] == []
    assert result(capsys, "alias", "remove", "support") == {"removed": "support"}
    assert result(capsys, "usage") == {"usage": []}
    assert result(capsys, "audit", "--what", "alias")["lines"][0]["what"] == "alias.remove"
    assert result(capsys, "audit", "--verify")["ok"] is True
    made = result(capsys, "admin-key")
    assert (made["key"][:10], made["hash"][:7]) == ("vnr-admin-", "sha256:")
    assert result(capsys, "remove", "acme") == {"removed": "acme"}


def test_words_for_people_and_errors_that_help(capsys: Any, tmp_path: Path) -> None:
    assert "veneer tenant add NAME" in run(capsys, "tenant", "list").out
    run(capsys, "tenant", "add", "acme")
    run(capsys, "tenant", "limit", "acme", "--tokens-per-day", "2000000")
    assert run(capsys, "tenant", "limit").out.splitlines()[1].split() == ["acme", "all", "2,000,000"]
    key = run(capsys, "tenant", "key", "add", "acme").out.strip()
    listed = run(capsys, "tenant", "key", "list").out
    assert key[4:14] in listed
    assert key not in listed
    run(capsys, "tenant", "alias", "set", "support", "a=3", "b=1", "--shadow", "c", "--fraction", "0.1")
    assert run(capsys, "tenant", "alias", "list").out.strip() == "support -> a 75 %, b 25 %; shadow c for 10 %"
    lost = run(capsys, "tenant", "change", "acne", "--weight", "2")
    assert (lost.code, "did you mean acme?" in lost.err) == (2, True)
    assert run(capsys, "tenant", "add", "../acme").code == 2
    assert run(capsys, "tenant", "limit", "--concurrency", "1").code == 2
    assert "millionth" in run(capsys, "tenant", "price", "all", "--prompt", "1e-7", "--completion", "1").err
    assert run(capsys, "tenant", "price", "all", "--prompt", "x", "--completion", "1").code == 2
    assert run(capsys, "tenant", "alias", "set", "s", "a=x").code == 2
    assert run(capsys, "tenant", "audit", "--expect", "0" * 63 + "1").code == 2
    other = str(tmp_path / "other.sqlite")
    assert "no tenants" in run(capsys, "tenant", "--at", other, "list").out
    assert run(capsys, "tenant", "usage").out.strip() == "nothing was used"


def lines_of(page: str) -> list[str]:
    bodies = re.findall(r"```\n(.*?)```", page, flags=re.S)
    return [re.sub(r"\s#.*$", "", line).strip() for body in bodies for line in body.splitlines()]


def test_the_page_of_the_docs_runs_as_it_stands(capsys: Any, tmp_path: Path) -> None:
    """Every command in its order, then every call to a server on the same database."""
    from fastapi import FastAPI

    from veneer.serve.tenancy.admin import admin_router
    from veneer.serve.tenancy.keys import make_admin_key
    from veneer.serve.tenancy.tenants import Tenants, default_database

    key, ran, identity = make_admin_key(), 0, ""
    for line in lines_of(PAGE):
        if line.startswith("veneer tenant "):
            done = run(capsys, *shlex.split(line.replace("3f9a0c21d4", identity))[1:])
            assert done.code == 0, f"{line}\n{done.err}"
            found = re.match(r"vnr-(\w{10})-", done.out)
            identity = found[1] if found else identity
            ran += 1
    assert ran > 25
    tenants = Tenants(default_database(), admin_key=key, watch=False)
    app = FastAPI()
    app.include_router(admin_router(tenants))

    async def call(line: str) -> httpx.Response:
        words = shlex.split(line.replace("$VENEER_ADMIN_KEY", key))[1:]
        method, url, headers, body = "GET", "", {}, None
        while words:
            word = words.pop(0)
            if word == "-X":
                method = words.pop(0)
            elif word == "-H":
                name, _, value = words.pop(0).partition(": ")
                headers[name] = value
            elif word == "--json":
                body, method = words.pop(0), "POST" if method == "GET" else method
                headers["Content-Type"] = "application/json"
            else:
                url = word
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return await client.request(method, f"http://{url}", content=body, headers=headers)

    called = 0
    for line in lines_of(PAGE):
        if line.startswith("curl "):
            answer = asyncio.run(call(line))
            assert answer.is_success, f"{line}\n{answer.text}"
            called += 1
    assert called >= 8
    listed = {r.path for r in app.routes if str(getattr(r, "path", "")).startswith("/admin")}
    listed |= {r.path for r in admin_router(tenants).routes}  # type: ignore[attr-defined]
    for path in listed:
        last = path.rsplit("/", 1)[-1].strip("{}")
        assert last in PAGE or last in ("tenant", "key"), f"{path} is not on the page"
    tenants.close()


def test_help_loads_no_database_and_shows_an_example(capsys: Any) -> None:
    code = "import sys; from veneer.cli.main import main\n"
    code += "try: main(['tenant', 'key', 'add', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'sqlalchemy', 'fastapi', 'torch'} & set(sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    names = ["add", "list", "change", "remove", "see", "share", "limit", "price", "usage", "audit", "admin-key"]
    names += [f"key {n}" for n in ("add", "list", "revoke", "rotate")]
    names += [f"alias {n}" for n in ("set", "list", "rollback", "remove", "history", "shadows")]
    for name in names:
        assert f"Example: veneer tenant {name}" in run(capsys, "tenant", *name.split(), "--help").out
