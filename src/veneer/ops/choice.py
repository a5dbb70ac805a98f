"""Which implementation of an op runs: the one place where that is decided, and where it can be asked for.
(Pages and panels, memory as serving lays it out, belong to kernels with no twin in torch: serve/forward asks
`compiled` for those.)

Every op of this folder has its reference in torch beside it. A device may bring faster implementations of parts of it,
in the module that HOMES names, each with what it takes. The op asks `chosen` and runs its reference where that is None.

    run = chosen("rms_norm", x, weight)
    y = F.rms_norm(x, …) if run is None else run(x, weight, eps)

`choices("cpu")` says what runs here, and why.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

HOMES = {"cpu": "veneer.ops.cpu.implementations", "cuda": "veneer.ops.cuda.implementations"}
"""Device type -> the module whose IMPLEMENTATIONS are its own: op -> Implementation."""

PINNED = os.environ.get("VENEER_OPS", "")
"""A device type whose implementations run on every tensor, whatever device it is on. "cuda" beside TRITON_INTERPRET=1
runs the kernels of GPUs on the CPU, to check them."""

OPS = {
    "attend": "attention of tokens over all others: softmax(q·kᵀ/√d)·v",
    "attend_backward": "its gradients",
    "causal_softmax": "softmax of scores over the keys that a query may see",
    "dequantise_blocks4": "a weight of 4 bits, in blocks",
    "dequantise_ggml": "a weight in the blocks of a GGUF file",
    "dequantise_rows8": "a weight of 8 bits, by rows",
    "dropout": "dropout whose mask is made again",
    "gain": "gain ⊙ y + b, DoRA's",
    "gain_backward": "its gradients",
    "gather_heads": "heads of rows laid side by side, turned",
    "geglu": "up ⊙ gelu(gate)",
    "geglu_backward": "its gradient",
    "gelu_gate": "gelu(gate) ⊙ up",
    "gelu_gate_backward": "its gradients",
    "gelu_tanh": "gelu by tanh",
    "gelu_tanh_backward": "its gradient",
    "gelu_tanh_gate": "gelu(gate) ⊙ up, gelu by tanh",
    "gelu_tanh_gate_backward": "its gradients",
    "low_rank": "s·(x·Aᵀ)·Bᵀ of all pairs of a product, with their gradients",
    "norm_silu": "silu of a group norm, with its gradient",
    "packed_product": "x·Wᵀ + b by a weight in the kernel's own order",
    "quantise_blocks4": "a weight into 4 bits",
    "rms_norm": "RMS norm",
    "rms_norm_backward": "its gradient",
    "rows_low_rank": "s·(x·Aᵀ)·Bᵀ with another adapter for each row",
    "scatter_heads": "the inverse of gather_heads",
    "silu_gate": "silu(gate) ⊙ up",
    "silu_gate_backward": "its gradients",
    "softmax_backward": "p ⊙ (dp − Σ p⊙dp)",
    "token_nll": "−log softmax at the targets, and its gradient",
}
"""The parts of ops that a device may have an implementation of, and what each computes."""


class Implementation(NamedTuple):
    """`run`: what an op calls instead of its reference. `takes`: whether it runs on what the op was given. `wants`:
    that in words. `missing`: why it cannot run here at all; "" where it can."""

    run: Callable[..., Any]
    takes: Callable[..., bool]
    wants: str
    missing: Callable[[], str]


@functools.cache
def _implementations(device: str) -> Mapping[str, Implementation]:
    home = HOMES.get(device)
    return {} if home is None else importlib.import_module(home).IMPLEMENTATIONS


def chosen(op: str, first: Tensor, *given: Any) -> Callable[..., Any] | None:
    """What runs `op` on these tensors (and whatever else decides it), by the device of the first; None: the reference.

    Called on every product, so it costs a look into two dicts and `takes`."""
    own = _implementations(PINNED or first.device.type).get(op)
    return own.run if own is not None and own.takes(first, *given) else None


def choices(device: str) -> dict[str, str]:
    """op -> what runs it on a device of this type ("cpu", "cuda"), and why, in a line for a report."""
    own = _implementations(device)
    out = {}
    for op in OPS:
        if op not in own:
            out[op] = f"torch: {device} has no implementation of its own"
        elif missing := own[op].missing():
            out[op] = f"torch: {missing}"
        else:
            out[op] = f"{HOMES[device]} for {own[op].wants}, torch for all else"
    return out
