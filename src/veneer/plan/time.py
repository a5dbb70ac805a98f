"""How long a run takes: operations counted, over a rate that is stated or was measured on this device.

forward       2 operations a weight and token                          products with frozen weights
backward      2 more for the gradient of the input; frozen weights get none
attention     2 products forward, 4 backward, over the keys that are multiplied
low rank      6·rank·(in + out) a token and pair: 2 forward, 4 backward; LoHa and LoKr: plan.pairs
head          as a product, at trained tokens alone
checkpointing the layers' forward once more
dequantising  bytes written and read, forward and backward

seconds = operations / rate + bytes / bandwidth
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from veneer.plan.memory import Load, dtype_bytes, seen_keys, text_memory, weight_bytes
from veneer.plan.shape import TextShape, layer_pairs
from veneer.plan.tables import Device

_EFFICIENCY = 0.4
"""Share of a device's bfloat16 rate that training products are taken to reach where nothing was measured: an
assumption, which --calibrate replaces."""
_BANDWIDTH = 0.7
HOST_LINK = 20e9
"""Bytes a second between the CPU's memory and a card's: an assumption for PCIe 4.0 × 16."""


@dataclass(frozen=True)
class Work:
    """Of one micro-batch, forward and backward. `products`, `attention`, `low_rank`, `head`: operations. `moved`: bytes
    of activations and weights that are read and written; `dequantised`: bytes written to dequantise; `fetched`: bytes
    brought from the CPU's memory, which is waited for; `copied`: to it and back, while something else is computed."""

    products: float = 0.0
    attention: float = 0.0
    low_rank: float = 0.0
    head: float = 0.0
    moved: float = 0.0
    dequantised: float = 0.0
    fetched: float = 0.0
    copied: float = 0.0

    @property
    def operations(self) -> float:
        return self.products + self.attention + self.low_rank + self.head

    @property
    def bytes(self) -> float:
        return self.moved + 2 * self.dequantised


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second of a device. `source`: where the figures come from, as a sentence. `measured`: by
    a calibration on this device."""

    operations: float
    bandwidth: float
    source: str
    measured: bool = False

    def seconds(self, work: Work, count: int = 1) -> float:
        """Seconds for `work` spread over `count` devices."""
        computing = (work.operations / self.operations + work.bytes / self.bandwidth) / count
        return max(computing, work.copied / HOST_LINK / count) + work.fetched / HOST_LINK


def rates_of(device: Device, dtype: str = "bfloat16") -> Rates:
    """The rates of a device that was not calibrated: a stated share of its data sheet's, of which float32 gets a
    quarter on a CPU and a fourteenth on a card (H100: 67 of 989 TFLOP/s)."""
    best = device.flops / (1 if dtype != "float32" else 4 if device.kind == "cpu" else 14)
    said = f"{_EFFICIENCY:.0%} of {best / 1e12:,.3g} TFLOP/s, {_BANDWIDTH:.0%} of {device.bandwidth / 1e9:,.0f} GB/s"
    how = "a guess; veneer plan --calibrate measures it" if device.kind == "cpu" else "both assumed"
    return Rates(_EFFICIENCY * best, _BANDWIDTH * device.bandwidth, f"{said}, {how}")


def text_work(shape: TextShape, load: Load, device: Device) -> Work:
    """Operations and bytes of a micro-batch of `load`."""
    tokens, trained = load.computed(device), load.wanted(device)
    again = 1 if load.checkpointing else 0
    pairs = layer_pairs(shape, load.spec, load.rank)
    twice = load.spec is not None and load.spec.dora and load.spec.dropout > 0
    products = attention = low_rank = 0.0
    for i, layer in enumerate(shape.layers):
        after = trained if shape.keeps and i == len(shape.layers) - 1 else tokens
        for linear in layer.linears:
            n = tokens if linear.product == "qkv" else after
            first = i == 0 and linear.product == "qkv"  # nothing below it learns: no gradient of its input
            products += (2 * (1 + again) + (0 if first else 2)) * n * linear.multiplied
            pair = pairs[i].get(linear.name)
            if pair is None:
                continue
            if twice:  # the dropped input meets the weight too
                products += (4 + 2 * again) * n * linear.multiplied
            each = (pair.operations + again * pair.forward) * (1 + load.begins_in_base)
            low_rank += each * n * linear.active
        keys = seen_keys(load.attended(device), layer.window)
        attention += (12 + 4 * again) * layer.heads * layer.head_dim * keys
    head = 4.0 * trained * shape.vocabulary * shape.hidden
    kept = text_memory(shape, replace(load, checkpointing=False), device)
    weights, constants = weight_bytes(shape, load.dtype, load.quantise, load.double)
    reads = 2 + again
    moved = 4.0 * (kept.activations + kept.logits) + reads * (weights + constants)
    dequantised = reads * shape.matrices * dtype_bytes(load.dtype) if load.quantise else 0
    inputs = dtype_bytes(load.dtype) * shape.hidden * tokens * len(shape.layers)
    copied = 2.0 * inputs if load.checkpointing and load.inputs_on_host and device.kind == "cuda" else 0.0
    return Work(products, attention, low_rank, head, moved, dequantised, 0.0, copied)


def reading_work(shape: TextShape, load: Load, device: Device) -> Work:
    """Operations and bytes of one forward over a micro-batch of `load`, through a base with nothing on it: what a
    teacher takes to read answers. The head is at the learned tokens alone."""
    tokens, trained = load.computed(device), load.wanted(device)
    products = sum(2.0 * tokens * linear.multiplied for layer in shape.layers for linear in layer.linears)
    keys = sum(layer.heads * layer.head_dim * seen_keys(load.attended(device), layer.window) for layer in shape.layers)
    head = 2.0 * trained * shape.vocabulary * shape.hidden
    return Work(products, 4.0 * keys, head=head, moved=float(sum(weight_bytes(shape, load.dtype, load.quantise))))


def run_seconds(
    shape: TextShape,
    load: Load,
    device: Device,
    rates: Rates,
    *,
    rows: int,
    tokens_per_row: float,
    epochs: float,
    held_out: int = 0,
    evaluations: int = 0,
) -> float:
    """Seconds of a whole run: its micro-batches, and the forward passes that score held-out rows."""
    one = rates.seconds(text_work(shape, load, device), device.count)
    micros = math.ceil(rows * tokens_per_row / max(1, load.tokens)) * epochs
    forward = one * (2 / 6 if load.checkpointing else 1 / 2)
    scored = held_out * tokens_per_row / max(1, load.tokens) * evaluations
    return micros * one + scored * forward
