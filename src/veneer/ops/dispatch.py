"""Choose the implementation of an op.

Every op of this package has a torch reference. HOMES names one module per device type, which can list faster
implementations, each with a condition on its inputs. An op calls `dispatch`, and runs its reference if the
result is None:

    run = dispatch("rms_norm", x, weight)
    y = F.rms_norm(x, …) if run is None else run(x, weight, eps)

The first implementation that supports the inputs runs. For a few ops, the fastest implementation depends on
the machine or on the dtype; for these ops, RULES makes the choice, from the dtype or from the machine's
profile (profile.py). Nothing is timed while an op runs, so the same profile gives the same bits. VENEER_OPS
overrides the choice:

    VENEER_OPS=torch                        references only
    VENEER_OPS=rms_norm=torch,attend=torch  these ops by these implementations, all others as usual
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.ops.profile import WORTH, profile

HOMES = {"cpu": "veneer.ops.cpu.implementations", "cuda": "veneer.ops.cuda.implementations"}
"""Device type -> the module that defines IMPLEMENTATIONS (op -> Implementation)."""

REFERENCE = "torch"
"""Name of every op's torch reference."""

OPS = {
    "attend": "softmax(q·kᵀ/√d)·v",
    "attend_backward": "gradients of attend",
    "varlen_attention": "causal attention of packed rows, with gradients",
    "causal_softmax": "softmax with a causal mask",
    "conv3x3": "3 × 3 convolution in float32",
    "quantized_linear": "x·Wᵀ + b with a quantized weight",
    "dequantize_blocks4": "dequantize 4-bit blocks",
    "dequantize_ggml": "dequantize GGUF blocks",
    "dequantize_rows8": "dequantize 8-bit rows",
    "dropout": "dropout with a recomputed mask",
    "dora_scale": "DoRA's scale ⊙ y + b",
    "dora_scale_backward": "gradients of dora_scale",
    "geglu": "up ⊙ gelu(gate)",
    "geglu_backward": "gradient of geglu",
    "gelu_gate": "gelu(gate) ⊙ up",
    "gelu_gate_backward": "gradients of gelu_gate",
    "gelu_tanh": "tanh approximation of gelu",
    "gelu_tanh_backward": "gradient of gelu_tanh",
    "gelu_tanh_gate": "gelu_tanh(gate) ⊙ up",
    "gelu_tanh_gate_backward": "gradients of gelu_tanh_gate",
    "prepacked_linear": "x·Wᵀ + b with a prepacked weight, with gradient",
    "linear_cross_entropy": "−log softmax(x·Wᵀ) at targets, with gradient",
    "int8_linear": "x·Wᵀ + b, or x·W, in 8 bits",
    "low_rank": "s·(x·Aᵀ)·Bᵀ of several pairs, with gradients",
    "norm_silu": "silu of a group norm, with gradient",
    "panel_linear": "x·Wᵀ + b with a weight in panels",
    "product": "a·b + c of 16-bit matrices in float32",
    "quantize_blocks4": "quantize to 4-bit blocks",
    "rms_norm": "RMS norm",
    "rms_norm_autograd": "RMS norm with gradient",
    "rms_norm_backward": "gradient of rms_norm",
    "rope": "rotary positions, with gradient",
    "rope_varlen_attention": "rope, then varlen_attention",
    "rows_low_rank": "s·(x·Aᵀ)·Bᵀ with an adapter per row",
    "silu_gate": "silu(gate) ⊙ up",
    "silu_gate_backward": "gradients of silu_gate",
    "softmax_backward": "p ⊙ (dp − Σ p⊙dp)",
    "token_nll": "−log softmax at targets, with gradient",
    "weight_layout": "weight layout for serving",
}
"""Ops that a device can implement, with a description of each."""


class Implementation(NamedTuple):
    """An implementation of an op.

    run: the function, or an object with several functions, that the op calls instead of its reference.
    takes: whether the implementation supports the op's arguments.
    wants: the condition that `takes` checks, in words.
    missing: returns why the implementation cannot run on this machine, or "" if it can.
    name: used in VENEER_OPS and in reports.
    alternatives: further implementations of the op, in order of preference."""

    run: Any
    takes: Callable[..., bool]
    wants: str
    missing: Callable[[], str]
    name: str = "compiled"
    alternatives: tuple[Implementation, ...] = ()


class Rule(NamedTuple):
    """A rule that chooses between implementations.

    prefer: (the op's arguments) -> the name to run. If this implementation does not support the inputs, or the
        name is "", the first implementation that supports them runs.
    why: the rule in words.

    A rule that reads the profile replaces the default only by an implementation that is more than WORTH times as
    fast."""

    prefer: Callable[..., str]
    why: str


def _panel_kernel(*_: Any) -> str:
    machine = profile()
    # AVX512-BF16 runs at twice the rate of float32, and AMX at eight times that rate or more.
    return "amx" if machine.rate("bfloat16") > WORTH * 2 * machine.rate("float32") else "compiled"


def _int8_kernel(*_: Any) -> str:
    machine = profile()
    # VNNI runs at four times the rate of float32, and AMX at eight times VNNI's; oneDNN uses AMX.
    return "onednn" if machine.rate("int8") > WORTH * 4 * machine.rate("float32") else "compiled"


def _arithmetic_is_float32() -> bool:
    return profile().arithmetic == "float32"


_FLOAT32_IS_FASTER = f"float32 is over {WORTH} times as fast as bfloat16"
RULES: dict[str, Rule] = {
    "int8_linear": Rule(_int8_kernel, f"onednn (with AMX) if int8 is over {4 * WORTH} times as fast as float32"),
    "low_rank": Rule(
        lambda *_: REFERENCE if _arithmetic_is_float32() else "compiled",
        f"torch (and the result is added to the frozen product before rounding) if {_FLOAT32_IS_FASTER}",
    ),
    "panel_linear": Rule(_panel_kernel, f"amx if bfloat16 is over {2 * WORTH} times as fast as float32"),
    "product": Rule(lambda *_: "" if _arithmetic_is_float32() else REFERENCE, f"torch unless {_FLOAT32_IS_FASTER}"),
    "rope_varlen_attention": Rule(
        lambda *_: "tiles32" if _arithmetic_is_float32() else "tiles", f"tiles32 if {_FLOAT32_IS_FASTER}"
    ),
    # torch's float32 product reorders the weight at each call. A prepacked copy makes the product 1.1 to 1.2
    # times as fast. In 16 bits (also with AMX), a copy makes the product at most 1.06 times as fast, which
    # does not justify the memory.
    "prepacked_linear": Rule(lambda x, *_: "onednn" if x.dtype == torch.float32 else REFERENCE, "onednn in float32"),
}
"""op -> rule that chooses among its implementations. An op without a rule runs the first implementation that
supports the inputs."""


# -- VENEER_OPS --------------------------------------------------------------------------------------------------------


def parse_overrides(text: str) -> dict[str, str]:
    """Parse VENEER_OPS into a mapping from ops to implementations ("*": all other ops).

    Raises ConfigError for an item that is neither `torch` nor OP=NAME with a known op."""
    words = [word for word in text.split(",") if word]
    names = dict(word.split("=", 1) for word in words if "=" in word)
    supported = {REFERENCE, *(f"{op}={name}" for op, name in names.items() if op in OPS)}
    if unknown := [word for word in words if word not in supported]:
        problem = f"VENEER_OPS has {', '.join(unknown)}, which is neither an op nor torch"
        fix = "name an op's implementation as op=name; docs/reference/ops.md lists the ops"
        raise ConfigError(problem, where="VENEER_OPS", fix=fix)
    every = {"*": REFERENCE} if REFERENCE in words else {}
    return names | every


_overrides = parse_overrides(os.environ.get("VENEER_OPS", ""))


@contextmanager
def override_ops(**names: str) -> Iterator[None]:
    """Use the named implementations of these ops inside a with-block, in all threads."""
    global _overrides
    previous = _overrides
    _overrides = {**previous, **names}
    try:
        yield
    finally:
        _overrides = previous


# -- dispatch ----------------------------------------------------------------------------------------------------------


@functools.cache
def implementations(device: str) -> Mapping[str, Implementation]:
    """Return the implementations for a device type, keyed by op."""
    home = HOMES.get(device)
    return {} if home is None else importlib.import_module(home).IMPLEMENTATIONS


def dispatch(op: str, first: Tensor, *args: Any) -> Any:
    """Return the implementation of `op` for these arguments, or None for the reference.

    The first tensor determines the device. Raises ConfigError if VENEER_OPS names an implementation that the
    op does not have."""
    implementation = implementations(first.device.type).get(op)
    if implementation is None:
        return None
    if not implementation.alternatives and op not in RULES and not _overrides:
        return implementation.run if implementation.takes(first, *args) else None
    name = _override_of(op)
    if name is None and op in RULES:
        name = RULES[op].prefer(first, *args)
    if name == REFERENCE:
        return None
    able = [candidate for candidate in (implementation, *implementation.alternatives) if candidate.takes(first, *args)]
    return next((candidate.run for candidate in able if candidate.name == name), able[0].run if able else None)


def _override_of(op: str) -> str | None:
    """Return the implementation that VENEER_OPS sets for an op, or None."""
    if op not in _overrides:
        return _overrides.get("*")
    name, homes = _overrides[op], [implementations(device).get(op) for device in HOMES]
    known = [implementation for implementation in homes if implementation is not None]
    available = {REFERENCE, *(candidate.name for each in known for candidate in (each, *each.alternatives))}
    if name not in available:
        problem = f"VENEER_OPS sets {op} to {name!r}, and the op has no implementation of that name"
        raise ConfigError(problem, where="VENEER_OPS", fix=f"it has: {', '.join(sorted(available))}")
    return name


class Choice(NamedTuple):
    """The chosen implementation of an op.

    name: the implementation, or several in order of preference.
    reason: why this choice was made.
    wants: the inputs that the chosen implementations support; "" for all inputs. The reference runs for all
        other inputs."""

    name: str
    reason: str
    wants: str = ""


def choices(device: str) -> dict[str, Choice]:
    """Return the choice of implementation for every op on a device type ("cpu", "cuda")."""
    return {op: _choice(op, device) for op in OPS}


def _choice(op: str, device: str) -> Choice:
    implementation = implementations(device).get(op)
    if implementation is None:
        return Choice(REFERENCE, f"{device} has no implementation of its own")
    here = [candidate for candidate in (implementation, *implementation.alternatives) if not candidate.missing()]
    if not here:
        return Choice(REFERENCE, implementation.missing())
    names = [candidate.name for candidate in here]
    wants = "; ".join(dict.fromkeys(candidate.wants for candidate in here))
    if (name := _override_of(op)) is not None:
        if name == REFERENCE:
            return Choice(name, "set by VENEER_OPS")
        if name in names:
            return Choice(name, "set by VENEER_OPS", here[names.index(name)].wants)
        return Choice(names[0], f"set to {name} by VENEER_OPS, which is missing here", here[0].wants)
    if op in RULES:
        return Choice(", ".join(names), RULES[op].why, wants)
    return Choice(", ".join(names), "the first that supports the input", wants)
