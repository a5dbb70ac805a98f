"""What is compiled to check it: every kernel at sizes of bases that people train and serve.

A step calls a function of veneer.ops.cuda on fake CUDA tensors, and what it launches is recorded. STEPS: the name of
the sizes -> a function that makes those calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from veneer.ops.cuda import activations, loss, norms

STEPS: dict[str, Callable[[], None]] = {}


def step(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def put(run: Callable[[], None]) -> Callable[[], None]:
        STEPS[name] = run
        return run

    return put


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def _norms(width: int) -> None:
    x, w = empty(8192, width), empty(width)
    norms.rms_norm_forward(x, w, 1e-5)
    norms.rms_norm_backward(x, x, w, 1e-5)


def _gate(width: int, act: str) -> None:
    both, h = empty(8192, 2 * width), empty(8192, width)
    activations.gate_forward(both, act)
    activations.gate_backward(h, both, act)


def _head(vocabulary: int) -> None:
    loss.token_nll(empty(1024, vocabulary), empty(1024, dtype=torch.int64), True)


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


@step("Llama 3.1 70B, 8,192 tokens")
def _llama_70b() -> None:
    _norms(8192)
    _gate(28672, "silu")


@step("Qwen 3 32B, 8,192 tokens")
def _qwen_32b() -> None:
    _norms(5120)
    _norms(128)
    _gate(25600, "silu")
    _head(151936)


@step("Gemma 3 27B, 8,192 tokens")
def _gemma_27b() -> None:
    _norms(5376)
    _gate(21504, "gelu_tanh")


@step("SDXL at 1,024²")
def _sdxl() -> None:
    both = empty(2, 4096, 5120)
    activations.gate_forward(both, "gelu", up_first=True)
    activations.geglu_backward(empty(2, 4096, 2560), both)


@step("FLUX.1 at 1,024²")
def _flux() -> None:
    x = empty(1, 4608, 12288)
    activations.gelu_tanh_forward(x)
    activations.gelu_tanh_backward(x, x)
