"""Duration of a run: counted operations and bytes divided by measured (CPU) or assumed (GPU) rates.

seconds = (products + a · attention) / rate + bytes / bandwidth + b · number of products
"""

from __future__ import annotations

from dataclasses import dataclass

from veneer.models.device import limit_threads
from veneer.plan.memory import Counts, Load, RunLoad, dtype_bytes, offloaded, visible_keys, weight_bytes
from veneer.plan.shape import TextShape
from veneer.plan.tables import Device

_ASSUMED = 0.4
"""Share of a GPU's matrix-product rate that training reaches."""
_BANDWIDTH = 0.7
HOST_LINK = 20e9
"""Bytes per second between CPU memory and a GPU: an assumption for PCIe 4.0 × 16."""


# Coefficients of a step's time on a CPU, fitted to measured steps (tests/plan/test_time.py).
_CPU_PRODUCTS, _CPU_BANDWIDTH = 0.95, 0.36
"""Shares of the profile's rate and bandwidth that training reaches."""
_ATTENTION = {"text": 1.5, "image": 3.5}
"""How many times as long an operation takes in attention as in other products, by kind of run."""
_CALL = 0.00018
"""Seconds of a product that do not depend on its size."""


@dataclass(frozen=True)
class Work:
    """The work of one micro-batch, forward and backward.

    attention: the part of `operations` that multiplies queries, keys and values.
    int8: the part of `operations` that runs in 8 bits.
    calls: number of products.
    bytes: bytes of activations and weights that are read or written.
    fetched: bytes from CPU memory that the device waits for."""

    operations: float = 0.0
    bytes: float = 0.0
    fetched: float = 0.0
    attention: float = 0.0
    int8: float = 0.0
    calls: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second of a device.

    source: where the numbers come from, as text.
    int8: operations per second in 8 bits, 0 if the same as in the run's dtype.
    attention: how many times as long an operation takes in attention as in other products.
    call: seconds of a product that do not depend on its size."""

    operations: float
    bandwidth: float
    source: str
    int8: float = 0.0
    attention: float = 1.0
    call: float = 0.0

    def seconds(self, work: Work, count: int = 1) -> float:
        """Return the seconds for `work`, divided among `count` devices."""
        operations = work.operations - work.int8 + (self.attention - 1) * work.attention
        seconds = operations / self.operations + work.int8 / (self.int8 or self.operations)
        return (seconds + work.bytes / self.bandwidth) / count + work.fetched / HOST_LINK + self.call * work.calls


def rates_of(device: Device, dtype: str = "bfloat16", kind: str = "text") -> Rates:
    """Return the rates of a device, for runs of a kind ("text" or "image").

    The rates of this machine's CPU are shares of the rate and the bandwidth in its profile (ops/profile.py);
    bfloat16 runs at the rate of the dtype in which the profile computes products. The rates of other devices are
    assumed shares of the numbers in their data sheets; float32 runs at a fourteenth of the bfloat16 rate (H100:
    67 of 989 TFLOP/s)."""
    if device.kind == "cpu":
        from veneer.ops.profile import profile

        limit_threads()  # the profile depends on the number of threads
        found = profile()
        computed, rate = found.product_rate(dtype)
        source = f"{_CPU_PRODUCTS:.0%} of {rate:,.0f} GFLOP/s in {computed}, {_CPU_BANDWIDTH:.0%} of "
        source += f"{found.bandwidth:,.1f} GB/s, measured here"
        operations, int8 = (1e9 * _CPU_PRODUCTS * each for each in (rate, found.rate("int8")))
        return Rates(operations, 1e9 * _CPU_BANDWIDTH * found.bandwidth, source, int8, _ATTENTION[kind], _CALL)
    best = device.flops / (1 if dtype != "float32" else 14)
    source = f"{_ASSUMED:.0%} of {best / 1e12:,.3g} TFLOP/s, {_BANDWIDTH:.0%} of {device.bandwidth / 1e9:,.0f} GB/s"
    return Rates(_ASSUMED * best, _BANDWIDTH * device.bandwidth, f"{source}, both assumed")


def run_work(counts: Counts, load: RunLoad) -> Work:
    """Return the operations and bytes of a micro-batch, forward and backward.

    Includes forward passes for recomputation, and forward passes of the base without adapter. Saved values
    are written twice and read twice, and so are the inputs and outputs of adapted layers, for the low-rank
    products. Each pass reads the weights; if the base is quantized, each pass also writes and reads the
    dequantized weights."""
    e, forwards = dtype_bytes(load.dtype), load.base_passes + load.checkpointing
    reads = 2 + forwards
    moved = 4.0 * (e * (counts.saved + counts.ends + counts.adapted) + counts.logits)
    moved += reads * sum(weight_bytes(counts, load.dtype, load.quantize, load.double))
    moved += 2 * reads * e * counts.matrices if load.quantize else 0
    return Work(
        counts.forward * (1 + forwards) + counts.backward + counts.head,
        moved,
        float(reads * e * sum(offloaded(counts, load))),
        attention=counts.attention * (3 + forwards),
        int8=counts.frozen * (2 + forwards) if load.compute == "int8" else 0.0,
        calls=float(counts.calls * reads),
    )


def reading_work(shape: TextShape, load: Load) -> Work:
    """Return the operations and bytes of one forward pass of a base without adapters.

    This is the work of a teacher that reads completions. The head runs only on trained tokens."""
    operations, attention = 2.0 * load.trained_tokens * shape.vocabulary * shape.hidden, 0.0
    for layer in shape.layers:
        operations += sum(2.0 * load.tokens * linear.multiplied for linear in layer.linears)
        attention += 4.0 * layer.heads * layer.head_dim * sum(visible_keys(n, layer.window) for n in load.lengths)
    read = float(sum(weight_bytes(shape, load.dtype, load.quantize)))
    return Work(operations + attention, read, attention=attention)
