"""/v1/feedback on a live server with tenants: stored completions, feedback, export, removal, outages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.library.conftest import postgres, quick  # noqa: F401
from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyText, live
from tests.serve.tenancy.conftest import new_tenant
from veneer.serve.access import ResolvedModel
from veneer.serve.http.surfaces.feedback import feedback_routes
from veneer.serve.principal import Principal
from veneer.serve.settings import LedgerSettings
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.tenants import Tenants
from veneer.train.text.rows import read_rows

DAY = 86400.0
SQL = ResolvedModel((), "sql", "sql")


@dataclass
class Shop:
    """A server with two tenants, their keys, and a clock that tests advance."""

    server: Live
    tenants: Tenants
    at: list[float]
    keys: dict[str, str] = field(default_factory=dict)

    def ask(self, content: str, tenant: str = "acme", **options: Any) -> Any:
        body = {"model": "sql", "messages": [{"role": "user", "content": content}], **options}
        answer = self.server.post("/v1/chat/completions", body, self.keys[tenant])
        assert answer.status_code == 200, answer.text
        return answer

    def say(self, id: str, tenant: str = "acme", **said: Any) -> httpx.Response:
        self.at[0] += 1
        return self.server.post("/v1/feedback", {"id": id, **said}, self.keys[tenant])

    def get(self, path: str, tenant: str = "acme") -> httpx.Response:
        return self.server.get(path, self.keys[tenant])

    def rows(self, kind: str, tenant: str = "acme", **query: str) -> list[Any]:
        path = f"/v1/feedback/rows?{httpx.QueryParams({'kind': kind, **query})}"
        return [json.loads(line) for line in self.get(path, tenant).text.splitlines()]

    def forget(self, tenant: str = "acme", **query: str) -> Any:
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        return self.server.client.delete("/v1/feedback", params=query, headers=headers).json()

    def kept(self, tenant: str = "acme") -> int:
        self.tenants.answers.flush()
        return int(self.get("/v1/feedback", tenant).json()["answers"])


@pytest.fixture
def shop(quick: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:  # noqa: F811
    """Yield a shop on SQLite, or on PostgreSQL if the test is parametrized with "postgresql"."""
    at = [1_900_000_000.0]
    remote = getattr(request, "param", "sqlite") == "postgresql"
    where = request.getfixturevalue("postgres")() if remote else str(quick / "tenants.sqlite")
    monkeypatch.setattr("veneer.serve.tenancy.tenants.SERVING_PATIENCE", 0.5)
    ledger = LedgerSettings(folder=quick / "journals", room=1 << 20)
    tenants = Tenants(where, ledger=ledger, wall=lambda: at[0], watch=False)
    keys = {name: new_tenant(tenants.store, name, ["*"]) for name in ("acme", "globex")}
    manage.change_settings(tenants.store, "acme", {"feedback_days": 30.0}, actor="me")
    routers = [feedback_routes(tenants.answers)]
    with live(ToyEngine(ToyText(tools=True)), ToyCatalog(), tenants, routers=routers) as server:
        yield Shop(server, tenants, at, keys)
    tenants.close()


def test_feedback_becomes_rows_for_training(shop: Shop, tmp_path: Path) -> None:
    good, bad, wrong = (shop.ask(text).json() for text in ("One", "Two", "Three"))
    both = shop.ask("Four", n=2).json()
    streamed = shop.ask("Five", stream=True).text.splitlines()[0]
    better = {"role": "assistant", "content": "Three, please."}

    said = shop.say(good["id"], thumb="up")
    told = {"object": "feedback", "id": good["id"], "choice": 0, "thumb": "up", "corrected": None, "rejected": []}
    assert said.json() == told
    assert shop.say(bad["id"], thumb="down").json()["thumb"] == "down"
    assert shop.say(wrong["id"], thumb="down", corrected="Three, please.").json()["corrected"] == better
    assert shop.say(both["id"], choice=1, rejected=[{"choice": 0}]).status_code == 200
    assert shop.say(json.loads(streamed.removeprefix("data: "))["id"], thumb="up").status_code == 200

    supervised, pairs, unpaired = (shop.rows(kind) for kind in ("supervised", "preference", "unpaired"))
    assert supervised[0] == {"messages": [*asked("One"), said_by(good)]}
    assert [row["messages"][0]["content"] for row in supervised] == ["One", "Three", "Five"]
    assert supervised[1]["messages"][-1] == better
    assert supervised[2]["messages"][-1]["content"].endswith("Five"), "a stream is kept as its whole text"
    assert pairs[0] == {"prompt": asked("Three"), "chosen": [better], "rejected": [said_by(wrong)]}
    assert [row["label"] for row in unpaired] == [True, False, False, True]
    assert len(pairs) == 1, "the two answers of a greedy model are equal, and teach nothing"
    for kind, rows in (("messages", supervised), ("preference", pairs), ("unpaired-preference", unpaired)):
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        read, about = read_rows([str(file)], format=kind)
        assert (about.format, len(read)) == (kind, len(rows))
    counts = {"answers": 5, "up": 2, "down": 2, "corrected": 1, "chosen": 1}
    assert shop.get("/v1/feedback").json() == {"object": "feedback.summary", "days": 30.0, "names": [], **counts}


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def said_by(answer: Any) -> dict[str, str]:
    return {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}


def test_the_last_choice_between_two_answers_counts(shop: Shop) -> None:
    plain, tuned = shop.ask("Hi", model="toy").json(), shop.ask("Hi").json()
    other = shop.ask("Bye").json()
    assert shop.say(tuned["id"], rejected=[{"id": plain["id"]}]).status_code == 200
    row = {"prompt": asked("Hi"), "chosen": [said_by(tuned)], "rejected": [said_by(plain)]}
    assert shop.rows("preference") == [row]
    assert shop.rows("preference", adapter="polite") == []
    assert shop.rows("preference", adapter="sql") == [row]
    refused = shop.say(tuned["id"], rejected=[{"id": other["id"]}])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "rejected")
    assert shop.say(tuned["id"], rejected=[{}]).status_code == 400, "over itself"
    shop.say(tuned["id"], thumb="up")
    assert shop.say(tuned["id"], thumb="down", rejected=None).json()["rejected"] == []
    assert shop.rows("preference") == []
    assert [row["label"] for row in shop.rows("unpaired")] == [False]
    assert shop.say(tuned["id"], thumb=None).json()["thumb"] is None
    assert shop.rows("unpaired") == []


def test_tool_calls_are_kept_with_their_tools(shop: Shop) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    answer = shop.ask("Go", tools=[tool], tool_choice="required").json()
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    shop.say(answer["id"], thumb="up")
    (row,) = shop.rows("supervised")
    assert row["tools"] == [tool]
    assert row["messages"][-1]["tool_calls"][0]["function"] == call


def test_answers_are_kept_on_request_and_only_for_their_tenant(shop: Shop) -> None:
    foreign, own = shop.ask("Secret", "globex").json()["id"], shop.ask("Mine").json()["id"]
    unkept = shop.ask("Private", store=False)
    assert "x-veneer-ignored" not in unkept.headers
    assert shop.ask("Kept", "globex", store=True).headers["x-veneer-ignored"] == "store"
    assert (shop.kept(), shop.kept("globex")) == (1, 0)
    ids = (foreign, unkept.json()["id"], "chatcmpl-0", "no\0id", "*")
    answers = [shop.say(id, thumb="up") for id in ids]
    assert {a.status_code for a in answers} == {404}
    texts = [answer.json()["error"]["message"] for answer in answers[:3]]
    messages = {text.replace(repr(id), "ID") for text, id in zip(texts, ids, strict=False)}
    assert len(messages) == 1, "answers of others, unkept ones and unknown ones give the same error"
    theirs = shop.say(own, "globex", thumb="up")
    assert theirs.status_code == 404
    assert "veneer tenant set" in theirs.json()["error"]["message"]
    assert shop.say(own, thumb="up", corrected="Mine!").status_code == 200
    assert shop.rows("supervised", "globex") == []
    assert shop.forget("globex", id=own)["answers"] == shop.forget("globex", everything="true")["answers"] == 0
    assert shop.kept() == 1


def test_only_answers_of_chosen_names_are_kept(shop: Shop) -> None:
    manage.change_settings(shop.tenants.store, "acme", {"feedback_days": 30.0, "feedback_names": ["pol*"]}, actor="me")
    shop.ask("One")
    shop.ask("Two", model="polite")
    assert shop.kept() == 1
    manage.change_settings(shop.tenants.store, "acme", {"feedback_days": None}, actor="me")
    shop.ask("Three", model="polite")
    assert shop.kept() == 1


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({}, None),
        ({"thumb": "sideways"}, "thumb"),
        ({"choice": 7, "thumb": "up"}, "choice"),
        ({"corrected": ""}, "corrected"),
        ({"corrected": {"role": "user", "content": "x"}}, "corrected"),
        ({"corrected": "x" * 300_000}, "corrected"),
        ({"rejected": [{"choice": 1}] * 65}, "rejected"),
        ({"thumbs": "up"}, "thumbs"),
    ],
)
def test_contradictory_feedback_is_refused(shop: Shop, said: dict[str, Any], param: str | None) -> None:
    refused = shop.say(shop.ask("Hi").json()["id"], **said)
    assert refused.status_code in (400, 413), refused.text
    assert refused.json()["error"]["param"] == param


def test_removing_a_user_removes_late_answers_too(shop: Shop) -> None:
    first = shop.ask("One", user="u-17").json()["id"]
    shop.ask("Two", user="u-17")
    other = shop.ask("Three", user="u-18").json()["id"]
    shop.say(first, thumb="up")
    shop.say(other, thumb="up", rejected=None)
    assert shop.kept() == 3
    held = shop.tenants.answers.keeping(Principal("tenant", "acme", user="u-17"), SQL, "chatcmpl-late")
    shop.at[0] += 1
    assert shop.forget(user="u-17") == {"object": "feedback.deleted", "answers": 2}
    held({"messages": []}, [{"role": "assistant", "content": "late"}])
    assert shop.kept() == 1, "answers requested before the removal are not kept"
    assert shop.say(first, thumb="up").status_code == 404
    assert [row["messages"][0]["content"] for row in shop.rows("supervised")] == ["Three"]
    shop.at[0] += 1
    shop.ask("Four", user="u-17")
    assert shop.kept() == 2, "later answers are kept again"
    data = b"".join(p.read_bytes() for p in Path(shop.tenants.store.where).parent.rglob("*") if p.is_file())
    assert b"u-17" not in data, "a user is kept as a hash"


def test_expired_answers_are_hidden_and_removed(shop: Shop) -> None:
    old = shop.ask("One").json()["id"]
    shop.say(old, thumb="up")
    shop.at[0] += 20 * DAY
    new = shop.ask("Two").json()["id"]
    shop.say(new, thumb="up")
    assert shop.tenants.answers.sweep() == 0
    shop.at[0] += 11 * DAY
    assert shop.say(old, thumb="down").status_code == 404, "before any sweep"
    assert len(shop.rows("supervised")) == 1
    assert shop.tenants.answers.sweep() == 1
    manage.change_settings(shop.tenants.store, "acme", {"feedback_days": 10.0}, actor="me")
    assert shop.kept() == 0, "fewer days apply to kept is too"
    assert shop.tenants.answers.sweep() == 1
    assert shop.rows("supervised") == []


@pytest.mark.parametrize("shop", ["postgresql"], indirect=True)
def test_feedback_returns_503_while_the_database_is_unavailable(shop: Shop) -> None:
    locked = psycopg.connect(shop.tenants.store.where)
    locked.execute("LOCK TABLE tenant_answers")  # the lock is held until the connection is closed
    id = shop.ask("One").json()["id"]
    away = shop.say(id, thumb="up")
    assert away.status_code == 503
    assert "retry-after" in away.headers
    assert "tenant_answers" not in away.text
    with suppress(Exception):  # the database's error; the writer has given up on the answer before the lock ends
        shop.tenants.answers.flush()
    locked.close()
    assert shop.say(id, thumb="up").status_code == 404
    later = shop.ask("Two").json()["id"]
    assert shop.say(later, thumb="up").status_code == 200
    assert len(shop.rows("supervised")) == 1
