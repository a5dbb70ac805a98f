"""What is compiled to check it: every kernel at sizes of bases that people train and serve.

A step calls a function of veneer.ops.cuda on fake CUDA tensors, and what it launches is recorded. STEPS: the name of
the sizes -> a function that makes those calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from veneer.ops.cuda import norms

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


@step("Llama 3.1 8B, 8,192 tokens")
def _llama_8b() -> None:
    _norms(4096)


@step("Llama 3.1 70B, 8,192 tokens")
def _llama_70b() -> None:
    _norms(8192)


@step("Qwen 3 32B, 8,192 tokens")
def _qwen_32b() -> None:
    _norms(5120)
    _norms(128)


@step("Gemma 3 27B, 8,192 tokens")
def _gemma_27b() -> None:
    _norms(5376)
