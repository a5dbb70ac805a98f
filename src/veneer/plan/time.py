"""Duration of a run: counted operations and bytes divided by measured (CPU) or assumed (GPU) rates.

seconds = operations / rate + bytes / bandwidth
"""

from __future__ import annotations

from dataclasses import dataclass

from veneer.plan.memory import Counts, Load, RunLoad, dtype_bytes, offloaded, visible_keys, weight_bytes
from veneer.plan.shape import TextShape
from veneer.plan.tables import Device

_EFFICIENCY = 0.4
"""Share of a device's matrix-product rate that training reaches.

On a CPU, steps of smollm2-135m reached 0.33 to 0.68. The value for a GPU is an assumption."""
_BANDWIDTH = 0.7
HOST_LINK = 20e9
"""Bytes per second between CPU memory and a GPU: an assumption for PCIe 4.0 × 16."""


@dataclass(frozen=True)
class Work:
    """The work of one micro-batch, forward and backward.

    bytes: bytes of activations and weights that are read or written.
    fetched: bytes from CPU memory that the device waits for."""

    operations: float = 0.0
    bytes: float = 0.0
    fetched: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second of a device.

    source: where the numbers come from, as text."""

    operations: float
    bandwidth: float
    source: str

    def seconds(self, work: Work, count: int = 1) -> float:
        """Return the seconds for `work`, divided among `count` devices."""
        computing = (work.operations / self.operations + work.bytes / self.bandwidth) / count
        return computing + work.fetched / HOST_LINK


def rates_of(device: Device, dtype: str = "bfloat16") -> Rates:
    """Return the rates of a device.

    The rates of this machine's CPU are shares of the product rate and the bandwidth in its profile
    (ops/profile.py). The rates of other devices are assumed shares of the numbers in their data sheets;
    float32 runs at a fourteenth of the bfloat16 rate (H100: 67 of 989 TFLOP/s)."""
    if device.kind == "cpu":
        from veneer.ops.profile import profile

        speeds = profile()
        rate, bandwidth = 1e9 * (speeds.rate(dtype) or speeds.rate("float32")), 1e9 * speeds.bandwidth
        source = f"{_EFFICIENCY:.0%} of {rate / 1e9:,.0f} GFLOP/s and of {bandwidth / 1e9:,.1f} GB/s, measured here"
        return Rates(_EFFICIENCY * rate, _EFFICIENCY * bandwidth, source)
    best = device.flops / (1 if dtype != "float32" else 14)
    source = f"{_EFFICIENCY:.0%} of {best / 1e12:,.3g} TFLOP/s, {_BANDWIDTH:.0%} of {device.bandwidth / 1e9:,.0f} GB/s"
    return Rates(_EFFICIENCY * best, _BANDWIDTH * device.bandwidth, f"{source}, both assumed")


def run_work(counts: Counts, load: RunLoad) -> Work:
    """Return the operations and bytes of a micro-batch, forward and backward.

    Includes forward passes for recomputation, and forward passes of the base without adapter. Saved values
    are written twice and read twice. Each pass reads the weights; if the base is quantized, each pass also
    writes and reads the dequantized weights."""
    e, forwards = dtype_bytes(load.dtype), load.base_passes + load.checkpointing
    reads = 2 + forwards
    moved = 4.0 * (e * (counts.saved + counts.ends) + counts.logits)
    moved += reads * sum(weight_bytes(counts, load.dtype, load.quantize, load.double))
    moved += 2 * reads * e * counts.matrices if load.quantize else 0
    return Work(
        counts.forward * (1 + forwards) + counts.backward + counts.head,
        moved,
        float(reads * e * sum(offloaded(counts, load))),
    )


def reading_work(shape: TextShape, load: Load) -> Work:
    """Return the operations and bytes of one forward pass of a base without adapters.

    This is the work of a teacher that reads completions. The head runs only on trained tokens."""
    operations = 2.0 * load.trained_tokens * shape.vocabulary * shape.hidden
    for layer in shape.layers:
        operations += sum(2.0 * load.tokens * linear.multiplied for linear in layer.linears)
        operations += 4.0 * layer.heads * layer.head_dim * sum(visible_keys(n, layer.window) for n in load.lengths)
    return Work(operations, float(sum(weight_bytes(shape, load.dtype, load.quantize))))
