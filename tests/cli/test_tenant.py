"""`veneer tenant …` as a user types it; tests/test_tenants_page.py tests its docs page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.run import run
from tests.library.conftest import quick  # noqa: F401
from tests.library.made import made, read_made
from veneer.library.library import open_library
from veneer.serve.principal import Principal


@pytest.fixture(autouse=True)
def _home(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("VENEER_HOME", str(quick))


def result(capsys: Any, *arguments: str) -> Any:
    return json.loads(run(capsys, "tenant", *arguments, "--json").out)


def test_every_subcommand_gives_json(capsys: Any) -> None:
    assert result(capsys, "add", "acme", "--see", "acme/*", "--weight", "2")["weight"] == 2.0
    assert [t["name"] for t in result(capsys, "list")["tenants"]] == ["acme"]
    changed = result(capsys, "set", "acme", "enabled=no", "weight=3", "adapters=acme/*,support", "concurrency=3")
    assert (changed["enabled"], changed["weight"], changed["concurrency"]) == (False, 3.0, 3)
    assert changed["adapters"] == ["acme/*", "support"]
    assert result(capsys, "set", "all", "adapters=base")["adapters"] == ["base"]
    assert result(capsys, "set", "*", "tokens_per_day=9")["tokens_per_day"] == 9
    assert result(capsys, "set", "acme", "concurrency=none")["concurrency"] is None
    result(capsys, "set", "all", "prompt_price=0.15", "completion_price=0.6", "--adapter", "support")
    price = result(capsys, "show", "all")["by_adapter"]["support"]
    assert (price["prompt_price"], price["cached_price"], price["completion_price"]) == (150_000, 150_000, 600_000)
    key = result(capsys, "key", "add", "acme", "--expires", "2099-01-31")
    assert key["key"].startswith(f"vnr-{key['id']}-")
    assert result(capsys, "key", "revoke", key["id"])["revoked"]
    assert sorted(k["state"] for k in result(capsys, "key", "list")["keys"]) == ["revoked"]
    assert result(capsys, "route", "set", "support", "a=3", "b=1", "--force")["targets"] == {"a": 3, "b": 1}
    assert result(capsys, "route", "set", "support", "c", "--shadow", "a", "--force")["targets"] == {"c": 1}
    assert result(capsys, "route", "rollback", "support", "--force")["targets"] == {"a": 3, "b": 1}
    assert len(result(capsys, "route", "history", "support")["moves"]) == 2
    assert len(result(capsys, "route", "list")["routes"]) == 1
    assert result(capsys, "route", "remove", "support") == {"removed": "support"}
    assert result(capsys, "usage") == {"usage": []}
    assert result(capsys, "audit", "--what", "route")["lines"][0]["what"] == "route.remove"
    assert result(capsys, "audit", "--verify")["ok"] is True
    keys = result(capsys, "admin-key")
    assert (keys["key"][:10], keys["hash"][:7]) == ("vnr-admin-", "sha256:")
    assert result(capsys, "remove", "acme") == {"removed": "acme"}


def test_text_output_and_error_messages_are_helpful(capsys: Any, tmp_path: Path) -> None:
    assert "veneer tenant add NAME" in run(capsys, "tenant", "list").out
    run(capsys, "tenant", "add", "acme")
    run(capsys, "tenant", "set", "acme", "tokens_per_day=2000000", "training_price=8.5", "feedback_days=7")
    run(capsys, "tenant", "set", "acme", "concurrency=4", "--adapter", "acme/support")
    assert run(capsys, "tenant", "show", "acme").out.splitlines()[3:] == [
        "tokens_per_day=2000000",
        "training_price=8.500000",
        "feedback_days=7.0",
        "feedback_names=",
        "acme/support: concurrency=4",
    ]
    key = run(capsys, "tenant", "key", "add", "acme").out.strip()
    listed = run(capsys, "tenant", "key", "list").out
    assert key[4:14] in listed
    assert key not in listed
    run(capsys, "tenant", "route", "set", "support", "a=3", "b=1", "--shadow", "c", "--fraction", "0.1", "--force")
    assert run(capsys, "tenant", "route", "list").out.strip() == "support -> a 75%, b 25%; shadow c for 10%"
    assert "did you mean acme?" in run(capsys, "tenant", "set", "acne", "weight=2", code=2).err
    run(capsys, "tenant", "add", "../acme", code=2)
    assert "did you mean concurrency?" in run(capsys, "tenant", "set", "acme", "concurency=1", code=2).err
    assert "key=value" in run(capsys, "tenant", "set", "acme", "concurrency", code=2).err
    assert "six decimal places" in run(capsys, "tenant", "set", "all", "prompt_price=1e-7", code=2).err
    for wrong in ("prompt_price=x", "concurrency=0", "concurrency=many", "weight=nan", "adapters=../x"):
        run(capsys, "tenant", "set", "acme", wrong, code=2)
    run(capsys, "tenant", "route", "set", "s", "a=x", code=2)
    run(capsys, "tenant", "audit", "--expect", "0" * 63 + "1", code=2)
    other = str(tmp_path / "other.sqlite")
    assert "no tenants" in run(capsys, "tenant", "--at", other, "list").out
    assert run(capsys, "tenant", "usage").out.strip() == "no usage"


def test_route_targets_must_be_in_the_library(capsys: Any, tmp_path: Path) -> None:
    assert "there is no library" in run(capsys, "tenant", "route", "set", "support", "support@1", code=2).err
    assert not (tmp_path / "home" / "library").exists()
    with open_library() as library:
        library.add(made(tmp_path, 1), "support", describe=read_made)
        library.add(made(tmp_path, 2), "support", describe=read_made)
    run(capsys, "tenant", "route", "set", "support", "smollm2-135m=90", "support@2=10")
    run(capsys, "tenant", "route", "set", "support", "support@1")
    for wrong in (["suport@1"], ["support@3"], ["support@1=9", "support@7=1"], ["support@1", "--shadow", "support@9"]):
        assert "cannot be served" in run(capsys, "tenant", "route", "set", "support", *wrong, code=2).err
        assert run(capsys, "tenant", "route", "list").out.strip() == "support -> support@1 100%"
    assert "support@2" in run(capsys, "tenant", "route", "set", "support", "support@3", code=2).err
    run(capsys, "tenant", "route", "set", "support", "support@2")
    with open_library() as library:
        library.remove("support@1")
    run(capsys, "tenant", "route", "rollback", "support", code=2)
    run(capsys, "tenant", "route", "rollback", "support", "--force")


def test_feedback_is_exported_as_rows(capsys: Any, quick: Path, tmp_path: Path) -> None:  # noqa: F811
    from veneer.serve.access import ResolvedModel
    from veneer.serve.tenancy.feedback import AnswerFeedback
    from veneer.serve.tenancy.tenants import Tenants

    result(capsys, "add", "acme")
    assert result(capsys, "set", "acme", "feedback_days=7")["feedback_days"] == 7.0
    tenants = Tenants(str(quick / "tenants.sqlite"), watch=False)
    for name, user in (("support", "ana"), ("sales", "bob")):
        keep = tenants.keeping(
            Principal("tenant", "acme", user=user), ResolvedModel((), name, f"{name}@2"), f"chatcmpl-{user}"
        )
        keep({"messages": [{"role": "user", "content": "Hi"}]}, [{"role": "assistant", "content": f"I am {name}"}])
        tenants.answers.give("acme", AnswerFeedback(f"chatcmpl-{user}", up=True))
    tenants.close()
    rows = tmp_path / "rows.jsonl"
    assert result(capsys, "feedback", "acme", "--adapter", "support", "-o", str(rows))["rows"] == 1
    assert json.loads(rows.read_text())["messages"][-1]["content"] == "I am support"
    assert result(capsys, "feedback", "acme", "-o", str(rows))["rows"] == 2
    assert result(capsys, "feedback", "all", "-o", str(rows))["rows"] == 0
    run(capsys, "tenant", "feedback", "acme", "--kind", "dpo", "-o", str(rows), code=2)


def test_economics_needs_the_cost_of_an_hour(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result(capsys, "add", "acme")
    assert "VENEER_MACHINE_HOUR" in run(capsys, "tenant", "economics", code=2).err
    monkeypatch.setenv("VENEER_MACHINE_HOUR", "2.50")
    assert result(capsys, "economics")["rows"] == []
    assert "no usage or training" in run(capsys, "tenant", "economics").out
