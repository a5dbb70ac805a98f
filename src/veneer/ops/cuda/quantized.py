"""Products with 4-bit weights, computed from the codes by bitsandbytes."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.errors import install_command
from veneer.ops.quantization_formats import (
    Blocks4,
    QuantizationFormat,
    bitsandbytes_operators,
    dynamic_map,
    gpu_library,
)


def why_missing() -> str:
    if bitsandbytes_operators() is None:
        return f"bitsandbytes is not installed ({install_command('gpu')})"
    return ""


def takes_codes(x: Tensor, stored: QuantizationFormat) -> bool:
    """Return whether bitsandbytes can multiply x by this weight.

    The weight must be nf4 or fp4, and every block must lie within one row."""
    if not isinstance(stored, Blocks4) or stored.shape[-1] % stored.block or not stored.packed.is_contiguous():
        return False
    fits = x.ndim == 2 and len(x) > 0 and x.dtype != torch.float64
    return fits and gpu_library(stored.kind, stored.block, x.device.type) is not None


def quantized_linear(x: Tensor, stored: Blocks4, low: int, high: int, bias: Tensor | None, out: Tensor) -> None:
    """Write x·Wᵀ + b to `out`, where W is rows low … high of the stored weight.

    x: (n, in). Depending on n, bitsandbytes dequantizes W before the product."""
    rows, columns = high - low, stored.shape[-1]
    first, last = low * columns // stored.block, high * columns // stored.block
    if low == 0 and stored.absmax2 is not None and stored.nested == 256:
        absmax, codes = stored.absmax2, dynamic_map(x.device)
        nested = {"absmax_8bit": stored.absmax[:last], "absmax_code": codes, "absmax_offset": stored.mean}
    else:
        absmax, nested = stored.absmax_of(first, last), {}
    packed = stored.packed[low * columns // 2 : high * columns // 2, None]
    product = bitsandbytes_operators().gemm_4bit
    out.copy_(product(x, packed, [rows, columns], absmax, stored.block, stored.kind, bias, **nested))
