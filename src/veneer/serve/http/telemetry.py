"""The access log and OpenTelemetry traces of requests; both are off until asked for.

The access log (`access_log: true` in the configuration file) writes one JSON object per request to stderr.
Traces need the extra `fleet`, and are on if OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT
is set and OTEL_SDK_DISABLED is not `true`. The SDK exports from a thread with a bounded queue, and drops spans
that it cannot send, so a collector that is away neither delays nor fails a request. Attributes are those of
OpenTelemetry's semantic conventions for HTTP and GenAI; they contain no prompt, completion or key.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Message, Scope

from veneer.errors import MissingExtraError
from veneer.serve.access import Bill
from veneer.serve.request import Usage

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def traces_of(environment: Mapping[str, str]) -> Any:
    """Return a tracer provider that exports by OTLP over HTTP, or None if the environment asks for no traces.

    Its `shutdown` exports the remaining spans.

    Raises MissingExtraError.
    """
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if disabled or not any(environment.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingExtraError("traces need OpenTelemetry", extra="fleet") from error
    name = {} if environment.get("OTEL_SERVICE_NAME") else {"service.name": "veneer"}
    provider = TracerProvider(resource=Resource.create(name))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


@dataclass
class Trail:
    """What is known of one HTTP request. `span`: the request's span, or None without traces."""

    id: str
    method: str
    span: Any = None
    tracer: Any = None
    began: float = field(default_factory=time.perf_counter)
    status: int = 499
    bytes: int = 0
    model: str = ""
    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0))

    def answered(self, message: Message) -> None:
        """Count a message of the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.bytes += len(message.get("body", b""))

    def used(self, model: str, usage: Usage) -> None:
        """Record the model and usage of the request, and the spans of its times in queue and engine."""
        self.model, self.usage = model, usage
        if self.span is None:
            return
        end = time.time_ns()
        started = end - int((usage.prefill + usage.decode) * 1e9)
        queued = started - int(usage.queued * 1e9)
        for name, start, stop in (("queue", queued, started), ("engine", started, end)):
            self.child(name, start).end(stop)
        kinds = {"chat": "chat", "images": "generate_content"}
        operation = next((kind for part, kind in kinds.items() if part in self.span.name), "text_completion")
        self.span.set_attributes(
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "veneer",
                "gen_ai.request.model": model,
                "gen_ai.usage.input_tokens": usage.prompt,
                "gen_ai.usage.cache_read.input_tokens": usage.cached,
                "gen_ai.usage.output_tokens": usage.completion,
            }
        )

    def child(self, name: str, start: int | None = None) -> Any:
        """Return a new span within the request's span. Needs traces."""
        from opentelemetry.trace import set_span_in_context

        return self.tracer.start_span(name, set_span_in_context(self.span), start_time=start)

    @property
    def traceparent(self) -> str:
        """The header that continues the trace (W3C Trace Context), or "" without traces."""
        if self.span is None:
            return ""
        at = self.span.get_span_context()
        return f"00-{at.trace_id:032x}-{at.span_id:016x}-{int(at.trace_flags):02x}"

    def end(self, scope: Scope, logged: bool) -> None:
        """End the request's span, and write its line of the access log if `logged`."""
        route = getattr(scope.get("route"), "path", "")
        tenant = scope["veneer.principal"].tenant
        if self.span is not None:
            self.span.update_name(f"{self.method} {route}".rstrip())
            attributes = {"http.route": route, "http.response.status_code": self.status}
            self.span.set_attributes(attributes | {"veneer.request_id": self.id, "veneer.tenant": tenant})
            if self.status >= 500:
                from opentelemetry.trace import StatusCode

                self.span.set_status(StatusCode.ERROR)
            self.span.end()
        if logged:
            row = {"time": round(time.time(), 3), "request_id": self.id, "trace_id": self.traceparent[3:35]}
            row |= {"tenant": tenant, "method": self.method, "route": route, "status": self.status}
            row |= {"bytes": self.bytes, "seconds": round(time.perf_counter() - self.began, 6), "model": self.model}
            row |= {"prompt_tokens": self.usage.prompt, "completion_tokens": self.usage.completion}
            # json escapes control and non-ASCII characters, so that a client's text cannot start a line
            sys.stderr.write(f"{json.dumps(row)}\n")


current: ContextVar[Trail | None] = ContextVar("trail", default=None)
"""The request that this task works for."""


def begin(scope: Scope, request_id: str, tracer: Any) -> Trail:
    """Return the trail of a new request; its span continues the trace of the request's `traceparent`."""
    trail = Trail(request_id, scope["method"])
    if tracer is not None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        context = TraceContextTextMapPropagator().extract(headers)
        trail.tracer = tracer
        trail.span = tracer.start_span(f"{trail.method} {scope['path']}", context, kind=SpanKind.SERVER)
    current.set(trail)
    return trail


async def settle(trail: Trail | None, model: str, usage: Usage, bill: Bill) -> None:
    """Bill a request, and record its usage and the time that the ledger takes in `trail`."""
    if trail is not None:
        trail.used(model, usage)
    ledger = trail.child("ledger") if trail is not None and trail.span is not None else None
    try:
        await bill.used(usage)
    finally:
        if ledger is not None:
            ledger.end()


def add_ids(record: logging.LogRecord) -> bool:
    """Set `ids` of a log record to the ids of the request that the task works for. A filter of log handlers."""
    trail = current.get()
    ids = "" if trail is None else f" request_id={trail.id}"
    if trail is not None and trail.span is not None:
        ids += f" trace_id={trail.traceparent[3:35]}"
    record.__dict__["ids"] = ids
    return True


def default_traces() -> Any:
    """Return the tracer provider that this process's environment asks for, or None."""
    return traces_of(os.environ)
