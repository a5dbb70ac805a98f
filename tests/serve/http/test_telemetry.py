"""Traces and the access log, with OpenTelemetry's own SDK and a receiver of OTLP over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyTenancy, ToyText, responses, toy_app, wait_for
from veneer.serve.http import telemetry
from veneer.serve.settings import HttpSettings

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
"""The trace id of the example in W3C Trace Context."""
BODY = {"model": "sql", "prompt": "a-secret-prompt", "max_tokens": 5}


def asked(**headers: str) -> dict[str, Any]:
    keys = {"authorization": "Bearer acme", **headers}
    return {"method": "POST", "url": "/v1/completions", "json": BODY, "headers": keys}


def app(log: bool = False) -> Any:
    return toy_app(ToyEngine(ToyText()), ToyCatalog(), ToyTenancy(), HttpSettings(access_log=log))


class Receiver(BaseHTTPRequestHandler):
    bodies: list[bytes]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[HTTPServer, list[bytes]]]:
    kind = type("Bodies", (Receiver,), {"bodies": []})
    server = HTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    made, original = [], telemetry.traces_of

    def traces_of(environment: Mapping[str, str]) -> Any:
        made.append(original(environment))
        return made[-1]

    monkeypatch.setattr(telemetry, "traces_of", traces_of)
    yield server, kind.bodies
    for provider in filter(None, made):  # otherwise, it retries until the end of the tests
        provider.shutdown()
    server.shutdown()
    server.server_close()


def test_a_request_continues_its_trace_from_the_door_to_the_ledger(collector):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    (answer,) = responses(app(), [asked(traceparent=f"00-{TRACE}-00f067aa0ba902b7-01")])
    assert answer.status_code == 200

    def spans() -> dict[str, Any]:
        read = [ExportTraceServiceRequest.FromString(body) for body in collector[1]]
        return {s.name: s for b in read for r in b.resource_spans for scope in r.scope_spans for s in scope.spans}

    wait_for(lambda: len(spans()) == 4, 60)
    found = spans()
    assert set(found) == {"POST /v1/completions", "queue", "engine", "ledger"}
    assert {span.trace_id.hex() for span in found.values()} == {TRACE}
    door = found.pop("POST /v1/completions")
    assert door.parent_span_id.hex() == "00f067aa0ba902b7"
    assert {span.parent_span_id for span in found.values()} == {door.span_id}
    values = {each.key: each.value for each in door.attributes}
    assert values["gen_ai.request.model"].string_value == "sql"
    assert values["gen_ai.usage.output_tokens"].int_value == answer.json()["usage"]["completion_tokens"]
    assert values["veneer.request_id"].string_value == answer.headers["x-request-id"]
    for secret in (b"a-secret-prompt", b"Bearer", answer.json()["choices"][0]["text"].encode()):
        assert not any(secret in body for body in collector[1])


def test_traces_are_off_until_an_endpoint_is_set():
    assert telemetry.traces_of({}) is None
    assert telemetry.traces_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}) is None


def test_the_access_log_has_one_line_per_request(capsys):
    forged = {**asked(), "url": "/x%0A%7B%22forged%22:1%7D"}
    good, missing = responses(app(log=True), [asked(), forged])
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["request_id"] for line in lines] == [each.headers["x-request-id"] for each in (good, missing)]
    assert [line["status"] for line in lines] == [200, 404]
    line, usage = lines[0], good.json()["usage"]
    assert (line["tenant"], line["method"], line["route"], line["model"]) == ("acme", "POST", "/v1/completions", "sql")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert line["bytes"] == len(good.content)


def test_without_the_setting_nothing_is_logged(capsys):
    responses(app(), [asked()])
    assert not capsys.readouterr().err
