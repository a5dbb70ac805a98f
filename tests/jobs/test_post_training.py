"""The section `after` of a job file, and its promotion rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.jobs.small import small_config
from veneer.errors import ConfigError, VeneerError
from veneer.jobs.post_training import PromotionRule, check_after, held_out_rows, load_job_config, parse_after
from veneer.serve.tenancy import manage, routes
from veneer.serve.tenancy.store import Store
from veneer.train.config.load import config_from


@given(
    new=st.integers(0, 100),
    serving=st.integers(0, 100),
    by=st.integers(-9, 9),
    metric=st.sampled_from(["valid_json", "loss"]),
)
def test_rule_compares_in_the_metrics_direction(new: int, serving: int, by: int, metric: str) -> None:
    """The expected result is calculated in integers, without rounding errors.

    So a difference of 0.01 must count as 0.01 in floating point too."""
    rule = PromotionRule(metric=metric, by=by / 100)
    holds = rule.holds({"new": {metric: new / 100}, "serving": {metric: serving / 100}})
    assert holds == ((serving - new if metric == "loss" else new - serving) >= by)


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ({"metric": "loss", "against": "base", "by": 0.5}, True), ({"metric": "loss", "by": 0.6}, False),
        ({"metric": "loss"}, True), ({"metric": "valid_json"}, None), ({"metric": "exact_match"}, None)
    ],
)  # fmt: skip
def test_rule_without_a_score_is_undecided(rule: Any, holds: bool | None) -> None:
    scores: Any = {
        "new": {"loss": 1.5, "exact_match": 0.5, "valid_json": None},
        "serving": {"loss": 2.0, "valid_json": 0.1},
        "base": {"loss": 2.0},
    }
    assert PromotionRule(**rule).holds(scores) is holds


@pytest.fixture
def tenants(tmp_path: Path) -> Any:
    store = Store(str(tmp_path / "tenants.sqlite"))
    manage.add_tenant(store, "acme", actor="test")
    for name, targets in {"everybodys": [("a@1", 1)]}.items():
        routes.set_route(store, name, targets, actor="test")
    for name, targets in {"split": [("a@1", 1), ("a@2", 1)], "moving": [("acme/support", 1)]}.items():
        routes.set_route(store, name, targets, tenant="acme", actor="test")
    yield store
    store.close()


HELD: dict[str, Any] = {"evaluate": {}}


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"rout": {"name": "x"}}, "did you mean route"),
        ({"route": {"name": "x", "wight": 0.1}}, "did you mean weight"),
        ({"route": {"name": "x", "weight": 1.5}}, "`after.route.weight`"),
        ({"route": {"weight": 0.1}}, "`after.route.name`"),
        ({"route": {"name": "x", "weight": True}}, "`after.route.weight`"), ([1], "cannot be read"),
        ({"evaluate": {"metrics": ["exact_mach"]}}, "did you mean exact_match"), ({}, "nothing to do"),
        ({"route": None}, "`after.route.name`"),
        ({**HELD, "promote": {"metric": "loss"}}, "needs a route"), ({"route": {"name": "No Route"}}, "cannot name"),
        ({"route": {"name": "globex/x"}}, "not in the namespace of tenant acme"),
        ({"route": {"name": "everybodys"}}, "belongs to all tenants"),
        ({"route": {"name": "split"}}, "already has several targets"),
        ({"route": {"name": "moving"}}, "the newest version"),
        ({"route": {"name": "x"}, "promote": {"metric": "loss"}}, "loss is used in `promote`"),
        ({**HELD, "route": {"name": "x"}, "promote": {"metric": "valid_json"}}, "[exact_match, loss, valid_json]"),
        ({"promote": {"metric": "exact_mach"}, "route": {"name": "x"}}, "did you mean exact_match"),
        ({"promote": {"metric": "loss", "against": "servin"}}, "`after.promote.against`"),
        ({"promote": {"metric": "loss", "buy": 1}}, "did you mean by"), ({"promote": "loss < base"}, "`after.promote`"),
    ],
)  # fmt: skip
def test_impossible_sections_are_refused_before_training(tenants, tmp_path, after, message):
    config, _ = config_from(small_config(tmp_path) | {"output": str(tmp_path / "out")})
    with pytest.raises(VeneerError) as error:
        check_after(parse_after(after, tmp_path), config, "acme/support", "acme", tenants)
    assert message in str(error.value)


def test_comparison_needs_held_out_rows_and_tenants(tenants: Store, tmp_path: Path) -> None:
    settings = small_config(tmp_path) | {"output": str(tmp_path / "out")}
    after = parse_after({**HELD, "route": {"name": "x"}}, tmp_path)
    config, _ = config_from(settings)
    check_after(after, config, "acme/support", "acme", tenants)
    with pytest.raises(ConfigError, match="need a tenants' database"):
        check_after(after, config, "acme/support", "acme", None)
    config, _ = config_from(settings | {"data": {"train": str(tmp_path / "rows.jsonl"), "split": 0}})
    with pytest.raises(ConfigError, match="no rows are held out"):
        held_out_rows(after.evaluate, config)


def test_job_file_has_a_run_and_a_section_after(tmp_path: Path) -> None:
    file = tmp_path / "support.yaml"
    small_config(tmp_path)
    run = "base: ./tiny-base\ndata: {train: rows.jsonl}\noutput: out\n"
    file.write_text(f"{run}after:\n  evaluate: {{data: held.jsonl}}\n  route: {{name: support}}\n")
    config, after = load_job_config(file, ["adapter.rank=3"])
    assert config.adapter.rank == 3
    assert after.evaluate.data == [str(tmp_path / "held.jsonl")]
    file.write_text(f"{run}after:\n  evaluate:\n  route: {{name: support}}\n")
    _, after = load_job_config(file)
    file.write_text(run)
    assert load_job_config(file)[1] is None
