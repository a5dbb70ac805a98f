"""Serving capacity of a device: adapters and tokens per second.

    one step of b requests      time = max(bytes read / bandwidth, operations / rate)
                                bytes: weights that are multiplied + keys and values of b contexts + b
                                    adapters
    a prompt                    operations / rate

This is a roofline: the limit of the hardware at the assumed rates, not the throughput of a real engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from veneer.plan.memory import FITS, dtype_bytes, weight_bytes
from veneer.plan.shape import TextShape, pair_parameters
from veneer.plan.tables import Device
from veneer.plan.time import Rates


@dataclass(frozen=True)
class Traffic:
    """The requests to serve: `prompt` tokens to read and `answer` tokens to generate.

    together: requests processed together in a step.
    tenants: number of adapters."""

    prompt: int = 600
    answer: int = 100
    together: int = 32
    tenants: int = 100


@dataclass(frozen=True)
class Serving:
    """The serving capacity of a device.

    adapters: number of adapters that fit in memory with the base and the KV cache.
    cache_bytes: bytes of the KV cache.
    devices: number of devices; more than given if the base needs more."""

    adapter_bytes: int
    cache_bytes: int
    adapters: int
    tokens_per_second: float
    requests_per_second: float
    devices: int


def cache_bytes(shape: TextShape, dtype: str) -> int:
    """Return the bytes of the keys and values of one token."""
    return dtype_bytes(dtype) * sum(2 * layer.kv_heads * layer.head_dim for layer in shape.layers)


def serving(
    shape: TextShape,
    device: Device,
    rates: Rates,
    traffic: Traffic,
    *,
    rank: int = 16,
    dtype: str = "bfloat16",
    quantize: str | None = None,
) -> Serving:
    """Return the serving capacity according to the roofline above."""
    e = dtype_bytes(dtype)
    weights, constants = weight_bytes(shape, dtype, quantize)
    adapter = e * pair_parameters(shape, rank=rank)
    cache_per_token = cache_bytes(shape, dtype)
    context = traffic.prompt + traffic.answer
    cache = cache_per_token * context * traffic.together
    fixed = weights + constants + cache
    usable = 0.95 * device.memory - (FITS["cuda", "text"].process if device.kind == "cuda" else 0)
    devices = max(device.count, -(-int(fixed + adapter) // int(max(1, usable))))
    adapters = max(0, int((devices * usable - fixed) // adapter))
    rank_share = adapter / e / max(1, shape.parameters)
    read = (
        _read(shape, e, weights + constants, traffic.together)
        + cache_per_token * (traffic.prompt + traffic.answer / 2) * (traffic.together)
        + adapter * min(traffic.together, traffic.tenants)
    )
    operations = 2 * shape.active_parameters * (1 + rank_share) * traffic.together
    step = max(read / rates.bandwidth, operations / rates.operations) / devices
    prompt = 2 * shape.active_parameters * (1 + rank_share) * traffic.prompt / rates.operations / devices
    seconds = traffic.answer * step / traffic.together + prompt
    return Serving(adapter, cache, adapters, traffic.answer / seconds, 1 / seconds, devices)


def _read(shape: TextShape, e: int, weights: int, together: int) -> float:
    """Return the bytes of weights that a step of `together` tokens reads.

    For a dense base, these are all weights. Of the experts, only those that at least one token chooses are
    read."""
    total = shape.matrices
    if not total:
        return float(weights)
    read = 0.0
    for layer in shape.layers:
        for linear in layer.linears:
            missed = (1 - linear.active / linear.times) ** together if linear.times > 1 else 0.0
            read += linear.parameters * (1 - missed)
    embedding = 0 if shape.tied else shape.vocabulary * shape.hidden * e
    return weights - embedding - (1 - read / total) * (weights - shape.embedding * e)
