"""Prometheus metrics: vLLM's names where the meaning is the same, and a few per adapter.

An adapter's name is a label only for the first `adapters` names, likewise tenants; the rest are counted as
"other", and requests with several adapters as "mix". So the number of series is bounded.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from veneer.serve.access import LedgerState
from veneer.serve.request import EngineStats, Usage

_SECONDS: tuple[float, ...] = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
_SECONDS += (1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """All series of one application, in its own registry."""

    def __init__(
        self,
        model: str,
        stats: Callable[[], EngineStats],
        adapters: int = 100,
        ledger: Callable[[], LedgerState | None] = lambda: None,
    ) -> None:
        """Create the series. `ledger`: its state, on a server that has a ledger."""
        self.registry = CollectorRegistry()
        self.limit, self._named, self._tenants = adapters, set[str](), set[str]()
        self.labels = (model, "0")
        self.running, self.waiting = Tally[str](), Tally[str]()
        self.registry.register(_Engine(self, stats, ledger))

        def histogram(name: str, what: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            made = Histogram(name, what, ("model_name", "engine"), registry=self.registry, buckets=buckets)
            made.labels(*self.labels)
            return made

        self.first = histogram("vllm:time_to_first_token_seconds", "Seconds from arrival to the first token.")
        self.between = histogram("vllm:inter_token_latency_seconds", "Seconds from one token to the next.")
        self.each = histogram("vllm:request_time_per_output_token_seconds", "Decoding seconds per token, by request.")
        self.whole = histogram("vllm:e2e_request_latency_seconds", "Seconds from arrival to the last token.")
        self.queued = histogram("vllm:request_queue_time_seconds", "Seconds until the first step.")
        self.prefill = histogram("vllm:request_prefill_time_seconds", "Seconds until the first token, after the queue.")
        self.decode = histogram("vllm:request_decode_time_seconds", "Seconds from the first token to the last.")
        self.prompts = histogram("vllm:request_prompt_tokens", "Tokens of prompts.", _TOKENS)
        self.answers = histogram("vllm:request_generation_tokens", "Tokens of answers.", _TOKENS)
        names = ("model_name", "engine", "finished_reason")
        self.ended = Counter("vllm:request_success", "Answers, by how they ended.", names, registry=self.registry)
        for reason in ("stop", "length", "abort", "error"):
            self.ended.labels(*self.labels, reason)

        def counters(of: str) -> tuple[Counter, Counter, Counter]:
            """Counters of answers, prompt tokens and generated tokens.

            Per adapter or tenant; answers also by finish reason.
            """
            kinds = {"requests": "Answers", "prompt_tokens": "Prompt tokens", "generation_tokens": "Tokens made"}
            made = [
                Counter(
                    f"veneer:{of}_{kind}",
                    f"{what}, by {of}.",
                    (of, *(["reason"] if kind == "requests" else [])),
                    registry=self.registry,
                )
                for kind, what in kinds.items()
            ]
            return made[0], made[1], made[2]

        self.by_adapter, self.by_tenant = counters("adapter"), counters("tenant")
        self.first_by_adapter = Histogram(
            "veneer:adapter_time_to_first_token_seconds",
            "Seconds to the first token, of each adapter.",
            ("adapter",),
            registry=self.registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
        )
        self.shadows = Counter(
            "veneer:shadow_answers",
            "Answers of shadows, by whether they were the one that was sent.",
            ("route", "shadow", "outcome"),
            registry=self.registry,
        )
        self.refused = Counter(
            "veneer:requests_refused", "Requests answered with an error.", ("code",), registry=self.registry
        )

    def label(self, name: str, *, tenant: bool = False) -> str:
        """The label of an adapter or tenant: its name while there is room, else "other"."""
        known = self._tenants if tenant else self._named
        if name not in known:
            if len(known) >= self.limit:
                return "other"
            known.add(name)
        return name

    def shadow(self, route: str, name: str, outcome: str) -> None:
        self.shadows.labels(self.label(route), self.label(name), outcome).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Meter:
    """Measures one answer; call `end` once, however it ended."""

    def __init__(self, metrics: Metrics, adapter: str, tenant: str = "") -> None:
        """Start the measurement.

        `tenant`: "" on a server without tenants, which has no series for them.
        """
        self.metrics, self.adapter = metrics, metrics.label(adapter)
        self.counters = [(self.adapter, metrics.by_adapter)]
        if tenant:
            self.counters.append((metrics.label(tenant, tenant=True), metrics.by_tenant))
        self.arrived = self.last = time.perf_counter()
        self.first: float | None = None
        self.tokens = 0
        self._state = metrics.waiting
        self._state[self.adapter] += 1

    def started(self) -> None:
        self._move(self.metrics.running)

    def token(self) -> None:
        now = time.perf_counter()
        self.tokens += 1
        if self.first is None:
            self.first = now
            self.metrics.first.labels(*self.metrics.labels).observe(now - self.arrived)
            self.metrics.first_by_adapter.labels(self.adapter).observe(now - self.arrived)
        else:
            self.metrics.between.labels(*self.metrics.labels).observe(now - self.last)
        self.last = now

    def end(self, reason: str, usage: Usage) -> None:
        m, now = self.metrics, time.perf_counter()
        self._move(None)
        m.ended.labels(*m.labels, reason).inc()
        for name, (requests, prompt, made) in self.counters:
            requests.labels(name, reason).inc()
            prompt.labels(name).inc(usage.prompt)
            made.labels(name).inc(usage.completion)
        if reason not in ("stop", "length"):
            return
        m.whole.labels(*m.labels).observe(now - self.arrived)
        m.queued.labels(*m.labels).observe(usage.queued)
        m.prefill.labels(*m.labels).observe(usage.prefill)
        m.decode.labels(*m.labels).observe(usage.decode)
        m.prompts.labels(*m.labels).observe(usage.prompt)
        m.answers.labels(*m.labels).observe(usage.completion)
        if self.first is not None and self.tokens > 1:
            m.each.labels(*m.labels).observe((self.last - self.first) / (self.tokens - 1))

    def _move(self, to: Tally[str] | None) -> None:
        if self._state is to:
            return
        self._state[self.adapter] -= 1
        self._state += Tally()  # drops zeros
        self._state = to if to is not None else Tally()
        if to is not None:
            to[self.adapter] += 1


class _Engine(Collector):
    """The engine's and ledger's counters, read when scraped."""

    def __init__(
        self, metrics: Metrics, stats: Callable[[], EngineStats], ledger: Callable[[], LedgerState | None]
    ) -> None:
        self.metrics, self.stats, self.ledger = metrics, stats, ledger

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        now = self.stats()
        gauges = {
            "vllm:num_requests_running": ("Requests in the engine's batch.", now.running),
            "vllm:num_requests_waiting": ("Requests that wait for the engine.", now.waiting),
            "vllm:kv_cache_usage_perc": ("Share of the cache's blocks in use; 1 is all.", now.cache_used),
            "veneer:adapters_resident": ("Adapters in memory.", now.adapters),
            "veneer:adapters_resident_bytes": ("Bytes that they take.", now.adapter_bytes),
        }
        counters = {
            "vllm:prefix_cache_queries": ("Looked up in the prefix cache.", now.prefix_lookups),
            "vllm:prefix_cache_hits": ("Found in the prefix cache.", now.prefix_hits),
            "vllm:num_preemptions": ("Requests put back to wait for room.", now.preemptions),
            "vllm:prompt_tokens": ("Prompt tokens computed.", now.prompt_tokens),
            "vllm:generation_tokens": ("Tokens made.", now.generated_tokens),
            "veneer:engine_steps": ("Forward passes.", now.steps),
            "veneer:adapter_evictions": ("Adapters that went out of memory to make room.", now.evictions),
        }
        if (state := self.ledger()) is not None:
            gauges |= {
                "veneer:ledger_owed": ("Requests that the ledger's database does not have yet.", state.owed),
                "veneer:ledger_lag_seconds": ("Since the oldest of them that has ended did so.", state.lag),
                "veneer:ledger_away": ("1 while the ledger's database does not answer.", int(state.away)),
            }
        for name, (what, value) in gauges.items():
            gauge = GaugeMetricFamily(name, what, labels=("model_name", "engine"))
            gauge.add_metric(self.metrics.labels, float(value))
            yield gauge
        for name, (what, value) in counters.items():
            counter = CounterMetricFamily(name, what, labels=("model_name", "engine"))
            counter.add_metric(self.metrics.labels, float(value))
            yield counter
        # Read by LoRA-aware routers: comma-joined names of running and waiting adapters; the value is the
        # time.
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters at work and waiting.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        base = self.metrics.labels[0]
        names = [
            ",".join(sorted(set(t) - {base, "other", "mix"})) for t in (self.metrics.running, self.metrics.waiting)
        ]
        info.add_metric(("0", *names), time.time())
        yield info
