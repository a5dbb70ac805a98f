"""What routers and controllers do with a model server's output: their rules in our words, with the files.

| consumer | rule | file (2026) |
| -------- | ---- | ----------- |
| llm-d, GIE | `Endpoint`: series, newest wins | llm-d-router pkg/epp/…/extractor/metrics/extractor.go |
| llm-d, GIE | `lora_affinity` | llm-d-router pkg/epp/…/scorer/loraaffinity/lora_affinity.go |
| llm-d | `lora_load_state` | llm-d-router #2792, scorer lora-load-state-scorer |
| llm-d | `KvIndex`: cache events | llm-d-router pkg/kvevents/{engineadapter/vllm_adapter,zmq_subscriber,pool}.go |
| production-stack | `engine_stats` | src/vllm_router/stats/engine_stats.py |
| production-stack | `accepts_load`, `registrations` | operator/internal/controller/loraadapter_controller.go |
| AIBrix | `aibrix_load` | pkg/controller/modeladapter/lora_client.go |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgpack
from prometheus_client.parser import text_string_to_metric_families


def samples(text: str) -> list[Any]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


# -- llm-d and GIE -----------------------------------------------------------------------------------------------------


@dataclass
class Endpoint:
    """What llm-d keeps of one server's metrics."""

    waiting_requests: int
    running_requests: int
    cache_use: float
    active: set[str]
    waiting: set[str]
    slots: int
    block_size: int
    blocks: int
    resident: dict[str, str]
    loaded: int

    @classmethod
    def scrape(cls, text: str) -> Endpoint:
        found = samples(text)

        def newest(name: str) -> Any:
            """Return the sample with the largest value, which is a time for information metrics."""
            return max((s for s in found if s.name == name), key=lambda s: s.value)

        lora, cache = newest("vllm:lora_requests_info").labels, newest("vllm:cache_config_info").labels

        def names(label: str) -> set[str]:
            return {name.strip() for name in lora[label].split(",")} - {""}

        slots = [s.value for s in found if s.name == "vllm:max_gpu_lora_adapters"]
        return cls(
            int(newest("vllm:num_requests_waiting").value),
            int(newest("vllm:num_requests_running").value),
            newest("vllm:kv_cache_usage_perc").value,
            names("running_lora_adapters"),
            names("waiting_lora_adapters"),
            int(max(slots, default=int(lora["max_lora"]))),
            int(cache["block_size"]),
            int(cache["num_gpu_blocks"]),
            {
                s.labels["adapter_name"]: s.labels["level"]
                for s in found
                if s.name == "vllm:lora_adapter_loaded" and s.value
            },
            int(newest("vllm:num_gpu_loaded_lora_adapters").value),
        )


def lora_affinity(endpoint: Endpoint, model: str) -> float:
    if model in endpoint.active:
        return 1.0
    if len(endpoint.active) + len(endpoint.waiting) < endpoint.slots:
        return 0.8
    return 0.6 if model in endpoint.waiting else 0.0


def lora_load_state(endpoint: Endpoint, model: str) -> float:
    if model in endpoint.resident:
        return 1.0 if endpoint.resident[model] == "gpu" else 0.8
    return 0.6 if endpoint.loaded < endpoint.slots else 0.0


_FIELDS = {
    "BlockStored": ["block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"],
    "BlockRemoved": ["block_hashes", "medium"],
    "AllBlocksCleared": [],
}


@dataclass
class KvIndex:
    """llm-d's index of one pod: which prompts' blocks the pod has cached.

    A block's own key is a hash of the previous block's own key, its tokens, and the value of `model`."""

    model: str = ""
    keys: dict[int, str] = field(default_factory=dict)
    """The engine's hash -> the router's own key."""

    def process(self, topic: bytes, message: bytes) -> None:
        kind, _pod, self.model = topic.decode().split("@")
        assert kind == "kv"
        _time, events, rank = msgpack.unpackb(message)
        assert rank == 0
        for event in events:
            fields = [event["type"], *(event.get(name) for name in _FIELDS[event["type"]])]
            self._apply(fields)

    def _apply(self, fields: list[Any]) -> None:
        tag, hashes = fields[0], fields[1] if len(fields) > 1 else []
        if tag == "AllBlocksCleared":
            self.keys.clear()
        elif tag == "BlockRemoved":
            for each in hashes:
                self.keys.pop(each, None)
        else:
            _, _, parent, tokens, size, _lora_id, _medium, name = fields
            if parent and parent not in self.keys:
                return  # llm-d skips blocks whose parent it does not know
            assert len(tokens) == size * len(hashes)
            own = self.keys[parent] if parent else ""
            for i, each in enumerate(hashes):
                own = self.key(own, tokens[i * size : (i + 1) * size], name or self.model)
                self.keys[each] = own

    @staticmethod
    def key(previous: str, tokens: Sequence[int], model: str) -> str:
        return hashlib.sha256(repr((previous, list(tokens), model)).encode()).hexdigest()

    def cached_blocks(self, tokens: Sequence[int], model: str, size: int) -> int:
        """Return how many blocks at the start of a prompt the pod has, as far as this index knows."""
        known, own, count = set(self.keys.values()), "", 0
        for start in range(0, len(tokens) - size + 1, size):
            own = self.key(own, tokens[start : start + size], model)
            if own not in known:
                break
            count += 1
        return count


# -- vLLM production-stack ---------------------------------------------------------------------------------------------


def engine_stats(text: str) -> dict[str, float]:
    """Return the six values that the router reads; a series that is missing stays 0 there."""
    names = ("num_requests_running", "num_requests_waiting", "gpu_cache_usage_perc", "gpu_prefix_cache_hit_rate")
    names += ("gpu_prefix_cache_hits_total", "gpu_prefix_cache_queries_total")
    return {s.name: s.value for s in samples(text) if s.name.removeprefix("vllm:") in names}


def accepts_load(answer: httpx.Response) -> bool:
    """The controller takes 200, and 400 with a top-level error that says the adapter is loaded."""
    if answer.status_code == 400:
        body = answer.json()
        return body.get("type") == "InvalidUserInput" and "has already been loaded" in body.get("message", "")
    return answer.status_code == 200


def registrations(models: dict[str, Any]) -> dict[str, str]:
    """Return name -> root of each model with a parent. `created` must be a Unix time, `root` a text."""
    loaded = {}
    for card in models["data"]:
        assert isinstance(card["created"], int)
        if card["parent"] is not None:
            loaded[card["id"]] = str(card["root"])
    return loaded


# -- AIBrix ------------------------------------------------------------------------------------------------------------


def aibrix_load(post: Callable[[str, dict[str, Any]], httpx.Response], models: dict[str, Any], **payload: Any) -> str:
    """Load as the controller does: "exists" if /v1/models lists the name, otherwise 200 or 201 is "loaded"."""
    if payload["lora_name"] in {card["id"] for card in models["data"]}:
        return "exists"
    path = "/v1/lora_adapter/load" if "artifact_url" in payload else "/v1/load_lora_adapter"
    answer = post(path, payload)
    return "loaded" if answer.status_code in (200, 201) else f"failed: {answer.text}"
