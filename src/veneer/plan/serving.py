"""What a device serves: adapters beside the base, tokens a second, cents per thousand requests.

    one step of b requests      time = max(bytes read / bandwidth, operations / rate)
                                bytes: weights that are multiplied + keys and values of b contexts + b adapters
    a prompt                    operations / rate

A roofline: what the hardware allows at the stated shares, not what an engine reaches on a bad day.
"""

from __future__ import annotations

from dataclasses import dataclass

from veneer.plan.memory import FITS, dtype_bytes, weight_bytes
from veneer.plan.shape import TextShape, pair_parameters
from veneer.plan.tables import Device
from veneer.plan.time import Rates


@dataclass(frozen=True)
class Traffic:
    """A request reads `prompt` tokens and writes `answer`; `together`: requests in a step. `tenants`: adapters."""

    prompt: int = 600
    answer: int = 100
    together: int = 32
    tenants: int = 100


@dataclass(frozen=True)
class Serving:
    """What a device serves. `adapters`: how many fit beside base and cache. `cache_bytes`: of keys and values. `cents`:
    per thousand requests at full load, None without a price. `shared`, `dedicated`: dollars an hour of one base for all
    tenants, and of one model for each."""

    adapter_bytes: int
    cache_bytes: int
    adapters: int
    tokens_per_second: float
    requests_per_second: float
    cents: float | None
    shared: float | None
    dedicated: float | None
    devices: int


def cache_bytes(shape: TextShape, dtype: str) -> int:
    """Bytes of the keys and values of one token."""
    return dtype_bytes(dtype) * sum(2 * layer.kv_heads * layer.head_dim for layer in shape.layers)


def serving(
    shape: TextShape,
    device: Device,
    rates: Rates,
    traffic: Traffic,
    *,
    rank: int = 16,
    dtype: str = "bfloat16",
    quantise: str | None = None,
) -> Serving:
    """The figures by the roofline above. `devices` of the result: as many as the base needs to be served at all;
    dedicated models need as many each."""
    e = dtype_bytes(dtype)
    weights, constants = weight_bytes(shape, dtype, quantise)
    adapter = e * pair_parameters(shape, rank=rank)
    each = cache_bytes(shape, dtype)
    context = traffic.prompt + traffic.answer
    cache = each * context * traffic.together
    fixed = weights + constants + cache
    usable = 0.95 * device.memory - (FITS["cuda", "text"].process if device.kind == "cuda" else 0)
    devices = max(device.count, -(-int(fixed + adapter) // int(max(1, usable))))
    adapters = max(0, int((devices * usable - fixed) // adapter))
    rank_share = adapter / e / max(1, shape.parameters)
    read = (
        _read(shape, e, weights + constants, traffic.together)
        + each * (traffic.prompt + traffic.answer / 2) * (traffic.together)
        + adapter * min(traffic.together, traffic.tenants)
    )
    operations = 2 * shape.active_parameters * (1 + rank_share) * traffic.together
    step = max(read / rates.bandwidth, operations / rates.operations) / devices
    prompt = 2 * shape.active_parameters * (1 + rank_share) * traffic.prompt / rates.operations / devices
    seconds = traffic.answer * step / traffic.together + prompt
    price = device.price
    cents = None if price is None else 100 * 1000 * seconds * devices * price / 3600
    shared = None if price is None else devices * price
    dedicated = None if shared is None else traffic.tenants * shared
    return Serving(adapter, cache, adapters, traffic.answer / seconds, 1 / seconds, cents, shared, dedicated, devices)


def _read(shape: TextShape, e: int, weights: int, together: int) -> float:
    """Bytes of weights that a step of so many tokens reads: all of a dense base, of experts those that some token
    picks."""
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
