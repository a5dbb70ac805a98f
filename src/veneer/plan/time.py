"""Duration of a run: counted operations and bytes over assumed or measured rates.

seconds = operations / rate + bytes / bandwidth
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from veneer.plan.memory import Counts, Load, RunLoad, dtype_bytes, offloaded, seen_keys, text_counts, weight_bytes
from veneer.plan.shape import TextShape
from veneer.plan.tables import Device

_EFFICIENCY = 0.4
"""Share of a device's bfloat16 peak that training is assumed to reach without measurements; --calibrate
replaces it."""
_BANDWIDTH = 0.7
HOST_LINK = 20e9
"""Bytes per second between CPU memory and a card: an assumption for PCIe 4.0 × 16."""


@dataclass(frozen=True)
class Work:
    """The work of one micro-batch, forward and backward.

    bytes: of activations and weights, read and written.
    fetched: bytes from CPU memory that the device waits for.
    copied: bytes to and from CPU memory during computation."""

    operations: float = 0.0
    bytes: float = 0.0
    fetched: float = 0.0
    copied: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second of a device.

    source: where the numbers come from, as a sentence.
    measured: whether a calibration on this device measured them."""

    operations: float
    bandwidth: float
    source: str
    measured: bool = False

    def seconds(self, work: Work, count: int = 1) -> float:
        """Return the seconds for `work` spread over `count` devices."""
        computing = (work.operations / self.operations + work.bytes / self.bandwidth) / count
        return max(computing, work.copied / HOST_LINK / count) + work.fetched / HOST_LINK


def rates_of(device: Device, dtype: str = "bfloat16") -> Rates:
    """Return the rates of an uncalibrated device: an assumed share of its data sheet.

    float32 gets a quarter on a CPU and a fourteenth on a card (H100: 67 of 989 TFLOP/s)."""
    best = device.flops / (1 if dtype != "float32" else 4 if device.kind == "cpu" else 14)
    said = f"{_EFFICIENCY:.0%} of {best / 1e12:,.3g} TFLOP/s, {_BANDWIDTH:.0%} of {device.bandwidth / 1e9:,.0f} GB/s"
    how = "a guess; veneer plan --calibrate measures it" if device.kind == "cpu" else "both assumed"
    return Rates(_EFFICIENCY * best, _BANDWIDTH * device.bandwidth, f"{said}, {how}")


def run_work(counts: Counts, load: RunLoad, device: Device, units: int = 1) -> Work:
    """Return operations and bytes of a micro-batch of `units` times the counts.

    Includes forward passes that recompute, and those of the base alone. Kept values are written and read
    twice, weights are read in every pass; dequantized weights are written and read in every pass."""
    e, forwards = dtype_bytes(load.dtype), load.bare + load.checkpointing
    reads = 2 + forwards
    moved = 4.0 * (units * e * (counts.kept + counts.ends) + counts.logits)
    moved += reads * sum(weight_bytes(counts, load.dtype, load.quantize, load.double))
    moved += 2 * reads * e * counts.matrices if load.quantize else 0
    away = load.checkpointing and load.inputs_on_host and device.kind == "cuda"
    return Work(
        units * (counts.forward * (1 + forwards) + counts.backward + counts.head),
        moved,
        float(reads * e * sum(offloaded(counts, load))),
        2.0 * units * e * counts.inputs if away else 0.0,
    )


def text_work(shape: TextShape, load: Load, device: Device) -> Work:
    """Return operations and bytes of a micro-batch of `load`."""
    return run_work(text_counts(shape, load, device), load, device)


def reading_work(shape: TextShape, load: Load) -> Work:
    """Return operations and bytes of one forward of a base without adapters.

    This is a teacher's work to read answers; the head runs only on the trained tokens."""
    operations = 2.0 * load.wanted * shape.vocabulary * shape.hidden
    for layer in shape.layers:
        operations += sum(2.0 * load.tokens * linear.multiplied for linear in layer.linears)
        operations += 4.0 * layer.heads * layer.head_dim * sum(seen_keys(n, layer.window) for n in load.lengths)
    return Work(operations, float(sum(weight_bytes(shape, load.dtype, load.quantize))))


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
    """Return the seconds of a whole run, including the scoring of held-out rows."""
    one = rates.seconds(text_work(shape, load, device), device.count)
    micros = math.ceil(rows * tokens_per_row / max(1, load.tokens)) * epochs
    forward = one * (2 / 6 if load.checkpointing else 1 / 2)
    scored = held_out * tokens_per_row / max(1, load.tokens) * evaluations
    return micros * one + scored * forward
