"""Stored answers on each kind of database are counted, exported and removed.

surfaces/test_feedback.py tests the HTTP routes.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.tenancy.conftest import Clock
from veneer.errors import ConfigError
from veneer.library.database import reading
from veneer.serve.access import ResolvedModel
from veneer.serve.principal import Principal
from veneer.serve.quota import Quotas
from veneer.serve.request import Refused
from veneer.serve.settings import QuotaLimits
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.feedback import AnswerFeedback, feedback_counts, feedback_rows
from veneer.serve.tenancy.tenants import Tenants

NOW = 1_800_001_000.0


def keep(tenants: Tenants, id: str, user: str, text: str, asked: str = "Hi", tenant: str = "acme") -> None:
    took = tenants.keeping(Principal("tenant", tenant, user=user), ResolvedModel((), "support", "support"), id)
    took({"messages": [{"role": "user", "content": asked}]}, [{"role": "assistant", "content": text}])


def rows(tenants: Tenants, kind: str) -> list[Any]:
    return list(feedback_rows(tenants.store.engine, "acme", kind, now=NOW))


def test_stored_answers_are_counted_exported_and_removed(one_door: Tenants, clock: Clock) -> None:
    manage.add_tenant(one_door.store, "acme", actor="me")
    manage.change_settings(one_door.store, "acme", {"feedback_days": 30.0}, actor="me")
    one_door.store.refresh()
    for n in range(230):  # more than one batch when reading and writing
        keep(one_door, f"a-{n}", f"u-{n % 2}", f"answer {n} \0 \ud83d")
    for n in range(230):
        one_door.answers.give("acme", AnswerFeedback(f"a-{n}", up=n % 4 != 0, changed=frozenset({"up"})))
    better = {"role": "assistant", "content": "better"}
    one_door.answers.give("acme", AnswerFeedback("a-1", corrected=better, changed=frozenset({"corrected"})))
    chosen = AnswerFeedback("a-2", rejected=(("a-3", 0), ("a-4", 0)), changed=frozenset({"rejected"}))
    one_door.answers.give("acme", chosen)
    with reading(one_door.store.engine) as c:
        counts = feedback_counts(c, "acme", NOW)
    assert counts == {"answers": 230, "up": 172, "down": 58, "corrected": 1, "chosen": 1}
    labels = rows(one_door, "unpaired")
    texts = [row["completion"][0]["content"] for row in labels]
    assert sorted(texts) == sorted(f"answer {n} \0 \ud83d" for n in range(230))
    assert sum(row["label"] for row in labels) == len(rows(one_door, "supervised")) == 172
    both = [(row["chosen"], row["rejected"]) for row in rows(one_door, "preference")]
    pairs = [(chosen[0]["content"][:8], rejected[0]["content"][:8]) for chosen, rejected in both]
    assert sorted(pairs) == [("answer 2", "answer 3"), ("answer 2", "answer 4"), ("better", "answer 1")]

    assert one_door.answers.forget("acme", user="u-1") == 115, "a-1 and a-3 among them"
    assert [row["rejected"][0]["content"][:8] for row in rows(one_door, "preference")] == ["answer 4"]
    assert one_door.answers.forget("acme", id="a-4") == 1
    assert rows(one_door, "preference") == []
    clock.now += 31 * 86400
    assert one_door.answers.sweep() == 114
    with reading(one_door.store.engine) as c:
        assert set(feedback_counts(c, "acme", 0.0).values()) == {0}
    manage.remove_tenant(one_door.store, "acme", actor="me")
    with pytest.raises(Refused, match="no answer 'a-0' is stored"):
        one_door.answers.give("acme", AnswerFeedback("a-0", up=True))


def test_answers_over_a_tenants_quota_are_not_kept(one_door: Tenants) -> None:
    for name in ("acme", "best"):
        manage.add_tenant(one_door.store, name, actor="me")
        manage.change_settings(one_door.store, name, {"feedback_days": 30.0}, actor="me")
    one_door.store.refresh()
    one_door.answers.quotas = Quotas(QuotaLimits(files=3))

    def kept(tenant: str) -> int:
        one_door.answers.flush()
        with reading(one_door.store.engine) as c:
            return feedback_counts(c, tenant, NOW)["answers"]

    for n in range(5):
        keep(one_door, f"a-{n}", f"u-{n}", "well")
    keep(one_door, "b-0", "u", "well", tenant="best")
    assert (kept("acme"), kept("best")) == (3, 1)
    assert one_door.answers.forget("acme", user="u-0") == 1
    keep(one_door, "a-9", "u", "well")
    assert kept("acme") == 3


def test_an_unknown_kind_of_rows_is_refused(tenants: Tenants) -> None:
    with pytest.raises(ConfigError, match="'dpo' is not a kind of training rows"):
        feedback_rows(tenants.store.engine, "acme", "dpo")
