"""Prometheus metrics: vLLM's names for metrics with the same meaning, and a few per adapter.

Only the first `adapters` adapter names become labels. Other adapters are counted as "other", and requests
with several adapters as "mix", so that the number of series is bounded.

Routers read three groups of series, in which an adapter has the name that clients send as `model`:

| series | read by | source |
| ------ | ------- | ------ |
| `vllm:lora_requests_info`, `vllm:cache_config_info` | llm-d, GIE | llm-d-router docs/plugin-metric-protocol.md |
| `vllm:lora_adapter_loaded`, `vllm:*_lora_adapters` | llm-d | the same file; vllm#54830 |
| `vllm:gpu_cache_usage_perc`, `vllm:gpu_prefix_cache_*` | production-stack | src/vllm_router/stats/engine_stats.py |

llm-d's lora-affinity-scorer gives 0.8 to a server with fewer active adapters than `max_lora`. So `max_lora` is
the number of adapters, at the current mean size, that fit in the memory for adapters.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from veneer.serve.access import LedgerState
from veneer.serve.names.adapter_cache import ResidentAdapter
from veneer.serve.request import BASE, DigestMix, EngineStats, Usage
from veneer.serve.settings import Objectives

_SECONDS: tuple[float, ...] = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
_SECONDS += (1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_ENGINE = ("model_name", "engine")
_FIRST = "vllm:time_to_first_token_seconds"
_BETWEEN = "vllm:inter_token_latency_seconds"
_LORA_INFO = "vllm:lora_requests_info"
_PER_TOKEN = "vllm:request_time_per_output_token_seconds"
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    _FIRST: ("Seconds from arrival to the first token.", _SECONDS),
    _BETWEEN: ("Seconds from one token to the next.", _SECONDS),
    _PER_TOKEN: ("Decoding seconds per token after the first, by request.", _SECONDS),
    "vllm:e2e_request_latency_seconds": ("Seconds from arrival to the last token.", _SECONDS),
    "vllm:request_queue_time_seconds": ("Seconds until the first step.", _SECONDS),
    "vllm:request_prefill_time_seconds": ("Seconds until the first token, after the queue.", _SECONDS),
    "vllm:request_decode_time_seconds": ("Seconds from the first token to the last.", _SECONDS),
    "vllm:request_prompt_tokens": ("Prompt tokens.", _TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens.", _TOKENS),
}
_GAUGES = {
    "vllm:num_requests_running": ("Requests in the engine's batch.", "running"),
    "vllm:num_requests_waiting": ("Requests that wait for the engine.", "waiting"),
    "vllm:kv_cache_usage_perc": ("Share of the cache's blocks in use; 1 is all.", "cache_used"),
    "vllm:gpu_cache_usage_perc": ("Old name of vllm:kv_cache_usage_perc.", "cache_used"),
    "vllm:gpu_prefix_cache_hit_rate": ("Share of prompt tokens found in the prefix cache.", "prefix_hit_rate"),
    "vllm:num_gpu_loaded_lora_adapters": ("Adapters in memory.", "adapters"),
    "vllm:num_cpu_loaded_lora_adapters": ("Adapters in slower memory.", "slow_adapters"),
    "vllm:max_gpu_lora_adapters": ("Adapters that fit in memory, at their current mean size.", "adapter_slots"),
    "veneer:adapters_resident": ("Adapters in memory.", "adapters"),
    "veneer:adapters_resident_bytes": ("Bytes of the adapters in memory.", "adapter_bytes"),
}
_COUNTERS = {
    "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", "prefix_lookups"),
    "vllm:prefix_cache_hits": ("Prompt tokens found in the prefix cache.", "prefix_hits"),
    "vllm:gpu_prefix_cache_queries": ("Old name of vllm:prefix_cache_queries.", "prefix_lookups"),
    "vllm:gpu_prefix_cache_hits": ("Old name of vllm:prefix_cache_hits.", "prefix_hits"),
    "vllm:num_preemptions": ("Preempted requests.", "preemptions"),
    "vllm:prompt_tokens": ("Prompt tokens computed.", "prompt_tokens"),
    "vllm:generation_tokens": ("Generated tokens.", "generated_tokens"),
    "vllm:spec_decode_num_draft_tokens": ("Tokens drafted by n-gram speculation.", "drafted_tokens"),
    "vllm:spec_decode_num_accepted_tokens": ("Drafted tokens that were accepted.", "accepted_tokens"),
    "veneer:forced_tokens": ("Generated tokens that a grammar forced, without a forward pass.", "forced_tokens"),
    "veneer:engine_steps": ("Forward passes.", "steps"),
    "veneer:adapter_evictions": ("Adapters evicted from memory.", "evictions"),
}
_LEDGER_GAUGES = {
    "veneer:ledger_owed": ("Requests that the ledger's database does not have yet.", "pending"),
    "veneer:ledger_lag_seconds": ("Seconds since the end of the oldest of these requests.", "lag"),
    "veneer:ledger_away": ("1 while the ledger's database does not answer.", "unavailable"),
}
"""Series -> (help text, attribute of EngineStats or LedgerState)."""
_RESIDENT = 1000
"""Maximum series of `vllm:lora_adapter_loaded`, and of client names remembered for these series."""


_TENANTS = 1000
"""Maximum tenants with series of their own; later ones count as "~other", which no tenant can be called."""
_LEVEL_MINUTES = 60


class _Families(Collector):
    """Metrics that have already been collected."""

    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterable[Metric]:
        return self.families


class Metrics(Collector):
    """All metrics of one application, in a registry of their own."""

    def __init__(
        self,
        model: str,
        stats: Callable[[], EngineStats],
        adapters: int = 100,
        ledger: Callable[[], LedgerState | None] = lambda: None,
        resident: Callable[[], Sequence[tuple[str, ResidentAdapter]]] = lambda: (),
        objectives: Objectives | None = None,
    ) -> None:
        """Create the metrics.

        `ledger`: returns the ledger's state on a server with a ledger. `resident`: returns (the server's name,
        adapter) of the adapters in memory, most recently used first.
        """
        self.registry = registry = CollectorRegistry()
        counter = partial(Counter, registry=registry)
        self.stats, self.ledger, self.resident = stats, ledger, resident
        self._client_names: dict[str, str] = {}  # name -> digest, most recently used last
        self.limit, self._named = adapters, set[str]()
        self.labels = (model, "0")
        self.running, self.waiting = Tally[str](), Tally[str]()
        registry.register(self)
        self.histograms = {
            name: Histogram(name, text, _ENGINE, registry=registry, buckets=buckets).labels(*self.labels)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self.ended = counter("vllm:request_success", "Answers, by finish reason.", (*_ENGINE, "finished_reason"))
        for reason in ("stop", "length", "abort", "error"):
            self.ended.labels(*self.labels, reason)
        self.answers = counter("veneer:adapter_requests", "Answers, by adapter.", ("adapter", "reason"))
        self.prompts = counter("veneer:adapter_prompt_tokens", "Prompt tokens, by adapter.", ("adapter",))
        self.generated = counter("veneer:adapter_generation_tokens", "Generated tokens, by adapter.", ("adapter",))
        self.first_by_adapter = Histogram(
            "veneer:adapter_time_to_first_token_seconds",
            "Seconds to the first token, by adapter.",
            ("adapter",),
            registry=registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
        )
        self.refused = counter("veneer:requests_refused", "Requests answered with an error.", ("code",))
        self.objectives, self._tenants = objectives or Objectives(), set[str]()
        self._minutes: dict[int, Tally[tuple[str, str]]] = {}  # minute -> (tenant, "answers" or objective) -> answers
        self.tenant_answers = counter("veneer:tenant_answers", "Answers, by tenant.", ("tenant",))
        text = "Answers that missed an objective, by tenant."
        self.tenant_missed = counter("veneer:tenant_missed", text, ("tenant", "objective"))
        text = "Share of answers that can miss an objective."
        allowed = Gauge("veneer:objective_allowed", text, ("objective",), registry=registry)
        for objective, share in self.objectives.allowed().items():
            allowed.labels(objective).set(share)

    def label(self, name: str) -> str:
        """Return the label of an adapter: its name, or "other" if there are too many names."""
        if name not in self._named:
            if len(self._named) >= self.limit:
                return "other"
            self._named.add(name)
        return name

    def count_answer(self, tenant: str, missed: Iterable[str]) -> None:
        """Count an answer, and the objectives that it missed."""
        if tenant not in self._tenants and len(self._tenants) >= _TENANTS:
            tenant = "~other"
        self._tenants.add(tenant)
        self.tenant_answers.labels(tenant).inc()
        for objective in self.objectives.allowed():
            self.tenant_missed.labels(tenant, objective).inc(objective in missed)
        minute = int(time.monotonic() // 60)
        for old in [m for m in self._minutes if m <= minute - _LEVEL_MINUTES]:
            del self._minutes[old]
        self._minutes.setdefault(minute, Tally()).update((tenant, what) for what in ("answers", *missed))

    def levels(self) -> dict[str, Tally[str]]:
        """Return each tenant's answers of the last hour: "answers", and objective -> answers that missed it."""
        oldest, levels = time.monotonic() // 60 - _LEVEL_MINUTES, defaultdict[str, Tally[str]](Tally)
        for minute, tally in list(self._minutes.items()):
            for (tenant, what), answers in list(tally.items()) if minute > oldest else ():
                levels[tenant][what] += answers
        return dict(levels)

    def text(self, engine: str = "") -> bytes:
        """Return all metrics in Prometheus's text format.

        `engine`: metrics of a separate engine process. They replace this server's metrics of the same name,
        except `vllm:lora_requests_info`, in which only this server knows the clients' names."""
        theirs = [m for m in text_string_to_metric_families(engine) if m.name != _LORA_INFO]
        names = {metric.name for metric in theirs}
        both = CollectorRegistry()
        both.register(_Families([*(m for m in self.registry.collect() if m.name not in names), *theirs]))
        return generate_latest(both)

    def collect(self) -> Iterable[Metric]:
        """Yield the engine's and the ledger's counters, read when metrics are scraped."""
        stats, state = self.stats(), self.ledger()
        tables: list[tuple[Any, Mapping[str, tuple[str, str]], Any]]
        tables = [(GaugeMetricFamily, _GAUGES, stats), (CounterMetricFamily, _COUNTERS, stats)]
        if state is not None:
            tables.append((GaugeMetricFamily, _LEDGER_GAUGES, state))
        for family, series, values in tables:
            for name, (text, attribute) in series.items():
                metric = family(name, text, labels=_ENGINE)
                metric.add_metric(self.labels, float(getattr(values, attribute)))
                yield metric
        # LoRA-aware routers read the names of running and waiting adapters, separated by commas, from these
        # labels. The metric's value is the current time.
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        info = GaugeMetricFamily(_LORA_INFO, "Running and waiting adapters.", labels=labels)
        names = [",".join(sorted(tally)) for tally in (self.running, self.waiting)]
        info.add_metric((str(stats.adapter_slots), *names), time.time())
        yield info
        if stats.blocks:
            size = (*_ENGINE, "block_size", "num_gpu_blocks")
            cache = GaugeMetricFamily("vllm:cache_config_info", "Blocks of the key-value cache.", labels=size)
            cache.add_metric((*self.labels, str(stats.block_size), str(stats.blocks)), 1)
            yield cache
        # Level "gpu" means that the adapter can run at once, which is true of all adapters in memory.
        sent = defaultdict[str, set[str]](set)
        for name, digest in list(self._client_names.items()):
            sent[digest].add(name)
        known = {n: 1 for name, each in self.resident() for n in sorted({name, *sent[each.digest]})}
        residence = (*_ENGINE, "adapter_name", "level", "pinned")
        loaded = GaugeMetricFamily("vllm:lora_adapter_loaded", "1: the adapter is in memory.", labels=residence)
        for name in list(known)[:_RESIDENT]:
            loaded.add_metric((*self.labels, name, "gpu", "false"), 1)
        yield loaded

    def remember(self, name: str, digest: str) -> None:
        """Remember that clients send this name for the adapter with this digest."""
        self._client_names.pop(name, None)
        self._client_names[name] = digest
        if len(self._client_names) > _RESIDENT:
            del self._client_names[next(iter(self._client_names))]


class Meter:
    """Measures one answer. Call `end` once, however the answer ended.

    `router_name`: see Request; None for requests that routers cannot attribute to an adapter. `tenant`: whose
    objectives apply. `tokens`: False for an image, whose only objective is not to fail.
    """

    def __init__(
        self,
        metrics: Metrics,
        adapter: str,
        router_name: str | None = None,
        mix: DigestMix = BASE,
        *,
        tenant: str = "",
        tokens: bool = True,
    ) -> None:
        self.tenant, self.tokens = tenant, tokens
        self.first: float | None = None  # time of the first token
        self.count = 0
        self.metrics, self.adapter = metrics, metrics.label(adapter)
        self.name = router_name if mix else None
        if self.name is not None:
            metrics.remember(self.name, mix[0][0])
        self.arrived = time.perf_counter()
        self.last: float | None = None  # time of the last token
        self._state: Tally[str] | None = None
        self._move(metrics.waiting)

    def started(self) -> None:
        self._move(self.metrics.running)

    def token(self) -> None:
        now = time.perf_counter()
        self.count += 1
        if self.last is None:
            self.first = now
            self.metrics.histograms[_FIRST].observe(now - self.arrived)
            self.metrics.first_by_adapter.labels(self.adapter).observe(now - self.arrived)
        else:
            self.metrics.histograms[_BETWEEN].observe(now - self.last)
        self.last = now

    def _slow(self, objectives: Objectives) -> list[str]:
        """Return the times that the answer missed. A client that left early has waited for its first token."""
        now = time.perf_counter()
        first, last = self.first or now, self.last or now
        slow = {"first_token": first - self.arrived > objectives.first_token}
        slow["between_tokens"] = last - first > objectives.between_tokens * max(self.count - 1, 1)
        return [name for name, missed in slow.items() if missed]

    def end(self, reason: str, usage: Usage, *, failed: bool | None = None) -> None:
        """Count the answer. `failed`: whether it missed the objective for errors; default: it has reason "error"."""
        metrics = self.metrics
        missed = self._slow(metrics.objectives) if self.tokens else []
        failed = reason == "error" if failed is None else failed
        metrics.count_answer(self.tenant, ["errors"] if failed else missed)
        self._move(Tally())
        metrics.ended.labels(*metrics.labels, reason).inc()
        metrics.answers.labels(self.adapter, reason).inc()
        metrics.prompts.labels(self.adapter).inc(usage.prompt)
        metrics.generated.labels(self.adapter).inc(usage.completion)
        if reason not in ("stop", "length"):
            return
        observed = {
            "vllm:e2e_request_latency_seconds": time.perf_counter() - self.arrived,
            "vllm:request_queue_time_seconds": usage.queued,
            "vllm:request_prefill_time_seconds": usage.prefill,
            "vllm:request_decode_time_seconds": usage.decode,
            "vllm:request_prompt_tokens": usage.prompt,
            "vllm:request_generation_tokens": usage.completion,
        }
        if self.last is not None and usage.completion > 1:  # `last` is None for images
            observed[_PER_TOKEN] = usage.decode / (usage.completion - 1)
        for name, value in observed.items():
            metrics.histograms[name].observe(value)

    def _move(self, state: Tally[str]) -> None:
        if self.name is None or self._state is state:
            return
        if self._state is not None:
            self._state[self.name] -= 1
            self._state += Tally()  # drops zeros
        self._state = state
        state[self.name] += 1
