"""GPU implementations of ops, from torch, Liger-Kernel and bitsandbytes.

None of these implementations has been run on a GPU yet. `veneer.ops.dispatch` reads IMPLEMENTATIONS: op ->
Implementation. An op runs its torch reference if it has no implementation, or if the implementation's library
is missing.
"""

from __future__ import annotations

from veneer.ops.cuda import attention, liger, quantized
from veneer.ops.dispatch import Implementation

_NORM = Implementation(liger.rms_norm, liger.takes_norm, "contiguous rows", liger.why_missing, "liger")

IMPLEMENTATIONS: dict[str, Implementation] = {
    "rms_norm": _NORM,
    "rms_norm_autograd": _NORM,
    "rope": Implementation(liger.rope, liger.takes_rope, "contiguous cos and sin", liger.why_missing, "liger"),
    "linear_cross_entropy": Implementation(
        liger.linear_cross_entropy,
        liger.takes_loss,
        "contiguous inputs, weight of the same dtype",
        liger.why_missing,
        "liger",
    ),
    "varlen_attention": Implementation(
        attention.varlen,
        attention.takes_varlen,
        "16-bit, head size at most 256 and divisible by 8, no caps or sinks",
        attention.varlen_missing,
        "varlen",
        (Implementation(attention.flex, attention.takes_flex, "caps or sinks", attention.flex_missing, "flex"),),
    ),
    "quantized_linear": Implementation(
        quantized.quantized_linear,
        quantized.takes_codes,
        "nf4 and fp4, each block within one row",
        quantized.why_missing,
        "bitsandbytes",
    ),
}
