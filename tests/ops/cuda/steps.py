"""What is compiled to check it: every kernel at sizes of bases that people train and serve.

A step calls a function of veneer.ops.cuda on tensors without values, and what it launches is recorded. STEPS: the name
of the sizes -> a function that makes those calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from veneer.ops.cuda import activations, attention, loss, norms, quantised

STEPS: dict[str, Callable[[], None]] = {}


def step(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def put(run: Callable[[], None]) -> Callable[[], None]:
        STEPS[name] = run
        return run

    return put


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _norms(width: int) -> None:
    x, w = empty(8192, width), empty(width)
    norms.rms_norm_forward(x, w, 1e-5)
    norms.rms_norm_backward(x, x, w, 1e-5)


def _gate(width: int, act: str) -> None:
    both, h = empty(8192, 2 * width), empty(8192, width)
    activations.gate_forward(both, act)
    activations.gate_backward(h, both, act)


def _head(vocabulary: int) -> None:
    loss.token_nll(empty(1024, vocabulary), empty(1024, dtype=torch.int64), True, empty(1024, dtype=torch.bool))


def _attention(heads: int, kv: int, dim: int, window: int | None = None, cap: float = 0.0, sunk: bool = False) -> None:
    """Rows of 4,096 tokens by the kernels of our own, forward and backward."""
    q, k, ends = empty(8192, heads, dim), empty(8192, kv, dim), empty(3, dtype=torch.int32)
    sinks = empty(heads) if sunk else None
    given = q, k, k, sinks, ends, 4096, dim**-0.5, window, cap
    ctx = Context()
    out = attention.ScoredAttention.forward(ctx, *given)
    attention.ScoredAttention.backward(ctx, out)


def _turn(heads: int, kv: int, dim: int) -> None:
    ctx, cos = Context(), empty(8192, dim // 2)
    q, k, v = attention.TurnedHeads.forward(ctx, empty(8192, heads + 2 * kv, dim), cos, cos, kv)
    attention.TurnedHeads.backward(ctx, q, k, v)


def _norm_turn(heads: int, kv: int, dim: int, weight: torch.dtype = torch.bfloat16) -> None:
    ctx, cos = Context(), empty(8192, dim // 2)
    qkv = empty(8192, heads + 2 * kv, dim)
    made = attention.NormedTurnedHeads.forward(ctx, qkv, empty(2, dim, dtype=weight), 1e-6, cos, cos, kv)
    attention.NormedTurnedHeads.backward(ctx, *made)


def _joint(tokens: int, heads: int, dim: int, streams: bool) -> None:
    ctx, qkv = Context(), empty(1, tokens, 3, heads, dim)
    weight = empty(2, 1, 1, tokens if streams else 1, dim, dtype=torch.float32)
    made = attention.JointHeads.forward(ctx, qkv, weight, 1e-6, empty(tokens, dim // 2, dtype=torch.complex64))
    attention.JointHeads.backward(ctx, *made)


def _norm_silu(n: int, channels: int, side: int, shifted: bool) -> None:
    x, w = empty(n, channels, side, side), empty(channels)
    shift = empty(n, channels) if shifted else None
    norms.NormSilu.forward(x, shift, w, w, 32, 1e-5)
    norms.NormSilu.backward(x, x, shift, w, w, 32, 1e-5)


class Context:
    """What torch gives to a Function."""

    saved_tensors: tuple[Tensor | None, ...] = ()
    needs_input_grad = (False,) * 9

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


@step("Llama 3.1 8B, 8,192 tokens")
def _llama_8b() -> None:
    _norms(4096)
    _gate(14336, "silu")
    _head(128256)
    x = empty(8192, 4096)
    activations.dropout(x, 0.05, 1)
    gain = empty(4096, dtype=torch.float32)
    activations.gain(x, gain, None)
    activations.gain(x, gain, empty(4096))
    activations.gain_backward(x, x, gain)
    _attention(32, 8, 128)
    _turn(32, 8, 128)


@step("Llama 3.1 70B, 8,192 tokens")
def _llama_70b() -> None:
    _norms(8192)
    _gate(28672, "silu")
    _turn(64, 8, 128)


@step("Qwen 3 32B, 8,192 tokens")
def _qwen_32b() -> None:
    _norms(5120)
    _norms(128)
    _norm_turn(64, 8, 128)
    _gate(25600, "silu")
    _head(151936)


@step("Gemma 3 27B, 8,192 tokens")
def _gemma_27b() -> None:
    _norms(5376)
    _gate(21504, "gelu_tanh")
    _attention(32, 16, 128, window=1024)
    _norm_turn(32, 16, 128, torch.float32)
    _attention(8, 4, 256, window=1024)  # its 4B's
    _norm_turn(8, 4, 256, torch.float32)


@step("Gemma 2 27B and 9B, 8,192 tokens")
def _gemma_2() -> None:
    for dim in (128, 256):
        _attention(16, 8, dim, cap=50.0)
        _attention(16, 8, dim, window=4096, cap=50.0)


@step("gpt-oss 20B, 8,192 tokens")
def _gpt_oss() -> None:
    _attention(64, 8, 64, sunk=True)
    _attention(64, 8, 64, window=128, sunk=True)


@step("a base in 4 and 8 bits")
def _quantised() -> None:
    rows, columns = 4096, 4096
    n = rows * columns
    packed, table, out = empty(n // 2, dtype=torch.uint8), empty(16, dtype=torch.float32), empty(rows, columns)
    map8, constants = empty(256, dtype=torch.float32), empty(n // 64, dtype=torch.uint8)
    mean, absmax = empty(1, dtype=torch.float32), empty(n // 64, dtype=torch.float32)
    quantised.dequantise_blocks4(packed, constants, absmax, mean, map8, table, 0, n, 64, 256, out)
    quantised.dequantise_blocks4(packed, absmax, None, None, map8, table, 0, n, 64, 256, out)
    quantised.dequantise_rows8(empty(rows, columns, dtype=torch.int8), absmax, out)
    for kind in quantised.GGML:
        quantised.dequantise_ggml(empty(rows, columns, dtype=torch.uint8), kind, out)


@step("SDXL at 1,024²")
def _sdxl() -> None:
    for channels, side in ((320, 128), (960, 128), (1280, 32)):
        _norm_silu(2, channels, side, False)
        _norm_silu(2, channels, side, True)
    both = empty(2, 4096, 5120)
    activations.gate_forward(both, "gelu", up_first=True)
    activations.geglu_backward(empty(2, 4096, 2560), both)


@step("FLUX.1 at 1,024²")
def _flux() -> None:
    x = empty(1, 4608, 12288)
    activations.gelu_tanh_forward(x)
    activations.gelu_tanh_backward(x, x)
    _joint(4608, 24, 128, True)
    _joint(4608, 24, 128, False)
