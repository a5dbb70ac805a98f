"""The dashboard and the alerts in deploy/observe, against the server's metrics and a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyText, free_port, live, wait_for
from veneer.serve.access import LedgerState, OpenAccess
from veneer.serve.settings import Objectives

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "observe"
BODY = {"model": "sql", "prompt": "hello", "max_tokens": 5}


class Ledgered(OpenAccess):
    def ledger_state(self) -> LedgerState:
        return LedgerState(0, 0.0, False)


def alerts() -> dict[str, str]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def expressions() -> list[str]:
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]] + list(alerts().values())


@contextmanager
def server() -> Iterator[Any]:
    with live(ToyEngine(ToyText()), ToyCatalog(), Ledgered()) as here:
        assert here.post("/v1/completions", BODY).status_code == 200
        assert here.post("/v1/completions", {**BODY, "model": "none"}).status_code == 404
        yield here


def exported_names(text: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def test_the_server_exports_every_metric_of_dashboard_and_alerts():
    with server() as here:
        exported = exported_names(here.get("/metrics").text)
    used = {name for text in expressions() for name in re.findall(r"\b(?:vllm|veneer):\w+", text)}
    assert len(used) > 10
    assert used <= exported


def program(name: str) -> str:
    path = shutil.which(name)
    assert path, f"there is no {name}: install Debian's package prometheus"
    return path


@pytest.mark.fleet
def test_prometheus_evaluates_every_expression(tmp_path):
    for name in ("alerts.yaml", "prometheus.yaml"):
        shutil.copy(FOLDER / name, tmp_path)
    file, port = tmp_path / "prometheus.yaml", free_port()
    subprocess.run([program("promtool"), "check", "config", str(file)], check=True)
    with server() as here:
        text = file.read_text().replace("localhost:8000", here.url.removeprefix("http://"))
        file.write_text(text.replace("15s", "1s"))
        command = [program("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL)
        try:

            def ask(query: str) -> Any:
                try:
                    url = f"http://127.0.0.1:{port}/api/v1/query"
                    answer = httpx.get(url, params={"query": query}, timeout=30)
                except httpx.TransportError:
                    return {}
                return {} if answer.status_code == 503 else answer.json()  # 503: Prometheus is starting

            rated = 'rate(vllm:request_success_total{finished_reason="stop"}[5m])'
            wait_for(lambda: ask(rated).get("data", {}).get("result"), 120)
            for expression in expressions():
                assert ask(expression)["status"] == "success", expression
            for name in {name for text in expressions() for name in re.findall(r"\b(?:vllm|veneer):\w+", text)}:
                assert ask(name)["data"]["result"], name
        finally:
            process.terminate()
            process.wait()


FIRING = {
    "VeneerQueueLong": {"vllm:num_requests_waiting": "200+0x60"},
    "VeneerLedgerOwed": {"veneer:ledger_owed": "2000+0x60"},
    "VeneerLedgerAway": {"veneer:ledger_away": "1+0x60"},
    "VeneerCacheFull": {"vllm:kv_cache_usage_perc": "0.99+0x60"},
    "VeneerAdaptersThrash": {"veneer:adapter_evictions_total": "0+120x60"},
    "VeneerEngineStuck": {
        "vllm:num_requests_running": "1+0x60",
        "veneer:engine_steps_total": "5+0x60",
        "vllm:generation_tokens_total": "9+0x60",
        "vllm:inter_token_latency_seconds_count": "8+0x60",
    },
    "VeneerErrors": {
        'vllm:request_success_total{finished_reason="error"}': "0+5x60",
        'vllm:request_success_total{finished_reason="stop"}': "0+60x60",
    },
    "VeneerObjectiveMissed": {
        'veneer:tenant_answers_total{tenant="acme"}': "0+60x60",
        'veneer:tenant_missed_total{tenant="acme",objective="first_token"}': "0+4x60",
        'veneer:tenant_missed_total{tenant="acme",objective="errors"}': "0+0x60",
        'veneer:objective_allowed{objective="first_token"}': "0.05+0x60",
        'veneer:objective_allowed{objective="errors"}': "0.01+0x60",
    },
    "VeneerFirstTokenSlow": {
        'vllm:time_to_first_token_seconds_bucket{le="5.0"}': "0+1x60",
        'vllm:time_to_first_token_seconds_bucket{le="10.0"}': "0+60x60",
        'vllm:time_to_first_token_seconds_bucket{le="+Inf"}': "0+60x60",
    },
}
"""Alert -> series that must make it fire, in promtool's notation: one value per minute."""

_STUCK, _ERRORS = FIRING["VeneerEngineStuck"], FIRING["VeneerErrors"]
_FIRST, _MISSED = FIRING["VeneerFirstTokenSlow"], FIRING["VeneerObjectiveMissed"]
SILENT: dict[str, list[dict[str, str]]] = {
    "VeneerQueueLong": [{"vllm:num_requests_waiting": "100+0x60"}, {"vllm:num_requests_waiting": "0 0 500 0x57"}],
    "VeneerLedgerOwed": [{"veneer:ledger_owed": "1000+0x60", "veneer:ledger_lag_seconds": "60+0x60"}],
    "VeneerLedgerAway": [{"veneer:ledger_away": "0+0x60"}, {"veneer:ledger_away": "0x10 1 0x49"}],
    "VeneerCacheFull": [{"vllm:kv_cache_usage_perc": "0.95+0x60"}],
    "VeneerAdaptersThrash": [{"veneer:adapter_evictions_total": "0+60x60"}],
    "VeneerEngineStuck": [
        _STUCK | {"vllm:num_requests_running": "0+0x60"},
        _STUCK | {"veneer:engine_steps_total": "5+1x60"},  # a long prompt: steps, but no token yet
        # An upstream: no steps here, and a long answer whose tokens are counted at its end.
        _STUCK | {"veneer:engine_steps_total": "0+0x60", "vllm:inter_token_latency_seconds_count": "8+900x60"},
        # vLLM that veneer runs: vLLM's series have another model_name.
        {
            f'{name}{{model_name="{"veneer" if name.startswith("veneer") else "vllm"}"}}': values
            for name, values in (_STUCK | {"vllm:generation_tokens_total": "9+900x60"}).items()
        },
    ],
    "VeneerErrors": [_ERRORS | {'vllm:request_success_total{finished_reason="stop"}': "0+600x60"}],
    "VeneerObjectiveMissed": [
        _MISSED | {'veneer:tenant_missed_total{tenant="acme",objective="first_token"}': "0+2x60"},
        _MISSED | {'veneer:objective_allowed{objective="first_token"}': "0.1+0x60"},
        # One miss of a tenant that seldom asks.
        _MISSED
        | {
            'veneer:tenant_answers_total{tenant="acme"}': "0x10 1 3x50",
            'veneer:tenant_missed_total{tenant="acme",objective="first_token"}': "0x10 1x50",
        },
    ],
    "VeneerFirstTokenSlow": [_FIRST | {'vllm:time_to_first_token_seconds_bucket{le="5.0"}': "0+59x60"}],
}
"""Alert -> cases close to its bounds, in which no alert may fire."""


def check_rules(folder: Path, series: dict[str, str], firing: set[str]) -> None:
    """Check with promtool which alerts fire at some time in 60 minutes of these series."""
    count = 'max_over_time(count(ALERTS{alertname="%s", alertstate="firing"})[60m:1m])'
    checks = [
        {"expr": count % name, "eval_time": "60m", "exp_samples": [{"labels": "{}", "value": 1}] * (name in firing)}
        for name in alerts()
    ]
    # Prometheus adds the label `instance` to each series that it scrapes.
    labeled = [name.replace("{", '{instance="a",') if "{" in name else f'{name}{{instance="a"}}' for name in series]
    inputs = [{"series": name, "values": values} for name, values in zip(labeled, series.values(), strict=True)]
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": checks}
    shutil.copy(FOLDER / "alerts.yaml", folder)
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": [test]}))
    ran = subprocess.run([program("promtool"), "test", "rules", str(file)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_alerts_by_server_use_the_default_objectives():
    default = Objectives()
    assert alerts()["VeneerFirstTokenSlow"].startswith(f"histogram_quantile({1 - default.slow:g},")
    assert alerts()["VeneerFirstTokenSlow"].endswith(f"> {default.first_token:g}")
    assert alerts()["VeneerErrors"].strip().endswith(f"> {default.failed:g}")


@pytest.mark.fleet
@pytest.mark.parametrize("alert", FIRING)
def test_an_alert_fires_when_it_should_and_only_then(tmp_path, alert):
    assert set(FIRING) == set(SILENT) == set(alerts())
    check_rules(tmp_path, FIRING[alert], {alert})
    for series in SILENT[alert]:
        check_rules(tmp_path, series, set())
