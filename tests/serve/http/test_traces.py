"""Traces across servers, without a collector, without OpenTelemetry, and at the end of a server."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.fake_servers import FakeVLLM, running
from tests.serve.http.test_telemetry import TRACE, app, asked, collector  # noqa: F401
from tests.serve.http.toy import ToyCatalog, ToyText, responses, toy_app, wait_for
from veneer.errors import MissingExtraError, install_command
from veneer.serve.build import build
from veneer.serve.fleet.mixes import Mixes
from veneer.serve.http.telemetry import add_ids, traces_of
from veneer.serve.settings import ServeSettings
from veneer.serve.upstream import Upstream

PARENT = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}


def spans(bodies: list[bytes]) -> list[Any]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    read = [ExportTraceServiceRequest.FromString(body) for body in bodies]
    return [s for b in read for r in b.resource_spans for scope in r.scope_spans for s in scope.spans]


def through_upstream(folder: Path) -> tuple[httpx.Response, dict[str, str]]:
    """Send a request through a server with an upstream; return the answer, and the headers that vLLM received."""
    fake = FakeVLLM()

    async def ask(url: str) -> httpx.Response:
        mixes = Mixes(lambda digest: folder, folder)
        engine: Any = Upstream(url, mixes=mixes, decode=lambda ids: "".join(f"<{i}>" for i in ids))
        engine.text = ToyText()
        door = toy_app(engine, ToyCatalog())
        await engine.begin()
        try:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://localhost") as client:
                body = {"model": "toy", "prompt": "hello", "max_tokens": 3}
                return await client.post("/v1/completions", json=body, headers=PARENT)
        finally:
            await engine.end()

    with running(fake) as url:
        return asyncio.run(ask(url)), fake.headers[-1]


def test_the_upstream_continues_the_clients_trace(collector, tmp_path):  # noqa: F811
    answer, received = through_upstream(tmp_path)
    assert answer.status_code == 200
    version, trace, parent, _ = received["traceparent"].split("-")
    assert (version, trace) == ("00", TRACE)
    # A second server, as the upstream, continues the trace that the first one sent.
    responses(app(), [asked(traceparent=received["traceparent"])])
    wait_for(lambda: len(spans(collector[1])) == 8, 60)
    found = spans(collector[1])
    assert {span.trace_id.hex() for span in found} == {TRACE}
    door, engine = [span for span in found if span.name.startswith("POST")]
    assert door.parent_span_id.hex() == PARENT["traceparent"].split("-")[2]
    assert engine.parent_span_id.hex() == parent == door.span_id.hex()


def test_without_traces_the_upstream_receives_no_header_of_ours(tmp_path):
    answer, received = through_upstream(tmp_path)
    assert answer.status_code == 200
    assert "traceparent" not in received


@pytest.mark.parametrize("hangs", [False, True])
def test_a_lost_collector_costs_neither_requests_nor_memory(collector, monkeypatch, hangs):  # noqa: F811
    from opentelemetry.sdk.trace import ReadableSpan

    receiver, bodies = collector
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    served = app()
    responses(served, [asked()])
    wait_for(lambda: bodies, 60)
    receiver.shutdown()
    if not hangs:  # otherwise the socket stays open, and nobody answers
        receiver.server_close()
    before = len(bodies)
    assert {each.status_code for each in responses(served, [asked()] * 100)} == {200}
    assert len(bodies) == before
    gc.collect()
    kept = sum(isinstance(each, ReadableSpan) for each in gc.get_objects())
    assert kept < 100, "more spans than the queue and a batch, of 400"


def test_without_an_endpoint_opentelemetry_is_not_imported():
    code = """
    import sys
    from tests.serve.http.test_telemetry import app, asked
    from tests.serve.http.toy import responses
    (answer,) = responses(app(), [asked()])
    assert answer.status_code == 200
    heavy = ("opentelemetry.sdk", "opentelemetry.exporter")  # other libraries import the API
    print([name for name in sys.modules if name.startswith(heavy)])
    """
    root = Path(__file__).resolve().parents[3]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    env = clean | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    ran = subprocess.run([sys.executable, "-c", re.sub("^    ", "", code, flags=re.M)], env=env, cwd=root,
                         capture_output=True, text=True)  # fmt: skip
    assert ran.stdout.strip() == "[]", ran.stderr


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert traces_of({}) is None
    with pytest.raises(MissingExtraError, match=re.escape(install_command("fleet"))):
        traces_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1"})


def test_a_server_that_stops_exports_its_last_spans(collector, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))

    async def run() -> None:
        built = build(ServeSettings("a-base", library=str(tmp_path / "library")), lambda text: None)
        await built.start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(built.app), base_url="http://localhost") as client:
            assert (await client.get("/version")).status_code == 200
        assert not collector[1]
        await built.stop()

    asyncio.run(run())
    assert [span.name for span in spans(collector[1])] == ["GET /version"]


@pytest.mark.parametrize("traced", [False, True])
def test_log_lines_of_a_request_have_its_ids(request, traced):
    if traced:
        request.getfixturevalue("collector")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(add_ids)
    handler.setFormatter(logging.Formatter("%(message)s%(ids)s"))
    logger = logging.getLogger("veneer")
    logger.addHandler(handler)
    try:
        crash = asked(**PARENT) | {"json": {"model": "sql", "prompt": "CRASH", "max_tokens": 5}}
        (answer,) = responses(app(), [crash], raise_app_exceptions=False)
        logger.warning("outside")
    finally:
        logger.removeHandler(handler)
    assert answer.status_code == 500
    ids = f" request_id={answer.headers['x-request-id']}" + (f" trace_id={TRACE}" if traced else "")
    first, *_, last = stream.getvalue().splitlines()
    assert first.endswith(ids)
    assert last == "outside"
