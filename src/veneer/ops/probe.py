"""How far from its floor this processor's training step is, in about two seconds.

    found = probe_layer()      one layer of a small language model, forward and backward with adapters

The floor is the time of the layer's products with frozen weights alone (2 operations a weight and token forward, 2 more
for the input's gradient), at the best rate that torch's own product of the same shapes reached in the same seconds.
What a floor does not count, attention's own products, the low-rank ones and everything element-wise, is the distance.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from veneer.ops.attention import RowLayout, rotary_attention
from veneer.ops.choice import random_like
from veneer.ops.linear import LinearMap, linear
from veneer.ops.lowrank import LowRank
from veneer.ops.mlp import gated_mlp
from veneer.ops.norms import rms_norm

_HIDDEN, _WIDTH, _HEADS, _KV, _DIM, _RANK = 576, 1536, 9, 3, 64, 16
"""A layer of SmolLM2-135M."""


@dataclass(frozen=True)
class LayerProbe:
    """`rate`: operations a second of the best product. `seconds`: of the layer's step; `floor`: of its products at that
    rate. `tokens`: in the step."""

    dtype: str
    tokens: int
    rate: float
    seconds: float
    floor: float

    @property
    def share(self) -> float:
        """Of the floor: 1 would be nothing but products."""
        return self.floor / self.seconds


def probe_layer(
    dtype: torch.dtype = torch.bfloat16, rows: int = 4, length: int = 512, seconds: float = 2.0
) -> LayerProbe:
    """Steps of one layer for about `seconds`, and products of its shapes between them."""
    n, wide = rows * length, (_HEADS + 2 * _KV) * _DIM
    sizes = {
        "qkv": (wide, _HIDDEN),
        "out": (_HIDDEN, _HEADS * _DIM),
        "gate_up": (2 * _WIDTH, _HIDDEN),
        "down": (_HIDDEN, _WIDTH),
    }
    maps = {name: _with_pair(dtype, *size) for name, size in sizes.items()}
    layout, weight = RowLayout([length] * rows), random_like(dtype, _HIDDEN)
    angles = random_like(torch.float32, n, _DIM // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    x, g = random_like(dtype, n, _HIDDEN).requires_grad_(), random_like(dtype, n, _HIDDEN)

    def step() -> None:
        qkv = linear(rms_norm(x, weight, 1e-5), maps["qkv"]).view(n, -1, _DIM)
        heads = rotary_attention(qkv, cos, sin, _KV, layout, _DIM**-0.5)
        y = x + linear(heads.flatten(1), maps["out"])
        y = y + gated_mlp(rms_norm(y, weight, 1e-5), maps["gate_up"], maps["down"])
        y.backward(g)

    products = [(maps[name].weight, random_like(dtype, n, size[1])) for name, size in sizes.items()]

    def multiply() -> None:
        for own, given in products:
            given @ own.t()

    operations = 2 * n * sum(a * b for a, b in sizes.values())
    taken = _least({"step": step, "products": multiply}, seconds)
    rate = operations / taken["products"]
    return LayerProbe(str(dtype).removeprefix("torch."), n, rate, taken["step"], 2 * operations / rate)


def _with_pair(dtype: torch.dtype, rows: int, inputs: int) -> LinearMap:
    A, B = (random_like(torch.float32, *size).mul_(0.01).requires_grad_() for size in ((_RANK, inputs), (rows, _RANK)))
    return LinearMap(random_like(dtype, rows, inputs).mul_(inputs**-0.5), None, (LowRank(A, B),))


def _least(works: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """The least seconds of each, in turn, the first run of each left out."""
    for work in works.values():
        work()
    best = dict.fromkeys(works, float("inf"))
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or float("inf") in best.values():
        for name, work in works.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - start)
    return best
