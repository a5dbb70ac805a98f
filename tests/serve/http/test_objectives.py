"""Objectives: which answers of which tenant count as too slow or failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyTenancy, ToyText, responses, toy_app
from veneer.errors import ConfigError
from veneer.serve.config import server_config
from veneer.serve.settings import HttpSettings, Objectives

FAST = Objectives(first_token=3600, between_tokens=3600)
IMPOSSIBLE = 1e-12


def asked(prompt: str, key: str = "acme", model: str = "sql") -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 5}
    return {"method": "POST", "url": "/v1/completions", "json": body, "headers": {"authorization": f"Bearer {key}"}}


def levels(objectives: Objectives, *prompts: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return what /metrics counts by tenant; the sums of the page must be the same."""
    app = toy_app(ToyEngine(ToyText()), ToyCatalog(), ToyTenancy(), HttpSettings(objectives=objectives))
    scrape = {"method": "GET", "url": "/metrics", "headers": {"authorization": "Bearer admin"}}
    text = responses(app, [*prompts, scrape], raise_app_exceptions=False)[-1].text
    counted: dict[str, dict[str, int]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in ("veneer:tenant_answers_total", "veneer:tenant_missed_total") and sample.value:
                tenant, what = sample.labels["tenant"], sample.labels.get("objective", "answers")
                counted.setdefault(tenant, {})[what] = int(sample.value)
    assert {tenant: dict(level) for tenant, level in app.state.service.metrics.levels().items()} == counted
    return counted


def test_a_fast_answer_misses_nothing():
    assert levels(FAST, asked("hello"), asked("hello")) == {"acme": {"answers": 2}}


def test_each_time_has_its_own_objective():
    slow_start = Objectives(first_token=IMPOSSIBLE, between_tokens=3600)
    assert levels(slow_start, asked("hello")) == {"acme": {"answers": 1, "first_token": 1}}
    slow_tokens = Objectives(first_token=3600, between_tokens=0.01)  # the toy engine waits 0.05 s per token
    assert levels(slow_tokens, asked("SLOW")) == {"acme": {"answers": 1, "between_tokens": 1}}


@pytest.mark.parametrize("prompt", ["FAIL", "CRASH", "FULL"])
def test_a_failed_answer_counts_as_an_error_only(prompt):
    both = Objectives(first_token=IMPOSSIBLE, between_tokens=IMPOSSIBLE)
    assert levels(both, asked(prompt)) == {"acme": {"answers": 1, "errors": 1}}


def test_a_refused_request_is_not_an_answer():
    assert levels(FAST, asked("hello", model="none"), asked("hello", key="wrong")) == {}


def test_tenants_are_counted_separately():
    found = levels(FAST, asked("hello"), asked("FAIL", "admin"), asked("hello", "admin"))
    assert found == {"acme": {"answers": 1}, "": {"answers": 2, "errors": 1}}


def test_objectives_come_from_the_configuration_file():
    read = server_config({"objectives": {"first_token": 2, "failed": 0.001}}, Path("server.yaml")).objectives
    assert read == Objectives(first_token=2.0, failed=0.001)
    assert server_config({}, Path("server.yaml")).objectives == Objectives()
    for wrong in ({"first_token": 0}, {"slow": 1}, {"failed": -0.1}, {"first": 2}, {"first_token": "soon"}):
        with pytest.raises(ConfigError, match="objectives"):
            server_config({"objectives": wrong}, Path("server.yaml"))
