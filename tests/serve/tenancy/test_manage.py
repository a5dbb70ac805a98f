"""The audit log: one row per change; changed, removed or truncated rows are detected."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.exc import DBAPIError

from tests.serve.tenancy.conftest import set_price
from veneer.library.database import reading, write_transaction
from veneer.serve.tenancy import manage, routes
from veneer.serve.tenancy.store import Store
from veneer.serve.tenancy.store import audit_table as table


def change_everything(store: Store) -> None:
    manage.add_tenant(store, "acme", actor="ana")
    row, _ = manage.make_tenant_key(store, "acme", actor="ana")
    manage.make_tenant_key(store, "acme", actor="ana")
    manage.revoke_key(store, row.id, actor="bob")
    manage.revoke_key(store, row.id, actor="bob")  # changes nothing, so the log has one line
    manage.change_settings(store, "acme", {"adapters": ["x"]}, actor="ana")
    manage.change_settings(store, "acme", {"concurrency": 2}, actor="ana")
    manage.change_settings(store, "acme", {"concurrency": 5}, actor="ana")
    set_price(store, 1, 2, 3, tenant="acme")
    set_price(store, None, None, None, tenant="acme")
    routes.set_route(store, "support", [("v1", 1)], actor="ana")
    manage.change_settings(store, "acme", {"weight": 2.0}, actor="ana")
    manage.log_change(store, "admin", "adapter.load", "v1", None, {"digest": "sha256:3f"})
    manage.remove_tenant(store, "acme", actor="ana")


def tamper(store: Store, *statements: object) -> None:
    """Change the log as somebody with database access could: drop the triggers, then run the statements."""
    with write_transaction(store.engine) as c:
        if c.dialect.name == "sqlite":
            for verb in ("update", "delete"):
                c.exec_driver_sql(f"DROP TRIGGER tenant_audit_no_{verb}")
        else:
            c.exec_driver_sql("DROP TRIGGER tenant_audit_fixed ON tenant_audit")
        for statement in statements:
            c.execute(statement)  # type: ignore[call-overload]


def faults(store: Store, expect: str = "") -> tuple[str, int, list[str]]:
    with reading(store.engine) as c:
        return manage.audit_faults(c, expect)


def test_every_change_has_an_audit_line_without_secrets(store: Store) -> None:
    change_everything(store)
    with reading(store.engine) as c:
        lines = manage.audit_lines(c)
        assert [x["what"] for x in manage.audit_lines(c, action="key")] == ["key.revoke", "key.add", "key.add"]
        assert [x["number"] for x in manage.audit_lines(c, subject="acme", limit=2, skip=1)] == [11, 9]
    expected = f"tenant.add key.add key.add key.revoke {'settings.change ' * 5}"
    expected += "route.set settings.change adapter.load tenant.remove"
    assert [x["what"] for x in reversed(lines)] == expected.split()
    by_number = {x["number"]: x for x in lines}
    assert by_number[7]["before"]["concurrency"] == 2
    assert by_number[7]["after"]["concurrency"] == 5
    assert by_number[9]["before"] == {"prompt_price": 1, "cached_price": 2, "completion_price": 3}
    assert by_number[11]["before"] == {"weight": 1.0}
    assert by_number[4]["who"] == "bob"
    assert by_number[4]["after"]["revoked"] is not None
    assert "hash" not in json.dumps([(x["before"], x["after"]) for x in lines])
    assert faults(store) == (by_number[13]["hash"], 13, [])


def test_the_database_refuses_changes_of_audit_lines(store: Store) -> None:
    change_everything(store)
    for statement in (delete(table), update(table).values(who="nobody")):
        with pytest.raises(DBAPIError, match="append-only"), write_transaction(store.engine) as c:
            c.execute(statement)
    assert faults(store)[2] == []


def test_a_failed_change_leaves_no_audit_line(store: Store) -> None:
    manage.add_tenant(store, "acme", actor="ana")
    revision = store.refresh().revision
    with pytest.raises(Exception, match="already"):
        manage.add_tenant(store, "acme", actor="ana")
    assert faults(store)[1] == 1
    assert store.refresh().revision == revision


@pytest.mark.parametrize(
    ("what", "words"),
    [("removed", "lines 5 to 5 are missing"), ("changed", "line 5 was changed"), ("renumbered", "line 5")],
)
def test_a_changed_audit_line_is_detected(store: Store, what: str, words: str) -> None:
    change_everything(store)
    here = table.c.number == 5
    if what == "changed":
        tamper(store, update(table).where(here).values(who="mallory"))
    else:
        later = range(6, 14) if what == "renumbered" else ()
        moved = (update(table).where(table.c.number == n).values(number=n - 1) for n in later)
        tamper(store, delete(table).where(here), *moved)
    assert any(words in fault for fault in faults(store)[2]), faults(store)[2]


@pytest.mark.parametrize("again", [False, True])
def test_a_truncated_log_is_detected_by_its_head(store: Store, again: bool) -> None:
    change_everything(store)
    head = faults(store)[0]
    manage.add_tenant(store, "globex", actor="ana")
    assert faults(store, head)[2] == []
    tamper(store, delete(table) if again else delete(table).where(table.c.number > 10))
    if again:
        change_everything(store)
        with reading(store.engine) as c:
            assert c.scalar(select(table.c.previous).where(table.c.number == 1)) == manage.FIRST_HASH
    assert faults(store)[2] == []  # the hash chain alone cannot show that the end is missing
    assert "missing" in faults(store, head)[2][0]
