"""What a device serves: adapters beside the base, tokens a second, cents per thousand requests.

    one step of b requests      time = max(bytes read / bandwidth, operations / rate)
                                bytes: weights that are multiplied + keys and values of b contexts + b adapters
    a prompt                    operations / rate

A roofline: what the hardware allows at the stated shares, not what an engine reaches on a bad day.
"""

from __future__ import annotations

from dataclasses import dataclass

from veneer.plan.memory import CUDA_CONTEXT, Memory, dtype_bytes, weight_bytes
from veneer.plan.shape import LayerShape, LinearShape, TextShape, pair_parameters
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
    usable = 0.95 * device.memory - (CUDA_CONTEXT if device.kind == "cuda" else 0)
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


_PAGE = 16
"""Tokens of a block of keys and values (serve/forward/paged.py)."""
_SAMPLED = 38
"""Bytes that a sampler holds of each score that it draws from: float32 copies, a nucleus in order and its sums."""


def serving_memory(
    shape: TextShape,
    traffic: Traffic,
    *,
    rank: int = 16,
    dtype: str = "bfloat16",
    quantise: str | None = None,
    budget: int = 512,
) -> Memory:
    """Bytes of a server on a GPU at the peak of a step of `budget` tokens, by part: keys and values of all requests
    that are served together, and an adapter of its own for each as far as there are tenants. Nothing of a layer
    outlives it, so the most is in the widest one, beside its weights where they are dequantised, or after all of them
    in the logits and what a sampler makes of these."""
    e, tokens = dtype_bytes(dtype), max(budget, traffic.together)
    weights, constants = weight_bytes(shape, dtype, quantise)
    adapters = min(traffic.together, traffic.tenants) * e * pair_parameters(shape, rank=rank)
    places = traffic.together * -(-(traffic.prompt + traffic.answer) // _PAGE) * _PAGE
    cache = places * cache_bytes(shape, dtype)
    layer = e * tokens * max((_widest(one, shape.hidden) for one in set(shape.layers)), default=0)
    dequantised = _dequantised(shape, e, quantise)
    logits = traffic.together * shape.vocabulary * (e + _SAMPLED)
    if logits > layer + dequantised:
        layer = dequantised = 0
    else:
        logits = 0
    return Memory(
        weights,
        constants,
        adapters,
        activations=layer,
        logits=logits,
        dequantised=dequantised,
        context=CUDA_CONTEXT,
        cache=cache,
    )


def _dequantised(shape: TextShape, e: int, quantise: str | None) -> int:
    """Of a quantised base the largest joined weight, in full."""
    products = [parts for one in set(shape.layers) for parts in one.products.values()]
    return e * max((sum(part.parameters for part in parts) for parts in products), default=0) if quantise else 0


def _widest(layer: LayerShape, hidden: int) -> int:
    """Values a token that are in memory at once: the residual and a norm's output, beside q, k, v and what attention
    gives, or beside gate, up and their product; of experts also what was gathered for them and what they give."""
    attention = (2 * layer.heads + 2 * layer.kv_heads) * layer.head_dim
    mlp = max((_mlp(parts) for name, parts in layer.products.items() if name.endswith("gate_up")), default=0.0)
    return 2 * hidden + max(attention, round(mlp))


def _mlp(parts: tuple[LinearShape, ...]) -> float:
    values = sum(1.5 * part.outputs * part.active for part in parts)
    return values + sum(2 * part.inputs * part.active for part in parts if part.times > 1)


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
