"""Random inputs for tests of fused products: adapter factors, dropout masks, quantized weights."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import torch
from torch import Tensor

from tests.core.exact import draw
from veneer.ops.dropout import Dropout
from veneer.ops.lowrank import LowRank
from veneer.ops.quantization_formats import KINDS, GgmlBlocks
from veneer.ops.quantized import Quantized, quantize


def factors(dtype: torch.dtype, *shapes: tuple[int, int]) -> list[Tensor]:
    """Return random factors in training's dtype, which is float32 for a 16-bit base."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return [draw(*s, dtype=kept, scale=0.3).requires_grad_() for s in shapes]


def with_dropout(products: tuple[LowRank, ...], dropout: float) -> tuple[LowRank, ...]:
    return tuple(replace(p, dropout=dropout) for p in products)


def mask_of_next(p: float, *shape: int, dtype: torch.dtype) -> Tensor:
    """Return the mask by which the next dropout of this shape will multiply.

    torch's generator does not advance."""
    state = torch.random.get_rng_state()
    drop = Dropout.sample(p)
    torch.random.set_rng_state(state)
    return (drop(torch.ones(*shape, dtype=dtype)) != 0).double() / (1 - p)


def coded(weight: Tensor, kind: str) -> Quantized:
    """Return a quantized weight.

    ggml's package cannot write K-quants, so K-quants get random codes and suitable scales."""
    if kind in KINDS:
        return quantize(weight, kind)
    rows, columns = weight.reshape(-1, weight.shape[-1]).shape
    if not kind.endswith("_K"):
        raw = gguf.quants.quantize(weight.float().numpy().reshape(rows, columns), gguf.GGMLQuantizationType[kind])
        made = torch.from_numpy(np.ascontiguousarray(raw))
    else:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        g = torch.Generator().manual_seed(rows)
        made = torch.randint(0, 256, (rows, columns // block, size), generator=g, dtype=torch.uint8)
        for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2)):  # float16 scales
            halves = torch.rand(rows, columns // block, 1, generator=g) * float(weight.abs().amax()) / 1024
            made[..., at : at + 2] = halves.half().view(torch.uint8)
        made = made.flatten(1)
    return Quantized(GgmlBlocks(kind, tuple(weight.shape), made), weight.dtype)
